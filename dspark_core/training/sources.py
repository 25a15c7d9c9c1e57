"""Where a trainer's feature sequences come from: a cache on disk, or a live target (`stream`).

The trainer numbers the sequences of a source 0, 1, ... and decides which of them each step takes
(`sequence_plan`). A source yields them step by step and may work ahead. A step's sequences must depend on
its numbers alone, so that a run resumed at a later step sees the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dspark_core.errors import ConfigError
from dspark_core.training.features import (
    FeatureSequence,
    SequenceRef,
    list_sequences,
    read_sequence,
    read_token_ids,
)
from dspark_core.training.manifest import listed_shards, read_manifest
from dspark_core.training.origin import FeatureOrigin, tap_columns

MIN_ANSWER_TOKENS = 2
"""An anchor and the token after it: with less there is nothing to train on."""


class SequenceSource(Protocol):
    @property
    def origin(self) -> FeatureOrigin | None:
        """None: unknown, for shards without a manifest."""
        ...

    def __len__(self) -> int:
        """Number of sequences long enough to train on."""
        ...

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[list[FeatureSequence]]:
        """The sequences of each step, in the order of `plan`, which may be endless.

        Close or drop the iterator to stop the work ahead. Raises CheckpointError naming a file that
        cannot be read.
        """
        ...

    def token_counts(self, vocab_size: int) -> Tensor:
        """Occurrences of each token over all sequences, [vocab_size] int64."""
        ...


def sequence_plan(
    count: int, per_step: int, *, seed: int, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[list[int]]:
    """Endless plan: the sequences this rank takes in each step from `start_step` on.

    Every epoch visits all `count` sequences in its own random order; a step may span two epochs.
    A step's `per_step` sequences are divided equally among the ranks.
    """
    if count < 1 or per_step < 1:
        raise ConfigError(f"count and per_step must be >= 1, got {count} and {per_step}")
    if per_step % world_size:
        raise ConfigError(f"sequences per step must be a multiple of world size {world_size}, got {per_step}")
    share = per_step // world_size
    epoch, order = -1, [0]
    for step in _count_from(start_step):
        first = step * per_step + rank * share
        chosen = []
        for number in range(first, first + share):
            wanted, row = divmod(number, count)
            if wanted != epoch:
                epoch, order = wanted, _permutation(count, seed, wanted)
            chosen.append(order[row])
        yield chosen


def mix_seed(seed: int, number: int) -> int:
    """A generator seed that depends on both `seed` and `number`."""
    return (seed * 1_000_003 + number) % 2**62


class CachedSource:
    """Feature shards on disk; each sequence is read when its step needs it."""

    def __init__(self, shards: Sequence[Path], *, tap_layers: Sequence[int] | None = None) -> None:
        """`tap_layers`: which of the cached layers to return, in this order; None: all.

        Raises ConfigError when shards differ in their targets or lack a layer, CheckpointError when
        a shard is missing, truncated or not a shard.
        """
        self._shards = list(shards)
        self._origin = _common_origin(self._shards)
        self._columns: list[slice] | None = None
        if tap_layers is not None and self._origin is not None:
            have, size = self._origin.tap_layers, self._origin.hidden_size
            columns = tap_columns(have, tap_layers, size, str(self._shards[0].parent))
            self._columns = None if tuple(tap_layers) == have else columns
            self._origin = replace(self._origin, tap_layers=tuple(tap_layers))
        self._refs = [ref for shard in self._shards for ref in list_sequences(shard) if _trainable(ref)]
        if not self._refs:
            raise ConfigError(
                f"no training sequences with at least {MIN_ANSWER_TOKENS} answer tokens "
                f"in {len(self._shards)} shards"
            )

    @classmethod
    def open(cls, directories: Sequence[Path], *, tap_layers: Sequence[int] | None = None) -> CachedSource:
        """All shards of the directories, sorted by name within each."""
        shards = [shard for directory in directories for shard in listed_shards(directory)]
        return cls(shards, tap_layers=tap_layers)

    @property
    def origin(self) -> FeatureOrigin | None:
        return self._origin

    @property
    def shards(self) -> Sequence[Path]:
        return self._shards

    def __len__(self) -> int:
        return len(self._refs)

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[list[FeatureSequence]]:
        for numbers in plan:
            yield [self._read(number) for number in numbers]

    def token_counts(self, vocab_size: int) -> Tensor:
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for shard in self._shards:
            counts += torch.bincount(read_token_ids(shard), minlength=vocab_size)
        return counts

    def _read(self, number: int) -> FeatureSequence:
        sequence = read_sequence(self._refs[number])
        if self._columns is None:
            return sequence
        return replace(sequence, taps=torch.cat([sequence.taps[:, c] for c in self._columns], dim=1))


def _trainable(ref: SequenceRef) -> bool:
    return ref.end - ref.start >= ref.answer_start + MIN_ANSWER_TOKENS


def _common_origin(shards: Sequence[Path]) -> FeatureOrigin | None:
    """Raises ConfigError when the shards' directories disagree."""
    found: dict[Path, FeatureOrigin] = {}
    for directory in dict.fromkeys(shard.parent for shard in shards):
        if (manifest := read_manifest(directory)) is not None:
            found[directory] = manifest.origin
    first = next(iter(found), None)
    for directory, origin in found.items():
        assert first is not None
        if origin != found[first]:
            differing = [
                f"{name} {value!r} and {origin.fields()[name]!r}"
                for name, value in found[first].fields().items()
                if value != origin.fields()[name]
            ]
            raise ConfigError(f"{first} and {directory} do not go together: {'; '.join(differing)}")
    return None if first is None else found[first]


def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(mix_seed(seed, -1 - epoch))
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order


def _count_from(step: int) -> Iterator[int]:
    while True:
        yield step
        step += 1
