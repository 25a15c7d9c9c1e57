"""Asks the drafter for drafts: chooses sequences and features to send, and checks the replies."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from dspark_core.engine.protocols import DraftBlock, DraftItem, DraftReply, DraftSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import DraftUnavailableError
from dspark_core.records import SamplingParams, Verification

_log = logging.getLogger(__name__)

PRIMED_POSITIONS, LEAST_PRIMED_POSITIONS = 2048, 64
"""Limit on positions primed per round, over all sequences. The whole round waits for the drafter to take them
in, which must end well before the deadline (0.2 s at 0.1 ms each); the rest follows in later rounds. If the
drafter is too slow the limit is halved, down to the second value: a late round costs a backoff, during which
more context may be missed than the round delivered."""
FEATURE_BYTES = 32 * 2**20
"""Limit on features per round, half of a message's limit (`services/common/limits.py`); its other fields are
small. A message that is too large ends the stream for every sequence."""
WIDEST_VALUE_BYTES = 4
"""Assumed size of a feature value, float32, until features have been read."""
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0
"""How long no drafts are requested after a late reply: at first and at most, doubling in between. A drafter
that is always late thus costs one deadline every half minute."""
OUTAGE_SECONDS = 1.0
"""Drafts missing for less are not worth a warning: a stream to a drafter is opened anew every few minutes."""

_PRIMING = SamplingParams(temperature=0.0)
"""Drafts from an incomplete context are discarded, so they use the cheapest sampling."""


@dataclass(frozen=True, slots=True)
class DraftRound:
    """Draft blocks by sequence id, and how long the round waited for them."""

    blocks: dict[str, DraftBlock]
    seconds: float
    primed: bool = False
    """The drafter also took in context it had missed, which takes longer."""
    hidden_seconds: float = 0.0
    """Drafting time in addition to `seconds`, hidden behind the target's work for other requests."""
    compute_seconds: float = 0.0
    """Part of both that the drafter's own pass took; 0 if unknown."""
    drafter_id: str = ""


NO_DRAFTS = DraftRound({}, 0.0)
NO_REPLY = DraftReply(())


@dataclass(frozen=True, slots=True)
class Share:
    """Positions [start, end) of one sequence whose features are to be sent."""

    sequence: SequenceState
    start: int
    end: int
    divisible: bool
    """The drafter holds everything before `start`, so a leading part can be sent alone. Otherwise the share
    must be sent whole."""
    complete: bool = True
    """Whether it reaches the anchor, so that the drafter can draft from it."""

    @property
    def rows(self) -> int:
        return self.end - self.start

    def first(self, rows: int) -> Share:
        return self if rows == self.rows else dataclasses.replace(self, end=self.start + rows, complete=False)


@dataclass(slots=True, eq=False)
class DraftFlight:
    """Requested draft blocks that have not been collected yet."""

    shares: Sequence[Share]
    items: Sequence[DraftItem]
    generation: int
    future: Future[DraftReply]
    primed: bool
    asked_at: float
    answered_at: float | None = None
    """Set by the thread on which the reply arrives."""

    @property
    def positions(self) -> int:
        """Number of positions whose features were sent."""
        return sum([share.rows for share in self.shares])


