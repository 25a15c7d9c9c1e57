"""Turns target logits into verdicts: how much of each draft stands, and the token after it.

Dispatches rows of the ragged batch to the three rules (greedy, coupled, rejection), each applied
to all its sequences at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import starmap
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.algorithms.rejection import (
    Acceptance,
    accept_rejection,
    equal_prefixes,
    longest_equal_prefix,
)
from dspark_core.algorithms.sampling import SamplingRows, TargetLaws, target_weight_blocks
from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.coupled_draw import sample_coupled
from dspark_core.engine.greedy_draw import greedy_tokens
from dspark_core.engine.protocols import DraftBlock
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import Verification


@dataclass(frozen=True, slots=True)
class Proposal:
    """One sequence's part in a round; without a block it only samples its next token."""

    sequence: SequenceState
    block: DraftBlock = field(default_factory=lambda: DraftBlock(""))
    verify_length: int = 0

    @property
    def draft_token_ids(self) -> tuple[int, ...]:
        """The scheduled prefix."""
        return self.block.token_ids[: self.verify_length]

    @property
    def drafted(self) -> int:
        return len(self.block.token_ids)


@dataclass(frozen=True, slots=True)
class Verdict:
    accepted: int
    next_token_id: int


class _Rule(Enum):
    GREEDY = "greedy"
    COUPLED = "coupled"
    REJECTION = "rejection"


class Acceptor:
    def __init__(self, generator: torch.Generator) -> None:
        """`generator` draws for unseeded rejection sampling only."""
        self._generator = generator

    @torch.inference_mode()
    def accept(self, logits: Tensor, proposals: Sequence[Proposal]) -> list[Verdict]:
        """logits [sum of (1 + verify_length), vocab], rows in the order of the proposals.

        They may be a GPU's: then all is decided there, and the verdicts are all that is read back.
        """
        if not proposals:
            return []
        verdicts: dict[int, Verdict] = {}
        order: list[int] = []
        outcomes: list[Acceptance] = []
        by_rule = _by_rule(proposals)
        rows_of = _row_ranges(proposals) if len(by_rule) > 1 else []
        for rule, members in by_rule.items():
            rows, of_rule = logits, proposals
            if len(by_rule) > 1:
                rows = logits[to_device(torch.cat([rows_of[index] for index in members]), logits.device)]
                of_rule = [proposals[index] for index in members]
            if rule is _Rule.REJECTION:
                outcomes.append(self._rejection(rows, of_rule))
            else:
                samples = self._samplers[rule](self, rows, of_rule)
                if samples.device.type == "cpu":
                    verdicts.update(zip(members, _equal_verdicts(samples, of_rule), strict=True))
                    continue
                outcomes.append(_accept_equal(samples, of_rule))
            order.extend(members)
        if outcomes:
            verdicts.update(zip(order, _read(outcomes), strict=True))
        return [verdicts[index] for index in range(len(proposals))]

    def _greedy(self, logits: Tensor, proposals: Sequence[Proposal]) -> Tensor:
        return greedy_tokens(logits)

    def _coupled(self, logits: Tensor, proposals: Sequence[Proposal]) -> Tensor:
        """The target samples every row with the request's own noise; drafts stand while equal."""
        rows = torch.tensor([1 + p.verify_length for p in proposals])
        seeds = torch.tensor([p.sequence.noise_seed for p in proposals]).repeat_interleave(rows)
        # Row i of a proposal decides the token at absolute position len(tokens) + i.
        first = torch.tensor([len(p.sequence.tokens) for p in proposals]) - (rows.cumsum(0) - rows)
        positions = first.repeat_interleave(rows) + torch.arange(len(logits))
        seeds, positions = to_device(seeds, logits.device), to_device(positions, logits.device)
        samples = [
            sample_coupled(weights, seeds[span], positions[span])
            for span, weights in target_weight_blocks(logits, _sampling_rows(proposals, logits.device))
        ]
        return torch.cat(samples)

    def _rejection(self, logits: Tensor, proposals: Sequence[Proposal]) -> Acceptance:
        ids, q_ids, q_probabilities = _draft_rows(proposals, logits.device)
        return accept_rejection(
            TargetLaws(logits, _sampling_rows(proposals, logits.device)),
            ids,
            q_ids,
            q_probabilities,
            _lengths(proposals, logits.device),
            self._generator,
        )

    _samplers: ClassVar[dict[_Rule, Callable[[Acceptor, Tensor, Sequence[Proposal]], Tensor]]] = {
        _Rule.GREEDY: _greedy,
        _Rule.COUPLED: _coupled,
    }
    """The target's own tokens [rows]: drafts stand while they are equal to them."""


