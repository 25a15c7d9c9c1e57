"""Features computed on the fly by a live target: training without a cache on disk.

A worker thread runs the target at most `ahead` steps ahead of the trainer. A step's sequences are
never batched with those of other steps, so a resumed run computes the same bytes in any dtype.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspark_core.errors import ConfigError
from dspark_core.models.decoder import Decoder, check_tap_layers
from dspark_core.training.data.conversations import Conversation, Conversations
from dspark_core.training.data.prefill import compute_packed, plan_packs
from dspark_core.training.features import FeatureSequence
from dspark_core.training.origin import FeatureOrigin

_POLL_SECONDS = 0.1
"""How soon the worker notices that it should stop."""
_COUNTED_AT_A_TIME = 256


class FeatureStream:
    """A `SequenceSource` whose sequences exist only from the target's pass until their training step."""

    def __init__(
        self,
        decoder: Decoder,
        conversations: Conversations,
        origin: FeatureOrigin,
        *,
        ahead: int = 2,
        pack_tokens: int = 2048,
    ) -> None:
        """`ahead`: steps held in memory besides the one being computed."""
        for name, value in (("ahead", ahead), ("pack_tokens", pack_tokens)):
            if value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        check_tap_layers(origin.tap_layers, decoder.config.num_layers)
        self._decoder = decoder
        self._conversations = conversations
        self._origin = origin
        self._ahead = ahead
        self._pack_tokens = pack_tokens

    @property
    def origin(self) -> FeatureOrigin:
        return self._origin

    def __len__(self) -> int:
        return len(self._conversations)

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[list[FeatureSequence]]:
        results: queue.Queue[_Result] = queue.Queue(maxsize=self._ahead)
        stopping = threading.Event()
        worker = threading.Thread(
            target=self._work, args=(plan, results, stopping), name="feature-stream", daemon=True
        )
        worker.start()
        try:
            while (result := results.get()).sequences is not None:
                yield result.sequences
            if result.error is not None:
                raise result.error
        finally:
            stopping.set()
            worker.join()

    def token_counts(self, vocab_size: int) -> Tensor:
        """Raises ConfigError for a token outside the vocabulary."""
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for start in range(0, len(self), _COUNTED_AT_A_TIME):
            numbers = range(start, min(start + _COUNTED_AT_A_TIME, len(self)))
            for one in self._conversations.get(numbers):
                counts += _token_counts(one, vocab_size)
        return counts

    def _work(
        self, plan: Iterable[Sequence[int]], results: queue.Queue[_Result], stopping: threading.Event
    ) -> None:
        try:
            for numbers in plan:
                if not _offer(results, _Result(self._compute(numbers)), stopping):
                    return
        except Exception as error:  # re-raised in the trainer's thread
            _offer(results, _Result(None, error), stopping)
        else:
            _offer(results, _Result(None), stopping)

    def _compute(self, numbers: Sequence[int]) -> list[FeatureSequence]:
        conversations = self._conversations.get(numbers)
        sequences: list[FeatureSequence] = []
        for pack in plan_packs([len(one) for one in conversations], self._pack_tokens):
            chosen = [conversations[index] for index in pack]
            sequences += compute_packed(self._decoder, chosen, self._origin.tap_layers)
        return [_as_cached(sequence) for sequence in sequences]


@dataclass(frozen=True, slots=True)
class _Result:
    """One step's sequences; None: the end of the plan, or of the work because of `error`."""

    sequences: list[FeatureSequence] | None
    error: Exception | None = None


def _offer(results: queue.Queue[_Result], result: _Result, stopping: threading.Event) -> bool:
    """Wait for room in the queue; False once the consumer has stopped."""
    while not stopping.is_set():
        try:
            results.put(result, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False


def _token_counts(one: Conversation, vocab_size: int) -> Tensor:
    token_ids = torch.tensor(one.prompt_ids + one.answer_ids)
    highest = int(token_ids.max())
    if highest >= vocab_size:
        raise ConfigError(
            f"token id {highest} is outside the target's vocabulary of {vocab_size}: "
            "the answers are of another target"
        )
    return torch.bincount(token_ids, minlength=vocab_size)


def _as_cached(sequence: FeatureSequence) -> FeatureSequence:
    """In the precision a feature cache stores."""
    return replace(sequence, taps=sequence.taps.to(torch.bfloat16), final=sequence.final.to(torch.bfloat16))
