"""The sequential part of a draft pass as one call: Markov biases and the choice of every token."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from dspark_core.kernels.library import Kernels, MatrixStruct
from dspark_core.kernels.matrix import NativeMatrix


class DraftMode(IntEnum):
    """How a row's tokens are chosen."""

    GREEDY = 0
    UNIFORM = 1
    COUPLED = 2


class DraftRowStruct(ctypes.Structure):
    """One request; `draft.h` says what the fields mean."""

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
        ("w2", MatrixStruct),
        ("w1", c_void_p),
        ("base", c_void_p),
        ("anchors", c_void_p),
        ("target_ids", c_void_p),
        ("rows", c_void_p),
        ("uniforms", c_void_p),
        ("tokens", c_void_p),
        ("proposal_ids", c_void_p),
        ("proposal_probs", c_void_p),
        ("num_rows", c_int32),
        ("block", c_int32),
        ("candidates", c_int32),
        ("bfloat16", c_int32),
        ("threads", c_int32),
    )


@dataclass(frozen=True, slots=True)
class DrawnBlocks:
    """What was drawn and, unless every row is greedy, from what; rows that are greedy hold nothing."""

    token_ids: Tensor  # [rows, block] int64 target token ids
    proposal_ids: Tensor | None  # [rows, block, candidates] int64
    proposal_probs: Tensor | None  # [rows, block, candidates] float32


class MarkovDraw:
    """Draws blocks through a vanilla Markov head: `B(x_{k-1}, .) = W1[x_{k-1}] W2`."""

    def __init__(self, kernels: Kernels, w1: Tensor, w2: NativeMatrix, target_ids: Tensor | None) -> None:
        """w1 [vocab, rank]; w2 [draft vocab, rank]; target_ids [draft vocab] int64, None: the same."""
        self._draw = kernels.functions.dspark_draft_draw
        self._draw.restype, self._draw.argtypes = None, (POINTER(_DraftDrawStruct),)
        self._w1 = w1.detach().contiguous()
        self._w2 = w2
        self._target_ids = None if target_ids is None else target_ids.contiguous()

    def __call__(
        self, base: Tensor, anchors: Tensor, rows: Sequence[DraftRowStruct], uniforms: Tensor, candidates: int
    ) -> DrawnBlocks:
        """base [rows, block, draft vocab] float32 logits before biases; anchors [rows] int64;
        uniforms [rows, block] float64; candidates: the most likely tokens a draw is made from."""
        count, block, vocab = base.shape
        if (vocab, len(rows), len(anchors)) != (self._w2.out_features, count, count):
            raise ValueError(f"{len(rows)} rows and {len(anchors)} anchors do not fit logits {base.shape}")
        candidates = min(candidates, vocab)
        base, anchors, uniforms = base.contiguous(), anchors.contiguous(), uniforms.contiguous()
        tokens = torch.empty((count, block), dtype=torch.int64)
        ids = probs = None
        if any(row.mode != DraftMode.GREEDY for row in rows):
            ids = torch.zeros((count, block, candidates), dtype=torch.int64)
            probs = torch.zeros((count, block, candidates))
        array = (DraftRowStruct * count)(*rows)
        self._draw(
            ctypes.byref(
                _DraftDrawStruct(
                    w2=self._w2.struct,
                    w1=self._w1.data_ptr(),
                    base=base.data_ptr(),
                    anchors=anchors.data_ptr(),
                    target_ids=None if self._target_ids is None else self._target_ids.data_ptr(),
                    rows=ctypes.addressof(array),
                    uniforms=uniforms.data_ptr(),
                    tokens=tokens.data_ptr(),
                    proposal_ids=None if ids is None else ids.data_ptr(),
                    proposal_probs=None if probs is None else probs.data_ptr(),
                    num_rows=count,
                    block=block,
                    candidates=candidates,
                    bfloat16=int(self._w1.dtype is torch.bfloat16),
                    threads=torch.get_num_threads(),
                )
            )
        )
        return DrawnBlocks(tokens, ids, probs)
