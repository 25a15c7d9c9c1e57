"""OpenAI's Responses API: from a request body to the answer, whole or as events. Nothing is stored."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.gateway.callers.tiers import Caller
from services.gateway.http.errors import ErrorAnswer, error_answer
from services.gateway.http.streaming import NamedEvent, StreamEnd
from services.gateway.openai.logprobs import LogprobsWriter
from services.gateway.openai.responses_answer import ErrorEvent, EventBody, ResponseBody
from services.gateway.openai.responses_schema import ResponsesBody
from services.gateway.openai.responses_writer import ResponseWriter
from services.gateway.openai.use_case import UseCase


def _sent(event: EventBody) -> NamedEvent:
    return NamedEvent(event.type, event.model_dump_json())


def _failed(answer: ErrorAnswer) -> NamedEvent:
    """Reports an error before there is a response that could."""
    return _sent(ErrorEvent.of(answer))


class Responses(UseCase):
    body_type = ResponsesBody
    id_prefix = "resp_"
    stream_end = StreamEnd(None, _failed)

    async def complete(self, body: ResponsesBody, request_id: str, caller: Caller) -> ResponseBody:
        writer = self._writer(body, request_id)
        async with self._deltas(body, request_id, caller) as deltas:
            async for timed in deltas:
                for _ in writer.add(timed):
                    pass  # events are for streams only
        return writer.response

    async def stream(self, body: ResponsesBody, request_id: str, caller: Caller) -> AsyncIterator[NamedEvent]:
        """Nothing is yielded before the first token, so that earlier errors can get an HTTP status."""
        writer = self._writer(body, request_id)
        async with self._deltas(body, request_id, caller) as deltas:
            try:
                async for timed in deltas:
                    for event in writer.add(timed):
                        yield _sent(event)
            except Exception as error:
                if not writer.begun:
                    raise
                for event in writer.fail(error_answer(error)):
                    yield _sent(event)

    def _writer(self, body: ResponsesBody, request_id: str) -> ResponseWriter:
        response = ResponseBody.begun(self._answers.head(request_id), body)
        return ResponseWriter(response, self._answers, LogprobsWriter(self._tokenizer))
