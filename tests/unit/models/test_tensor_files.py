"""Files of tensors: others may read what the umask lets them, and what cannot be opened says why."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dspark_core.errors import CheckpointError
from dspark_core.models.drafter_checkpoint import load_drafter, save_drafter
from dspark_core.models.hf import HfTensors
from dspark_core.models.ngram_file import NgramOrigin, load_ngrams, save_ngrams
from dspark_core.models.tensor_files import save_arrays, save_tensors
from dspark_core.training.averaging import average_checkpoints
from dspark_core.training.features import list_sequences, write_shard
from tests.unit.algorithms.test_ngram_table import table_of
from tests.unit.models.autoregressive_tiny import EAGLE3, random_drafter
from tests.unit.models.autoregressive_tiny import save as save_autoregressive
from tests.unit.models.dspark_tiny import TARGET, tiny_config, tiny_drafter
from tests.unit.training.training_sequences import random_sequence

WEIGHTS = "model.safetensors"


def _drafter(folder: Path) -> Path:
    save_drafter(folder, tiny_drafter(tiny_config()))
    return folder / WEIGHTS


def _autoregressive(folder: Path) -> Path:
    return save_autoregressive(folder, random_drafter(EAGLE3)) / WEIGHTS


def _ngrams(folder: Path) -> Path:
    origin = NgramOrigin(target="m.gguf", fingerprint="f" * 16, vocab_size=99, answer_tokens=99)
    save_ngrams(table_of({(1,): (2, 10)}), origin, folder / "ngrams.safetensors")
    return folder / "ngrams.safetensors"


def _average(folder: Path) -> Path:
    inputs = [folder / "0", folder / "1"]
    for one in inputs:
        _drafter(one)
    average_checkpoints(folder / "mean", inputs)
    return folder / "mean" / WEIGHTS


def _shard(folder: Path) -> Path:
    write_shard(folder / "0.safetensors", [random_sequence(5, 2)])
    return folder / "0.safetensors"


@pytest.fixture(params=[0o022, 0o027], ids=["others", "group"])
def allowed(request: pytest.FixtureRequest) -> Iterator[int]:
    """The mode of a new file."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


@pytest.mark.parametrize("write", [_drafter, _autoregressive, _ngrams, _average, _shard])
def test_what_is_written_here_may_be_read_by_whom_the_umask_lets(
    tmp_path: Path, allowed: int, write: Callable[[Path], Path]
) -> None:
    assert stat.S_IMODE(write(tmp_path).stat().st_mode) == allowed
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".mode", ".partial")]


def test_a_file_that_others_could_not_read_becomes_readable(tmp_path: Path, allowed: int) -> None:
    path = tmp_path / "x.safetensors"
    path.touch(0o600)
    save_tensors({"a": torch.ones(2)}, path)
    assert stat.S_IMODE(path.stat().st_mode) == allowed
    path.chmod(0o600)
    save_arrays({"a": np.ones(2)}, path, {})
    assert stat.S_IMODE(path.stat().st_mode) == allowed


def _load_drafter(folder: Path) -> None:
    drafter = tiny_drafter(tiny_config())
    load_drafter(folder, drafter.embed_tokens, drafter.lm_head, TARGET, torch.float32)


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (_drafter, _load_drafter),
        (_drafter, HfTensors),
        (_ngrams, lambda folder: load_ngrams(folder / "ngrams.safetensors")),
        (_shard, lambda folder: list_sequences(folder / "0.safetensors")),
    ],
    ids=["drafter", "target", "ngrams", "shard"],
)
def test_a_file_that_cannot_be_opened_says_why(
    tmp_path: Path, write: Callable[[Path], Path], read: Callable[[Path], object]
) -> None:
    path = write(tmp_path)
    path.unlink()
    path.mkdir()  # root may read any file
    with pytest.raises(CheckpointError, match=r"cannot be read: \[Errno 21\] Is a directory"):
        read(tmp_path)
