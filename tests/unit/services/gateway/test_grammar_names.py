"""A verifier's errors about a grammar name the field in which the client asked for it."""

from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.errors import ContextLengthError, InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from services.gateway.admission import Admission
from services.gateway.generation import TextGenerator
from services.gateway.metrics import GatewayMetrics
from services.gateway.preparation import RequestPreparer
from services.gateway.requests import ChatMessage, ChatRole, Conversation, TextRequest
from services.gateway.served_model import ServedModel
from services.gateway.tools.tools import Tool, ToolUse
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.fake_generation import FakeBackend

ASKED = Conversation(messages=(ChatMessage(role=ChatRole.USER, content="hi"),))
JSON = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "object"}')
REQUEST = TextRequest(request_id="r", model="m", prompt=ASKED, grammar=JSON)
MAY = ToolUse(tools=(Tool(name="add"),))
MUST = replace(MAY, required=True)


async def refusal(request: TextRequest, error: InvalidRequestError) -> InvalidRequestError:
    backend, tokenizer = FakeBackend(max_context_tokens=5000), byte_tokenizer()
    backend.error = error
    generator = TextGenerator(
        preparer=RequestPreparer(ServedModel("m", backend), tokenizer),
        backend=backend,
        tokenizer=tokenizer,
        admission=Admission(max_running=1, max_waiting=0),
        metrics=GatewayMetrics(CollectorRegistry()),
        timeout_seconds=30,
    )
    with pytest.raises(InvalidRequestError) as caught:
        async with aclosing(generator.stream(request)) as deltas:
            await anext(deltas)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "grammar"),  # over gRPC
        ({"grammar_field": "response_format"}, "response_format"),
        ({"grammar_field": "structured_outputs"}, "structured_outputs"),
        ({"grammar": None, "grammar_field": "response_format", "tools": MUST}, "tools"),
        ({"grammar_field": "response_format", "tools": MAY}, "tools"),
    ],
)
async def test_a_grammar_has_the_name_of_the_field_it_came_from(fields: dict[str, Any], field: str) -> None:
    said = InvalidRequestError("grammar: not for this grammar's model", field="grammar")
    error = await refusal(replace(REQUEST, **fields), said)
    assert (error.field, str(error)) == (field, f"{field}: not for this grammar's model")


async def test_other_fields_keep_their_names() -> None:
    said = ContextLengthError("prompt: a grammar of words", field="prompt")
    assert await refusal(replace(REQUEST, grammar_field="response_format"), said) is said
