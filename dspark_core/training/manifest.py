"""`manifest.json` of a feature cache: what its shards were computed from, and their checksums.

Shards in a directory without a manifest have no recorded origin, but can still be read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.training.origin import FeatureOrigin

MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    sha256: str
    bytes: int
    sequences: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    origin: FeatureOrigin
    answers_sha256: str
    """Digest of the answer file; shards of different answers must not be mixed."""
    planned_shards: int
    """Number of shards of the complete cache."""
    shards: Mapping[str, ShardEntry]
    """By file name."""
    plan_sha256: str | None = None
    """Digest of which conversations are in which shard; None where `answers_sha256` already implies it."""

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.planned_shards


@dataclass(frozen=True, slots=True)
class ShardFault:
    path: Path
    problem: str


def read_manifest(directory: Path) -> Manifest | None:
    """None if there is no manifest. Raises CheckpointError naming the file when it is damaged."""
    path = directory / MANIFEST_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(
            origin=FeatureOrigin.parse(values["origin"], str(path)),
            answers_sha256=str(values["answers_sha256"]),
            plan_sha256=values.get("plan_sha256"),
            planned_shards=int(values["planned_shards"]),
            shards={name: ShardEntry(**entry) for name, entry in values["shards"].items()},
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error!r}") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically: readers see the old one or the new one."""
    values = {
        "origin": manifest.origin.fields(),
        "answers_sha256": manifest.answers_sha256,
        "plan_sha256": manifest.plan_sha256,
        "planned_shards": manifest.planned_shards,
        "shards": {name: asdict(entry) for name, entry in manifest.shards.items()},
    }
    partial = directory / f"{MANIFEST_FILE}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / MANIFEST_FILE)


def listed_shards(directory: Path) -> list[Path]:
    """The shards of a directory, sorted by name: those in the manifest, or all if there is none.

    Raises:
        ConfigError: there is no such directory, or it holds no shard.
        CheckpointError: a listed shard is missing or has another size.
    """
    if not directory.is_dir():
        raise ConfigError(f"feature directory {directory} not found")
    manifest = read_manifest(directory)
    if manifest is None:
        shards = sorted(directory.glob("*.safetensors"))
    else:
        shards = [directory / name for name in sorted(manifest.shards)]
        for shard in shards:
            if (problem := _size_problem(shard, manifest.shards[shard.name])) is not None:
                raise CheckpointError(f"shard {shard} {problem}: run the command that wrote it again")
    if not shards:
        raise ConfigError(f"feature directory {directory} holds no shards")
    return shards


def shards_present(directory: Path, manifest: Manifest) -> dict[str, ShardEntry]:
    """The listed shards that exist with their listed size and so need not be computed again."""
    return {
        name: entry
        for name, entry in manifest.shards.items()
        if _size_problem(directory / name, entry) is None
    }


def check_shards(directory: Path) -> Iterator[tuple[Path, ShardFault | None]]:
    """Verify the checksum of each listed shard, lazily, one by one.

    Raises ConfigError when there is no manifest to check against.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        raise ConfigError(f"{directory} has no {MANIFEST_FILE}: there are no checksums to check")
    for name in sorted(manifest.shards):
        path, entry = directory / name, manifest.shards[name]
        problem = _size_problem(path, entry)
        if problem is None and file_digest(path) != entry.sha256:
            problem = "does not have the checksum it was written with"
        yield path, None if problem is None else ShardFault(path, problem)


def file_digest(path: Path) -> str:
    """SHA-256, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _size_problem(path: Path, entry: ShardEntry) -> str | None:
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == entry.bytes else f"has {size} bytes instead of {entry.bytes}"
