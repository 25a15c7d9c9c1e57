"""Fills a directory with feature shards, resuming where an interrupted run stopped.

The answers and settings alone determine which conversations form a shard and which of them share a pass,
so an interrupted cache ends up with the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dspark_core.errors import ConfigError
from dspark_core.models.decoder import Decoder
from dspark_core.training.data.conversations import AnswerFile
from dspark_core.training.data.prefill import compute_packed, plan_packs
from dspark_core.training.features import FeatureSequence, write_shard
from dspark_core.training.manifest import (
    Manifest,
    ShardEntry,
    file_digest,
    read_manifest,
    shards_present,
    write_manifest,
)
from dspark_core.training.origin import FeatureOrigin

DEFAULT_SHARD_TOKENS = 65_536
DEFAULT_PACK_TOKENS = 2048
_STORED = torch.bfloat16
_BYTES_PER_SEQUENCE = 20
_BYTES_PER_SHARD = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardPlan:
    name: str
    numbers: range
    """Consecutive conversations of the answer file."""
    tokens: int
    bytes: int
    """Expected size, accurate to a fraction of a percent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """All shards of the complete cache, and which of them are still missing."""

    directory: Path
    manifest: Manifest
    shards: tuple[ShardPlan, ...]

    @property
    def missing(self) -> tuple[ShardPlan, ...]:
        return tuple(shard for shard in self.shards if shard.name not in self.manifest.shards)

    @property
    def missing_bytes(self) -> int:
        return sum(shard.bytes for shard in self.missing)

    @property
    def missing_tokens(self) -> int:
        return sum(shard.tokens for shard in self.missing)

    @property
    def total_bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)


def bytes_per_token(origin: FeatureOrigin) -> int:
    """Taps, final state, token id and log-normaliser; nothing is of vocabulary size."""
    values = (len(origin.tap_layers) + 1) * origin.hidden_size
    return values * _STORED.itemsize + 2 * torch.int32.itemsize


def plan_cache(
    directory: Path, answers: AnswerFile, origin: FeatureOrigin, shard_tokens: int = DEFAULT_SHARD_TOKENS
) -> CachePlan:
    """Writes nothing. Raises ConfigError when the directory holds a different cache."""
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens must be >= 1, got {shard_tokens}")
    shards = tuple(_plan_shards(answers.lengths, bytes_per_token(origin), shard_tokens))
    planned = Manifest(
        origin=origin,
        answers_sha256=file_digest(answers.path),
        plan_sha256=_plan_digest(shards),
        planned_shards=len(shards),
        shards={},
    )
    existing = read_manifest(directory)
    if existing is not None:
        _require_same(existing, planned, directory)
        planned = replace(planned, shards=shards_present(directory, existing))
    elif directory.is_dir() and any(directory.glob("*.safetensors")):
        raise ConfigError(f"{directory} holds shards without a manifest: choose another directory")
    return CachePlan(directory=directory, manifest=planned, shards=shards)


def require_space(plan: CachePlan, free_bytes: int | None = None) -> None:
    """Raises ConfigError, with both figures, when the missing shards do not fit on the disk."""
    free = free_on_disk(plan.directory) if free_bytes is None else free_bytes
    if plan.missing_bytes > free:
        raise ConfigError(
            f"the features need {gigabytes(plan.missing_bytes)} in {plan.directory}, where "
            f"{gigabytes(free)} are free: use fewer answers or tap layers, or stream the features in training"
        )


def free_on_disk(directory: Path) -> int:
    """Free bytes on the disk of the directory, which need not exist yet."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"


def fill_cache(
    plan: CachePlan,
    answers: AnswerFile,
    decoder: Decoder,
    *,
    pack_tokens: int = DEFAULT_PACK_TOKENS,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Compute and write the missing shards -> the complete manifest.

    `on_tokens` is called with the number of tokens of each pass. Raises ConfigError before writing
    anything when the disk is too small.
    """
    require_space(plan)
    plan.directory.mkdir(parents=True, exist_ok=True)
    for leftover in plan.directory.glob("*.partial"):
        leftover.unlink()
    manifest = plan.manifest
    write_manifest(plan.directory, manifest)
    for shard in plan.missing:
        sequences = list(_compute(shard, answers, decoder, manifest.origin, pack_tokens, on_tokens))
        path = plan.directory / shard.name
        write_shard(path, sequences)
        entry = ShardEntry(
            sha256=file_digest(path),
            bytes=path.stat().st_size,
            sequences=len(sequences),
            tokens=sum(map(len, sequences)),
        )
        manifest = replace(manifest, shards={**manifest.shards, shard.name: entry})
        write_manifest(plan.directory, manifest)
    return manifest


def _compute(
    shard: ShardPlan,
    answers: AnswerFile,
    decoder: Decoder,
    origin: FeatureOrigin,
    pack_tokens: int,
    on_tokens: Callable[[int], None],
) -> Iterator[FeatureSequence]:
    lengths = [answers.lengths[number] for number in shard.numbers]
    for pack in plan_packs(lengths, pack_tokens):
        conversations = answers.get([shard.numbers[index] for index in pack])
        yield from compute_packed(decoder, conversations, origin.tap_layers)
        on_tokens(sum(map(len, conversations)))


def _plan_shards(lengths: Sequence[int], token_bytes: int, shard_tokens: int) -> Iterator[ShardPlan]:
    """Fill each shard with consecutive conversations up to `shard_tokens`; the last takes the rest."""
    start, tokens, count = 0, 0, 0
    for number, length in enumerate(lengths, start=1):
        tokens += length
        if tokens < shard_tokens and number < len(lengths):
            continue
        overhead = _BYTES_PER_SHARD + (number - start) * _BYTES_PER_SEQUENCE
        yield ShardPlan(
            name=f"features-{count:06d}.safetensors",
            numbers=range(start, number),
            tokens=tokens,
            bytes=tokens * token_bytes + overhead,
        )
        start, tokens, count = number, 0, count + 1


def _plan_digest(shards: Sequence[ShardPlan]) -> str:
    """Digest of which conversations are in which shard. The token sums are part of it because a lower length
    limit selects other conversations under the same numbers."""
    layout = repr([(shard.numbers, shard.tokens) for shard in shards])
    return hashlib.sha256(layout.encode()).hexdigest()


def _require_same(existing: Manifest, planned: Manifest, directory: Path) -> None:
    """Raises ConfigError naming what differs, with both values."""
    have, want = _identity(existing), _identity(planned)
    if differing := [
        f"{name} {have[name]!r}, not {want[name]!r}" for name in have if have[name] != want[name]
    ]:
        raise ConfigError(
            f"{directory} holds another cache ({'; '.join(differing)}): choose another directory"
        )


def _identity(manifest: Manifest) -> dict[str, object]:
    return {
        **manifest.origin.fields(),
        "answers": manifest.answers_sha256,
        "shards": manifest.planned_shards,
        "the conversations in them, by max length and shard tokens": manifest.plan_sha256,
    }
