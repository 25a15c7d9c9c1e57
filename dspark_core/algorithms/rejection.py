"""Lossless acceptance of draft tokens over a flattened ragged batch.

Two rules that must never be mixed within a request: speculative rejection sampling (Leviathan et
al., Chen et al.) for drafts drawn independently of the target, and accept-iff-equal for greedy
decoding and for samples coupled by shared noise. Randomness is an argument.

Layout: request r verifies `lengths[r]` draft tokens and owns `lengths[r] + 1` consecutive rows; its
row j holds the target's distribution after j of its draft tokens, so the row of draft token j
(counted from 0) is row j, and the last row is the bonus token's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_core.algorithms.sampling import KnownLaws, TargetLaws, draw_tokens
from dspark_core.algorithms.transfer import to_device


@dataclass(frozen=True, slots=True)
class Acceptance:
    """A round's outcome: request r commits its first `accepted[r]` draft tokens and then the next token."""

    accepted: Tensor  # [requests] int64
    next_token_ids: Tensor  # [requests] int64


def accept_rejection(
    target: Tensor | TargetLaws,
    draft_ids: Tensor,
    draft_q_ids: Tensor,
    draft_q_probs: Tensor,
    lengths: Tensor,
    generator: torch.Generator,
) -> Acceptance:
    """Keeps draft token x with probability min(1, p(x) / q(x)). The first rejected one is replaced by a
    draw from normalised max(p - q, 0); after a fully accepted prefix the bonus token is drawn from p.

    Committed tokens are then distributed as the target's own samples, provided x was drawn from q
    and lengths do not depend on the tokens they admit. A token with q(x) = 0 is never accepted.

    Args:
        target: p of each row in the module's layout: [rows, vocab], or laws evaluated on demand.
        draft_ids: [drafts] the verified draft tokens, grouped by request.
        draft_q_ids: [drafts, k] support of q; may be padded by entries of probability 0.
        draft_q_probs: [drafts, k] their probabilities, which sum to 1.
        lengths: [requests] int64, sum is drafts; 0 draws a token from p.
        generator: draws one uniform per draft and one per request on its own device; a CPU generator gives
            every device the same numbers.
    """
    laws = KnownLaws(target) if isinstance(target, Tensor) else target
    request = _request_of_draft(laws.num_rows, draft_ids, lengths)
    row = torch.arange(draft_ids.shape[0], device=draft_ids.device) + request
    p = laws.of_tokens(row, draft_ids)
    q = torch.where(draft_q_ids == draft_ids.unsqueeze(-1), draft_q_probs, 0.0).sum(dim=-1).double()
    # Strict, and as a product: p = 0 is never kept, and p >= q > 0 always is, since u < 1.
    kept = (q > 0) & (draw_uniforms(draft_ids, generator) * q < p)
    accepted = _leading_true(kept, request, lengths)
    weights = _next_token_weights(laws, draft_q_ids, draft_q_probs, lengths, accepted)
    return Acceptance(accepted, draw_tokens(weights, draw_uniforms(lengths, generator)))


def longest_equal_prefix(own_tokens: Tensor, draft_ids: Tensor, lengths: Tensor) -> Acceptance:
    """Accepts draft tokens while they equal the target's own; the next token is the target's.

    `own_tokens` [rows] are the argmax for greedy decoding, or the samples drawn with the shared
    noise in coupled mode; draft_ids [drafts]; lengths [requests] int64.
    """
    if own_tokens.device.type == "cpu":
        found = equal_prefixes(own_tokens.tolist(), draft_ids.tolist(), lengths.tolist())
        return Acceptance(
            lengths.new_tensor([count for count, _ in found]),
            own_tokens.new_tensor([token_id for _, token_id in found]),
        )
    request = _request_of_draft(own_tokens.shape[0], draft_ids, lengths)
    row = torch.arange(draft_ids.shape[0], device=draft_ids.device) + request
    accepted = _leading_true(own_tokens[row] == draft_ids, request, lengths)
    return Acceptance(accepted, own_tokens[_first_rows(lengths) + accepted])


