"""One training run in one folder: steps, checkpoints, validation, early stopping, and resuming.

The folder holds `checkpoints/` (to resume from), `drafter/` (the newest export), `best/` (the export with
the longest accepted length, if the run validates) and `log.jsonl`.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.training.checkpoints import Checkpoints
from dspark_core.training.run_log import Listener, Progress
from dspark_core.training.speculative_validation import ValidationReport
from dspark_core.training.trainer import StepReport, Trainer

NEWEST, BEST, LOG, CHECKPOINTS = "drafter", "best", "log.jsonl", "checkpoints"
Validate = Callable[[Path], ValidationReport]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    output: Path
    checkpoint_every: int = 200
    keep: int = 2
    """Number of checkpoints kept on disk."""
    log_every: int = 20
    validate_every: int = 200
    patience: int | None = None
    """End the run after this many validations without a new best; None: never end early."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep", "log_every", "validate_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """State of a run besides the trainer's."""

    yardstick: str = ""
    """What accepted lengths are measured with; those of another are not comparable. Empty: unknown."""
    best_length: float = 0.0
    best_step: int | None = None
    stale: int = 0
    """Validations since the best one."""
    validation_due: bool = False
    """The current step still has to be exported and validated."""


class TrainingRun:
    def __init__(
        self,
        trainer: Trainer,
        settings: RunSettings,
        *,
        validate: Validate | None = None,
        validates: bool | None = None,
        yardstick: str = "",
        drafter: Mapping[str, object] | None = None,
    ) -> None:
        """Only the first worker needs `validate`, with its `yardstick` (`RunState`), and calls listeners;
        `validates` tells the others whether the first validates. `drafter`: what the weights mean beyond
        their shapes, as plain values; `resume` refuses a checkpoint with other values."""
        self.trainer, self.settings = trainer, settings
        self._drafter = dict(drafter or {})
        self.state = RunState(yardstick=yardstick)
        self.set_aside: RunState | None = None
        """The state whose best validation `resume` has dropped, as its yardstick was another."""
        self.stop = threading.Event()
        """Set by the caller: the run finishes the current step, saves its state and ends."""
        self._validate = validate
        self._validates = validate is not None if validates is None else validates
        self._listeners: list[Listener] = []
        self._checkpoints = Checkpoints(settings.output / CHECKPOINTS, settings.keep)
        self._saved: tuple[int, RunState] | None = None
        self._pending: list[StepReport] = []

    def resume(self) -> bool:
        """Restore the newest checkpoint, if there is one. Raises CheckpointError when it cannot be used,
        ConfigError when it was saved with other `drafter` values or after more steps than are asked for."""
        latest = self._checkpoints.latest()
        if latest is None:
            return False
        saved = self._checkpoints.load(latest)
        if missing := {"trainer", "run", "drafter"} - saved.keys():
            raise CheckpointError(f"{latest} has no {', '.join(sorted(missing))}: --fresh starts over")
        for name, value in self._drafter.items():
            if (was := saved["drafter"].get(name, value)) != value:
                raise ConfigError(
                    f"{name}: now {value!r}, {was!r} in {latest}: give what the run had, or --fresh "
                    "starts over"
                )
        self.trainer.restore(saved["trainer"])
        step, steps = self.trainer.step, self.trainer.config.steps
        if step > steps:
            raise ConfigError(f"optimisation.steps is {steps}, the run is at step {step} already")
        self.state = self._comparable(RunState(**saved["run"]))
        self._saved = (self.trainer.step, self.state)
        return True

    def _comparable(self, saved: RunState) -> RunState:
        """`saved`, without its best validation if this run measures with another yardstick."""
        yardstick = self.state.yardstick
        other = float("" not in (yardstick, saved.yardstick) and yardstick != saved.yardstick)
        if self.trainer.workers.total(torch.tensor(other)) > 0:  # only the first knows
            self.set_aside = saved
            return RunState(yardstick=yardstick, validation_due=saved.validation_due)
        return replace(saved, yardstick=yardstick or saved.yardstick)

    def listen(self, listener: Listener) -> None:
        self._listeners.append(listener)

    @property
    def finished(self) -> bool:
        """False: steps, or a validation that is due, remain."""
        return self._at_end() and not self.state.validation_due

    def run(self) -> RunState:
        """Run to the last step, until patience runs out, or until `stop` is set."""
        if self.state.validation_due and self._ends_here():
            return self.state
        seconds, started = 0.0, time.perf_counter()
        for report in self.trainer.run():
            self._pending.append(report)
            seconds += time.perf_counter() - started  # excludes validation and checkpoints
            for listener in self._listeners:
                listener.stepped(report)
            last = report.step == self.trainer.config.steps
            if last or report.step % self.settings.log_every == 0:
                self._report_progress(seconds)
                seconds = 0.0
            if last or report.step % self.settings.validate_every == 0:
                self.state = replace(self.state, validation_due=True)
            if self._ends_here():
                break
            started = time.perf_counter()
        return self.state

    def _ends_here(self) -> bool:
        """Export, validate and save as due after a step -> whether the run ends here."""
        due = self.state.validation_due
        if due:
            self._save()  # before validating: an error or interrupt there must not lose training progress
            self._export()
            if not self._validates:
                self.state = replace(self.state, validation_due=False)
            elif not self._asked_to_stop():
                self._validate_newest()
        over = self._at_end() or self._asked_to_stop()
        if over or (self.trainer.step % self.settings.checkpoint_every == 0 and not due):
            self._save()
        return over

    def _report_progress(self, seconds: float) -> None:
        progress = Progress.over(self._pending, seconds)
        self._pending = []
        for listener in self._listeners:
            listener.progressed(progress)

    def _save(self) -> None:
        """Save a checkpoint unless the current state is already on disk."""
        present = (self.trainer.step, self.state)
        if present == self._saved:
            return
        self._saved = present
        state = {"trainer": self.trainer.state(), "run": asdict(self.state), "drafter": self._drafter}
        if self.trainer.workers.is_first:
            self._checkpoints.save(self.trainer.step, state)
        self.trainer.workers.barrier()

    def _export(self) -> None:
        newest = self.settings.output / NEWEST
        partial = newest.with_suffix(".partial")
        if self.trainer.workers.is_first:  # others might delete what the first is already writing
            shutil.rmtree(partial, ignore_errors=True)
        self.trainer.export(partial)
        if self.trainer.workers.is_first:
            _replace_directory(partial, newest)

    def _validate_newest(self) -> None:
        newest = self.settings.output / NEWEST
        report = ValidationReport(accepted_length=0.0, rounds=0)
        if self._validate is not None:
            report = self._validate(newest)
        length = float(self.trainer.workers.total(torch.tensor(report.accepted_length, dtype=torch.float64)))
        is_best = length > self.state.best_length
        if is_best:
            self.state = RunState(
                yardstick=self.state.yardstick, best_length=length, best_step=self.trainer.step
            )
        else:
            self.state = replace(self.state, stale=self.state.stale + 1, validation_due=False)
        if self.trainer.workers.is_first:
            self._keep_best(newest, is_best=is_best)
            for listener in self._listeners:
                listener.validated(self.trainer.step, report, is_best=is_best)

    def _keep_best(self, newest: Path, *, is_best: bool) -> None:
        if is_best:
            partial = newest.with_suffix(".partial")
            shutil.copytree(newest, partial)
            _replace_directory(partial, self.settings.output / BEST)

    def _at_end(self) -> bool:
        """Whether the steps are done or patience has run out."""
        patience = self.settings.patience
        out_of_patience = patience is not None and self.state.stale >= patience
        return self.trainer.step == self.trainer.config.steps or out_of_patience

    def _asked_to_stop(self) -> bool:
        """Whether any worker was asked; all must agree, or the collectives would deadlock."""
        workers = self.trainer.workers
        return bool(workers.total(torch.tensor(float(self.stop.is_set()))) > 0)


def _replace_directory(new: Path, old: Path) -> None:
    """Readers see the old content, the new, or for an instant neither; never a partial one."""
    gone = old.with_suffix(".old")
    shutil.rmtree(gone, ignore_errors=True)
    if old.exists():
        old.rename(gone)
    new.rename(old)
    shutil.rmtree(gone, ignore_errors=True)
