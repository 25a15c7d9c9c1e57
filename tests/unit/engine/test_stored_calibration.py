"""A calibration stored with the checkpoint is applied to confidences, and refused if it does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dspark_core.algorithms.calibration import Calibration, ConfidenceScaling
from dspark_core.engine.building import EngineOptions, build_drafter, read_geometry
from dspark_core.engine.draft_engines.base import ContextDraftEngine
from dspark_core.engine.protocols import DraftBlock, DraftItem
from dspark_core.errors import CheckpointError
from dspark_core.models.drafter_calibration import CALIBRATION_FILE, read_calibration, write_calibration
from dspark_core.records import SamplingParams, Verification

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TEMPERATURES = (2.0, 0.5, 1.0, 4.0, 0.25, 1.0, 3.0)
BIASES = (0.5, 0.0, -1.0, 0.0, 0.25, 2.0, 0.0)


def calibration(count: int = 7) -> Calibration:
    return Calibration(
        scaling=ConfidenceScaling(TEMPERATURES[:count], BIASES[:count]),
        rounds=(9,) * count,
        ece_before=(0.2,) * count,
        ece_after=(0.1,) * count,
    )


def checkpoint(tmp_path: Path, name: str = "dspark_vanilla") -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def options(directory: Path) -> EngineOptions:
    return EngineOptions(
        target_model=str(GOLDEN / "qwen3_tiny_target"),
        drafter=str(directory),
        dtype="float32",
        kv_cache_bytes=2**22,
    )


def draft(engine: ContextDraftEngine) -> DraftBlock:
    features = torch.randn(4, engine.geometry.feature_size, generator=torch.Generator().manual_seed(0))
    item = DraftItem(
        sequence_id="one",
        anchor_token_id=7,
        anchor_position=4,
        features_start=0,
        features=features,
        sampling=SamplingParams(temperature=0.0),
        verification=Verification.REJECTION,
    )
    (block,) = engine.propose([item])
    return block


def test_each_position_is_scaled_by_its_own_values(tmp_path: Path):
    directory = checkpoint(tmp_path)
    geometry = read_geometry(directory)
    assert geometry.block_size == len(TEMPERATURES)
    plain = draft(build_drafter(options(directory)))
    write_calibration(directory / CALIBRATION_FILE, calibration(), fingerprint=geometry.fingerprint)

    scaled = draft(build_drafter(options(directory)))
    assert scaled.token_ids == plain.token_ids
    logits = torch.logit(torch.tensor(plain.confidences, dtype=torch.float64))
    temperatures, biases = (torch.tensor(values, dtype=torch.float64) for values in (TEMPERATURES, BIASES))
    wanted = torch.sigmoid(logits / temperatures + biases)
    assert scaled.confidences == pytest.approx(wanted.tolist(), rel=1e-4)
    assert scaled.confidences != pytest.approx(plain.confidences, rel=1e-2)
    assert read_geometry(directory) == geometry, "a calibration must not change what a verifier compares"

    assert draft(build_drafter(options(directory), calibrated=False)).confidences == plain.confidences


def test_what_was_written_is_read(tmp_path: Path):
    write_calibration(tmp_path / "new" / CALIBRATION_FILE, calibration(), fingerprint="abc")
    found = read_calibration(tmp_path / "new", fingerprint="abc", block_size=7, confidence_head=True)
    assert found == calibration()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [CALIBRATION_FILE]
    assert read_calibration(tmp_path, fingerprint="abc", block_size=7, confidence_head=True) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperatures": [1.0] * 6 + [0.0]}, "temperatures must be positive numbers, got 0.0"),
        ({"temperatures": [1.0] * 6 + [-2.0]}, "temperatures must be positive numbers, got -2.0"),
        ({"temperatures": 1.0}, "temperatures must be a list of numbers, got 1.0"),
        ({"fingerprint": "another"}, "fingerprint='another' is of another checkpoint"),
        ({"fingerprint": None}, "fingerprint=None is of another checkpoint"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, change, message):
    directory = checkpoint(tmp_path)
    fields = {"fingerprint": read_geometry(directory).fingerprint, **calibration().to_dict(), **change}
    (directory / CALIBRATION_FILE).write_text(json.dumps(fields))
    with pytest.raises(CheckpointError) as caught:
        build_drafter(options(directory))
    assert str(directory / CALIBRATION_FILE) in str(caught.value)
    assert message in str(caught.value)


def test_a_calibration_of_another_block_size_is_refused(tmp_path: Path):
    directory = checkpoint(tmp_path)
    mark = read_geometry(directory).fingerprint
    write_calibration(directory / CALIBRATION_FILE, calibration(2), fingerprint=mark)
    with pytest.raises(CheckpointError, match=r"temperatures=.* one value for each of block_size=7"):
        build_drafter(options(directory))


def test_a_drafter_without_confidences_cannot_be_calibrated(tmp_path: Path):
    directory = checkpoint(tmp_path, "dflash")
    mark = read_geometry(directory).fingerprint
    write_calibration(directory / CALIBRATION_FILE, calibration(), fingerprint=mark)
    with pytest.raises(CheckpointError, match="no confidence head"):
        build_drafter(options(directory))


def test_a_file_that_is_no_object_is_refused(tmp_path: Path):
    directory = checkpoint(tmp_path)
    (directory / CALIBRATION_FILE).write_text("[1, 2]")
    with pytest.raises(CheckpointError, match=r"calibration\.json: holds no JSON object"):
        build_drafter(options(directory))
