"""Reports of a training run: JSON lines, TensorBoard, and the interface of other listeners."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dspark_core.errors import ConfigError
from dspark_core.training.speculative_validation import ValidationReport
from dspark_core.training.trainer import StepReport


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Means over the steps since the last report."""

    step: int
    cross_entropy: float
    distance: float
    confidence: float
    acceptance: tuple[float, ...]
    expected_length: float
    gradient_norm: float
    learning_rate: float
    seconds_per_step: float
    positions_per_second: float

    @classmethod
    def over(cls, reports: Sequence[StepReport], seconds: float) -> Progress:
        count, last = len(reports), reports[-1]
        columns = zip(*(report.acceptance for report in reports), strict=True)
        acceptance = tuple(sum(column) / count for column in columns)
        mean = StepReport(last.step, 0.0, 0.0, 0.0, acceptance, 0.0, 0.0)
        return cls(
            step=last.step,
            cross_entropy=sum(report.cross_entropy for report in reports) / count,
            distance=sum(report.distance for report in reports) / count,
            confidence=sum(report.confidence for report in reports) / count,
            acceptance=acceptance,
            expected_length=mean.expected_length,
            gradient_norm=sum(report.gradient_norm for report in reports) / count,
            learning_rate=last.learning_rate,
            seconds_per_step=seconds / count,
            positions_per_second=sum(report.positions for report in reports) / max(seconds, 1e-9),
        )

    def scalars(self) -> dict[str, float]:
        return {
            name: getattr(self, name) for name in self.__slots__ if name not in ("step", "acceptance")
        } | {f"acceptance_{k}": rate for k, rate in enumerate(self.acceptance, start=1)}


class Listener(Protocol):
    def stepped(self, report: StepReport) -> None: ...

    def progressed(self, progress: Progress) -> None: ...

    def validated(self, step: int, report: ValidationReport, *, is_best: bool) -> None: ...


class JsonLog:
    def __init__(self, path: Path, start_step: int, *, validation_due: bool = False) -> None:
        """Drops rows that a run resumed after `start_step` will write again; with `validation_due`, also
        that step's validation."""
        self._path = path
        validated_step = start_step - 1 if validation_due else start_step
        kept = [
            row
            for row in read_log(path)
            if row["step"] <= (validated_step if "accepted_length" in row else start_step)
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        partial.rename(path)

    def stepped(self, report: StepReport) -> None:
        """Single steps are not written."""

    def progressed(self, progress: Progress) -> None:
        values = {"step": progress.step, **progress.scalars()}
        self._write({name: float(f"{value:.6g}") for name, value in values.items()} | {"step": progress.step})

    def validated(self, step: int, report: ValidationReport, *, is_best: bool) -> None:
        length = round(report.accepted_length, 4)
        self._write({"step": step, "accepted_length": length, "rounds": report.rounds, "is_best": is_best})

    def _write(self, row: dict[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole rows. A machine that crashes may leave others; they are no reason to stop a training."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


class TensorBoardLog:
    def __init__(self, directory: Path, start_step: int) -> None:
        """Raises ConfigError when TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "output.tensorboard needs TensorBoard: pip install 'dspark[train]', or set it to false"
            ) from error
        self._writer = SummaryWriter(str(directory), purge_step=start_step + 1)

    def stepped(self, report: StepReport) -> None:
        """Single steps are not written."""

    def progressed(self, progress: Progress) -> None:
        for name, value in progress.scalars().items():
            self._writer.add_scalar(name, value, progress.step)
        self._writer.flush()

    def validated(self, step: int, report: ValidationReport, *, is_best: bool) -> None:
        self._writer.add_scalar("accepted_length", report.accepted_length, step)
        self._writer.flush()
