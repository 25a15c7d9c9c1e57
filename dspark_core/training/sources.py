"""Where a trainer's feature sequences come from: a cache on disk, or a live target (`stream`).

A trainer numbers the sequences of a source 0, 1, ... and says which of them each step takes
(`sequence_plan`). A source yields them step by step and may work ahead, so what a step gets must
be a function of its numbers alone: a run resumed at a later step then sees the same bytes.
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
        """None: shards without a manifest, of which nobody knows."""
        ...

    def __len__(self) -> int:
        """Sequences long enough to train on."""
        ...

    def batches(self, plan: Iterable[Sequence[int]]) -> Iterator[list[FeatureSequence]]:
        """The sequences of each step of the plan, in its order; `plan` may be endless.

        Close the iterator (or drop it) to stop work done ahead. Raises CheckpointError naming the
        file for what cannot be read.
        """
        ...

    def token_counts(self, vocab_size: int) -> Tensor:
        """How often each token occurs in all sequences, [vocab_size] int64."""
        ...


def sequence_plan(
    count: int, per_step: int, *, seed: int, start_step: int = 0, rank: int = 0, world_size: int = 1
) -> Iterator[list[int]]:
    """Which sequences each step takes, from `start_step` on, for ever.

    Every epoch visits all `count` sequences in an order of its own. Steps run on across epochs.
    Of a step's `per_step` sequences each rank takes its equal share.
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
    """A generator seed that differs between seeds and between numbers."""
    return (seed * 1_000_003 + number) % 2**62


class CachedSource:
    """Feature shards on disk; each sequence is read when its step comes."""

    def __init__(self, shards: Sequence[Path], *, tap_layers: Sequence[int] | None = None) -> None:
        """`tap_layers`: which of the cached layers to give, in this order; None: all.

        Raises ConfigError for shards of different targets or without the layers, CheckpointError
        for one that is missing, cut short or no shard.
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
        """All shards of the directories, in the order of their names."""
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
