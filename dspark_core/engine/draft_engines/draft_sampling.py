"""Draws the tokens of a block, and keeps the distributions they were drawn from.

Tokens are drawn from the top k of the draft distribution, tempered and filtered as the request asks, so that
the sparse distribution sent to the verifier is exactly the proposal distribution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.algorithms.coupling import sample_coupled_sparse
from dspark_core.algorithms.sampling import SamplingRows, draw_tokens, greedy_tokens, target_probabilities
from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.protocols import DraftItem, SparseDistribution
from dspark_core.records import Verification

PROPOSAL_TOKENS = 64
"""k of the sparse proposal distribution."""


class BlockSampler:
    """Draws position after position for a batch of requests with different sampling parameters."""

    def __init__(
        self,
        items: Sequence[DraftItem],
        generator: torch.Generator,
        *,
        token_ids: Tensor | None = None,
        device: torch.device | None = None,
    ) -> None:
        """`token_ids` [draft vocab]: the target's id of each draft vocabulary entry; None: the same ids.

        `device` of the logits; None: the CPU. `generator` must be on the CPU.
        """
        self._device = torch.device("cpu") if device is None else device
        self._generator = generator
        self._token_ids = token_ids
        self._rows = [row for row, item in enumerate(items) if not item.sampling.greedy]
        sampled = [items[row] for row in self._rows]
        self._is_coupled = [item.verification is Verification.COUPLED for item in sampled]
        self._sampled_rows = self._on_device(torch.tensor(self._rows, dtype=torch.long))
        self._coupled = self._on_device(torch.tensor(self._is_coupled, dtype=torch.bool))
        self._params = SamplingRows.from_params([item.sampling for item in sampled], device=self._device)
        seeds = torch.tensor([item.sampling.seed or 0 for item in sampled], dtype=torch.long)
        positions = torch.tensor([item.anchor_position + 1 for item in sampled], dtype=torch.long)
        self._seeds, self._positions = self._on_device(seeds), self._on_device(positions)
        self._drawn_from: list[tuple[Tensor, Tensor]] = []  # per position: ids, probabilities [sampled, k]

    def __call__(self, position: int, logits: Tensor) -> Tensor:
        """logits [requests, draft vocab] of block position `position` -> draft vocabulary ids [requests]."""
        count = len(self._rows)
        if count == 0:
            return greedy_tokens(logits)
        chosen = self._seeds.new_empty(len(logits)) if count == len(logits) else greedy_tokens(logits)
        top = logits[self._sampled_rows].float().topk(min(PROPOSAL_TOKENS, logits.shape[-1]), dim=-1)
        probabilities = target_probabilities(top.values, self._params)  # [sampled, k]
        token_ids = top.indices if self._token_ids is None else self._token_ids[top.indices]
        uniforms = self._on_device(torch.rand(count, generator=self._generator))
        column = draw_tokens(probabilities, uniforms)
        if any(self._is_coupled):
            # The noise is keyed by the target's token ids, so that drafter and target use the same.
            shared = sample_coupled_sparse(token_ids, probabilities, self._seeds, self._positions + position)
            shared_column = (token_ids == shared[:, None]).int().argmax(dim=-1)
            column = torch.where(self._coupled, shared_column, column)
        chosen[self._sampled_rows] = top.indices.gather(1, column[:, None]).squeeze(1)
        self._drawn_from.append((token_ids, probabilities))
        return chosen

    def distributions(self) -> dict[int, SparseDistribution]:
        """The distribution of each block position by request row (rejection mode only)."""
        if not self._drawn_from:
            return {}
        token_ids = torch.stack([ids for ids, _ in self._drawn_from], dim=1)  # [sampled, block, k]
        probabilities = torch.stack([p for _, p in self._drawn_from], dim=1)
        return {
            row: SparseDistribution(token_ids=token_ids[index], probabilities=probabilities[index])
            for index, row in enumerate(self._rows)
            if not self._is_coupled[index]
        }

    def _on_device(self, values: Tensor) -> Tensor:
        return to_device(values, self._device)
