"""What to ask the drafter for: which sequences, which features, and how replies are checked."""

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
from dspark_core.engine.target_engine import TargetEngine
from dspark_core.errors import DraftUnavailableError
from dspark_core.records import SamplingParams, Verification

_log = logging.getLogger(__name__)

PRIMED_POSITIONS, LEAST_PRIMED_POSITIONS = 2048, 64
"""Of context that the drafter has missed, all sequences of a round together, at most: everybody waits while
it takes them in, which must be done well before the deadline (0.2 s where one takes 0.1 ms). The rest follows
in the rounds after. Where a drafter is too slow for so many, half as many are tried, and so on down to the
least: a late round costs a backoff, in which more may be missed than the round has brought."""
FEATURE_BYTES = 32 * 2**20
"""Of features in one round: half of what a message may hold (`services/common/limits.py`), as what else is in
it is small. A message that is larger ends the stream of everybody."""
WIDEST_VALUE_BYTES = 4
"""Of a feature's value, float32, until some were seen."""
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 1.0, 30.0
"""How long no drafts are asked for after some came late: at first, and at most, doubling. A drafter that is
always late so costs one deadline in half a minute."""

_PRIMING = SamplingParams(temperature=0.0)
"""What is drafted from an unfinished context is of no use: the cheapest."""


@dataclass(frozen=True, slots=True)
class DraftRound:
    """Draft blocks by sequence id, and how long the round waited for them."""

    blocks: dict[str, DraftBlock]
    seconds: float
    primed: bool = False
    """The drafter took in context it had missed while nobody asked it, which takes longer."""
    hidden_seconds: float = 0.0
    """What drafting took beyond `seconds`, while the target computed others."""
    compute_seconds: float = 0.0
    """Of both, the drafter's own pass; 0: it did not tell."""
    drafter_id: str = ""


NO_DRAFTS = DraftRound({}, 0.0)
NO_REPLY = DraftReply(())


@dataclass(frozen=True, slots=True)
class Share:
    """Features of positions [start, end) of one sequence, to be sent."""

    sequence: SequenceState
    start: int
    end: int
    divisible: bool
    """The drafter holds all before `start`, so a part from there is of use. Else it takes it whole."""
    complete: bool = True
    """It reaches the anchor, so that the drafter can draft from it."""

    @property
    def rows(self) -> int:
        return self.end - self.start

    def first(self, rows: int) -> Share:
        return self if rows == self.rows else dataclasses.replace(self, end=self.start + rows, complete=False)


