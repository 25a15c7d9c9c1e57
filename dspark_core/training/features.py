"""Target features on disk, which drafter training reads instead of running the target again.

A shard is one safetensors file of whole sequences stored back to back. For every token it keeps the
tapped hidden states (the drafter's input), the final hidden state and the log-normaliser over the
full vocabulary; the last two give the target's distribution in d + 1 values instead of V.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from dspark_core.errors import CheckpointError
from dspark_core.models.tensor_files import open_tensors, save_tensors

_ROWS = ("token_ids", "taps", "final", "log_normalizers")


@dataclass(frozen=True, slots=True)
class FeatureSequence:
    """One conversation with the target's features; row i belongs to token i."""

    token_ids: Tensor  # [tokens] int64
    answer_start: int
    """Index of the first answer token; only answers are trained on."""
    taps: Tensor  # [tokens, m * d]
    final: Tensor  # [tokens, d], after the final norm
    log_normalizers: Tensor  # [tokens] float32; defined from answer_start - 1 on

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SequenceRef:
    """Location of a sequence: tokens [start, end) of a shard."""

    shard: Path
    start: int
    end: int
    answer_start: int
    checksum: int | None = None
    """CRC-32 of the sequence's rows; None: the shard predates checksums."""


def write_shard(path: Path, sequences: Sequence[FeatureSequence]) -> None:
    """Write atomically: the file gets its name once it is complete and on disk, so training may already
    read the directory. Raises CheckpointError naming the shard when it cannot be written."""
    rows = [_stored(sequence) for sequence in sequences]
    lengths = torch.tensor([0] + [len(sequence) for sequence in sequences])
    tensors = {name: torch.cat([row[name] for row in rows]) for name in _ROWS}
    tensors |= {
        "offsets": lengths.cumsum(0),
        "answer_starts": torch.tensor([sequence.answer_start for sequence in sequences]).int(),
        "checksums": torch.tensor([_checksum(row) for row in rows]),
    }
    partial = path.with_suffix(".partial")
    try:
        save_tensors(tensors, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.rename(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {path} cannot be written: {error}") from error


def list_sequences(shard: Path) -> list[SequenceRef]:
    """Raises CheckpointError when the file is not a shard."""
    offsets = _read(shard, "offsets").tolist()
    answer_starts = _read(shard, "answer_starts").tolist()
    checksums: list[int | None] = [None] * len(answer_starts)
    if _has(shard, "checksums"):
        checksums = _read(shard, "checksums").tolist()
    return [
        SequenceRef(shard, start, end, answer, checksum)
        for start, end, answer, checksum in zip(
            offsets[:-1], offsets[1:], answer_starts, checksums, strict=True
        )
    ]


def read_token_ids(shard: Path) -> Tensor:
    """All tokens of a shard, [tokens]; for counting."""
    return _read(shard, "token_ids").long()


def read_sequence(ref: SequenceRef) -> FeatureSequence:
    """Reads only this sequence's rows.

    Raises CheckpointError naming the shard when they cannot be read or their checksum is wrong.
    """
    try:
        with open_tensors(ref.shard) as file:
            rows = {name: file.get_slice(name)[ref.start : ref.end] for name in _ROWS}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {ref.shard} cannot be read: {error}") from error
    if ref.checksum is not None and _checksum(rows) != ref.checksum:
        raise CheckpointError(
            f"shard {ref.shard} is corrupt: tokens {ref.start} to {ref.end} do not have the checksum "
            "they were written with"
        )
    return FeatureSequence(
        rows["token_ids"].long(), ref.answer_start, rows["taps"], rows["final"], rows["log_normalizers"]
    )


def _stored(sequence: FeatureSequence) -> dict[str, Tensor]:
    return {
        "token_ids": sequence.token_ids.int(),
        "taps": sequence.taps.to(torch.bfloat16),
        "final": sequence.final.to(torch.bfloat16),
        "log_normalizers": sequence.log_normalizers.float(),
    }


def _checksum(rows: Mapping[str, Tensor]) -> int:
    value = 0
    for name in _ROWS:
        value = zlib.crc32(rows[name].contiguous().view(torch.uint8).numpy().data, value)
    return value


def _has(shard: Path, name: str) -> bool:
    with open_tensors(shard) as file:
        return name in file.keys()  # noqa: SIM118 - not a mapping


def _read(shard: Path, name: str) -> Tensor:
    try:
        with open_tensors(shard) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"shard {shard}: {name}: cannot be read: {error}") from error
