"""Accepted length of a drafter in training, by speculative decoding with the real engines.

Decoding is greedy, verifies whole draft blocks and skips calibration, so the same prompts give the same
result. Prompts are token ids; reading and rendering them is left to the caller.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dspark_core.engine.building import EngineOptions, build_drafter, build_target, context_limit
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.errors import ConfigError
from dspark_core.models.loading import LoadedTarget
from dspark_core.records import GenerateRequest, RoundReport, SamplingParams

_DRAFT_DEADLINE_SECONDS = 600.0
"""Long, because a late draft would count as a rejected one."""
_PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationReport:
    accepted_length: float
    """Committed tokens per round, the bonus token included."""
    rounds: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationSettings:
    max_tokens: int = 64
    """An answer gets no further round once it has this many tokens; its last round counts in full."""
    concurrency: int = 16
    dtype: str = "bfloat16"
    kv_cache_bytes: int = 2**29

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")


class SpeculativeValidator:
    def __init__(
        self,
        target: LoadedTarget,
        prompts: Sequence[tuple[int, ...]],
        stop_token_ids: tuple[int, ...],
        settings: ValidationSettings,
    ) -> None:
        """Raises ConfigError when a prompt leaves no room for its answer."""
        if not prompts:
            raise ConfigError("validation needs at least one prompt")
        self._options = EngineOptions(
            target_model=str(target.path),
            drafter=None,
            dtype=settings.dtype,
            kv_cache_bytes=settings.kv_cache_bytes,
        )
        # Features of every drafter have the target's hidden size.
        limit = context_limit(self._options, target, target.config.hidden_size)
        most = limit - settings.max_tokens - 1
        for number, prompt in enumerate(prompts):
            if len(prompt) > most:
                raise ConfigError(
                    f"validation prompt {number} has {len(prompt)} tokens; "
                    f"with max_tokens={settings.max_tokens} there is room for {most}: the context is of "
                    f"{target.config.max_context_tokens} tokens, the cache of validations of {limit}"
                )
        self._target = target
        self._prompts = prompts
        self._stop_token_ids = stop_token_ids
        self._settings = settings

    @property
    def yardstick(self) -> str:
        """Differs if accepted lengths are not comparable. Concurrency changes them in no systematic way."""
        measured = (self._prompts, self._stop_token_ids, self._settings.max_tokens, self._settings.dtype)
        return hashlib.sha256(repr(measured).encode()).hexdigest()[:16]

    def __call__(self, drafter: Path) -> ValidationReport:
        """Answer all prompts with the checkpoint in the directory `drafter`."""
        settings = self._settings
        options = replace(self._options, drafter=str(drafter))
        target = build_target(options, self._target)
        drafts = LocalDraftSource(build_drafter(options, self._target, calibrated=False))
        plan = _ReportedPlan()
        loop = RoundLoop(
            target.engine,
            plan,
            drafting=Drafting(drafts, target.engine, deadline_seconds=_DRAFT_DEADLINE_SECONDS),
            limits=_limits(settings.concurrency, drafts.geometry.block_size),
            generator=torch.Generator().manual_seed(0),
        )
        committed = self._answer(loop, plan, drafts.geometry.block_size)
        return ValidationReport(
            accepted_length=sum(committed) / max(len(committed), 1), rounds=len(committed)
        )

    def _answer(self, loop: RoundLoop, plan: _ReportedPlan, block_size: int) -> list[int]:
        """-> committed tokens of every round. Prefill, whose token no draft could save, is not a round."""
        committed: list[int] = []
        waiting = deque(enumerate(self._prompts))
        lengths: dict[str, int] = {}
        while waiting or lengths:
            while waiting and len(lengths) < self._settings.concurrency:
                number, prompt = waiting.popleft()
                loop.submit(self._request(str(number), prompt, block_size))
                lengths[str(number)] = 0
            plan.latest = frozenset()
            for output in loop.step():
                if output.request_id in plan.latest:
                    committed.append(len(output.chunk.token_ids))
                lengths[output.request_id] += len(output.chunk.token_ids)
                enough = lengths[output.request_id] >= self._settings.max_tokens
                if enough or output.chunk.finish_reason is not None:
                    loop.cancel(output.request_id)
                    del lengths[output.request_id]
        return committed

    def _request(self, request_id: str, prompt: tuple[int, ...], block_size: int) -> GenerateRequest:
        return GenerateRequest(
            request_id=request_id,
            prompt_token_ids=prompt,
            # A lower limit would shorten the draft blocks of the last rounds.
            max_tokens=self._settings.max_tokens + block_size,
            sampling=SamplingParams(temperature=0.0),
            stop_token_ids=self._stop_token_ids,
        )


class _ReportedPlan(FullPlanSource):
    """Verifies whole blocks and records which requests took part in the latest round."""

    def __init__(self) -> None:
        self.latest: frozenset[str] = frozenset()

    def report(self, report: RoundReport) -> None:
        self.latest = frozenset(request.sequence_id for request in report.requests)


def _limits(concurrency: int, block_size: int) -> BatchLimits:
    return BatchLimits(
        max_running=concurrency,
        max_waiting=concurrency,
        max_batch_tokens=concurrency * (1 + block_size) + _PREFILL_CHUNK_TOKENS,
        prefill_chunk_tokens=_PREFILL_CHUNK_TOKENS,
    )
