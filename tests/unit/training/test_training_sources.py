"""What a step is given depends on its numbers alone, wherever the sequences come from."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.training.features import list_sequences, write_shard
from dspark_core.training.manifest import Manifest, ShardEntry, file_digest, write_manifest
from dspark_core.training.origin import FeatureOrigin
from dspark_core.training.sources import CachedSource, sequence_plan
from tests.unit.training.training_sequences import random_sequence

ORIGIN = FeatureOrigin(
    target="tiny",
    fingerprint="f0",
    vocab_size=50,
    hidden_size=4,
    tap_layers=(1, 3),
    dtype="float32",
    chat_template="",
)


def cache(directory: Path, origin: FeatureOrigin = ORIGIN, shards: int = 2) -> Path:
    """Shards of three sequences, with a manifest."""
    directory.mkdir()
    entries = {}
    for number in range(shards):
        path = directory / f"shard-{number}.safetensors"
        write_shard(path, [random_sequence(6 + k, 2, seed=10 * number + k) for k in range(3)])
        entries[path.name] = ShardEntry(
            sha256=file_digest(path), bytes=path.stat().st_size, sequences=3, tokens=21
        )
    manifest = Manifest(origin=origin, answers_sha256="a", planned_shards=shards, shards=entries)
    write_manifest(directory, manifest)
    return directory


def test_every_epoch_takes_every_sequence_once() -> None:
    plan = sequence_plan(7, 3, seed=5)
    numbers = [number for step in islice(plan, 14) for number in step]
    epochs = [numbers[start : start + 7] for start in range(0, 42, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_plan_resumed_later_is_the_same_plan(start: int) -> None:
    whole = list(islice(sequence_plan(7, 3, seed=5), 12))
    assert list(islice(sequence_plan(7, 3, seed=5, start_step=start), 12 - start)) == whole[start:]


def test_ranks_share_a_step() -> None:
    whole = list(islice(sequence_plan(9, 4, seed=1), 5))
    parts = [list(islice(sequence_plan(9, 4, seed=1, rank=rank, world_size=2), 5)) for rank in (0, 1)]
    assert [left + right for left, right in zip(*parts, strict=True)] == whole
    with pytest.raises(ConfigError, match="multiple of world size 3, got 4"):
        next(sequence_plan(9, 4, seed=1, world_size=3))


def test_a_cache_gives_the_sequences_it_holds(tmp_path: Path) -> None:
    source = CachedSource.open([cache(tmp_path / "one")])
    assert len(source) == 6
    assert source.origin == ORIGIN
    first, second = source.batches([[5, 0], [3]])
    assert [len(sequence) for sequence in first + second] == [8, 6, 6]
    torch.testing.assert_close(first[1].taps, random_sequence(6, 2, seed=0).taps.bfloat16())
    counts = Counter(int(t) for batch in source.batches([range(6)]) for s in batch for t in s.token_ids)
    assert source.token_counts(50).tolist() == [counts[token] for token in range(50)]


def test_layers_are_chosen_among_the_cached_ones(tmp_path: Path) -> None:
    directory = cache(tmp_path / "one")
    source = CachedSource.open([directory], tap_layers=(3,))
    assert source.origin is not None
    assert source.origin.tap_layers == (3,)
    [batch] = source.batches([[0]])
    torch.testing.assert_close(batch[0].taps, random_sequence(6, 2, seed=0).taps[:, 4:].bfloat16())
    with pytest.raises(ConfigError, match="holds tap layers 1, 3; the drafter needs 0, 3: no 0"):
        CachedSource.open([directory], tap_layers=(0, 3))


def test_caches_of_different_targets_are_not_mixed(tmp_path: Path) -> None:
    other = FeatureOrigin(**{**ORIGIN.fields(), "fingerprint": "f1"})
    with pytest.raises(ConfigError, match="fingerprint 'f0' and 'f1'"):
        CachedSource.open([cache(tmp_path / "one"), cache(tmp_path / "two", other)])


def test_shards_without_a_manifest_or_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    write_shard(path, [random_sequence(9, 2)])
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["checksums"]
    save_file(tensors, path)
    source = CachedSource.open([tmp_path])
    assert source.origin is None
    assert [len(sequence) for [sequence] in source.batches([[0]])] == [9]


def test_a_flipped_bit_is_reported_with_the_shards_name(tmp_path: Path) -> None:
    directory = cache(tmp_path / "one", shards=1)
    shard = directory / "shard-0.safetensors"
    content = bytearray(shard.read_bytes())
    content[-8] ^= 1  # in the rows of one tensor
    shard.write_bytes(content)
    source = CachedSource.open([directory])
    with pytest.raises(CheckpointError, match=r"shard-0\.safetensors is corrupt"):
        list(source.batches([range(len(list_sequences(shard)))]))


def test_a_shard_cut_short_is_refused_at_the_start(tmp_path: Path) -> None:
    directory = cache(tmp_path / "one")
    shard = directory / "shard-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"shard-1\.safetensors has \d+ bytes instead of \d+"):
        CachedSource.open([directory])
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"shard-1\.safetensors is missing"):
        CachedSource.open([directory])


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not found"):
        CachedSource.open([tmp_path / "nowhere"])
    with pytest.raises(ConfigError, match="holds no shards"):
        CachedSource.open([tmp_path])
    (tmp_path / "manifest.json").write_text('{"origin": 3}')
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        CachedSource.open([tmp_path])
