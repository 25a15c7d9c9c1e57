"""Generates many sequences with the target in this process: continuous batching, no drafting.

Every job is seeded and so draws its tokens with its own noise. Rounding may still depend on what shares a
pass (below float32 it does), so reproducing tokens takes the same jobs in the same order in a fresh run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError, ContextLengthError, InvalidRequestError
from dspark_core.records import FinishReason, GenerateRequest, SamplingParams

DEFAULT_CONCURRENCY = 64
PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    key: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    key: str
    token_ids: tuple[int, ...]
    """Includes the stop token, if there is one, as the last."""
    finish: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    key: str
    problem: str


class BatchGenerator:
    def __init__(
        self,
        engine: TargetEngine,
        stop_token_ids: tuple[int, ...],
        *,
        concurrency: int = DEFAULT_CONCURRENCY,
        on_end: Callable[[SequenceState], None] | None = None,
    ) -> None:
        """`concurrency`: sequences decoded together; a new one starts whenever one ends.

        `on_end` is called for each sequence while the engine still holds its states.
        """
        if concurrency < 1:
            raise ConfigError(f"concurrency must be >= 1, got {concurrency}")
        self._engine = engine
        self._stop_token_ids = stop_token_ids
        self._concurrency = concurrency
        self._on_end = on_end
        self._limits = BatchLimits(
            max_running=concurrency,
            max_waiting=concurrency,
            max_batch_tokens=concurrency + PREFILL_CHUNK_TOKENS,
            prefill_chunk_tokens=PREFILL_CHUNK_TOKENS,
        )

    @property
    def max_prompt_tokens(self) -> int:
        """Leaves room for one answer token."""
        return self._engine.max_context_tokens - 1

    def run(self, jobs: Iterable[Job]) -> Iterator[Generated | Failure]:
        """Yields results in the order they finish; a prompt the target cannot take yields a Failure."""
        loop = RoundLoop(self._engine, FullPlanSource(), limits=self._limits, on_end=self._on_end)
        waiting = iter(jobs)
        tokens: dict[str, list[int]] = {}
        exhausted = False
        while not exhausted or tokens:
            while not exhausted and len(tokens) < self._concurrency:
                job = next(waiting, None)
                if job is None:
                    exhausted = True
                elif (failure := self._submit(loop, job)) is not None:
                    yield failure
                else:
                    tokens[job.key] = []
            yield from _ended(loop, tokens)

    def _submit(self, loop: RoundLoop, job: Job) -> Failure | None:
        try:
            loop.submit(
                GenerateRequest(
                    request_id=job.key,
                    prompt_token_ids=job.prompt_ids,
                    max_tokens=job.max_tokens,
                    sampling=job.sampling,
                    stop_token_ids=self._stop_token_ids,
                )
            )
        except (ContextLengthError, InvalidRequestError) as error:
            return Failure(key=job.key, problem=str(error))
        return None


def _ended(loop: RoundLoop, tokens: dict[str, list[int]]) -> Iterator[Generated]:
    """Run one round -> the sequences that ended, which are removed from `tokens`."""
    for output in loop.step():
        tokens[output.request_id].extend(output.chunk.token_ids)
        if output.chunk.finish_reason is not None:
            yield Generated(
                key=output.request_id,
                token_ids=tuple(tokens.pop(output.request_id)),
                finish=output.chunk.finish_reason,
            )
