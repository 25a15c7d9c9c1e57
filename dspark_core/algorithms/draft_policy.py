"""Stops drafting for requests for which it does not pay, and tries them again later.

A request's gain from drafts is estimated from past rounds only, so the decision cannot bias the
output. A request is in one of three states:

    DRAFTING --not worth it for PATIENCE rounds--> PAUSED
    PAUSED   --worth it again, or waited `backoff` rounds--> PROBING
    PROBING  --PROBE_ROUNDS drafts later--> DRAFTING if worth it, else PAUSED with twice the backoff

Requests of one group (the same kind of sampling) behave alike, so a new request starts from its group's
estimate: paused while the group is waiting, as a probe once it has waited. Otherwise every short answer would
pay for finding out again. Only the first request of an unknown group starts by drafting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from dspark_core.algorithms.drafting_choice import better_looked_up, worth_drafting
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.single_request import better_looked_up_alone, worth_drafting_alone
from dspark_core.algorithms.step_surface import Floats
from dspark_core.records import RequestSurvival

PATIENCE = 3
PROBE_ROUNDS = 2
FIRST_BACKOFF = 16
MAX_BACKOFF = 256
RATE = 0.15
"""Weight of the newest round in a request's estimated gain."""
GROUP_RATE = 0.02
TRUST_MEMORY = 0.95
"""Decay per drafted round of the promised and accepted token counts that trust is computed from."""
TRUST_PRIOR = 2.0
"""Tokens, both promised and accepted, that a group starts with."""
PROBED_SHARE = 8
"""When a group has waited, one in this many of its paused requests is probed, at least one. Drafts for more
requests cost more, and with more probes one is likelier to look worthwhile by luck."""
LEAST_GAIN = 0.05
"""Minimum relative gain of a draft, over plain decoding and over looked-up tokens, for a request that runs
alone. It covers costs that step times miss (deciding a sampled row costs more than the greedy one that was
profiled; after a pause the drafter catches up), and gains that seem better by luck."""
LOOK_ROUNDS = 5
"""While all requests are paused, whether any is worth a draft again is computed once in this many rounds:
without drafts the estimated gains do not change, and costs change slowly. In the rounds between, requests
that have looked-up tokens use them. Odd, or one of two alternating cohorts would never be evaluated."""
UNKNOWN_GAIN, UNKNOWN_VERIFIED = 1.0, 2.0
"""Assumed gain and verified tokens of a draft, compared with looked-up tokens, before any was observed."""
MAX_REMEMBERED = 4096
"""Number of sequences remembered; the least recently used are forgotten."""


class DraftState(Enum):
    DRAFTING = "drafting"
    PAUSED = "paused"
    PROBING = "probing"


# Compared for every request in every round: an enum attribute lookup costs more than the comparison.
_DRAFTING, _PAUSED, _PROBING = DraftState.DRAFTING, DraftState.PAUSED, DraftState.PROBING


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCandidate:
    """A request for which the policy decides whether to draft."""

    sequence_id: str
    group: str = ""
    """Requests of one group, e.g. sampled the same way, are expected to gain alike. Groups are never
    forgotten, so there must be few."""
    draftable: bool = True
    """False: it takes part in the round but must not use a draft."""
    floor_tokens_per_second: float | None = None
    context_tokens: int = 0
    lookup_survival: tuple[float, ...] = ()
    """Survival a_1, a_2, ... of tokens looked up for it, which cost nothing to draft; empty: none."""


@dataclass(slots=True)
class _Yield:
    """Running means over drafted rounds."""

    promised: float
    """Expected accepted draft tokens, i.e. the sum of their survival."""
    verified: float

    def learn(self, promised: float, verified: float, rate: float) -> None:
        self.promised += rate * (promised - self.promised)
        self.verified += rate * (verified - self.verified)


@dataclass(slots=True)
class _Group:
    means: _Yield | None = None
    accepted: float = 0.0
    promised: float = 0.0
    """Decayed counts of draft tokens accepted and promised; their ratio corrects later promises."""
    backoff: int = FIRST_BACKOFF
    wait: int = 0
    """Rounds until a paused request of this group may be probed; counts down while there is one."""
    probes_left: int = 0
    """Paused requests that may still be probed this round for having waited."""
    hopeful: bool = False
    """The last probe found drafts worthwhile, so the others are probed soon, half of them at a time."""

    @property
    def trust(self) -> float:
        return (self.accepted + TRUST_PRIOR) / (self.promised + TRUST_PRIOR)


@dataclass(slots=True)
class _Sequence:
    group: str
    means: _Yield | None
    state: DraftState = DraftState.DRAFTING
    unworthy_rounds: int = 0
    backoff: int = FIRST_BACKOFF
    wait: int = 0
    probes_left: int = 0
    asked: bool = False
    """Whether the last decision was to draft for it."""


