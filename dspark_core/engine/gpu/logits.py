"""Logits in float32, written directly by the LM head's matrix product where supported, else converted.

A product of bfloat16 matrices is accumulated in float32. Rounding it to bfloat16 and converting it back would
cost two passes over the largest array of a step, and the last bits of precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.models.decoder import Decoder
from dspark_core.models.layers import soft_cap


class FloatLogits:
    def __init__(self, decoder: Decoder) -> None:
        """`decoder` must already be on its device and not packed."""
        self._decoder = decoder
        weight = decoder.lm_head.weight
        self._dtype = weight.dtype
        self._direct = self._dtype is torch.float32 or multiplies_into_float32(weight.dtype, weight.device)

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [rows, hidden] -> [rows, vocab] float32, in `out` if given."""
        if not self._direct or self._decoder.packed_head is not None:
            logits = self._decoder.logits(hidden)
            return logits.float() if out is None else out.copy_(logits)
        weight = self._decoder.lm_head.weight.t()
        if self._dtype is torch.float32:
            product = torch.mm(hidden, weight, out=out)
        else:
            product = torch.mm(hidden, weight, out_dtype=torch.float32, out=out)
        cap = self._decoder.config.final_logit_softcap
        return product if cap is None else product.copy_(soft_cap(product, cap))


def multiplies_into_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `torch.mm` of `dtype` can return float32 on the device; on CUDA it can since PyTorch 2.8."""
    tried = torch.zeros((16, 16), dtype=dtype, device=device)
    try:
        torch.mm(tried, tried, out_dtype=torch.float32)
    except (TypeError, RuntimeError):  # unknown argument; unsupported product
        return False
    return True
