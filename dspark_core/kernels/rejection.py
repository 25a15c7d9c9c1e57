"""Speculative rejection sampling of logits; `dspark_core.algorithms.rejection` is the reference."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from dspark_core.kernels.laws import law_array
from dspark_core.kernels.library import Kernels, struct_function
from dspark_core.records import SamplingParams


class _RejectionRowsStruct(ctypes.Structure):
    _fields_ = (
        ("logits", c_void_p),
        ("laws", c_void_p),
        ("lengths", c_void_p),
        ("draft_ids", c_void_p),
        ("q_ids", c_void_p),
        ("q_probs", c_void_p),
        ("draft_uniforms", c_void_p),
        ("request_uniforms", c_void_p),
        ("accepted", c_void_p),
        ("next_tokens", c_void_p),
        ("requests", c_int32),
        ("candidates", c_int32),
        ("vocab", c_int32),
        ("threads", c_int32),
    )


def accept_rejection(
    kernels: Kernels,
    logits: Tensor,
    params: Sequence[SamplingParams],
    draft_ids: Sequence[int],
    draft_q_ids: Tensor,
    draft_q_probs: Tensor,
    lengths: Sequence[int],
    uniforms: Tensor,
) -> list[tuple[int, int]]:
    """Same result as the reference, from logits -> (accepted drafts, next token) of each request.

    Short arguments are Python sequences: for one request, tensor operators would take longer than the rows.

    Args:
        logits: [drafts + requests, vocab] float32.
        params: one per request, temperatures above 0.
        draft_ids: [drafts] in [0, vocab).
        draft_q_ids: [drafts, k] int64 in [0, vocab).
        draft_q_probs: [drafts, k] float32.
        lengths: [requests], sum is drafts.
        uniforms: [drafts + requests] float64 in [0, 1), drafts first.
    """
    requests, drafts = len(lengths), len(draft_ids)
    _check(logits, drafts, len(params), lengths, draft_q_ids, draft_q_probs, uniforms)
    laws, counts, ids = law_array(params), (c_int64 * requests)(*lengths), (c_int64 * drafts)(*draft_ids)
    accepted, tokens = (c_int64 * requests)(), (c_int64 * requests)()
    logits, q_ids, q_probs = logits.contiguous(), draft_q_ids.contiguous(), draft_q_probs.contiguous()
    uniforms = uniforms.contiguous()
    struct_function(kernels, "dspark_accept_rejection", _RejectionRowsStruct)(
        ctypes.byref(
            _RejectionRowsStruct(
                logits=logits.data_ptr(),
                laws=ctypes.addressof(laws),
                lengths=ctypes.addressof(counts),
                draft_ids=ctypes.addressof(ids),
                q_ids=q_ids.data_ptr(),
                q_probs=q_probs.data_ptr(),
                draft_uniforms=uniforms.data_ptr(),
                request_uniforms=uniforms.data_ptr() + drafts * uniforms.element_size(),
                accepted=ctypes.addressof(accepted),
                next_tokens=ctypes.addressof(tokens),
                requests=requests,
                candidates=q_ids.shape[1],
                vocab=logits.shape[1],
                threads=torch.get_num_threads(),
            )
        )
    )
    return list(zip(accepted, tokens, strict=True))


def _check(
    logits: Tensor,
    drafts: int,
    laws: int,
    lengths: Sequence[int],
    q_ids: Tensor,
    q_probs: Tensor,
    uniforms: Tensor,
) -> None:
    """Raises ValueError for shapes with which the kernel would read out of bounds."""
    rows, requests = len(logits), len(lengths)
    if (rows, len(uniforms), laws, sum(lengths)) != (drafts + requests, rows, requests, drafts):
        raise ValueError(
            f"{rows} rows, {len(uniforms)} uniforms and {laws} laws do not fit {requests} requests "
            f"with {drafts} drafts of lengths {list(lengths)}"
        )
    if q_ids.shape != q_probs.shape or len(q_ids) != drafts:
        raise ValueError(f"q of {tuple(q_ids.shape)} and {tuple(q_probs.shape)} do not fit {drafts} drafts")
    kinds = (logits.dtype, q_ids.dtype, q_probs.dtype, uniforms.dtype)
    if kinds != (torch.float32, torch.int64, torch.float32, torch.float64):
        raise ValueError(f"logits, q's ids and probabilities, and uniforms are of {kinds}")
