"""Draws the blocks of a DSpark drafter: with PyTorch operators or in one native call.

Both follow the same rules (`draft_sampling`). The native call runs the whole Markov loop, which reads W2 once
per block position and otherwise does so little work that the overhead of operators would dominate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark_core.engine.draft_engines.draft_sampling import PROPOSAL_TOKENS, BlockSampler
from dspark_core.engine.protocols import DraftItem, SparseDistribution
from dspark_core.kernels.draft import DraftMode, DraftRowStruct, MarkovDraw
from dspark_core.kernels.library import native_kernels
from dspark_core.models.dspark import DraftTokens, DSparkDrafter
from dspark_core.models.heads import MarkovHead
from dspark_core.models.packing import PackedLinear
from dspark_core.records import Verification

Distributions = dict[int, SparseDistribution]
"""The distribution each block position was drawn from, by item index (rejection mode only)."""

BlockDraw = Callable[[Sequence[DraftItem], Tensor, Tensor], tuple[DraftTokens, Distributions]]
"""(items, anchors [requests], hidden [requests, block, d]) -> draft tokens and their distributions."""


def block_draw(drafter: DSparkDrafter, generator: torch.Generator) -> BlockDraw:
    """The fastest implementation available; the native one needs a drafter packed by native kernels."""
    native = _markov_draw(drafter)
    if native is None:
        return OperatorDraw(drafter, generator)
    return NativeDraw(drafter, native, generator)


class OperatorDraw:
    """For any kind of head on any device; the reference."""

    def __init__(self, drafter: DSparkDrafter, generator: torch.Generator) -> None:
        self._drafter = drafter
        self._generator = generator

    def __call__(
        self, items: Sequence[DraftItem], anchors: Tensor, hidden: Tensor
    ) -> tuple[DraftTokens, Distributions]:
        ids = self._drafter.draft_vocab_ids
        sampler = BlockSampler(items, self._generator, token_ids=ids, device=hidden.device)
        drawn = self._drafter.draw(anchors, hidden, sampler)
        return drawn, sampler.distributions()


class NativeDraw:
    """For vanilla Markov heads."""

    def __init__(self, drafter: DSparkDrafter, draw: MarkovDraw, generator: torch.Generator) -> None:
        self._drafter = drafter
        self._draw = draw
        self._has_head = drafter.native_head is not None
        self._generator = generator

    def __call__(
        self, items: Sequence[DraftItem], anchors: Tensor, hidden: Tensor
    ) -> tuple[DraftTokens, Distributions]:
        rows = [_row(item) for item in items]
        proposed = [index for index, row in enumerate(rows) if row.mode == DraftMode.UNIFORM]
        uniforms = torch.empty(hidden.shape[:2], dtype=torch.float64)
        if proposed:
            torch.rand(hidden.shape[:2], generator=self._generator, out=uniforms)
        logits = None if self._has_head else self._drafter.float_logits(hidden)
        drawn = self._draw(hidden, anchors, rows, uniforms, PROPOSAL_TOKENS, logits=logits)
        distributions: Distributions = {}
        if drawn.proposal_ids is not None and drawn.proposal_probs is not None:
            distributions = {
                index: SparseDistribution(
                    token_ids=drawn.proposal_ids[index], probabilities=drawn.proposal_probs[index]
                )
                for index in proposed
            }
        return DraftTokens(drawn.token_ids, drawn.confidence_logits), distributions


def _markov_draw(drafter: DSparkDrafter) -> MarkovDraw | None:
    head, kernels = drafter.markov_head, native_kernels()
    if kernels is None or type(head) is not MarkovHead:
        return None
    w2 = head.markov_w2
    if not isinstance(w2, PackedLinear) or w2.native is None:
        return None
    return MarkovDraw(
        kernels,
        head.markov_w1.weight,
        w2.native,
        drafter.draft_vocab_ids,
        head=drafter.native_head,
        confidence=drafter.confidence_weights,
    )


def _row(item: DraftItem) -> DraftRowStruct:
    sampling, mode = item.sampling, DraftMode.UNIFORM
    if sampling.greedy:
        mode = DraftMode.GREEDY
    elif item.verification is Verification.COUPLED:
        mode = DraftMode.COUPLED
    return DraftRowStruct(
        sampling.top_p,
        sampling.seed or 0,
        item.anchor_position + 1,
        sampling.temperature,
        sampling.min_p,
        min(sampling.top_k, 2**31 - 1),
        mode,
    )
