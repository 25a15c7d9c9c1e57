"""Tables of n-grams on disk: whole when read again, refused when they are something else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_core.errors import CheckpointError
from dspark_core.models.ngram_file import NgramOrigin, load_ngrams, save_ngrams
from tests.unit.algorithms.test_ngram_table import table_of

TABLE = table_of({(1,): (2, 10), (1, 2): (40_000, 250), (7, 7): (0, 0)})


def origin(vocab_size: int) -> NgramOrigin:
    return NgramOrigin(target="m.gguf", fingerprint="f" * 16, vocab_size=vocab_size, answer_tokens=99)


@pytest.mark.parametrize("vocab_size", [50_000, 2**16, 150_000])
def test_a_table_is_read_as_it_was_written(tmp_path: Path, vocab_size: int) -> None:
    path = tmp_path / "ngrams.safetensors"
    save_ngrams(TABLE, origin(vocab_size), path)
    table, said = load_ngrams(path)
    assert said == origin(vocab_size)
    assert table.order == TABLE.order
    for name in ("checks", "tokens", "levels"):
        np.testing.assert_array_equal(getattr(table, name), getattr(TABLE, name), strict=True)
    np.testing.assert_array_equal(table.evidence.rates, TABLE.evidence.rates, strict=True)
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ngrams.safetensors"
    with pytest.raises(CheckpointError, match=r"ngrams\.safetensors cannot be read"):
        load_ngrams(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_ngrams(path)
    save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="is no table of n-grams: format None"):
        load_ngrams(path)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ngrams.safetensors"
    save_ngrams(TABLE, origin(30_000), path)
    with pytest.raises(CheckpointError, match="names token 40000 of a vocabulary of 30000"):
        load_ngrams(path)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    path = tmp_path / "ngrams.safetensors"
    save_file({"checks": TABLE.checks}, path, {"format": "dspark-ngrams-1"})
    with pytest.raises(CheckpointError, match="tokens"):
        load_ngrams(path)
