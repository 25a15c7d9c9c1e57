"""States written down while generating are those a later pass over the answers would compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.errors import ConfigError
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.generation import BatchGenerator
from dspark_core.training.data.local_answers import LocalAnswers
from dspark_core.training.data.recording import FeatureRecorder, RecordedShards, recorded_layers
from dspark_core.training.features import FeatureSequence
from dspark_core.training.manifest import read_manifest
from dspark_core.training.sources import CachedSource
from tests.support.byte_tokenizer import END
from tests.unit.models.dspark_golden import GOLDEN, golden_target
from tests.unit.training.answer_files import golden_origin
from tests.unit.training.test_local_answers import SETTINGS, TOKENIZER, prompts
from tests.unit.training.training_sequences import GOLDEN_LAYERS, compute_features

ASKED = prompts(10)


def recording(directory: Path, settings: str = "same") -> LocalAnswers:
    """Answers of a float32 target that keeps its states."""
    target = golden_target()
    options = EngineOptions(
        target_model=str(GOLDEN / "qwen3_tiny_target"),
        drafter=None,
        dtype="float32",
        kv_cache_bytes=2**20,
        max_context_tokens=60,
        kept_layers=recorded_layers(GOLDEN_LAYERS, target.config.num_layers),
    )
    engine = build_target(options, target).engine
    recorder = FeatureRecorder(engine, target.decoder)
    generator = BatchGenerator(engine, (END,), concurrency=3, on_end=recorder)
    shards = RecordedShards(directory, recorder, golden_origin(), settings, chunks=3)
    return LocalAnswers(generator, TOKENIZER, SETTINGS, shards)


def read_all(directory: Path) -> list[FeatureSequence]:
    source = CachedSource.open([directory])
    return [one for batch in source.batches([range(len(source))]) for one in batch]


def test_recorded_states_are_those_of_a_pass_over_the_answer(tmp_path: Path) -> None:
    answers = recording(tmp_path)
    given = list(answers.run(ASKED, lambda _: False))
    manifest = read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.complete
    recorded = read_all(tmp_path)
    assert len(recorded) == len(given) == 10
    by_tokens = {one.prompt_ids + one.answer_ids: one for one in given}  # type: ignore[union-attr]
    for one in recorded:
        answer = by_tokens[tuple(one.token_ids.tolist())]
        expected = compute_features(
            golden_target().decoder, Conversation(answer.prompt_ids, answer.answer_ids), GOLDEN_LAYERS
        )
        assert one.answer_start == expected.answer_start
        last = len(one) - 1  # of the last token there is nothing: it was never computed
        for name in ("taps", "final", "log_normalizers"):
            have, want = getattr(one, name)[:last].float(), getattr(expected, name)[:last].float()
            torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)


def test_a_chunk_whose_shard_is_missing_is_generated_again(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for directory in (whole, broken):
        answers = recording(directory)
        done = {one.prompt_id for one in answers.run(ASKED, lambda _: False)}  # type: ignore[union-attr]
    manifest = read_manifest(broken)
    assert manifest is not None
    (broken / "manifest.json").unlink()
    for shard in broken.glob("*.safetensors"):
        shard.unlink()
    again, heard = recording(broken), []
    assert list(again.run(ASKED, done.__contains__, heard.append)) == []
    assert len(heard) == 10
    assert read_manifest(broken) == read_manifest(whole) == manifest
    once_more, heard = recording(broken), []
    assert list(once_more.run(ASKED, done.__contains__, heard.append)) == []
    assert heard == []


def test_a_listed_shard_that_is_gone_is_recorded_again(tmp_path: Path) -> None:
    done = {one.prompt_id for one in recording(tmp_path).run(ASKED, lambda _: False)}  # type: ignore[union-attr]
    shard = min(tmp_path.glob("*.safetensors"))
    written = shard.read_bytes()
    shard.unlink()
    assert list(recording(tmp_path).run(ASKED, done.__contains__)) == []
    assert shard.read_bytes() == written


def test_states_of_other_answers_are_not_mixed_in(tmp_path: Path) -> None:
    answers = recording(tmp_path)
    list(answers.run(ASKED[:4], lambda _: False))
    with pytest.raises(ConfigError, match="those of other answers or layers"):
        recording(tmp_path, settings="other")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="shards without a manifest"):
        recording(tmp_path)
