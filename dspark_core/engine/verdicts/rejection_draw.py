"""Rejection sampling for target rows, with native kernels if available."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.algorithms import rejection
from dspark_core.algorithms.rejection import Acceptance, draw_uniforms
from dspark_core.algorithms.sampling import SamplingRows, TargetLaws
from dspark_core.algorithms.transfer import to_device
from dspark_core.kernels import rejection as native
from dspark_core.kernels.library import kernels_for
from dspark_core.records import SamplingParams


def accept_rejection(
    logits: Tensor,
    params: Sequence[SamplingParams],
    draft_ids: Sequence[int],
    draft_q_ids: Tensor,
    draft_q_probs: Tensor,
    lengths: Sequence[int],
    generator: torch.Generator,
) -> Acceptance | list[tuple[int, int]]:
    """`algorithms.rejection.accept_rejection` with the distributions that `params` [requests] make of the
    logits. Returns each request's number of accepted draft tokens and next token: numbers from the kernels,
    else tensors.

    Both implementations use the same uniforms, so results differ only where a uniform falls within the
    rounding of an exponential or a sum.
    """
    kernels = kernels_for(logits)
    if kernels is not None:
        uniforms = draw_uniforms(logits, generator)
        return native.accept_rejection(
            kernels, logits, params, draft_ids, draft_q_ids, draft_q_probs, lengths, uniforms
        )
    rows = SamplingRows.from_params(params, [1 + length for length in lengths], logits.device)
    ids, counts = (to_device(torch.tensor(n, dtype=torch.int64), logits.device) for n in (draft_ids, lengths))
    laws = TargetLaws(logits, rows)
    return rejection.accept_rejection(laws, ids, draft_q_ids, draft_q_probs, counts, generator)
