"""Assembles the gateway's parts around a backend; the REST and gRPC servers both run on the result."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass

from dspark_core.tokenization.tokenizer import Tokenizer
from services.common.lifecycle import end
from services.common.telemetry import Telemetry
from services.gateway.admission import Admission
from services.gateway.answers import AnswerFactory, fingerprint_of
from services.gateway.callers.auth import ApiKeys
from services.gateway.callers.key_file import KeyFile
from services.gateway.config import GatewayConfig
from services.gateway.generation import TextGenerator
from services.gateway.metrics import GatewayMetrics
from services.gateway.openai.chat import ChatCompletions
from services.gateway.openai.completion_answers import ModelBody, ModelList
from services.gateway.openai.completions import Completions
from services.gateway.openai.responses import Responses
from services.gateway.preparation import RequestPreparer
from services.gateway.served_model import ServedModel
from services.gateway.verifiers.backend import GenerationBackend


class Models:
    """Lists the one model a gateway serves."""

    def __init__(self, model: ServedModel, answers: AnswerFactory) -> None:
        self._model = model
        self._answers = answers

    async def list(self) -> ModelList:
        return ModelList(data=[await self.get(self._model.name)])

    async def get(self, name: str) -> ModelBody:
        """Raises UnknownModelError."""
        self._model.check_name(name)
        limit = await self._model.known_limit()
        return ModelBody(id=name, created=self._answers.started, max_model_len=limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Everything a transport needs. For use on one event loop."""

    model_name: str
    chat: ChatCompletions
    completions: Completions
    responses: Responses
    models: Models
    generator: TextGenerator
    answers: AnswerFactory
    admission: Admission
    api_keys: ApiKeys
    key_file: KeyFile | None
    metrics: GatewayMetrics
    telemetry: Telemetry
    max_body_bytes: int
    cors_origins: tuple[str, ...] = ()

    def start_tasks(self, stack: AsyncExitStack) -> None:
        """Starts what runs beside the servers; the stack ends it."""
        if self.key_file is not None:
            stack.push_async_callback(end, asyncio.create_task(self.key_file.keep(), name="key-file"))


def build_gateway(
    config: GatewayConfig, tokenizer: Tokenizer, backend: GenerationBackend, telemetry: Telemetry
) -> Gateway:
    limits = config.limits
    model = ServedModel(config.model_name, backend, limits.max_context_tokens)
    metrics = GatewayMetrics(telemetry.registry)
    admission = Admission(limits.max_running_requests, limits.max_waiting_requests)
    metrics.watch_queue(lambda: admission.running, lambda: admission.waiting)
    answers = AnswerFactory(model=config.model_name, fingerprint=fingerprint_of(config.model_name))
    generator = TextGenerator(
        preparer=RequestPreparer(model, tokenizer, config.tool_format, reasoning=config.reasoning),
        backend=backend,
        tokenizer=tokenizer,
        admission=admission,
        metrics=metrics,
        timeout_seconds=limits.request_timeout_seconds,
        # A request with more choices than there are places would be answered 429 for ever.
        max_choices=min(limits.max_choices, limits.max_running_requests + limits.max_waiting_requests),
    )
    api_keys = ApiKeys(config.api_keys, config.tiers, config.prefix_sharing)
    return Gateway(
        model_name=config.model_name,
        chat=ChatCompletions(generator, answers, tokenizer),
        completions=Completions(generator, answers, tokenizer),
        responses=Responses(generator, answers, tokenizer),
        models=Models(model, answers),
        generator=generator,
        answers=answers,
        admission=admission,
        api_keys=api_keys,
        key_file=KeyFile(config.keys_file, api_keys.use) if config.keys_file else None,
        metrics=metrics,
        telemetry=telemetry,
        max_body_bytes=limits.max_body_bytes,
        cors_origins=config.cors_origins,
    )
