"""What to ask the drafter for: which sequences, which features, and how replies are checked."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from torch import Tensor

from dspark_core.engine.protocols import DraftBlock, DraftItem, DraftReply, DraftSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.target_engine import TargetEngine
from dspark_core.errors import DraftUnavailableError
from dspark_core.records import Verification

_log = logging.getLogger(__name__)


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


@dataclass(slots=True, eq=False)
class DraftFlight:
    """Blocks that were asked for and not waited for yet."""

    wanted: Sequence[SequenceState]
    items: Sequence[DraftItem]
    generation: int
    future: Future[list[DraftBlock]]
    primed: bool
    asked_at: float
    answered_at: float | None = None
    """Set by whichever thread the answer comes on."""


class Drafting:
    """Talks to a `DraftSource` on behalf of the round loop; losing it costs speed, never tokens."""

    def __init__(
        self,
        source: DraftSource,
        engine: TargetEngine,
        *,
        deadline_seconds: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._source = source
        self._engine = engine
        self._deadline_seconds = deadline_seconds
        self._available = True
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
        item brings what was missed, at most a window, in one append.
        """
        wanted = self._usable(sequences)
        if not wanted:
            return NO_DRAFTS
        started = self._clock()
        return self._landed(self._begun(wanted), waiting_since=started)

    def begin(self, sequences: Sequence[SequenceState]) -> DraftFlight | None:
        """`propose` that waits for nothing; None: nobody may use a draft. `finish` it before the sequences
        get another token. As many may be under way as the source takes."""
        wanted = self._usable(sequences)
        return self._begun(wanted) if wanted else None

    def _usable(self, sequences: Sequence[SequenceState]) -> list[SequenceState]:
        return [s for s in sequences if s.request.speculation.enabled and draft_limit(s, self.block_size) > 0]

    def _begun(self, wanted: Sequence[SequenceState]) -> DraftFlight:
        generation = self._source.generation
        starts = [self._features_start(sequence, generation) for sequence in wanted]
        spans = [(s.pages, start, len(s.tokens) - 1) for s, start in zip(wanted, starts, strict=True)]
        features = self._engine.read_features_of(spans)
        items = [self._item(*parts) for parts in zip(wanted, starts, features, strict=True)]
        # A round commits a block and its bonus token at most.
        missed = (len(s.tokens) - 1 - start for s, start in zip(wanted, starts, strict=True))
        primed = max(missed) > self.block_size + 1
        asked_at = self._clock()  # what was done until here has held up whoever called
        flight = DraftFlight(wanted, items, generation, self._source.propose(items), primed, asked_at)
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

    def _landed(self, flight: DraftFlight, waiting_since: float) -> DraftRound:
        blocks = self._answer(flight)
        landed_at = self._clock()
        hidden = min(flight.answered_at or landed_at, waiting_since) - flight.asked_at
        told = flight.future if isinstance(flight.future, DraftReply) and blocks else DraftReply()
        return DraftRound(
            blocks,
            landed_at - waiting_since,
            flight.primed,
            max(hidden, 0.0),
            told.compute_seconds,
            told.drafter_id,
        )

    def _answer(self, flight: DraftFlight) -> dict[str, DraftBlock]:
        left = flight.asked_at + self._deadline_seconds - self._clock()
        try:
            blocks = flight.future.result(timeout=max(left, 0.0))
        except (DraftUnavailableError, TimeoutError) as error:
            flight.future.cancel()  # nobody will look at it any more
            self._lost(flight.wanted, error)
            return {}
        if not self._available:
            _log.info("drafts are back")
        self._available = True
        for sequence, item, block in zip(flight.wanted, flight.items, blocks, strict=True):
            sequence.drafter_end = item.anchor_position
            sequence.drafter_generation = -1 if block.needs_context else flight.generation
        pairs = zip(flight.items, blocks, strict=True)
        return {block.sequence_id: block for item, block in pairs if _verifiable(item, block)}

    def _lost(self, wanted: Sequence[SequenceState], error: Exception) -> None:
        if self._available:
            reason = str(error) or f"no reply within {self._deadline_seconds} s"
            _log.warning("no drafts, decoding plainly until they are back: %s", reason)
        self._available = False
        # Whether the drafter saw this round's features is unknown: prime it again next time.
        for sequence in wanted:
            sequence.drafter_generation = -1

    def _features_start(self, sequence: SequenceState, generation: int) -> int:
        """The first position whose feature the drafter has not got and may need."""
        start = sequence.drafter_end if sequence.drafter_generation == generation else 0
        window = self._source.geometry.context_window
        return start if window is None else max(start, len(sequence.tokens) - 1 - window)

    def _item(self, sequence: SequenceState, start: int, features: Tensor) -> DraftItem:
        anchor_position = len(sequence.tokens) - 1
        sampling = sequence.request.sampling
        if sequence.request.verification is Verification.COUPLED:
            sampling = dataclasses.replace(sampling, seed=sequence.noise_seed)
        return DraftItem(
            sequence_id=sequence.sequence_id,
            anchor_token_id=sequence.tokens[-1],
            anchor_position=anchor_position,
            features_start=start,
            features=features,
            token_ids=tuple(sequence.tokens[start:anchor_position]),
            sampling=sampling,
            verification=sequence.request.verification,
            most_tokens=min(draft_limit(sequence, self.block_size), sequence.useful_draft or self.block_size),
        )


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
