"""`calibration.json` next to a drafter's weights: the scaling of its confidence head."""

from __future__ import annotations

import json
import os
from pathlib import Path

from dspark_core.algorithms.calibration import Calibration
from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.hf import read_json
from dspark_core.models.metadata import Metadata

CALIBRATION_FILE = "calibration.json"


def read_calibration(
    directory: Path, *, fingerprint: str, block_size: int, confidence_head: bool
) -> Calibration | None:
    """The calibration of the checkpoint in this directory; None if it was never calibrated.

    Raises CheckpointError naming the file and the field: invalid values, another block size or
    fingerprint, or a drafter without a confidence head.
    """
    path = directory / CALIBRATION_FILE
    if not path.exists():
        return None
    metadata = Metadata(str(path), read_json(path))
    if not confidence_head:
        raise metadata.error("temperatures", "cannot apply: this drafter has no confidence head")
    if metadata.get("fingerprint") != fingerprint:
        raise metadata.error(
            "fingerprint",
            f"is of another checkpoint, this one has {fingerprint!r}: run `dspark calibrate` again "
            "or remove the file",
        )
    try:
        calibration = Calibration.from_dict(metadata.values)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    if len(calibration.scaling.temperatures) != block_size:
        raise metadata.error("temperatures", f"must have one value for each of block_size={block_size}")
    return calibration


def write_calibration(path: Path, calibration: Calibration, *, fingerprint: str) -> None:
    """Atomic: a reader never sees a partial file. Raises OSError."""
    text = json.dumps({"fingerprint": fingerprint, **calibration.to_dict()}, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