@dataclass(slots=True, eq=False)
class DraftFlight:
    """Blocks that were asked for and not waited for yet."""

    shares: Sequence[Share]
    items: Sequence[DraftItem]
    generation: int
    future: Future[DraftReply]
    primed: bool
    asked_at: float
    answered_at: float | None = None
    """Set by whichever thread the answer comes on."""

    @property
    def positions(self) -> int:
        """Whose features were sent."""
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
        self._late: deque[DraftFlight] = deque()
        """Not waited for any more, and owed still; oldest first, as they are answered."""
        self._backoff_seconds = 0.0
        self._rests_until: float | None = None
        self._clock = clock

    @property
    def apart(self) -> bool:
        """Whether drafts are made while the target computes, rather than instead."""
        return self._source.apart

    @property
    def available(self) -> bool:
        """Whether the last round's drafts came."""
        return self._available

    def propose(self, sequences: Sequence[SequenceState]) -> DraftRound:
        """Blocks for those of `sequences` that may use at least one draft token this round.

        Leaving a sequence out costs nothing: its features are neither read nor sent, and its next
        items bring what was missed, at most a window. Who has missed more than fits a round gets no
        block until the last of it was sent.
        """
        wanted = self._usable(sequences)
        if not wanted:
            return NO_DRAFTS
        started = self._clock()
        flight = self._begun(wanted)
        return NO_DRAFTS if flight is None else self._landed(flight, waiting_since=started)

    def begin(self, sequences: Sequence[SequenceState]) -> DraftFlight | None:
        """`propose` that waits for nothing; None: nobody may use a draft, or the drafter was late and is left
        alone for a while. `finish` it before the sequences get another token. As many may be under way as the
        source takes."""
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
        # A round commits a block and its bonus token at most: who has missed more is being primed.
        usual, most = self.block_size + 1, self._most_positions
        shares = portions([self._missed(s, generation) for s in wanted], usual, most, self._primable)
        if not shares:
            return None
        features = self._engine.read_features_of([(s.sequence.pages, s.start, s.end) for s in shares])
        self._position_bytes = features[0].shape[-1] * features[0].element_size()
        items = [self._item(share, rows) for share, rows in zip(shares, features, strict=True)]
        primed = max(share.rows for share in shares) > usual
        asked_at = self._clock()  # what was done until here has held up whoever called
        flight = DraftFlight(shares, items, generation, self._source.propose(items), primed, asked_at)
        flight.future.add_done_callback(lambda _: setattr(flight, "answered_at", self._clock()))
        return flight

    def finish(self, flight: DraftFlight) -> DraftRound:
        """Waits for what is left of the deadline, which began when the drafts were asked for."""
        return self._landed(flight, waiting_since=self._clock())

    def release(self, sequence_ids: Sequence[str]) -> None:
        self._source.release(sequence_ids)

    @property
    def block_size(self) -> int:
        return self._source.geometry.block_size

    @property
    def _most_positions(self) -> int:
        """Whose features fit a round."""
        return self._feature_bytes // max(self._position_bytes, 1)

    def _landed(self, flight: DraftFlight, waiting_since: float) -> DraftRound:
        reply, blocks = self._answer(flight)
        told = reply if blocks else NO_REPLY
        landed_at = self._clock()
        hidden = min(flight.answered_at or landed_at, waiting_since) - flight.asked_at
        return DraftRound(
            blocks,
            landed_at - waiting_since,
            flight.primed,
            max(hidden, 0.0),
            told.compute_seconds,
            told.drafter_id,
        )

    def _answer(self, flight: DraftFlight) -> tuple[DraftReply, dict[str, DraftBlock]]:
        """What came in time, and the blocks of it that may be verified."""
        self._take_late()  # answered before this one, of which it may have the same sequences
        left = flight.asked_at + self._deadline_seconds - self._clock()
        try:
            reply = flight.future.result(timeout=0.0 if self._rests() else max(left, 0.0))
        except TimeoutError:
            self._give_up(flight)
            return NO_REPLY, {}
        except DraftUnavailableError as error:
            self._lost(flight, str(error))
            return NO_REPLY, {}
        if not self._available:
            _log.info("drafts are back")
        self._available = True
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
        """Waits no more for it, nor soon for another: a drafter that is slow now is likely to be so again.
        What it was sent is in its memory all the same, once it answers."""
        self._missing(f"no reply within {self._deadline_seconds} s")
        self._late.append(flight)
        if flight.primed and 2 * flight.positions > self._primable:
            self._primable = max(self._primable // 2, LEAST_PRIMED_POSITIONS)
        if self._rests():
            return  # asked for together with one that was late
        self._backoff_seconds = min(2 * self._backoff_seconds, MAX_BACKOFF_SECONDS) or FIRST_BACKOFF_SECONDS
        self._rests_until = self._clock() + self._backoff_seconds

    def _prime_more(self, flight: DraftFlight) -> None:
        """Twice as much takes twice as long at most, and so comes in time still."""
        took = (flight.answered_at or self._clock()) - flight.asked_at
        if flight.positions >= self._primable and took <= self._deadline_seconds / 2:
            self._primable = min(2 * self._primable, PRIMED_POSITIONS)

    def _take_late(self) -> None:
        """Learns from replies nobody waited for what the drafter holds: priming goes on from there."""
        while self._late and self._late[0].future.done():
            flight = self._late.popleft()
            try:
                self._taken_in(flight, flight.future.result().blocks)
            except DraftUnavailableError as error:
                self._lost(flight, str(error))

    def _taken_in(self, flight: DraftFlight, blocks: Sequence[DraftBlock]) -> None:
        """The drafter has appended what it was sent. Tokens are never taken back, so that holds for as long
        as its state does, which `generation` tells."""
        for share, block in zip(flight.shares, blocks, strict=True):
            share.sequence.drafter_end = share.end
            share.sequence.drafter_generation = -1 if block.needs_context else flight.generation

    def _lost(self, flight: DraftFlight, reason: str) -> None:
        self._missing(reason)
        # Whether the drafter saw this round's features is unknown: prime it again next time.
        for share in flight.shares:
            share.sequence.drafter_generation = -1

    def _missing(self, reason: str) -> None:
        if self._available:
            _log.warning("no drafts, decoding plainly until they are back: %s", reason)
        self._available = False

    def _missed(self, sequence: SequenceState, generation: int) -> Share:
        """What the drafter has not got and may need."""
        held = sequence.drafter_end if sequence.drafter_generation == generation else 0
        start, anchor_position = held, len(sequence.tokens) - 1
        window = self._source.geometry.context_window
        # A window that fits no round can only be reached by appending to what is held.
        if window is not None and window <= self._most_positions:
            start = max(held, anchor_position - window)
        return Share(sequence, start, anchor_position, divisible=start == held)

    def _item(self, share: Share, features: Tensor) -> DraftItem:
        sequence, request = share.sequence, share.sequence.request
        sampling, verification = request.sampling, request.verification
        if verification is Verification.COUPLED:
            sampling = dataclasses.replace(sampling, seed=sequence.noise_seed)
        most_tokens = min(draft_limit(sequence, self.block_size), sequence.useful_draft or self.block_size)
        if not share.complete:  # its anchor is one of the tokens that are known already
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


def portions(missed: Sequence[Share], usual: int, most: int, most_primed: int) -> list[Share]:
    """What of `missed` goes with one round, in the same order: `most` positions in all, of which
    `most_primed` are of sequences that have missed more than the `usual`.

    The others come first, as priming must not take drafts from them; then one after the other is primed, so
    that the first can be drafted for soon.
    """
    if sum([share.rows for share in missed]) <= min(most, most_primed):
        return list(missed)
    room, primable = most, most_primed
    taken: dict[int, Share] = {}
    for index in sorted(range(len(missed)), key=lambda index: missed[index].rows > usual):
        share = missed[index]
        primed = share.rows > usual
        if primed and share.divisible:
            share = share.first(min(share.rows, room, primable))
        # What is not divisible goes alone where it is more than may be primed.
        if primed and (not share.rows or primable < min(share.rows, most_primed)):
            continue
        if share.rows > room:
            continue
        taken[index] = share
        room -= share.rows
        if primed:
            primable = max(primable - share.rows, 0)
    return [taken[index] for index in sorted(taken)]


def _verifiable(item: DraftItem, block: DraftBlock) -> bool:
    """Rejection sampling needs the law a draft was drawn from; without it, decode plainly.

    A drafter that leaves it out must not fail the round of everybody else.
    """
    sampled = item.verification is Verification.REJECTION and not item.sampling.greedy
    return not sampled or not block.token_ids or block.distribution is not None


def draft_limit(sequence: SequenceState, block_size: int) -> int:
    """Most draft tokens worth verifying: the bonus token always follows the last of them."""
    limit = min(block_size, sequence.remaining - 1)
    requested = sequence.request.speculation.max_draft_tokens
    return limit if requested is None else min(limit, requested)
