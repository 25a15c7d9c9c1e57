"""The use case behind all of the gateway's APIs: admit, prepare, generate, assemble text, measure."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from opentelemetry import trace

from dspark_core.errors import (
    ContextLengthError,
    DeadlineError,
    DSparkError,
    InvalidRequestError,
    QueueFullError,
    QuotaError,
    UnavailableError,
    UnknownModelError,
)
from dspark_core.records import FinishReason, GenerateChunk
from dspark_core.tokenization.tokenizer import Tokenizer
from services.common.interruption import Interruption
from services.common.streams import closing
from services.gateway.admission import Admission, Ticket
from services.gateway.assembly import TextAssembler, TextDelta
from services.gateway.callers.quotas import Account, Meter
from services.gateway.choices import choices_of, merged, together
from services.gateway.metrics import CANCELLED, GatewayMetrics
from services.gateway.preparation import PreparedRequest, RequestPreparer
from services.gateway.requests import DEFAULT_MAX_CHOICES, TextRequest
from services.gateway.thread_work import ThreadWork
from services.gateway.verifiers.backend import GenerationBackend

Clock = Callable[[], float]

_log = logging.getLogger(__name__)

_REFUSALS = (InvalidRequestError, ContextLengthError, UnknownModelError, QueueFullError, QuotaError)
ORDINARY_OUTCOMES = frozenset(
    {*(reason.value for reason in FinishReason), CANCELLED, *(kind.__name__ for kind in _REFUSALS)}
)
"""Finished or cancelled requests, client errors, and refusals by design: logged at INFO, and no failures to
the alerts and the dashboard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedDelta:
    delta: TextDelta
    seconds: float
    """Since the request was sent to the backend; time in the gateway's queue is not included."""
    decode_tokens_per_second: float = 0.0
    """Tokens after those of the first chunk, divided by the time since that chunk; 0.0 without any."""
    min_tokens_per_second: float | None = None
    """The request's speed floor, promised or wished for."""
    choice: int = 0
    """Index of the answer this belongs to."""


