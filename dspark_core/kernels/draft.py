"""Everything after the layers of a draft pass in one call: head, Markov biases, draws and confidences."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dspark_core.kernels.library import Kernels, MatrixStruct, struct_function
from dspark_core.kernels.matrix import NativeMatrix
from dspark_core.kernels.reused_rows import ReusedRows


class DraftMode(IntEnum):
    """How a row's tokens are chosen."""

    GREEDY = 0
    UNIFORM = 1
    COUPLED = 2


class DraftRowStruct(ctypes.Structure):
    """One request; the fields are documented in `draft.h`."""

    _fields_ = (
        ("top_p", c_double),
        ("seed", c_int64),
        ("position", c_int64),
        ("temperature", c_float),
        ("min_p", c_float),
        ("top_k", c_int32),
        ("mode", c_int32),
    )


class _DraftDrawStruct(ctypes.Structure):
    _fields_ = (
        ("head", MatrixStruct),
        ("w2", MatrixStruct),
        ("w1", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("confidence", c_void_p),
        ("anchors", c_void_p),
        ("target_ids", c_void_p),
        ("rows", c_void_p),
        ("uniforms", c_void_p),
        ("tokens", c_void_p),
        ("proposal_ids", c_void_p),
        ("proposal_probs", c_void_p),
        ("confidence_logits", c_void_p),
        ("num_rows", c_int32),
        ("block", c_int32),
        ("candidates", c_int32),
        ("hidden_size", c_int32),
        ("confidence_with_markov", c_int32),
        ("bfloat16", c_int32),
        ("threads", c_int32),
    )


@dataclass(frozen=True, slots=True)
class DrawnBlocks:
    """The drawn tokens and, unless all rows are greedy, their proposals; those of greedy rows are zeros."""

    token_ids: Tensor  # [rows, block] int64 target token ids
    proposal_ids: Tensor | None  # [rows, block, candidates] int64
    proposal_probs: Tensor | None  # [rows, block, candidates] float32
    confidence_logits: Tensor | None  # [rows, block] float32; None: no confidence head


class MarkovDraw:
    """Draws blocks through a vanilla Markov head: `B(x_{k-1}, .) = W1[x_{k-1}] W2`."""

    def __init__(
        self,
        kernels: Kernels,
        w1: Tensor,
        w2: NativeMatrix,
        target_ids: Tensor | None,
        *,
        head: NativeMatrix | None = None,
        confidence: Tensor | None = None,
    ) -> None:
        """w1 [vocab, rank]; w2 [draft vocab, rank]; target_ids [draft vocab] int64, None: identity.

        head [draft vocab, hidden]; None: callers pass logits. confidence: float32 weights for the hidden
        state, then for a row of `w1` if the head uses it, then the bias; None: no confidences.
        """
        self._draw = struct_function(kernels, "dspark_draft_draw", _DraftDrawStruct)
        self._w1 = w1.detach().contiguous()
        self._w2 = w2
        self._target_ids = None if target_ids is None else target_ids.contiguous()
        self._head = head
        self._confidence = None if confidence is None else confidence.contiguous()
        self._logits = ReusedRows()

    def __call__(
        self,
        hidden: Tensor,
        anchors: Tensor,
        rows: Sequence[DraftRowStruct],
        uniforms: Tensor,
        candidates: int,
        *,
        logits: Tensor | None = None,
    ) -> DrawnBlocks:
        """hidden [rows, block, d] of the dtype of `w1`; anchors [rows] int64; uniforms [rows, block]
        float64; candidates: number of most likely tokens that draws are restricted to.

        logits [rows, block, draft vocab] float32, before biases, overwritten; None: computed by the head.
        """
        count, block, size = hidden.shape
        vocab = self._w2.out_features
        self._check(hidden, anchors, rows, logits)
        candidates = min(candidates, vocab)
        hidden, anchors, uniforms = hidden.contiguous(), anchors.contiguous(), uniforms.contiguous()
        head = self._head if logits is None else None
        logits = self._logits.take(count * block, vocab) if logits is None else logits.contiguous()
        tokens = torch.empty((count, block), dtype=torch.int64)
        confidences = None if self._confidence is None else torch.empty((count, block))
        ids = probs = None
        if any(row.mode != DraftMode.GREEDY for row in rows):
            ids = torch.zeros((count, block, candidates), dtype=torch.int64)
            probs = torch.zeros((count, block, candidates))
        array = (DraftRowStruct * count)(*rows)
        self._draw(
            ctypes.byref(
                _DraftDrawStruct(
                    head=MatrixStruct() if head is None else head.struct,
                    w2=self._w2.struct,
                    w1=self._w1.data_ptr(),
                    hidden=hidden.data_ptr(),
                    logits=logits.data_ptr(),
                    confidence=None if self._confidence is None else self._confidence.data_ptr(),
                    anchors=anchors.data_ptr(),
                    target_ids=None if self._target_ids is None else self._target_ids.data_ptr(),
                    rows=ctypes.addressof(array),
                    uniforms=uniforms.data_ptr(),
                    tokens=tokens.data_ptr(),
                    proposal_ids=None if ids is None else ids.data_ptr(),
                    proposal_probs=None if probs is None else probs.data_ptr(),
                    confidence_logits=None if confidences is None else confidences.data_ptr(),
                    num_rows=count,
                    block=block,
                    candidates=candidates,
                    hidden_size=size,
                    confidence_with_markov=self._confidence_sees_tokens(size),
                    bfloat16=int(self._w1.dtype is torch.bfloat16),
                    threads=torch.get_num_threads(),
                )
            )
        )
        return DrawnBlocks(tokens, ids, probs, confidences)

    def _check(
        self, hidden: Tensor, anchors: Tensor, rows: Sequence[DraftRowStruct], logits: Tensor | None
    ) -> None:
        """Raises ValueError for shapes with which the kernel would read out of bounds."""
        count, block, size = hidden.shape
        if (len(rows), len(anchors)) != (count, count):
            raise ValueError(f"{len(rows)} rows and {len(anchors)} anchors do not fit {count} hidden states")
        if hidden.dtype is not self._w1.dtype:
            raise ValueError(f"hidden states must be {self._w1.dtype}, got {hidden.dtype}")
        if logits is None:
            if self._head is None or self._head.in_features != size:
                raise ValueError(f"no head for hidden states of {size} values, and no logits")
        elif logits.shape != (count, block, self._w2.out_features) or logits.dtype is not torch.float32:
            raise ValueError(f"logits {tuple(logits.shape)} {logits.dtype} do not fit")
        if self._confidence is not None and len(self._confidence) - 1 - size not in (0, self._w1.shape[1]):
            raise ValueError(f"{len(self._confidence)} confidence weights do not fit {size} hidden values")

    def _confidence_sees_tokens(self, hidden_size: int) -> int:
        return int(self._confidence is not None and len(self._confidence) > hidden_size + 1)
