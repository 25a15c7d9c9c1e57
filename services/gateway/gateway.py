"""Puts the gateway's parts together around a backend; REST and gRPC are both served from here."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.errors import UnavailableError, UnknownModelError
from dspark_core.tokenization.tokenizer import Tokenizer
from services.common.telemetry import Telemetry
from services.gateway.admission import Admission
from services.gateway.answers import AnswerFactory, fingerprint_of
from services.gateway.auth import ApiKeys
from services.gateway.backend import GenerationBackend
from services.gateway.chat import ChatCompletions
from services.gateway.completions import Completions
from services.gateway.config import GatewayConfig
from services.gateway.generation import TextGenerator
from services.gateway.metrics import GatewayMetrics
from services.gateway.openai_responses import ModelBody, ModelList
from services.gateway.preparation import RequestPreparer


class Models:
    """The one model a gateway serves."""

    def __init__(
        self, answers: AnswerFactory, backend: GenerationBackend, max_context_tokens: int | None
    ) -> None:
        self._answers = answers
        self._backend = backend
        self._max_context_tokens = max_context_tokens

    async def list(self) -> ModelList:
        return ModelList(data=[await self.get(self._answers.model)])

    async def get(self, name: str) -> ModelBody:
        """Raises UnknownModelError."""
        if name != self._answers.model:
            raise UnknownModelError(
                f"the model {name!r} does not exist here, only {self._answers.model!r}", field="model"
            )
        return ModelBody(id=name, created=self._answers.started, max_model_len=await self._limit())

    async def _limit(self) -> int | None:
        try:
            limit = (await self._backend.describe()).max_context_tokens
        except UnavailableError:
            return self._max_context_tokens
        return min(limit, self._max_context_tokens or limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Everything a transport needs. One event loop only."""

    model_name: str
    chat: ChatCompletions
    completions: Completions
    models: Models
    generator: TextGenerator
    answers: AnswerFactory
    admission: Admission
    api_keys: ApiKeys
    metrics: GatewayMetrics
    telemetry: Telemetry
    max_body_bytes: int
    cors_origins: tuple[str, ...] = ()


def build_gateway(
    config: GatewayConfig, tokenizer: Tokenizer, backend: GenerationBackend, telemetry: Telemetry
) -> Gateway:
    limits = config.limits
    metrics = GatewayMetrics(telemetry.registry)
    admission = Admission(limits.max_running_requests, limits.max_waiting_requests)
    metrics.watch_queue(lambda: admission.running, lambda: admission.waiting)
    answers = AnswerFactory(model=config.model_name, fingerprint=fingerprint_of(config.model_name))
    generator = TextGenerator(
        preparer=RequestPreparer(
            config.model_name, tokenizer, backend, limits.max_context_tokens, config.tool_format
        ),
        backend=backend,
        tokenizer=tokenizer,
        admission=admission,
        metrics=metrics,
        timeout_seconds=limits.request_timeout_seconds,
        # More than there are places for would be told to come back for ever.
        max_choices=min(limits.max_choices, limits.max_running_requests + limits.max_waiting_requests),
    )
    return Gateway(
        model_name=config.model_name,
        chat=ChatCompletions(generator, answers, tokenizer),
        completions=Completions(generator, answers, tokenizer),
        models=Models(answers, backend, limits.max_context_tokens),
        generator=generator,
        answers=answers,
        admission=admission,
        api_keys=ApiKeys(config.api_keys, config.tiers),
        metrics=metrics,
        telemetry=telemetry,
        max_body_bytes=limits.max_body_bytes,
        cors_origins=config.cors_origins,
    )
