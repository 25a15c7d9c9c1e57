"""What is mixed into vLLM's workers, on a model runner that is stood in for."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dspark_core.vllm_engine.steps import WorkerStep

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

NOTHING = WorkerStep(sequences=[], ended=[], logit_rows=[], taps=False, shared=False)

WorkerOn = Callable[[str, list[str]], Any]


class Event:
    def __init__(self, log: list[str]) -> None:
        self._log = log

    def synchronize(self) -> None:
        self._log.append("wait")

    def record(self) -> None:
        self._log.append("record")


@pytest.fixture
def worker_on(monkeypatch: pytest.MonkeyPatch) -> WorkerOn:
    """-> a worker that logs when it fills its inputs, which it does in the guard of vLLM's runner. Its rank
    returns nothing, so nothing else waits for a GPU."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from dspark_core.vllm_engine import worker

    class Worker(worker.StepWorker):
        def __init__(self, device: str, log: list[str]) -> None:
            self.model_runner: Any = SimpleNamespace(
                device=torch.device(device), prepare_inputs_event=None, requests={}
            )
            self._log = log

        def execute_model(self, scheduled: object) -> None:
            with GPUModelRunner.synchronize_input_prep(self.model_runner):
                self._log.append("fill")

    def build(device: str, log: list[str]) -> Worker:
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: Event(log))
        return Worker(device, log)

    monkeypatch.setattr(worker, "get_tp_group", lambda: SimpleNamespace(rank_in_group=1))
    return build


def test_inputs_are_refilled_only_after_a_gpu_has_copied_the_last_ones(worker_on: WorkerOn) -> None:
    log: list[str] = []
    by = worker_on("cuda", log)
    for _ in range(2):
        assert by.dspark_step(NOTHING) is None
    assert log == ["wait", "fill", "record"] * 2


def test_a_cpu_needs_no_wait(worker_on: WorkerOn) -> None:
    log: list[str] = []
    assert worker_on("cpu", log).dspark_step(NOTHING) is None
    assert log == ["fill"]
