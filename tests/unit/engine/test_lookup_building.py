"""Which n-gram tables a target may draft from."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dspark_core.engine.drafts.lookup_building import build_lookup, load_table
from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.loading import LoadedTarget
from dspark_core.models.ngram_file import NgramOrigin, save_ngrams
from dspark_core.zoo_paths import NGRAMS_AUTO
from tests.unit.algorithms.test_ngram_table import table_of
from tests.unit.engine.tiny import VOCAB, tiny_decoder

TABLE = table_of({(1,): (2, 250)})


@pytest.fixture
def target() -> LoadedTarget:
    decoder = tiny_decoder()
    return LoadedTarget(decoder=decoder, config=decoder.config, path=Path("tiny"), fingerprint="here")


def file_of(tmp_path: Path, fingerprint: str, vocab_size: int) -> Path:
    path = tmp_path / "ngrams.safetensors"
    origin = NgramOrigin(target="t", fingerprint=fingerprint, vocab_size=vocab_size, answer_tokens=9)
    save_ngrams(TABLE, origin, path)
    return path


def test_a_table_of_the_target_is_taken_without_a_word(tmp_path: Path, target, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_table(file_of(tmp_path, "here", VOCAB), target).entries == 1
    assert not caplog.records


def test_a_table_of_other_weights_is_taken_with_a_warning(tmp_path: Path, target, caplog) -> None:
    assert load_table(file_of(tmp_path, "there", VOCAB), target).entries == 1
    assert "fingerprint there, here here" in caplog.text


def test_a_table_of_another_vocabulary_is_refused(tmp_path: Path, target) -> None:
    with pytest.raises(
        CheckpointError, match=rf"of a target with {VOCAB + 1} tokens \(t\); tiny has {VOCAB}"
    ):
        load_table(file_of(tmp_path, "here", VOCAB + 1), target)


def test_a_target_without_a_table_looks_its_own_text_up(tmp_path: Path, target) -> None:
    assert build_lookup(NGRAMS_AUTO, "/models/tiny", target).remembered == 0
    assert build_lookup(str(file_of(tmp_path, "here", VOCAB)), "/models/tiny", target).remembered == 0
    with pytest.raises(ConfigError, match="'missing' not found"):
        build_lookup("missing", "/models/tiny", target)
