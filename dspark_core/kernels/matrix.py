"""One weight matrix in the kernels' layout, usable as a linear layer."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_core.kernels.library import Format, Kernels, MatrixStruct
from dspark_core.kernels.memory import Arena

GROUP = 32
"""Number of inputs that share a scale in the quantised formats."""

_BLOCK_BYTES = {Format.Q4: 20, Format.Q8: 34}


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A weight as a GGUF file stores it: Q4_1 blocks (Format.Q4) or Q8_0 blocks (Format.Q8)."""

    format: Format
    blocks: Tensor  # [outputs, bytes] uint8
    inputs: int

    def __post_init__(self) -> None:
        expected = self.inputs // GROUP * _BLOCK_BYTES[self.format]
        if self.inputs % GROUP or self.blocks.shape[1] != expected:
            raise ValueError(
                f"{self.inputs} inputs need rows of {expected} bytes, got {self.blocks.shape[1]}"
            )

    @property
    def scales(self) -> Tensor:
        """[outputs, groups, 1 or 2] float16, at the start of each block: scale and, for Q4_1, minimum."""
        blocks = self.blocks.view(len(self.blocks), -1, _BLOCK_BYTES[self.format])
        count = 2 if self.format is Format.Q4 else 1
        return blocks[:, :, : 2 * count].contiguous().view(torch.float16)


def supports(kind: Format, inputs: int, dtype: torch.dtype) -> bool:
    """Whether a matrix of this format can be multiplied by activations of this dtype."""
    if kind is Format.FLOAT32:
        return dtype is torch.float32
    if dtype is not torch.bfloat16:
        return False
    return inputs % (2 if kind is Format.BFLOAT16 else GROUP) == 0


class NativeMatrix:
    """A row's results are bitwise independent of the other rows in the call."""

    def __init__(
        self,
        kernels: Kernels,
        source: Tensor | QuantizedRows,
        kind: Format,
        *,
        bias: Tensor | None = None,
        paired: bool = False,
        arena: Arena | None = None,
    ) -> None:
        """`source` [outputs, inputs]. `paired`: its upper half gates its lower half (SwiGLU).

        A float source is quantised if `kind` is Q8 or I8; 4-bit weights are only taken as stored.
        """
        self._kernels = kernels
        raw = isinstance(source, QuantizedRows)
        rows = source.blocks if isinstance(source, QuantizedRows) else source
        self.out_features = rows.shape[0]
        self.in_features = source.inputs if isinstance(source, QuantizedRows) else rows.shape[1]
        self.kind = kind
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self.struct = MatrixStruct(
            None,
            None if self._bias is None else self._bias.data_ptr(),
            self.out_features,
            self.in_features,
            int(kind),
            int(paired),
        )
        reference = ctypes.byref(self.struct)
        self._data = (arena or Arena()).take(kernels.functions.dspark_matrix_bytes(reference))
        self.struct.data = self._data.data_ptr()
        values = rows.contiguous() if raw else rows.detach().float().contiguous()
        kernels.functions.dspark_pack(reference, values.data_ptr(), int(raw), self.struct.data)

    @property
    def num_bytes(self) -> int:
        return self._data.numel()

    def multiply(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        """x [..., in_features] -> [..., out_features]."""
        rows = x.numel() // self.in_features
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=out_dtype)
        if rows == 0:
            return out
        x = x.contiguous()
        self._kernels.functions.dspark_linear(
            ctypes.byref(self.struct),
            x.data_ptr(),
            int(x.dtype is torch.bfloat16),
            rows,
            out.data_ptr(),
            int(out_dtype is torch.bfloat16),
            torch.get_num_threads(),
        )
        return out

    def normed(self, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """RMSNorm of `multiply`: x [..., in_features] -> [..., out_features] in x's dtype.

        norm [out_features] float32: the norm's weights.
        """
        rows = x.numel() // self.in_features
        out = torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype)
        if rows == 0:
            return out
        x, product = x.contiguous(), torch.empty((rows, self.out_features))
        self._kernels.functions.dspark_normed_linear(
            ctypes.byref(self.struct),
            x.data_ptr(),
            int(x.dtype is torch.bfloat16),
            rows,
            product.data_ptr(),
            norm.data_ptr(),
            eps,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def dequantize(self, first: int = 0, rows: int | None = None) -> Tensor:
        """Rows [first, first + rows) as float32: the exact values that `multiply` uses."""
        count = self.out_features - first if rows is None else rows
        out = torch.empty((count, self.in_features))
        self._kernels.functions.dspark_unpack(ctypes.byref(self.struct), first, count, out.data_ptr())
        return out