class Drafting:
    """Talks to a `DraftSource` on behalf of the round loop; losing it costs speed, never tokens."""

    def __init__(
        self,
        source: DraftSource,
        engine: TargetEngine,
        *,
        deadline_seconds: float,
        feature_bytes: int = FEATURE_BYTES,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._source = source
        self._engine = engine
        self._deadline_seconds = deadline_seconds
        self._feature_bytes = feature_bytes
        self._position_bytes = source.geometry.feature_size * WIDEST_VALUE_BYTES
        self._primable = PRIMED_POSITIONS
        self._available = True
        self._missing_since = 0.0
        self._warned = False
        self._late: deque[DraftFlight] = deque()
        """Outstanding replies that are no longer waited for; oldest first, the order in which they arrive."""
        self._backoff_seconds = 0.0
        self._rests_until: float | None = None
        self._clock = clock

    @property
    def apart(self) -> bool:
        """Whether drafts can be made while the target computes."""
        return self._source.apart

    @property
    def available(self) -> bool:
        """Whether the last requested drafts arrived in time."""
        return self._available

    def propose(self, sequences: Sequence[SequenceState]) -> DraftRound:
        """Drafts for those of `sequences` that can use at least one draft token this round.

        Leaving a sequence out costs nothing: its features are neither read nor sent, and its next item brings
        what was missed, at most one context window. A sequence that missed more than fits a round gets no
        block until the rest has been sent.
        """
        wanted = self._usable(sequences)
        if not wanted:
            return NO_DRAFTS
        started = self._clock()
        flight = self._begun(wanted)
        return NO_DRAFTS if flight is None else self._landed(flight, waiting_since=started)

    def begin(self, sequences: Sequence[SequenceState]) -> DraftFlight | None:
        """Like `propose` without waiting. Returns None if no sequence can use a draft, or the drafter is
        unavailable or backed off from. Call `finish` before the sequences get another token. The source
        limits how many flights may be open."""
        wanted = self._usable(sequences)
        return self._begun(wanted) if wanted else None

    def _usable(self, sequences: Sequence[SequenceState]) -> list[SequenceState]:
        return [s for s in sequences if s.request.speculation.enabled and draft_limit(s, self.block_size) > 0]

    def _begun(self, wanted: Sequence[SequenceState]) -> DraftFlight | None:
        self._take_late()
        if self._late or self._rests():
            return None
        if not self._source.connected:
            self._missing("no drafter is connected")
            return None
        generation = self._source.generation
        # A round commits at most a block and the bonus token: a sequence that missed more is being primed.
        usual, most = self.block_size + 1, self._max_positions
        shares = portions([self._missed(s, generation) for s in wanted], usual, most, self._primable)
        if not shares:
            return None
        features = self._engine.read_features_of([(s.sequence.pages, s.start, s.end) for s in shares])
        self._position_bytes = features[0].shape[-1] * features[0].element_size()
        items = [self._item(share, rows) for share, rows in zip(shares, features, strict=True)]
        primed = max(share.rows for share in shares) > usual
        asked_at = self._clock()  # the caller has waited for the work so far, so it counts as not hidden
        flight = DraftFlight(shares, items, generation, self._source.propose(items), primed, asked_at)
        flight.future.add_done_callback(lambda _: setattr(flight, "answered_at", self._clock()))
        return flight

    def finish(self, flight: DraftFlight) -> DraftRound:
        """Waits for the rest of the deadline, which began when the drafts were requested."""
        return self._landed(flight, waiting_since=self._clock())

    def release(self, sequence_ids: Sequence[str]) -> None:
        self._source.release(sequence_ids)

    @property
    def block_size(self) -> int:
        return self._source.geometry.block_size

    @property
    def _max_positions(self) -> int:
        """Number of positions whose features fit a round."""
        return self._feature_bytes // max(self._position_bytes, 1)

    def _landed(self, flight: DraftFlight, waiting_since: float) -> DraftRound:
        reply, blocks = self._answer(flight)
        used = reply if blocks else NO_REPLY
        landed_at = self._clock()
        hidden = min(flight.answered_at or landed_at, waiting_since) - flight.asked_at
        return DraftRound(
            blocks,
            landed_at - waiting_since,
            flight.primed,
            max(hidden, 0.0),
            used.compute_seconds,
            used.drafter_id,
        )

    def _answer(self, flight: DraftFlight) -> tuple[DraftReply, dict[str, DraftBlock]]:
        """The reply if it came in time, and those of its blocks that may be verified."""
        self._take_late()  # earlier replies first: they may concern the same sequences
        left = flight.asked_at + self._deadline_seconds - self._clock()
        try:
            reply = flight.future.result(timeout=0.0 if self._rests() else max(left, 0.0))
        except TimeoutError:
            self._give_up(flight)
            return NO_REPLY, {}
        except DraftUnavailableError as error:
            self._lost(flight, str(error))
            return NO_REPLY, {}
        if self._warned:
            _log.info("drafts are back")
        self._available, self._warned = True, False
        self._backoff_seconds, self._rests_until = 0.0, None
        self._prime_more(flight)
        self._taken_in(flight, reply.blocks)
        triples = zip(flight.shares, flight.items, reply.blocks, strict=True)
        return reply, {
            block.sequence_id: block
            for share, item, block in triples
            if share.complete and _verifiable(item, block)
        }

    def _rests(self) -> bool:
        return self._rests_until is not None and self._clock() < self._rests_until

    def _give_up(self, flight: DraftFlight) -> None:
        """Stops waiting and backs off: a drafter that is slow now will probably be slow again. Once the reply
        does arrive, the drafter holds what it was sent."""
        self._missing(f"no reply within {self._deadline_seconds} s")
        self._late.append(flight)
        if flight.primed and 2 * flight.positions > self._primable:
            self._primable = max(self._primable // 2, LEAST_PRIMED_POSITIONS)
        if self._rests():
            return  # requested before an earlier flight turned out to be late
        self._backoff_seconds = min(2 * self._backoff_seconds, MAX_BACKOFF_SECONDS) or FIRST_BACKOFF_SECONDS
        self._rests_until = self._clock() + self._backoff_seconds

    def _prime_more(self, flight: DraftFlight) -> None:
        """Doubles the priming limit if it was used up within half the deadline: twice as much takes at most
        twice as long, which is still in time."""
        took = (flight.answered_at or self._clock()) - flight.asked_at
        if flight.positions >= self._primable and took <= self._deadline_seconds / 2:
            self._primable = min(2 * self._primable, PRIMED_POSITIONS)

    def _take_late(self) -> None:
        """Learns from late replies what the drafter holds, so that priming continues from there."""
        while self._late and self._late[0].future.done():
            flight = self._late.popleft()
            try:
                self._taken_in(flight, flight.future.result().blocks)
            except DraftUnavailableError as error:
                self._lost(flight, str(error))

    def _taken_in(self, flight: DraftFlight, blocks: Sequence[DraftBlock]) -> None:
        """Notes that the drafter has appended what it was sent. Tokens are never rolled back, so this holds
        until the drafter's state is lost, which `generation` shows."""
        for share, block in zip(flight.shares, blocks, strict=True):
            share.sequence.drafter_end = share.end
            share.sequence.drafter_generation = -1 if block.needs_context else flight.generation

    def _lost(self, flight: DraftFlight, reason: str) -> None:
        self._missing(reason)
        # It is unknown whether the drafter received this round's features: re-prime next time.
        for share in flight.shares:
            share.sequence.drafter_generation = -1

    def _missing(self, reason: str) -> None:
        now = self._clock()
        if self._available:
            self._available, self._missing_since = False, now
        if not self._warned and now - self._missing_since >= OUTAGE_SECONDS:
            _log.warning("no drafts, decoding plainly until they are back: %s", reason)
            self._warned = True

    def _missed(self, sequence: SequenceState, generation: int) -> Share:
        """The context that the drafter lacks and may need."""
        held = sequence.drafter_end if sequence.drafter_generation == generation else 0
        start, anchor_position = held, len(sequence.tokens) - 1
        window = self._source.geometry.context_window
        # A window too large for one round must be built up by appending to what the drafter holds.
        if window is not None and window <= self._max_positions:
            start = max(held, anchor_position - window)
        return Share(sequence, start, anchor_position, divisible=start == held)

    def _item(self, share: Share, features: Tensor) -> DraftItem:
        sequence, request = share.sequence, share.sequence.request
        sampling, verification = request.sampling, request.verification
        if verification is Verification.COUPLED:
            sampling = dataclasses.replace(sampling, seed=sequence.noise_seed)
        most_tokens = min(draft_limit(sequence, self.block_size), sequence.useful_draft or self.block_size)
        if not share.complete:  # its "anchor" is an earlier token, whose continuation is known
            sampling, verification, most_tokens = _PRIMING, Verification.REJECTION, 1
        return DraftItem(
            sequence_id=sequence.sequence_id,
            anchor_token_id=sequence.tokens[share.end],
            anchor_position=share.end,
            features_start=share.start,
            features=features,
            token_ids=tuple(sequence.tokens[share.start : share.end]),
            sampling=sampling,
            verification=verification,
            most_tokens=most_tokens,
        )


def portions(missed: Sequence[Share], usual: int, most: int, max_primed: int) -> list[Share]:
    """Selects what to send of `missed` in one round, in the same order: at most `most` positions in total, of
    which at most `max_primed` belong to sequences that missed more than `usual` and so are primed.

    Other sequences are served first: priming must not cost them their drafts. Sequences are then primed one
    after another, so that the first can be drafted for soon.
    """
    if sum([share.rows for share in missed]) <= min(most, max_primed):
        return list(missed)
    room, primable = most, max_primed
    taken: dict[int, Share] = {}
    for index in sorted(range(len(missed)), key=lambda index: missed[index].rows > usual):
        share = missed[index]
        primed = share.rows > usual
        if primed and share.divisible:
            share = share.first(min(share.rows, room, primable))
        # An indivisible share above `max_primed` goes as the only one that is primed.
        if primed and (not share.rows or primable < min(share.rows, max_primed)):
            continue
        if share.rows > room:
            continue
        taken[index] = share
        room -= share.rows
        if primed:
            primable = max(primable - share.rows, 0)
    return [taken[index] for index in sorted(taken)]


def _verifiable(item: DraftItem, block: DraftBlock) -> bool:
    """Whether the block may be verified: rejection sampling needs the distribution it was drawn from.

    A drafter that omits it costs this sequence its drafts, but does not fail the round.
    """
    sampled = item.verification is Verification.REJECTION and not item.sampling.greedy
    return not sampled or not block.token_ids or block.distribution is not None


def draft_limit(sequence: SequenceState, block_size: int) -> int:
    """Most draft tokens worth verifying, given that a bonus token follows the last accepted one."""
    limit = min(block_size, sequence.remaining - 1)
    requested = sequence.request.speculation.max_draft_tokens
    return limit if requested is None else min(limit, requested)
