"""Passes by workers that are stood in for here; tests/vllm has the real ones."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dspark_core.engine.target.batch import Run, build_batch
from dspark_core.engine.target.passes import TapWriter
from dspark_core.vllm_engine.passes import VllmPasses
from dspark_core.vllm_engine.steps import WorkerStep


class Output(NamedTuple):
    logits: Tensor
    taps: Tensor | None


class ScriptedWorkers:
    """Of several processes the last one has the result."""

    def __init__(self) -> None:
        self.steps: list[WorkerStep] = []
        self.fail = False

    def collective_rpc(
        self, method: str, *, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]:
        assert method == "dspark_step"
        assert timeout is not None
        if self.fail:
            raise RuntimeError("a worker died")
        (step,) = args
        self.steps.append(step)
        rows, tokens = sum(step.logit_rows), sum(one.num_tokens for one in step.sequences)
        taps = torch.full((tokens, 3), float(tokens)) if step.taps else None
        return [None, Output(torch.ones((rows, 5), dtype=torch.bfloat16), taps)]


def passes(workers: ScriptedWorkers, taps: TapWriter | None = None) -> VllmPasses:
    return VllmPasses(workers, version="1.2", device=torch.device("cpu"), max_runs=2, taps=taps)


def forward(by: VllmPasses, runs: Sequence[Run]) -> Tensor:
    return by.forward(runs, build_batch(runs, page_tokens=4))


def test_logits_are_float32_and_taps_reach_their_slots() -> None:
    written: list[tuple[Tensor, Tensor]] = []
    by = passes(ScriptedWorkers(), TapWriter((0,), lambda slots, taps: written.append((slots, taps))))
    logits = forward(by, [Run([1, 2, 3], 2, [5, 9], 3, "a")])
    assert logits.dtype is torch.float32
    assert logits.shape == (3, 5)
    ((slots, taps),) = written
    assert slots.tolist() == [22, 23, 36]
    assert taps.shape == (3, 3)
    assert by.computed_by == "vLLM 1.2"


def test_too_many_runs_are_refused_and_change_nothing() -> None:
    workers = ScriptedWorkers()
    by = passes(workers)
    forward(by, [Run([1], 0, [1], 1, "a")])
    with pytest.raises(ValueError, match="may hold 2 runs, got 3"):
        forward(by, [Run([1], 0, [2 + i], 1, f"{i}") for i in range(3)])
    forward(by, [Run([2], 1, [1], 1, "a")])
    assert [step.sequences[0].fresh for step in workers.steps] == [True, False]


def test_a_pass_that_failed_is_told_anew() -> None:
    workers = ScriptedWorkers()
    by = passes(workers)
    forward(by, [Run([1], 0, [1], 1, "a")])
    workers.fail = True
    with pytest.raises(RuntimeError, match="a worker died"):
        forward(by, [Run([2], 1, [1], 1, "a")])
    workers.fail = False
    forward(by, [Run([2], 1, [1], 1, "a")])
    assert [step.sequences[0].fresh for step in workers.steps] == [True, True]
