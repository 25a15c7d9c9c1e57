"""Answers prompts by speculative decoding, many at a time, and records every round.

Draft blocks are always verified whole. Prompts are token ids; tokenizers and files are left to the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup import BLOCK_TOKENS, LookupDrafting
from dspark_core.engine.protocols import DraftSource
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop, RoundOutput
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError, ContextLengthError, InvalidRequestError
from dspark_core.evaluation.recording import RecordingDrafts, RecordingPlan, ServedPlan, draft_round
from dspark_core.evaluation.round_table import DraftRound
from dspark_core.records import (
    MAX_SEED,
    GenerateRequest,
    SamplingParams,
    SpeculationOptions,
    Verification,
)

DRAFT_DEADLINE_SECONDS = 600.0
"""Long, because a late draft would count as a rejected one, and no user is waiting."""

PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSettings:
    """How answers are generated. Defaults follow the paper's protocol, except for the length."""

    max_tokens: int = 256
    """An answer gets no further round once it has this many tokens; its last round counts in full."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    verification: Verification = Verification.REJECTION
    seed: int = 0
    concurrency: int = 16
    """Number of answers generated together."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.seed <= MAX_SEED // 2:
            raise ConfigError(f"seed must be in [0, {MAX_SEED // 2}], got {self.seed}")
        try:
            self.sampling_of(0)
        except InvalidRequestError as error:  # its message names temperature, top_p or top_k
            raise ConfigError(str(error)) from error

    def sampling_of(self, row: int) -> SamplingParams:
        """Sampling of the prompt in row `row` of its set; with coupled verification, a seed per row."""
        coupled = self.verification is Verification.COUPLED
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed + row if coupled else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPrompt:
    set_name: str
    row: int
    """Index within its set, from 0."""
    token_ids: tuple[int, ...]

    @property
    def request_id(self) -> str:
        return f"{self.set_name}/{self.row}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredPrompt:
    prompt: EvalPrompt
    rounds: tuple[DraftRound, ...]
    """Rounds after prefill; none of them counts the token of prefill."""
    token_ids: tuple[int, ...]
    """The answer: the token of prefill and the tokens committed by the rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRun:
    answered: tuple[AnsweredPrompt, ...]
    """In order of completion."""
    too_long: tuple[EvalPrompt, ...]
    """Prompts skipped because they leave no room in the context."""


@dataclass(slots=True)
class _Running:
    prompt: EvalPrompt
    rounds: list[DraftRound] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)


def draft_generator(seed: int) -> torch.Generator:
    """Random generator of the drafter in a run with this seed.

    Differs from the acceptor's: accepting with the random numbers a draft was drawn with is not lossless.
    """
    return torch.Generator().manual_seed(MAX_SEED - seed)


class EvalRunner:
    def __init__(
        self,
        engine: TargetEngine,
        source: DraftSource | None,
        settings: EvalSettings,
        *,
        lookup: LookupDrafting | None = None,
        stop_token_ids: tuple[int, ...] = (),
    ) -> None:
        """`source`: None evaluates lookup alone. `lookup`: its drafts are used where they promise more than
        the drafter's; None evaluates the drafter alone."""
        self._settings = settings
        self._stop_token_ids = stop_token_ids
        self._longest_draft = max(source.geometry.block_size if source else 0, BLOCK_TOKENS if lookup else 0)
        self._plan = RecordingPlan() if source is None or lookup is None else ServedPlan()
        drafts = None if source is None else RecordingDrafts(source)
        self._judged = drafts if lookup is None else None
        """Source of the confidences to evaluate; None with lookup, where only some rounds have them."""
        self._loop = RoundLoop(
            engine,
            self._plan,
            drafting=Drafting(drafts, engine, deadline_seconds=DRAFT_DEADLINE_SECONDS) if drafts else None,
            lookup=lookup,
            limits=_limits(settings.concurrency, self._longest_draft),
            generator=torch.Generator().manual_seed(settings.seed),
        )
        self._running: dict[str, _Running] = {}

    def run(
        self, prompts: Sequence[EvalPrompt], on_ended: Callable[[EvalPrompt], None] = lambda _: None
    ) -> EvalRun:
        """Answer all prompts; `on_ended` is called for each, skipped ones included."""
        waiting = deque(prompts)
        answered: list[AnsweredPrompt] = []
        too_long: list[EvalPrompt] = []
        while waiting or self._running:
            while waiting and len(self._running) < self._settings.concurrency:
                prompt = waiting.popleft()
                if not self._submit(prompt):
                    too_long.append(prompt)
                    on_ended(prompt)
            for ended in self._step():
                answered.append(
                    AnsweredPrompt(
                        prompt=ended.prompt, rounds=tuple(ended.rounds), token_ids=tuple(ended.token_ids)
                    )
                )
                on_ended(ended.prompt)
        return EvalRun(answered=tuple(answered), too_long=tuple(too_long))

    def _submit(self, prompt: EvalPrompt) -> bool:
        """False when the prompt does not fit the context."""
        request = GenerateRequest(
            request_id=prompt.request_id,
            prompt_token_ids=prompt.token_ids,
            # A lower limit would shorten the draft blocks of the last rounds, and so the accepted length.
            max_tokens=self._settings.max_tokens + self._longest_draft,
            sampling=self._settings.sampling_of(prompt.row),
            stop_token_ids=self._stop_token_ids,
            speculation=SpeculationOptions(verification=self._settings.verification),
        )
        try:
            self._loop.submit(request)
        except ContextLengthError:
            return False
        self._running[prompt.request_id] = _Running(prompt)
        return True

    def _step(self) -> list[_Running]:
        """Run one round -> the answers that ended with it."""
        outputs = self._loop.step()
        report = self._plan.take_report()
        survivals = {one.sequence_id: one for one in report.requests} if report else {}
        ended = []
        for output in outputs:
            running = self._running[output.request_id]
            running.token_ids.extend(output.chunk.token_ids)
            if output.request_id in survivals:  # otherwise the token is prefill's
                confident = self._judged is not None and self._judged.is_confident(output.request_id)
                running.rounds.append(draft_round(survivals[output.request_id], output, confident=confident))
            if self._is_over(running, output):
                self._loop.cancel(output.request_id)
                ended.append(self._running.pop(output.request_id))
        return ended

    def _is_over(self, running: _Running, output: RoundOutput) -> bool:
        return output.chunk.finish_reason is not None or len(running.token_ids) >= self._settings.max_tokens


def _limits(concurrency: int, longest_draft: int) -> BatchLimits:
    """Room for every whole draft plus a prefill chunk; all prompts in the loop may be waiting."""
    return BatchLimits(
        max_running=concurrency,
        max_waiting=concurrency,
        max_batch_tokens=concurrency * (1 + longest_draft) + PREFILL_CHUNK_TOKENS,
        prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
    )
