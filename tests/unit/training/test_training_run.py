"""A run keeps the best, gives up when told to, and goes on where it stopped."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.drafter_checkpoint import save_drafter
from dspark_core.training.averaging import average_checkpoints
from dspark_core.training.features import write_shard
from dspark_core.training.objectives.dspark import DSparkObjective
from dspark_core.training.recipe import LossConfig
from dspark_core.training.run import RunSettings, TrainingRun
from dspark_core.training.run_log import JsonLog, Progress, TensorBoardLog, read_log
from dspark_core.training.sources import CachedSource
from dspark_core.training.speculative_validation import ValidationReport
from dspark_core.training.trainer import StepReport, Trainer
from dspark_core.training.trainer_config import TrainerConfig
from tests.unit.models.dspark_tiny import tiny_config, tiny_drafter
from tests.unit.training.training_sequences import random_sequence


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> CachedSource:
    config = tiny_config()
    shard = tmp_path_factory.mktemp("shards") / "a.safetensors"
    size = config.backbone.hidden_size
    write_shard(shard, [random_sequence(20, 4, taps=config.tap_size, size=size, seed=i) for i in range(6)])
    return CachedSource([shard])


def _run(
    source: CachedSource, output: Path, lengths: list[float] | None = None, *, yardstick: str = "", **fields
) -> TrainingRun:
    torch.manual_seed(0)
    trainer = Trainer(
        DSparkObjective(tiny_drafter(tiny_config()), LossConfig(anchors_per_sequence=4)),
        TrainerConfig(steps=10, sequences_per_step=2, learning_rate=1e-3),
        source,
    )
    settings = RunSettings(
        output=output, **({"checkpoint_every": 2, "log_every": 2, "validate_every": 2} | fields)
    )
    told = iter(lengths or [])
    validate = None if lengths is None else lambda _: ValidationReport(accepted_length=next(told), rounds=7)
    return TrainingRun(trainer, settings, validate=validate, yardstick=yardstick)


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def test_the_best_export_is_kept_and_patience_ends_the_run(source: CachedSource, tmp_path: Path) -> None:
    run = _run(source, tmp_path, [1.2, 1.5, 1.4, 1.5, 9.0], patience=2)
    state = run.run()
    assert (state.best_length, state.best_step, run.trainer.step) == (1.5, 4, 8)
    best, newest = _weights(tmp_path / "best"), _weights(tmp_path / "drafter")
    assert any(not torch.equal(best[name], newest[name]) for name in best)
    until_best = _run(source, tmp_path / "again", [1.0])
    next_reports = until_best.trainer.run()
    for _ in range(4):
        next(next_reports)
    until_best.trainer.export(tmp_path / "again")
    assert all(torch.equal(value, best[name]) for name, value in _weights(tmp_path / "again").items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "best", "checkpoints", "drafter"]


LENGTHS = [1.1, 1.2, 1.3, 1.25, 1.2]
"""Of the validations after steps 2, 4, ... 10."""


class StopAt:
    def __init__(self, run: TrainingRun, step: int) -> None:
        self._run, self._step = run, step

    def stepped(self, report: StepReport) -> None:
        if report.step == self._step:
            self._run.stop.set()

    def progressed(self, progress: Progress) -> None: ...

    def validated(self, step: int, report: ValidationReport, *, is_best: bool) -> None: ...


def _assert_goes_on_as_a_whole_run(source: CachedSource, folder: Path, step: int, validations: int) -> None:
    """The run in `folder / "parts"` was ended at `step`, after so many validations."""
    whole = _run(source, folder / "whole", LENGTHS)
    whole.listen(JsonLog(folder / "whole.jsonl", 0))
    whole.run()
    second = _run(source, folder / "parts", LENGTHS[validations:])
    assert second.resume()
    assert second.trainer.step == step
    due = second.state.validation_due
    second.listen(JsonLog(folder / "parts.jsonl", step, validation_due=due))
    assert second.run() == whole.state
    assert second.finished
    for name, value in whole.trainer.state()["masters"].items():
        assert torch.equal(value, second.trainer.state()["masters"][name])
    told = [
        [row for row in read_log(folder / f"{name}.jsonl") if "rounds" in row] for name in ("whole", "parts")
    ]
    assert told[0] == told[1]
    assert [row["accepted_length"] for row in told[0]] == LENGTHS


# At 4 and 10 a validation is due, which a run that is to stop leaves to the next.
@pytest.mark.parametrize(("step", "validations"), [(5, 2), (4, 1), (10, 4)])
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    source: CachedSource, tmp_path: Path, step: int, validations: int
) -> None:
    first = _run(source, tmp_path / "parts", LENGTHS, checkpoint_every=100)
    first.listen(JsonLog(tmp_path / "parts.jsonl", 0))
    first.listen(StopAt(first, step))
    first.run()
    assert first.trainer.step == step
    assert not first.finished
    _assert_goes_on_as_a_whole_run(source, tmp_path, step, validations)


@pytest.mark.parametrize("told", [False, True])
def test_what_fails_in_a_validation_costs_no_step(source: CachedSource, tmp_path: Path, told: bool) -> None:
    """Before its figure is in the log, or as by a kill before that is in a checkpoint."""
    first = _run(source, tmp_path / "parts", LENGTHS[:2] if told else LENGTHS[:1], checkpoint_every=100)
    first.listen(JsonLog(tmp_path / "parts.jsonl", 0))

    class FailAtFour(StopAt):
        def validated(self, step: int, report: ValidationReport, *, is_best: bool) -> None:
            if step == 4:
                raise ConfigError("a disk is full")

    first.listen(FailAtFour(first, 100))
    with pytest.raises(ConfigError if told else StopIteration):
        first.run()
    _assert_goes_on_as_a_whole_run(source, tmp_path, 4, 1)


def test_a_length_measured_with_another_yardstick_is_not_the_best(
    source: CachedSource, tmp_path: Path
) -> None:
    def part(lengths: list[float], stop_at: int, yardstick: str) -> TrainingRun:
        run = _run(source, tmp_path, lengths, yardstick=yardstick, patience=3)
        run.resume()
        run.listen(StopAt(run, stop_at))
        run.run()
        return run

    part([1.9, 1.8], 5, "hard")
    same = part([1.7], 7, "hard")
    assert same.set_aside is None
    assert (same.state.best_length, same.state.stale) == (1.9, 2)
    other = part([1.2], 9, "harder")
    assert other.set_aside == same.state
    assert (other.state.best_length, other.state.best_step, other.state.stale) == (1.2, 8, 0)


def test_the_log_forgets_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"ste')
    JsonLog(path, 4)
    assert read_log(path) == [{"step": 2}, {"step": 4}]


def test_a_run_without_a_checkpoint_has_nothing_to_resume(source: CachedSource, tmp_path: Path) -> None:
    assert not _run(source, tmp_path).resume()


@pytest.mark.parametrize("field", ["checkpoint_every", "keep", "log_every", "validate_every", "patience"])
def test_a_bad_setting_is_named(field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be >= 1, got 0"):
        RunSettings(output=tmp_path, **{field: 0})


def test_checkpoints_are_averaged(tmp_path: Path) -> None:
    drafters = [tiny_drafter(tiny_config()), tiny_drafter(tiny_config())]
    with torch.no_grad():
        drafters[1].norm.weight.add_(1.0)
    for index, drafter in enumerate(drafters):
        save_drafter(tmp_path / str(index), drafter)
    average_checkpoints(tmp_path / "mean", [tmp_path / "0", tmp_path / "1"])
    first, mean = _weights(tmp_path / "0"), _weights(tmp_path / "mean")
    torch.testing.assert_close(mean["norm.weight"], first["norm.weight"] + 0.5)
    with pytest.raises(ConfigError, match="exists already"):
        average_checkpoints(tmp_path / "mean", [tmp_path / "0", tmp_path / "1"])
    with pytest.raises(ConfigError, match="at least two"):
        average_checkpoints(tmp_path / "x", [tmp_path / "0"])
    with pytest.raises(CheckpointError, match="nowhere"):
        average_checkpoints(tmp_path / "x", [tmp_path / "0", tmp_path / "nowhere"])


def test_tensorboard_is_written_and_missed_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = TensorBoardLog(tmp_path / "board", 0)
    log.progressed(Progress.over([StepReport(1, 2.0, 1.0, 0.5, (0.5,), 0.1, 1.0, 8)], 2.0))
    log.validated(1, ValidationReport(accepted_length=1.5, rounds=3), is_best=True)
    (events,) = (tmp_path / "board").iterdir()
    content = events.read_bytes()
    assert all(name in content for name in (b"cross_entropy", b"positions_per_second", b"accepted_length"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'dspark\[train\]'"):
        TensorBoardLog(tmp_path / "board", 0)
