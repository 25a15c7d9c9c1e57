"""Shows the progress of a training run: a bar, or plain lines if there is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_core.training import run_log
from dspark_core.training.speculative_validation import ValidationReport
from dspark_core.training.trainer import StepReport


class ProgressView:
    """A `Listener`."""

    def __init__(self, steps: int, start_step: int, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=console.quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=start_step, rates="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stepped(self, report: StepReport) -> None:
        self._bar.update(self._task, completed=report.step)

    def progressed(self, progress: run_log.Progress) -> None:
        line = describe(progress)
        self._bar.update(self._task, rates=line)
        if not self._console.is_terminal:
            self._console.print(f"step {progress.step}  {line}", soft_wrap=True, highlight=False)

    def validated(self, step: int, report: ValidationReport, *, is_best: bool) -> None:
        best = ", the best so far" if is_best else ""
        self._console.print(
            f"step {step}: accepted length {report.accepted_length:.3f} over {report.rounds} rounds{best}",
            soft_wrap=True,
            highlight=False,
        )


def describe(progress: run_log.Progress) -> str:
    rate = 1 / max(progress.seconds_per_step, 1e-9)
    confidence = f"confidence {progress.confidence:.3f}  " if progress.confidence else ""  # not always there
    return (
        f"{rate:.2f} steps/s  {progress.positions_per_second:,.0f} positions/s  "
        f"ce {progress.cross_entropy:.3f}  l1 {progress.distance:.3f}  "
        f"{confidence}expected length {progress.expected_length:.2f}"
    )
