"""Linear layers in a blocked weight layout, for inference on a CPU.

A decode step is bound by reading weights, and the plain row-major layout is read at about half
the speed of a blocked one. The native kernels (`dspark_core.kernels`) are used where available, else
oneDNN's layout, which PyTorch exposes only through the operators that TorchInductor
emits, hence the names with an underscore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from dspark_core.kernels.library import Format, Kernels, native_kernels
from dspark_core.kernels.matrix import NativeMatrix, QuantizedRows, supports
from dspark_core.kernels.memory import Arena
from dspark_core.models.layers import RMSNorm

_ROWS_HINT = 8
"""Rows per call that oneDNN's layout is optimised for: a small verification step. With a hint of one row,
float32 is slower and results depend on how many rows share a call."""


_ROUNDING_ACTIVATIONS = {Format.Q4: Format.I4, Format.Q8: Format.I8}


class WeightChoice(Enum):
    """The format in which a target's matrices are held."""

    STORED = "stored"
    """As in the checkpoint: quantised blocks stay quantised where that is exact; otherwise as FULL."""
    FULL = "full"
    """Dequantised to the engine's dtype."""
    STORED_A8 = "stored-a8"
    """As STORED, but with activations rounded to 8 bits, with a scale per row and 32 inputs, as other engines
    do for such files. This computes a slightly different model."""
    INT8 = "int8"
    """Rounded to 8 bits with a scale per 32 inputs; a matrix whose inputs are no multiple of 32 is as FULL.
    This computes a slightly different model."""

    @property
    def exact(self) -> bool:
        """Whether no rounding is added to that of the checkpoint and the dtype."""
        return self in (WeightChoice.STORED, WeightChoice.FULL)

    @property
    def keeps_blocks(self) -> bool:
        """Whether quantised blocks stay quantised."""
        return self in (WeightChoice.STORED, WeightChoice.STORED_A8)


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingPlan:
    """How to pack a module's matrices."""

    weights: WeightChoice = WeightChoice.STORED
    stored: Mapping[str, QuantizedRows] = field(default_factory=dict)
    """Quantised weights by parameter name."""
    native: bool = True
    """False: never use the native kernels."""
    byte_products: bool = False
    """Use 8-bit weights and activations if the machine multiplies those faster. For drafters only, where
    rounding errors cost at most speed; targets have `STORED_A8`."""
    arena: Arena = field(default_factory=Arena)


class PackedLinear(nn.Module):
    """Inference only: no gradients, no `weight`, CPU only."""

    def __init__(
        self,
        linear: nn.Linear,
        *,
        plan: PackingPlan | None = None,
        stored: QuantizedRows | None = None,
        paired: bool = False,
    ) -> None:
        """`stored`: the weight as stored in the file; `paired` as in `NativeMatrix`."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._dtype = linear.weight.dtype
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._weight: Tensor | None = None
        self.native = _native_matrix(linear, plan or PackingPlan(), stored, paired)
        """None: computed by oneDNN."""
        if self.native is None:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS_HINT)

    @property
    def num_bytes(self) -> int:
        """Size of the packed weight."""
        if self.native is not None:
            return self.native.num_bytes
        return self.in_features * self.out_features * self._dtype.itemsize

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        if self.native is not None:
            return self.native.multiply(x, self._dtype)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return out


class NormedProduct:
    """`norm(linear(x))` in one native call: operator overhead exceeds the time of a product of a few rows."""

    def __init__(self, matrix: NativeMatrix, norm: RMSNorm) -> None:
        self._matrix = matrix
        self._weight = norm.weight.detach().float().contiguous()
        self._eps = norm.eps

    @classmethod
    def of(cls, linear: nn.Module, norm: nn.Module) -> NormedProduct | None:
        """None if `linear` is not packed for the kernels or `norm` is not a plain RMSNorm."""
        if type(norm) is not RMSNorm or not isinstance(linear, PackedLinear) or linear.native is None:
            return None
        return cls(linear.native, norm)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        return self._matrix.normed(x, self._weight, self._eps)


def _native_matrix(
    linear: nn.Linear, plan: PackingPlan, stored: QuantizedRows | None, paired: bool
) -> NativeMatrix | None:
    kernels = native_kernels() if plan.native and linear.weight.device.type == "cpu" else None
    if kernels is None:
        return None
    dtype = linear.weight.dtype
    source: Tensor | QuantizedRows = linear.weight
    kind = Format.FLOAT32 if dtype is torch.float32 else Format.BFLOAT16
    if plan.byte_products and multiplies_bytes(kernels, linear.in_features, dtype):
        kind = Format.I8
    elif plan.weights is WeightChoice.INT8 and supports(Format.Q8, linear.in_features, dtype):
        kind = Format.Q8
    elif plan.weights.keeps_blocks and stored and supports(stored.format, linear.in_features, dtype):
        source, kind = stored, stored.format
        if plan.weights is WeightChoice.STORED_A8:
            kind = _ROUNDING_ACTIVATIONS[kind]
    if not supports(kind, linear.in_features, dtype):
        return None
    return NativeMatrix(kernels, source, kind, bias=linear.bias, paired=paired, arena=plan.arena)


def multiplies_bytes(kernels: Kernels, inputs: int, dtype: torch.dtype) -> bool:
    """Whether `PackingPlan.byte_products` applies to matrices of this kind on this machine."""
    return kernels.byte_products and supports(Format.I8, inputs, dtype)


def takes_int8(module: nn.Module) -> bool:
    """Whether `WeightChoice.INT8` has an effect on any matrix of the module."""
    linears = (child for child in module.modules() if isinstance(child, nn.Linear))
    return any(supports(Format.Q8, linear.in_features, linear.weight.dtype) for linear in linears)


def can_pack(weight: Tensor, plan: PackingPlan) -> bool:
    """Whether a packed layout exists for the weight's device and dtype under this plan."""
    if weight.device.type != "cpu":
        return False
    if plan.native and native_kernels() is not None and _plain_format(weight) is not None:
        return True
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def _plain_format(weight: Tensor) -> Format | None:
    for kind in (Format.FLOAT32, Format.BFLOAT16):
        if supports(kind, weight.shape[1], weight.dtype):
            return kind
    return None


def pack_weight(weight: Tensor, plan: PackingPlan | None = None) -> PackedLinear | None:
    """A layer from a bare weight [outputs, inputs]; None if no packed layout is available."""
    plan = plan or PackingPlan()
    if not can_pack(weight, plan):
        return None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return PackedLinear(linear, plan=plan)


def pack_linears(module: nn.Module, plan: PackingPlan | None = None, prefix: str = "") -> None:
    """Replaces every plain linear layer under `module`, which frees its row-major weight.

    `prefix`: the module's own name in `plan.stored`, with a trailing dot.
    """
    plan = plan or PackingPlan()
    for name, child in module.named_children():
        if type(child) is not nn.Linear:
            pack_linears(child, plan, f"{prefix}{name}.")
        elif can_pack(child.weight, plan):
            stored = plan.stored.get(f"{prefix}{name}.weight")
            paired = name == "gate_up_proj"
            setattr(module, name, PackedLinear(child, plan=plan, stored=stored, paired=paired))