class TextGenerator:
    def __init__(
        self,
        *,
        preparer: RequestPreparer,
        backend: GenerationBackend,
        tokenizer: Tokenizer,
        admission: Admission,
        metrics: GatewayMetrics,
        timeout_seconds: float,
        max_choices: int = DEFAULT_MAX_CHOICES,
        clock: Clock = time.monotonic,
    ) -> None:
        self._preparer = preparer
        self._backend = backend
        self._tokenizer = tokenizer
        self._admission = admission
        self._metrics = metrics
        self._timeout_seconds = timeout_seconds
        self._max_choices = max_choices
        self._clock = clock

    async def stream(
        self, *requests: TextRequest, account: Account | None = None
    ) -> AsyncIterator[TimedDelta]:
        """Yields text as it is committed; the last delta of each choice has a finish reason. Close to cancel.

        requests: one per prompt. Choices are numbered prompt by prompt. An error in one ends them all.
        account: pays for them.

        Raises:
            InvalidRequestError: before anything is generated.
            QuotaError: likewise; the account is used up.
            QueueFullError, UnavailableError: likewise, or once every verifier has failed.
            DeadlineError: the request exceeded its time limit.
        """
        arrival, account = self._clock(), account or Account()
        with self._recording_failure(requests[0], arrival, account):
            tickets = self._enter(requests, account)
        meter = Meter(account, requests[0].choices)
        work = ThreadWork(account.name)
        try:
            streams, places = [], iter(tickets)
            for place, request in enumerate(requests):
                with (
                    self._recording_failure(request, arrival, account),
                    _giving_back(account, len(tickets), work),
                ):
                    prepared = await self._prepare(request, arrival, work)
                choices = choices_of(prepared, request.choices, first=place * request.choices)
                runs = [self._run(one, next(places), arrival, account) for one in choices]
                streams.append(together(runs, len(prepared.request.prompt_token_ids)))
            async with closing(streams[0] if len(streams) == 1 else merged(streams)) as deltas:
                async for timed in deltas:
                    meter.add(timed.choice, timed.delta.usage)
                    yield timed
        finally:
            # Hold the places while a thread still works for the requests; otherwise clients that disconnect
            # could queue unbounded work.
            work.when_done(lambda: _close_all(tickets, account))

    def _enter(self, requests: Sequence[TextRequest], account: Account) -> Sequence[Ticket]:
        count = sum(request.choices for request in requests)
        most = min(self._max_choices, account.max_at_once)
        if count > most:
            whose = "gateway" if most == self._max_choices else "key"
            field, name = (
                ("n", "n") if len(requests) == 1 else ("prompt", f"{len(requests)} prompts, times n,")
            )
            raise InvalidRequestError(
                f"{name} must be <= {most}, this {whose}'s limit, got {count}", field=field
            )
        try:
            account.enter(count)
        except QuotaError as error:
            self._metrics.tiers.quota_refused(requests[0].tier, error.quota)
            raise
        try:
            return self._admission.enter_all(count)
        except DSparkError:
            account.give_back(count)
            account.leave(count)
            raise

    @contextlib.contextmanager
    def _recording_failure(self, request: TextRequest, arrival: float, account: Account) -> Iterator[None]:
        """Records a request that fails before it runs in the same log and metrics as the others."""
        try:
            yield
        except BaseException as error:
            record = _Record(
                self._metrics, self._clock, arrival, request.request_id, request.tier, account.name
            )
            record.outcome = _outcome_of(error)
            record.close()
            raise

    async def _prepare(self, request: TextRequest, arrival: float, work: ThreadWork) -> PreparedRequest:
        with Interruption() as limit, self._admission.ending(limit):
            limit.after(self._remaining(arrival), self._too_late())
            return await limit.wait(self._preparer.prepare(request, work))

    async def _run(
        self, prepared: PreparedRequest, ticket: Ticket, arrival: float, account: Account
    ) -> AsyncIterator[TimedDelta]:
        request_id, tier = prepared.request.request_id, prepared.tier
        record = _Record(self._metrics, self._clock, arrival, request_id, tier, account.name, prepared)
        try:
            await ticket.start(self._remaining(arrival))
            async with closing(self._generate(prepared, record, arrival)) as deltas:
                async for timed in deltas:
                    yield timed
        except InvalidRequestError as error:
            refused = _in_terms_of_request(error, prepared)
            record.outcome = _outcome_of(refused)
            raise refused from None
        except (asyncio.CancelledError, GeneratorExit) as left:
            record.outcome = record.outcome or _outcome_of(left)
            raise
        except Exception as error:
            record.outcome = _outcome_of(error)
            raise
        finally:
            record.close()
            ticket.close()  # other choices may take longer

    async def _generate(
        self, prepared: PreparedRequest, record: _Record, arrival: float
    ) -> AsyncIterator[TimedDelta]:
        assembler = TextAssembler(
            self._tokenizer, prepared.request, prepared.stop, prepared.calls, prepared.thought
        )
        started = self._clock()
        # Each wait covers a single step, as this generator may be advanced from different tasks.
        with Interruption() as limit, self._admission.ending(limit):
            limit.after(self._remaining(arrival), self._too_late())
            async with closing(self._backend.generate(prepared.request)) as chunks:
                while True:
                    chunk = await _next(chunks, limit)
                    delta = assembler.add(chunk)
                    record.add(delta)
                    yield TimedDelta(
                        delta=delta,
                        seconds=self._clock() - started,
                        decode_tokens_per_second=record.decode_tokens_per_second,
                        min_tokens_per_second=prepared.request.min_tokens_per_second,
                        choice=prepared.choice,
                    )
                    if chunk.finish_reason is not None:
                        # Read to the end: a call closed now would count as cancelled in every service.
                        with contextlib.suppress(DSparkError):
                            await _next(chunks, limit)
                    if delta.finish_reason is not None:
                        return

    def _too_late(self) -> DeadlineError:
        return DeadlineError(
            f"the request did not finish within {self._timeout_seconds:g} s, this gateway's limit"
        )

    def _remaining(self, arrival: float) -> float:
        return max(0.0, arrival + self._timeout_seconds - self._clock())


def _in_terms_of_request(error: InvalidRequestError, prepared: PreparedRequest) -> DSparkError:
    """Restates an error in terms of the client's fields. Verifiers only know the compiled `grammar`, and the
    scheduler only the floor. A tier's floor that cannot be met is not the client's error."""
    if error.field == "grammar":
        return error.about(prepared.grammar_field)
    if error.field != "min_tokens_per_second":
        return error
    if prepared.floor_field is None:
        return UnavailableError(str(error.about(f"the floor of tier {prepared.tier!r}")))
    return error.about(prepared.floor_field)


def _outcome_of(error: BaseException) -> str:
    left = isinstance(error, (asyncio.CancelledError, GeneratorExit))
    return CANCELLED if left else type(error).__name__


@contextlib.contextmanager
def _giving_back(account: Account, count: int, work: ThreadWork) -> Iterator[None]:
    """Requests that are refused before they run do not count as let in, unless finding out was work: of
    grammars to check, nobody may send more than the key's quota allows."""
    try:
        yield
    except UnavailableError:
        account.give_back(count)
        raise
    except (InvalidRequestError, QueueFullError):
        if not work.asked:
            account.give_back(count)
        raise