def _rule_of(proposal: Proposal) -> _Rule:
    if proposal.sequence.request.sampling.greedy:
        return _Rule.GREEDY
    if proposal.sequence.request.verification is Verification.COUPLED:
        return _Rule.COUPLED
    return _Rule.REJECTION


def _by_rule(proposals: Sequence[Proposal]) -> dict[_Rule, list[int]]:
    members: dict[_Rule, list[int]] = {}
    for index, proposal in enumerate(proposals):
        members.setdefault(_rule_of(proposal), []).append(index)
    return members


def _row_ranges(proposals: Sequence[Proposal]) -> list[Tensor]:
    ranges, start = [], 0
    for proposal in proposals:
        end = start + 1 + proposal.verify_length
        ranges.append(torch.arange(start, end))
        start = end
    return ranges


def _sampling_rows(proposals: Sequence[Proposal], device: torch.device) -> SamplingRows:
    return SamplingRows.from_params(
        [p.sequence.request.sampling for p in proposals], [1 + p.verify_length for p in proposals], device
    )


def _read(outcomes: Sequence[Acceptance]) -> list[Verdict]:
    """At once: a GPU is waited for here."""
    decided = torch.stack(
        (torch.cat([o.accepted for o in outcomes]), torch.cat([o.next_token_ids for o in outcomes]))
    )
    return list(map(Verdict, *decided.tolist()))


def _equal_verdicts(samples: Tensor, proposals: Sequence[Proposal]) -> Iterator[Verdict]:
    """`_accept_equal` without operators, for the CPU."""
    drafts = [token_id for proposal in proposals for token_id in proposal.draft_token_ids]
    lengths = [proposal.verify_length for proposal in proposals]
    return starmap(Verdict, equal_prefixes(samples.tolist(), drafts, lengths))


def _accept_equal(samples: Tensor, proposals: Sequence[Proposal]) -> Acceptance:
    """samples [rows]: the target's own tokens."""
    drafts = _draft_ids(proposals, samples.device)
    return longest_equal_prefix(samples, drafts, _lengths(proposals, samples.device))


def _draft_ids(proposals: Sequence[Proposal], device: torch.device) -> Tensor:
    ids = torch.tensor([t for p in proposals for t in p.draft_token_ids], dtype=torch.long)
    return to_device(ids, device)


def _lengths(proposals: Sequence[Proposal], device: torch.device) -> Tensor:
    return to_device(torch.tensor([p.verify_length for p in proposals]), device)


def _draft_rows(proposals: Sequence[Proposal], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draft ids [drafts] and their sparse distributions [drafts, k], flattened over sequences."""
    ids = _draft_ids(proposals, device)
    token_ids, probabilities = [], []
    for proposal in proposals:
        if proposal.verify_length == 0:
            continue
        distribution = proposal.block.distribution
        if distribution is None:
            raise ValueError(f"draft of {proposal.sequence.sequence_id} carries no distribution")
        token_ids.append(distribution.token_ids[: proposal.verify_length])
        probabilities.append(distribution.probabilities[: proposal.verify_length])
    if not token_ids:
        return ids, ids.new_zeros((0, 1)), torch.zeros((0, 1), device=device)
    return ids, _gathered(token_ids, device), _gathered(probabilities, device)


def _gathered(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """[.., k] tensors of any k under each other, on the device: from a drafter beside it they are there
    already. Narrower ones are filled up with zeros."""
    if len({part.device for part in parts}) > 1:
        parts = [to_device(part, device) for part in parts]
    widest = max(part.shape[1] for part in parts)
    return to_device(torch.cat([F.pad(part, (0, widest - part.shape[1])) for part in parts]), device)
