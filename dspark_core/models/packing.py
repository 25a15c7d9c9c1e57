"""Linear layers in oneDNN's blocked weight layout, for inference on a CPU.

A decode step is bound by reading weights, and the plain row-major layout is read at about half
the speed of the blocked one. PyTorch offers the layout only through the operators that
TorchInductor emits, hence the names with an underscore.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS_HINT = 8
"""Rows per call the layout is chosen for: a small verification step. A hint of one row makes
float32 slower, and its results depend on how many rows share a call."""


class PackedLinear(nn.Module):
    """Forward only: it has no gradients, no `weight`, and stays on the CPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


def can_pack(weight: Tensor) -> bool:
    """Whether this PyTorch build and processor have the layout for the weight's device and dtype."""
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def pack_weight(weight: Tensor) -> PackedLinear | None:
    """A layer of a bare weight [outputs, inputs]; None where the layout is not to be had."""
    if not can_pack(weight):
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return PackedLinear(linear)


def pack_linears(module: nn.Module) -> None:
    """Replaces every plain linear layer under `module`, so that its row-major weight is freed."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, PackedLinear(child) if can_pack(child.weight) else child)
        else:
            pack_linears(child)
