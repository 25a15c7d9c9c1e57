"""Stops drafting for requests it does not pay for, and tries them again later.

What a request gains by drafts is estimated from rounds that are over, so the decision can bias no
output. A request is in one of three states:

    DRAFTING --not worth it for PATIENCE rounds--> PAUSED
    PAUSED   --worth it again, or waited `backoff` rounds--> PROBING
    PROBING  --PROBE_ROUNDS drafts later--> DRAFTING if worth it, else PAUSED with twice the backoff

Requests of one group (the same kind of sampling) resemble each other: a new one starts from what is
known of its group, paused while the group waits and as a probe once it has waited, or every short answer
would pay to find out. Only who finds a group unknown starts by drafting.
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
"""Weight of a request's newest round in what it is thought to gain."""
GROUP_RATE = 0.02
TRUST_MEMORY = 0.95
"""What of the comparison of promised and accepted tokens is kept with each drafted round."""
TRUST_PRIOR = 2.0
"""Tokens, both promised and accepted, that a group starts with."""
PROBED_SHARE = 8
"""When a group has waited, one in so many of its paused requests is tried, and one at least: a draft costs
more the more are drafted for, and the more are tried the likelier is one that is worth it by luck alone."""
LEAST_GAIN = 0.05
"""What drafts have to promise a request that is alone. Less is lost in what step times do not tell: a sampled
row costs more to decide than the greedy one that was profiled."""
LOOK_ROUNDS = 5
"""While everybody is paused, whether someone would be worth a draft again is computed every so many rounds:
what rounds gain does not change without drafts, and what they cost changes slowly. In the others whoever has
looked-up tokens is left with them. Odd, or of two cohorts that take turns one would never be looked at."""
UNKNOWN_GAIN, UNKNOWN_VERIFIED = 1.0, 2.0
"""What a draft is thought to bring and verify while none was seen, against looked-up tokens."""
MAX_REMEMBERED = 4096
"""Sequences; those asked about least recently are forgotten."""


class DraftState(Enum):
    DRAFTING = "drafting"
    PAUSED = "paused"
    PROBING = "probing"


# Asked of every request every round: looking a member up in its enum takes longer than comparing it.
_DRAFTING, _PAUSED, _PROBING = DraftState.DRAFTING, DraftState.PAUSED, DraftState.PROBING


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftCandidate:
    """A request that is about to be drafted for, or not."""

    sequence_id: str
    group: str = ""
    """Requests of one group are expected to gain alike; for example how they are sampled. Groups are
    never forgotten: there must be few."""
    draftable: bool = True
    """False: it takes part in the round, but may not use a draft."""
    floor_tokens_per_second: float | None = None
    context_tokens: int = 0
    lookup_survival: tuple[float, ...] = ()
    """a_1, a_2, ... of tokens that were looked up for it, at no cost; empty: none."""


@dataclass(slots=True)
class _Yield:
    """Running means over drafted rounds."""

    promised: float
    """Accepted draft tokens by their survival."""
    verified: float

    def learn(self, promised: float, verified: float, rate: float) -> None:
        self.promised += rate * (promised - self.promised)
        self.verified += rate * (verified - self.verified)


@dataclass(slots=True)
class _Group:
    means: _Yield | None = None
    accepted: float = 0.0
    promised: float = 0.0
    """Draft tokens accepted and promised, fading: their ratio corrects promises."""
    backoff: int = FIRST_BACKOFF
    wait: int = 0
    """Rounds until a paused request of this group may be probed; they count while there is one."""
    probes_left: int = 0
    """How many more may be probed for having waited, this round."""
    hopeful: bool = False
    """The last probe found a request worth its drafts: the others are tried soon, half of them at a time."""

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
    """Whether it was to be drafted for when that was decided last."""


@dataclass(slots=True)
class DraftPolicy:
    """Feed it every round by `learn`; `choose` is asked before a round, not necessarily before each."""

    _groups: dict[str, _Group] = field(default_factory=dict)
    _sequences: dict[str, _Sequence] = field(default_factory=dict)
    _round: int = 0
    _unasked: int = 0
    """Rounds that ended since the last choice."""

    def state(self, sequence_id: str) -> DraftState | None:
        """None: not known (any more)."""
        known = self._sequences.get(sequence_id)
        return None if known is None else known.state

    def steady(self, requests: Sequence[RequestSurvival]) -> bool:
        """Whether all that were drafted for are so round by round, rather than as a probe after a pause, and
        none was asked for and got nothing: the drafter was still taking in its context, beside the others."""
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
        """Whether to draft for each, this round. `price`: of drafter time to others, see `draft_price`."""
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
        """Draft tokens that each may expect to be accepted, and verified, if drafted for -> two [candidates].
        Of whom nothing is known, what is assumed of the unknown; 0 for those who may not use a draft."""
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
        """What the drafts of a round brought; requests without a draft teach nothing."""
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
            if group.wait > 0:  # others of its kind are waiting: it waits with them
                known.state, known.wait = DraftState.PAUSED, group.wait
            elif means is not None:
                known.state, known.probes_left = DraftState.PROBING, PROBE_ROUNDS
        self._sequences[candidate.sequence_id] = known  # last: asked about most recently
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
        """Of everyone, as if all were to be decided anew; what is not known is worth finding out."""
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
        # A floor that rounds without drafts do not hold is worth a draft too.
        return [
            new or worth or (candidate.floor_tokens_per_second or 0.0) * plain > 1.0
            for candidate, new, worth in zip(candidates, unknown, worthy, strict=True)
        ]

    def _expected(self, members: Sequence[_Sequence]) -> tuple[list[float], list[float]]:
        """Draft tokens that each may expect to be accepted, and verified; 0 where nothing is known."""
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
        """Who has looked-up tokens that are worth more than a draft; it leaves the state as it is."""
        lookups = [candidate.lookup_survival for candidate in candidates]
        if not any(lookups):
            return (False,) * len(candidates)
        context = sum(candidate.context_tokens for candidate in candidates)
        if len(members) == 1:
            gain, length = gains[0], verified[0]
            if members[0].means is None:
                gain, length = UNKNOWN_GAIN, UNKNOWN_VERIFIED
            return (better_looked_up_alone(lookups[0], gain, length, round_time, context, price),)
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
        """One step of the state machine, so many rounds after the last -> whether to draft."""
        group = self._groups[member.group]
        if member.state is _DRAFTING:
            member.unworthy_rounds = 0 if worth else member.unworthy_rounds + 1
            if member.unworthy_rounds >= PATIENCE:
                self._pause(member, group)
        elif member.state is _PAUSED:
            member.wait = max(member.wait - elapsed, 0)
            if not worth:
                if member.wait > 0 or group.probes_left <= 0:
                    return False
                group.probes_left -= 1
                # The others wait for what this one finds.
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
    """Whether nothing but waiting goes on: all are paused, and none was promised a speed."""
    paused = all(member.state is _PAUSED for member in members)
    return paused and not any(candidate.floor_tokens_per_second for candidate in candidates)
