"""Answers from any OpenAI-compatible server, with bounded concurrency and retries while it is busy."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from dspark_core.errors import ConfigError, UnavailableError
from dspark_core.records import FinishReason, SamplingParams
from dspark_core.tokenization.texts import lone_surrogate
from dspark_core.training.data.generation import Failure
from services.cli.loopback import is_loopback

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_FINISH = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}
GIVE_UP_AFTER = 32
"""Consecutive prompts whose attempts all failed: the server is then considered gone, not busy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointConfig:
    url: str
    """With or without the trailing `/v1`."""
    model: str | None = None
    """None: the first one the server lists."""
    api_key: str | None = None
    concurrency: int = 32
    deadline_seconds: float = 300.0
    """Per attempt at one answer."""
    attempts: int = 6
    backoff_seconds: float = 1.0
    """Pause before the second attempt; doubled each time, up to `max_backoff_seconds`, and jittered."""
    max_backoff_seconds: float = 60.0
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Extra variables for the model's chat template; not in OpenAI's own API, but most other engines accept
    them."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"--endpoint must begin with http:// or https://, got {self.url!r}")
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise ConfigError(f"--endpoint must be a URL, got {self.url!r}: {error}") from error
        if not host:
            raise ConfigError(f"--endpoint must name a host, got {self.url!r}")
        for name in ("concurrency", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not self.deadline_seconds > 0:
            raise ConfigError(f"deadline_seconds must be > 0, got {self.deadline_seconds}")

    @property
    def base_url(self) -> str:
        stem = self.url.rstrip("/")
        return stem if stem.endswith("/v1") else f"{stem}/v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    key: str
    messages: list[dict[str, str]]
    sampling: SamplingParams
    max_tokens: int

    def body(self, model: str, template_arguments: Mapping[str, Any]) -> dict[str, object]:
        body: dict[str, object] = {
            "model": model,
            "messages": self.messages,
            "max_tokens": self.max_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "seed": self.sampling.seed,
        }
        if self.sampling.top_k:  # not in OpenAI's own API, but ours and most others accept it
            body["top_k"] = self.sampling.top_k
        if template_arguments:
            body["chat_template_kwargs"] = dict(template_arguments)
        return body


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    key: str
    text: str
    finish: FinishReason


class _RetryableError(Exception):
    """The server may answer the same request later."""

    def __init__(self, problem: str, after_seconds: float | None = None) -> None:
        super().__init__(problem)
        self.after_seconds = after_seconds


class OpenAIEndpoint:
    """Use as an async context manager; one instance queries one model."""

    def __init__(self, config: EndpointConfig, jitter: Callable[[], float] = random.random) -> None:
        self._config = config
        self._jitter = jitter
        self._model = config.model or ""
        self._unanswered = 0
        headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
        timeout = httpx.Timeout(config.deadline_seconds, connect=min(10.0, config.deadline_seconds))
        limits = httpx.Limits(max_connections=config.concurrency)
        self._http = httpx.AsyncClient(
            timeout=timeout, limits=limits, headers=headers, trust_env=not is_loopback(config.url)
        )

    async def __aenter__(self) -> OpenAIEndpoint:
        """Raises UnavailableError if no model is given and the server does not list one."""
        try:
            if not self._model:
                self._model = await self._first_model()
        except BaseException:
            await self._http.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    @property
    def model(self) -> str:
        return self._model

    async def run(self, questions: Iterable[Question], on_result: Callable[[Reply | Failure], None]) -> None:
        """Asks all questions, at most `concurrency` at a time; results arrive in order of completion.

        Raises UnavailableError if the server stops answering altogether.
        """
        waiting = iter(questions)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._config.concurrency):
                    group.create_task(self._ask_all(waiting, on_result))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first failure cancels the other tasks

    async def _ask_all(
        self, waiting: Iterator[Question], on_result: Callable[[Reply | Failure], None]
    ) -> None:
        for question in waiting:  # shared by all tasks: each takes the next one
            result = await self._ask_patiently(question)
            on_result(result)
            if self._unanswered >= GIVE_UP_AFTER:
                problem = result.problem if isinstance(result, Failure) else ""
                raise UnavailableError(
                    f"{self._config.base_url} left {self._unanswered} prompts in a row unanswered; "
                    f"last error: {problem}"
                )

    async def _ask_patiently(self, question: Question) -> Reply | Failure:
        problem = ""
        for attempt in range(1, self._config.attempts + 1):
            try:
                result = await self._ask(question)
            except _RetryableError as error:
                problem = str(error)
                if attempt < self._config.attempts:
                    await asyncio.sleep(self._pause(attempt, error.after_seconds))
            else:
                self._unanswered = 0
                return result
        self._unanswered += 1
        return Failure(key=question.key, problem=f"{problem} ({self._config.attempts} attempts)")

    def _pause(self, attempt: int, asked_seconds: float | None) -> float:
        wait = min(self._config.backoff_seconds * 2.0 ** (attempt - 1), self._config.max_backoff_seconds)
        if asked_seconds is not None:
            wait = min(max(wait, asked_seconds), self._config.max_backoff_seconds)
        jitter: float = 0.5 * self._jitter()
        return wait * (1 + jitter)

    async def _ask(self, question: Question) -> Reply | Failure:
        try:
            async with asyncio.timeout(self._config.deadline_seconds):
                body = question.body(self._model, self._config.template_arguments)
                response = await self._http.post(f"{self._config.base_url}/chat/completions", json=body)
        except TimeoutError:
            raise _RetryableError(f"no answer within {self._config.deadline_seconds:g} s") from None
        except httpx.RequestError as error:  # not only TransportError: bad compression is a DecodingError
            raise _RetryableError(f"{type(error).__name__}: {error}") from error
        if response.status_code in _RETRIED:
            raise _RetryableError(_problem(response), _retry_after(response))
        if response.is_error:
            return Failure(key=question.key, problem=_problem(response))
        return _reply(question.key, response)

    async def _first_model(self) -> str:
        url = f"{self._config.base_url}/models"
        try:
            response = await self._http.get(url, timeout=min(10.0, self._config.deadline_seconds))
            response.raise_for_status()
            return str(response.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise UnavailableError(f"{url} does not list a model: {type(error).__name__}: {error}") from error


def _reply(key: str, response: httpx.Response) -> Reply | Failure:
    try:
        choice: dict[str, Any] = response.json()["choices"][0]
        message, finish = choice["message"], choice["finish_reason"]
        text, thought = message["content"], message.get("reasoning_content") or message.get("reasoning")
    except (ValueError, LookupError, TypeError) as error:
        return Failure(key=key, problem=f"not a chat completion: {error!r}: {response.text[:200]}")
    if thought:
        return Failure(
            key=key,
            problem="the server returns the model's thought apart, so the answer is not all that it wrote: "
            "turn thinking off (--chat-template-kwargs) or the separation (DSpark: --reasoning none)",
        )
    if not text:
        return Failure(key=key, problem="the answer is empty")
    if not isinstance(text, str):
        return Failure(key=key, problem=f"the answer is not text: {json.dumps(text)[:200]}")
    if (half := lone_surrogate(text)) is not None:
        return Failure(key=key, problem=f"the answer contains {half}, which is not text")
    if not isinstance(finish, str) or finish not in _FINISH:
        return Failure(key=key, problem=f"finish_reason {finish!r}: the answer is incomplete")
    return Reply(key=key, text=text, finish=_FINISH[finish])


def _problem(response: httpx.Response) -> str:
    try:
        message = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):
        message = response.text[:200]
    return f"status {response.status_code}: {message}"


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return float(response.headers["retry-after"])
    except (KeyError, ValueError):
        return None