def _close_all(tickets: Sequence[Ticket], account: Account) -> None:
    for ticket in tickets:
        ticket.close()
    account.leave(len(tickets))


async def _next(chunks: AsyncIterator[GenerateChunk], limit: Interruption) -> GenerateChunk:
    try:
        return await limit.wait(anext(chunks))
    except StopAsyncIteration:
        raise UnavailableError("the verifier ended the stream without a finish reason") from None


class _Record:
    """Collects what one choice contributes to the metrics, the log and its span."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        clock: Clock,
        arrival: float,
        request_id: str,
        tier: str,
        key: str,
        prepared: PreparedRequest | None = None,
    ) -> None:
        """key: its name; prepared: None if the request failed before it was prepared."""
        self._metrics = metrics
        self._clock = clock
        self._arrival = arrival
        self._request_id = request_id
        self._tier = tier
        self._key = key
        request = prepared.request if prepared else None
        self._prompt_tokens = len(request.prompt_token_ids) if request else 0
        self._repeats_prompt = prepared is not None and prepared.repeats_prompt
        self._promised = request.min_tokens_per_second if request and request.floor_promised else None
        self._first: tuple[float, int] | None = None  # arrival time and number of the first tokens
        self._last_tokens: float | None = None
        self._delta: TextDelta | None = None
        # The calling transport's span; its context must not be entered inside a generator. It describes the
        # first choice only, as one span cannot describe several.
        first = prepared is None or prepared.choice == 0
        self._span = trace.get_current_span() if first else trace.INVALID_SPAN
        self._span.set_attribute("dspark.request_id", request_id)
        self._span.set_attribute("dspark.prompt_tokens", self._prompt_tokens)
        self.outcome = ""

    def add(self, delta: TextDelta) -> None:
        self._delta = delta
        if delta.finish_reason is not None:
            self.outcome = delta.finish_reason.value
        if not delta.token_ids:
            return
        now = self._clock()
        if self._last_tokens is None:
            self._metrics.first_token(now - self._arrival)
            if not self._repeats_prompt:
                self._metrics.prompt(self._tier, delta.usage.prompt_tokens, delta.usage.cached_prompt_tokens)
            self._first = (now, delta.usage.completion_tokens)
        else:
            self._metrics.next_tokens(now - self._last_tokens, len(delta.token_ids))
        self._last_tokens = now

    @property
    def decode_tokens_per_second(self) -> float:
        if self._first is None or self._last_tokens is None or self._delta is None:
            return 0.0
        first_at, first_tokens = self._first
        seconds = self._last_tokens - first_at
        return (self._delta.usage.completion_tokens - first_tokens) / seconds if seconds > 0 else 0.0

    def close(self) -> None:
        rate = self.decode_tokens_per_second
        if self._promised is not None and rate:
            self._metrics.tiers.promise(self._tier, held=rate >= self._promised)
        stats = self._delta.stats if self._delta else None
        completion_tokens = self._delta.usage.completion_tokens if self._delta else 0
        self._metrics.tiers.completion(self._tier, completion_tokens)
        seconds = self._clock() - self._arrival
        self._log(completion_tokens, seconds, rate)
        self._metrics.generation_ended(
            self.outcome,
            seconds=seconds,
            completion_tokens=completion_tokens,
            stats=stats,
        )
        self._span.set_attribute("dspark.completion_tokens", completion_tokens)
        self._span.set_attribute("dspark.outcome", self.outcome)
        if stats is not None:
            self._span.set_attribute("dspark.rounds", stats.rounds)
            self._span.set_attribute("dspark.accepted_length", stats.accepted_length)

    def _log(self, completion_tokens: int, seconds: float, rate: float) -> None:
        """Logs one line per choice, without any of its text."""
        fields: dict[str, object] = {
            "request_id": self._request_id,
            "tier": self._tier,
            "outcome": self.outcome,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "seconds": round(seconds, 3),
        }
        if self._key:
            fields["key"] = self._key
        if self._delta is not None:
            fields["cached_prompt_tokens"] = self._delta.usage.cached_prompt_tokens
        if self._first is not None:
            fields["first_token_seconds"] = round(self._first[0] - self._arrival, 3)
        if rate:
            fields["tokens_per_second"] = round(rate, 1)
        if self._delta is not None and self._delta.stats is not None and self._delta.stats.rounds:
            fields["accepted_length"] = round(self._delta.stats.accepted_length, 2)
        level = logging.INFO if self.outcome in ORDINARY_OUTCOMES else logging.WARNING
        text = ", ".join(f"{name} {value}" for name, value in fields.items() if name != "request_id")
        _log.log(level, "request %s ended: %s", self._request_id, text, extra=fields)