@dataclass(slots=True)
class DraftPolicy:
    """Every round goes to `learn`; `choose` is called before a round, though not necessarily before each."""

    _groups: dict[str, _Group] = field(default_factory=dict)
    _sequences: dict[str, _Sequence] = field(default_factory=dict)
    _round: int = 0
    _unasked: int = 0
    """Rounds finished since the last choice."""

    def state(self, sequence_id: str) -> DraftState | None:
        """None: unknown or forgotten."""
        known = self._sequences.get(sequence_id)
        return None if known is None else known.state

    def steady(self, requests: Sequence[RequestSurvival]) -> bool:
        """Whether the drafter's pass was a steady one: no drafted request was a probe after a pause, and none
        was asked for in vain because the drafter was still catching up on its context."""
        known = [(request, self._sequences.get(request.sequence_id)) for request in requests]
        return not any(
            member is None or member.state is not _DRAFTING
            if request.drafted
            else member is not None and member.asked and not request.survival
            for request, member in known
        )

    def choose(
        self, candidates: Sequence[DraftCandidate], round_time: RoundTimeModel, price: float = 0.0
    ) -> tuple[bool, ...]:
        """Whether to draft for each candidate this round. `price`: see `draft_price`."""
        members = [self._member(candidate) for candidate in candidates]
        elapsed, self._unasked = max(self._unasked, 1), 0
        self._round += elapsed
        looked_up: Sequence[bool] = [bool(candidate.lookup_survival) for candidate in candidates]
        worthy: Sequence[bool] = (False,) * len(members)
        looks = any(candidate.draftable for candidate in candidates)
        if looks and (self._round % LOOK_ROUNDS < elapsed or not _rests(candidates, members)):
            gains, verified = self._expected(members)
            looked_up = self._looked_up(candidates, members, gains, verified, round_time, price)
            if not all(looked_up):
                worthy = self._worthy(candidates, members, gains, verified, round_time, price)
        paused = [
            member.group
            for candidate, member in zip(candidates, members, strict=True)
            if candidate.draftable and member.state is _PAUSED
        ]
        for name, count in Counter(paused).items():
            group = self._groups[name]
            group.wait = max(group.wait - elapsed, 0)
            share = 2 if group.hopeful else PROBED_SHARE
            group.probes_left = max(count // share, 1) if group.wait == 0 else 0
        for candidate, member, worth, free in zip(candidates, members, worthy, looked_up, strict=True):
            member.asked = candidate.draftable and not free and self._advance(member, worth, elapsed)
        return tuple([member.asked for member in members])

    def prospects(self, candidates: Sequence[DraftCandidate]) -> tuple[Floats, Floats]:
        """Expected accepted and verified draft tokens of each candidate if drafted for -> two [candidates].
        Unknown requests get the assumed values; those that must not use a draft get 0."""
        means = [self._means(candidate) for candidate in candidates]
        usable = np.array([candidate.draftable for candidate in candidates], dtype=np.float64)
        return usable * [gain for gain, _ in means], usable * [verified for _, verified in means]

    def _means(self, candidate: DraftCandidate) -> tuple[float, float]:
        known, group = self._sequences.get(candidate.sequence_id), self._groups.get(candidate.group)
        means = None if known is None else known.means
        if group is not None and means is None:
            means = group.means
        if group is None or means is None:
            return UNKNOWN_GAIN, UNKNOWN_VERIFIED
        return means.promised * group.trust, means.verified

    def learn(self, requests: Sequence[RequestSurvival]) -> None:
        """Learns from the drafts of a finished round; requests without a draft are ignored."""
        self._unasked += bool(requests)
        for request in requests:
            member = self._sequences.get(request.sequence_id)
            if member is None or not request.drafted:
                continue
            group = self._groups[member.group]
            promised, verified = sum(request.survival[: request.verify_length]), float(request.verify_length)
            group.accepted = TRUST_MEMORY * group.accepted + request.accepted
            group.promised = TRUST_MEMORY * group.promised + promised
            if group.means is None:
                group.means = _Yield(promised, verified)
            if member.means is None:
                member.means = _Yield(promised, verified)
            group.means.learn(promised, verified, GROUP_RATE)
            member.means.learn(promised, verified, RATE)

    def _member(self, candidate: DraftCandidate) -> _Sequence:
        known = self._sequences.pop(candidate.sequence_id, None)
        if known is None:
            group = self._groups.setdefault(candidate.group, _Group())
            means = None if group.means is None else _Yield(group.means.promised, group.means.verified)
            known = _Sequence(candidate.group, means, backoff=group.backoff)
            if group.wait > 0:  # its group is waiting, so it waits too
                known.state, known.wait = DraftState.PAUSED, group.wait
            elif means is not None:
                known.state, known.probes_left = DraftState.PROBING, PROBE_ROUNDS
        self._sequences[candidate.sequence_id] = known  # reinserted last, as most recently used
        if len(self._sequences) > MAX_REMEMBERED:
            del self._sequences[next(iter(self._sequences))]
        return known

    def _worthy(
        self,
        candidates: Sequence[DraftCandidate],
        members: Sequence[_Sequence],
        gains: Sequence[float],
        verified: Sequence[float],
        round_time: RoundTimeModel,
        price: float,
    ) -> Sequence[bool]:
        """Evaluates all requests afresh, whatever their state; unknown ones are worth trying."""
        unknown = [member.means is None for member in members]
        context = sum([candidate.context_tokens for candidate in candidates])
        worthy: Sequence[bool]
        if len(members) == 1:
            usable = candidates[0].draftable
            gain, length = usable * gains[0], usable * verified[0]
            worthy = [worth_drafting_alone(gain, length, round_time, context, price, least_gain=LEAST_GAIN)]
        else:
            draftable = np.array([candidate.draftable for candidate in candidates], dtype=np.bool_)
            chosen = worth_drafting(
                np.array(gains) * draftable, np.array(verified) * draftable, round_time, context, price
            )
            worthy = chosen.tolist()
        plain = round_time.seconds(max(len(members), 1), max(len(members), 1), context)
        # A draft is also worthwhile for a speed floor that plain rounds miss.
        return [
            new or worth or (candidate.floor_tokens_per_second or 0.0) * plain > 1.0
            for candidate, new, worth in zip(candidates, unknown, worthy, strict=True)
        ]

    def _expected(self, members: Sequence[_Sequence]) -> tuple[list[float], list[float]]:
        """Expected accepted and verified draft tokens of each member; 0 if unknown."""
        gains = [m.means.promised * self._groups[m.group].trust if m.means else 0.0 for m in members]
        verified = [member.means.verified if member.means else 0.0 for member in members]
        return gains, verified

    @staticmethod
    def _looked_up(
        candidates: Sequence[DraftCandidate],
        members: Sequence[_Sequence],
        gains: Sequence[float],
        verified: Sequence[float],
        round_time: RoundTimeModel,
        price: float,
    ) -> Sequence[bool]:
        """Which requests have looked-up tokens worth more than a draft; does not change the state."""
        lookups = [candidate.lookup_survival for candidate in candidates]
        if not any(lookups):
            return (False,) * len(candidates)
        context = sum(candidate.context_tokens for candidate in candidates)
        if len(members) == 1:
            gain, length = gains[0], verified[0]
            if members[0].means is None:
                gain, length = UNKNOWN_GAIN, UNKNOWN_VERIFIED
            alone = better_looked_up_alone(
                lookups[0], gain, length, round_time, context, price, least_gain=LEAST_GAIN
            )
            return (alone,)
        unknown = np.array([member.means is None for member in members])
        better: list[bool] = better_looked_up(
            lookups,
            np.where(unknown, UNKNOWN_GAIN, gains),
            np.where(unknown, UNKNOWN_VERIFIED, verified),
            round_time,
            context,
            price,
        ).tolist()
        return better

    def _advance(self, member: _Sequence, worth: bool, elapsed: int) -> bool:
        """One step of the state machine, `elapsed` rounds after the last -> whether to draft."""
        group = self._groups[member.group]
        if member.state is _DRAFTING:
            member.unworthy_rounds = 0 if worth else member.unworthy_rounds + 1
            if member.unworthy_rounds >= PATIENCE:
                self._pause(member, group)
        elif member.state is _PAUSED:
            if member.wait > 0:  # of many paused requests, most are past it, and `max` takes longer
                member.wait = max(member.wait - elapsed, 0)
            if not worth:
                if member.wait > 0 or group.probes_left <= 0:
                    return False
                group.probes_left -= 1
                # The rest of the group waits for the outcome of this probe.
                group.wait = PROBE_ROUNDS + 1 if group.hopeful else group.backoff
            member.state, member.probes_left = _PROBING, PROBE_ROUNDS
        if member.state is _PROBING:
            if member.probes_left > 0:
                member.probes_left -= 1
                return True
            if worth:
                member.state, member.unworthy_rounds = _DRAFTING, 0
                member.backoff = group.backoff = FIRST_BACKOFF
                group.hopeful, group.wait = True, 0
            else:
                member.backoff = min(2 * member.backoff, MAX_BACKOFF)
                self._pause(member, group)
        return member.state is _DRAFTING

    @staticmethod
    def _pause(member: _Sequence, group: _Group) -> None:
        member.state, member.wait, group.hopeful = _PAUSED, member.backoff, False
        group.backoff = member.backoff
        group.wait = member.backoff


def _rests(candidates: Sequence[DraftCandidate], members: Sequence[_Sequence]) -> bool:
    """Whether all requests are paused and none has a speed floor."""
    paused = all(member.state is _PAUSED for member in members)
    return paused and not any(candidate.floor_tokens_per_second for candidate in candidates)