def equal_prefixes(
    own_tokens: Sequence[int], draft_ids: Sequence[int], lengths: Sequence[int]
) -> list[tuple[int, int]]:
    """`longest_equal_prefix` on Python numbers -> (accepted drafts, next token) of each request.

    Several times as fast as tensor operators for a few tokens per request; on a GPU it would force a sync.
    """
    _check_rows(len(own_tokens), len(draft_ids), len(lengths))
    found, row = [], 0
    for request, length in enumerate(lengths):
        first = row - request  # among the drafts
        count = 0
        while count < length and own_tokens[row + count] == draft_ids[first + count]:
            count += 1
        found.append((count, own_tokens[row + count]))
        row += 1 + length
    return found


def draw_uniforms(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniforms in [0, 1), one per element of `like`, on its device.

    float64, so that acceptance probabilities below 2^-24 are not rounded to 0 or 1.
    """
    drawn = torch.rand(like.shape[0], dtype=torch.float64, device=generator.device, generator=generator)
    return to_device(drawn, like.device)


def _check_rows(rows: int, drafts: int, requests: int) -> None:
    if rows != drafts + requests:
        raise ValueError(f"rows must be drafts + requests = {drafts} + {requests}, got {rows}")


def _request_of_draft(rows: int, draft_ids: Tensor, lengths: Tensor) -> Tensor:
    """Index of the request that each draft token belongs to [drafts]; its row is draft index + request."""
    drafts, requests = draft_ids.shape[0], lengths.shape[0]
    _check_rows(rows, drafts, requests)
    return torch.repeat_interleave(torch.arange(requests, device=lengths.device), lengths, output_size=drafts)


def _first_rows(lengths: Tensor) -> Tensor:
    rows = lengths + 1
    return rows.cumsum(0) - rows


def _leading_true(kept: Tensor, request: Tensor, lengths: Tensor) -> Tensor:
    """Number of each request's draft tokens before the first one not kept [requests]."""
    first_draft = lengths.cumsum(0) - lengths
    position = torch.arange(kept.shape[0], device=kept.device) - first_draft[request]
    end = torch.where(kept, lengths[request], position)
    return lengths.scatter_reduce(0, request, end, "amin")


def _next_token_weights(
    laws: KnownLaws | TargetLaws,
    draft_q_ids: Tensor,
    draft_q_probs: Tensor,
    lengths: Tensor,
    accepted: Tensor,
) -> Tensor:
    """Unnormalised distribution of the token after each accepted prefix [requests, vocab]."""
    weights = laws.of_rows(_first_rows(lengths) + accepted)
    if weights.is_cuda:
        return residual_weights(weights, draft_q_ids, draft_q_probs, lengths, accepted)
    rejected = (accepted < lengths).nonzero().squeeze(-1)
    if not len(rejected):
        return weights
    draft = (lengths.cumsum(0) - lengths + accepted)[rejected]
    p = weights[rejected]
    residual = p.scatter_add(1, draft_q_ids[draft], -draft_q_probs[draft].to(p.dtype)).clamp_(min=0.0)
    # The residual is empty only if p = q, where nothing is rejected; rounding alone could lead here.
    empty = residual.sum(dim=-1, keepdim=True) <= 0
    weights[rejected] = torch.where(empty, p, residual)
    return weights


def residual_weights(
    weights: Tensor, draft_q_ids: Tensor, draft_q_probs: Tensor, lengths: Tensor, accepted: Tensor
) -> Tensor:
    """p of each request's next row [requests, vocab] -> max(p - q, 0) where a draft was rejected, else p.

    For a GPU: all rows take the same path, so no rejection flags need to be read back.
    """
    if not len(draft_q_ids):
        return weights
    rejected = accepted < lengths
    draft = torch.where(rejected, lengths.cumsum(0) - lengths + accepted, 0)
    q = draft_q_probs[draft].to(weights.dtype)
    residual = weights.scatter_add(1, draft_q_ids[draft], -q).clamp_(min=0.0)
    # As above: the residual is empty only if p = q.
    usable = rejected & (residual.sum(dim=-1) > 0)
    return torch.where(usable.unsqueeze(-1), residual, weights)
