"""Turns target logits into verdicts: how many tokens of each draft are accepted, and the token after them.

Dispatches the rows of the ragged batch to three rules (greedy, coupled, rejection), each applied to all its
sequences at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import starmap
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.algorithms.rejection import (
    Acceptance,
    equal_prefixes,
    longest_equal_prefix,
)
from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.protocols import DraftBlock
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.verdicts.coupled_draw import sample_coupled
from dspark_core.engine.verdicts.greedy_draw import greedy_tokens
from dspark_core.engine.verdicts.rejection_draw import accept_rejection
from dspark_core.records import Verification

NO_BLOCK = DraftBlock("")
"""Nothing was drafted."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """One sequence's part in a round. Without a block it only samples its next token."""

    sequence: SequenceState
    block: DraftBlock = NO_BLOCK
    verify_length: int = 0

    @property
    def draft_token_ids(self) -> tuple[int, ...]:
        """The scheduled prefix, which is verified."""
        return self.block.token_ids[: self.verify_length]

    @property
    def drafted(self) -> int:
        return len(self.block.token_ids)


@dataclass(frozen=True, slots=True)
class ShapedRows:
    """Rows of logits of a proposal whose request needs more than sampling (`SequenceState.shaped`)."""

    index: int
    """Index of the proposal."""
    proposal: Proposal
    rows: slice


def shaped_rows(proposals: Sequence[Proposal]) -> list[ShapedRows]:
    """Usually none; a round then pays only for one check per proposal."""
    shaped, start = [], 0
    for index, proposal in enumerate(proposals):
        end = start + 1 + proposal.verify_length
        if proposal.sequence.shaped:
            shaped.append(ShapedRows(index, proposal, slice(start, end)))
        start = end
    return shaped


@dataclass(frozen=True, slots=True)
class Verdict:
    accepted: int
    next_token_id: int


_Outcome = Acceptance | list[tuple[int, int]]
"""Accepted draft tokens and next token of each request: as tensors, or as numbers if already on the host."""


_NO_TOKENS, _NO_PROBABILITIES = torch.zeros((0, 1), dtype=torch.int64), torch.zeros((0, 1))


class _Rule(Enum):
    GREEDY = "greedy"
    COUPLED = "coupled"
    REJECTION = "rejection"


class Acceptor:
    def __init__(self, generator: torch.Generator) -> None:
        """`generator` is used only for unseeded rejection sampling."""
        self._generator = generator

    @torch.inference_mode()
    def accept(self, logits: Tensor, proposals: Sequence[Proposal]) -> list[Verdict]:
        """logits [sum of (1 + verify_length), vocab], rows in the order of the proposals.

        Logits on a GPU are judged there; only the verdicts are read back.
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
            outcome = self._rules[rule](self, rows, of_rule)
            if isinstance(outcome, Acceptance):
                outcomes.append(outcome)
                order.extend(members)
            else:
                verdicts.update(zip(members, starmap(Verdict, outcome), strict=True))
        if outcomes:
            verdicts.update(zip(order, _read(outcomes), strict=True))
        return [verdicts[index] for index in range(len(proposals))]

    def _greedy(self, logits: Tensor, proposals: Sequence[Proposal]) -> _Outcome:
        return _accept_equal(greedy_tokens(logits), proposals)

    def _coupled(self, logits: Tensor, proposals: Sequence[Proposal]) -> _Outcome:
        """The target samples every row with the request's noise; drafts are accepted while equal to that."""
        rows = torch.tensor([1 + p.verify_length for p in proposals])
        seeds = torch.tensor([p.sequence.noise_seed for p in proposals]).repeat_interleave(rows)
        # Row i of a proposal decides the token at absolute position len(tokens) + i.
        first = torch.tensor([len(p.sequence.tokens) for p in proposals]) - (rows.cumsum(0) - rows)
        positions = first.repeat_interleave(rows) + torch.arange(len(logits))
        seeds, positions = to_device(seeds, logits.device), to_device(positions, logits.device)
        params = [p.sequence.request.sampling for p in proposals for _ in range(1 + p.verify_length)]
        return _accept_equal(sample_coupled(logits, params, seeds, positions), proposals)

    def _rejection(self, logits: Tensor, proposals: Sequence[Proposal]) -> _Outcome:
        q_ids, q_probabilities = _draft_laws(proposals, logits.device)
        params = [p.sequence.request.sampling for p in proposals]
        return accept_rejection(
            logits,
            params,
            _draft_ids(proposals),
            q_ids,
            q_probabilities,
            [p.verify_length for p in proposals],
            self._generator,
        )

    _rules: ClassVar[dict[_Rule, Callable[[Acceptor, Tensor, Sequence[Proposal]], _Outcome]]] = {
        _Rule.GREEDY: _greedy,
        _Rule.COUPLED: _coupled,
        _Rule.REJECTION: _rejection,
    }


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


def _read(outcomes: Sequence[Acceptance]) -> list[Verdict]:
    """Reads all outcomes in one transfer: this synchronises with the GPU."""
    decided = torch.stack(
        (torch.cat([o.accepted for o in outcomes]), torch.cat([o.next_token_ids for o in outcomes]))
    )
    return list(map(Verdict, *decided.tolist()))


def _accept_equal(samples: Tensor, proposals: Sequence[Proposal]) -> _Outcome:
    """samples [rows]: the target's own tokens. Drafts are accepted while equal to them."""
    drafts, lengths = _draft_ids(proposals), [proposal.verify_length for proposal in proposals]
    if samples.device.type == "cpu":  # plain Python is faster here than operators
        return equal_prefixes(samples.tolist(), drafts, lengths)
    ids, counts = (to_device(torch.tensor(n, dtype=torch.int64), samples.device) for n in (drafts, lengths))
    return longest_equal_prefix(samples, ids, counts)


def _draft_ids(proposals: Sequence[Proposal]) -> list[int]:
    return [token_id for proposal in proposals for token_id in proposal.draft_token_ids]


def _draft_laws(proposals: Sequence[Proposal], device: torch.device) -> tuple[Tensor, Tensor]:
    """The draft distributions, flattened over sequences: [drafts, k] token ids and probabilities."""
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
        return to_device(_NO_TOKENS, device), to_device(_NO_PROBABILITIES, device)
    return _gathered(token_ids, device), _gathered(probabilities, device)


def _gathered(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Concatenates [.., k] tensors of any k on the device, padding narrower ones with zeros. Those of a
    drafter on the same device are not copied to it."""
    if len(parts) == 1:
        return to_device(parts[0], device)
    if len({part.device for part in parts}) > 1:
        parts = [to_device(part, device) for part in parts]
    widest = max(part.shape[1] for part in parts)
    return to_device(torch.cat([F.pad(part, (0, widest - part.shape[1])) for part in parts]), device)
