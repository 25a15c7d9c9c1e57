"""Target passes computed by vLLM's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from dspark_core.engine.rounds.verifier import STALL_SECONDS
from dspark_core.engine.target.batch import RaggedBatch, Run
from dspark_core.engine.target.passes import TapWriter, computed_on
from dspark_core.vllm_engine.sharing import SharedReader, SharedRows
from dspark_core.vllm_engine.steps import SequenceTracker

PASS_SECONDS = STALL_SECONDS
"""After this time, workers in other processes count as lost, as the verifier does."""


class Workers(Protocol):
    """The part of vLLM's executor that is used."""

    def collective_rpc(
        self, method: str, *, timeout: float | None = None, args: tuple[Any, ...] = ()
    ) -> list[Any]: ...


class VllmPasses:
    def __init__(
        self,
        workers: Workers,
        *,
        version: str,
        device: torch.device,
        max_runs: int,
        taps: TapWriter | None,
        elsewhere: bool = False,
    ) -> None:
        """`workers`: running, of vLLM `version`; `max_runs`: maximum number of sequences per pass;
        `elsewhere`: whether the workers are separate processes."""
        self._workers = workers
        self._version = version
        self._device = device
        self._max_runs = max_runs
        self._taps = taps
        self._tracker = SequenceTracker()
        self._shared = SharedReader() if elsewhere else None

    @property
    def computed_by(self) -> str:
        return computed_on(f"vLLM {self._version}", self._device)

    def forward(self, runs: Sequence[Run], batch: RaggedBatch) -> Tensor:
        """Raises ValueError if there are more runs than the workers have rows."""
        if len(runs) > self._max_runs:
            raise ValueError(f"a pass may hold {self._max_runs} runs, got {len(runs)}")
        step = self._tracker.step(runs, taps=self._taps is not None, shared=self._shared is not None)
        if self._shared is not None and self._device.type == "cuda":
            # Finish all reads of the shared buffers that the workers are about to overwrite.
            torch.cuda.current_stream(self._device).synchronize()
        try:
            answers = self._workers.collective_rpc("dspark_step", timeout=PASS_SECONDS, args=(step,))
        except Exception:
            self._tracker.forget()
            raise
        output = next(answer for answer in answers if answer is not None)
        if self._taps is not None:
            taps = self._result(output.taps)
            # Features may be projected later, after the workers have overwritten the shared buffer.
            self._taps.write(batch.slots.to(self._device), taps.clone() if self._shared else taps)
        return self._result(output.logits).float()

    def _result(self, given: Tensor | SharedRows) -> Tensor:
        if isinstance(given, Tensor):
            return given
        if self._shared is None:
            raise AssertionError("workers in this process share nothing")
        return self._shared.read(given)
