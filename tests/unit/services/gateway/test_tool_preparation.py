"""Call marks that are tokens: named in grammars, visible to the call parser, hidden everywhere else."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import Future

import pytest
from llguidance import LLMatcher, LLTokenizer

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.records import FinishReason, GenerateChunk, GenerateRequest
from dspark_core.tokenization.grammar_checking import GrammarChecker
from dspark_core.tokenization.grammar_sources import grammar_source
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.tokenization.tool_formats import ToolFormat
from services.common.lifecycle import end
from services.gateway.assembly import TextAssembler
from services.gateway.thread_work import ThreadWork
from services.gateway.tools.tool_preparation import ToolPreparer
from services.gateway.tools.tool_stream import CallDelta
from services.gateway.tools.tools import Tool, ToolUse
from tests.support.byte_tokenizer import END, byte_tokenizer

ARGUMENTS = '{"a": 1}'
CALL = f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'
TAGGED = f'<|python_tag|>{{"name": "add", "parameters": {ARGUMENTS}}}'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
USE = ToolUse(tools=(Tool(name="add", parameters=SCHEMA),))
REQUIRED = ToolUse(tools=USE.tools, required=True)


def tokenizer(*marks: str, special: bool) -> Tokenizer:
    return byte_tokenizer(added=marks, special=special)


def read(preparer: ToolPreparer, model: Tokenizer, text: str) -> tuple[str, tuple[CallDelta, ...]]:
    request = GenerateRequest(request_id="r", prompt_token_ids=(1,), stop_token_ids=(END,))
    assembler = TextAssembler(model, request, (), preparer.reading(USE, None))
    token_ids = (*model.encode(text, add_special_tokens=False), END)
    delta = assembler.add(GenerateChunk(token_ids=token_ids, finish_reason=FinishReason.STOP))
    return delta.text, delta.calls


@pytest.mark.parametrize("special", [False, True])
async def test_marks_that_are_tokens_are_found_and_demanded_as_such(special) -> None:
    model = tokenizer("<tool_call>", "</tool_call>", special=special)
    preparer = ToolPreparer(model, GrammarChecker())
    called = (CallDelta(0, "add"), CallDelta(0, None, ARGUMENTS))
    assert read(preparer, model, f"So: {CALL}") == ("So:", called)
    grammar = await preparer.grammar(REQUIRED, None, ThreadWork())
    tokens = LLTokenizer(model.document, n_vocab=model.vocab_size, eos_token=[END])
    matcher = LLMatcher(tokens, grammar_source(grammar), log_level=0)
    token_ids = model.encode(CALL, add_special_tokens=False)
    assert len(token_ids) < len(CALL) - len("<tool_call>")
    assert matcher.try_consume_tokens(list(token_ids)) == len(token_ids)
    assert matcher.is_accepting()


SYNTAXES = {
    ToolFormat.MISTRAL: ("[TOOL_CALLS]", "[ARGS]"),
    ToolFormat.MISTRAL_LIST: ("[TOOL_CALLS]",),
    ToolFormat.GEMMA4: ("<|tool_call>", "<tool_call|>", '<|"|>'),
    ToolFormat.QWEN3_CODER: ("<tool_call>", "</tool_call>"),
}


@pytest.mark.parametrize("format_", SYNTAXES)
@pytest.mark.parametrize("special", [False, True])
async def test_formats_whose_marks_are_tokens(format_: ToolFormat, special) -> None:
    model = tokenizer("<think>", "</think>", *SYNTAXES[format_], special=special)
    preparer = ToolPreparer(model, GrammarChecker(), format_)
    syntax = preparer.reading(USE, None).syntax
    call = syntax.written("add", ARGUMENTS)
    called = (CallDelta(0, "add"), CallDelta(0, None, ARGUMENTS))
    assert read(preparer, model, f"So: {call}") == ("So:", called)
    tokens = LLTokenizer(model.document, n_vocab=model.vocab_size, eos_token=[END])
    wrong = syntax.written("add", '{"a": "x"}')
    for use, fine, refused in (
        (REQUIRED, (call,), ("So:", f"So: {call}", wrong)),
        (STRICT, ("So.", call, f"So: {call}"), (wrong, syntax.begin, f"{call}{wrong}")),
    ):
        grammar = await preparer.grammar(use, None, ThreadWork())
        for text in (*fine, *refused):
            matcher = LLMatcher(tokens, grammar_source(grammar), log_level=0)
            assert not matcher.is_error(), matcher.get_error()
            token_ids = list(model.encode(text, add_special_tokens=False))
            whole = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
            assert whole is (text in fine), text


STRICT = ToolUse(tools=(Tool(name="add", parameters=SCHEMA, strict=True),))
THOUGHT = "<think>\nHm, <tool_call?\n</think>\n"


@pytest.mark.parametrize("marks", [(), ("<tool_call>", "</tool_call>")], ids=["text", "tokens"])
@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (CALL, True),
        (f"So: {CALL}\n{CALL}", True),
        (f"{THOUGHT}So: {CALL}\nDone.", True),
        (f"{CALL}\n{THOUGHT}Done.", True),
        (f"{THOUGHT}Nothing to call.", True),
        (CALL.replace("1", '"1"'), False),
        (f"{THOUGHT}<tool_call>\nadd(1)", False),
    ],
)
async def test_strict_calls_stand_beside_thoughts(marks, text, allowed) -> None:
    model = tokenizer("<think>", "</think>", *marks, special=False)
    grammar = await ToolPreparer(model, GrammarChecker()).grammar(STRICT, None, ThreadWork())
    tokens = LLTokenizer(model.document, n_vocab=model.vocab_size, eos_token=[END])
    matcher = LLMatcher(tokens, grammar_source(grammar), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    token_ids = list(model.encode(text, add_special_tokens=False))
    whole = matcher.try_consume_tokens(token_ids) == len(token_ids) and matcher.is_accepting()
    assert whole is allowed


async def test_bare_calls_may_follow_no_thought_but_text_may() -> None:
    model = tokenizer("<think>", "</think>", special=False)
    grammar = await ToolPreparer(model, GrammarChecker(), ToolFormat.LLAMA3_JSON).grammar(
        STRICT, None, ThreadWork()
    )
    tokens = LLTokenizer(model.document, n_vocab=model.vocab_size, eos_token=[END])
    for text in (f"{THOUGHT}Nothing {{}} to call.", TAGGED.removeprefix("<|python_tag|>")):
        matcher = LLMatcher(tokens, grammar_source(grammar), log_level=0)
        token_ids = list(model.encode(text, add_special_tokens=False))
        assert matcher.try_consume_tokens(token_ids) == len(token_ids), text
        assert matcher.is_accepting(), text


def test_a_control_token_before_a_call_is_no_text() -> None:
    model = tokenizer("<|python_tag|>", special=True)
    preparer = ToolPreparer(model, GrammarChecker(), ToolFormat.LLAMA3_JSON)
    assert read(preparer, model, TAGGED)[1] == (CallDelta(0, "add"), CallDelta(0, None, ARGUMENTS))
    assert read(preparer, model, "<|python_tag|>print(1)") == ("print(1)", ())
    assert model.decode(model.encode(TAGGED, add_special_tokens=False)) == TAGGED.removeprefix(
        "<|python_tag|>"
    )


async def test_what_may_be_called_or_not_is_constrained_by_its_format_alone() -> None:
    preparer = ToolPreparer(tokenizer(special=True), GrammarChecker())
    assert await preparer.grammar(USE, None, ThreadWork()) is None
    shape = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type": "boolean"}')
    both = await preparer.grammar(USE, shape, ThreadWork())
    assert "start: calls | answer" in both.text
    alone = ToolUse(tools=USE.tools, parallel=False)
    assert preparer.reading(alone, None).parallel is False
    assert preparer.reading(alone, both).parallel is True  # the grammar enforces it
    assert preparer.reading(REQUIRED, both).eager is True


class SlowChecker(GrammarChecker):
    """Its check has begun, and ends when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = asyncio.Event()
        self.checked: Future[None] = Future()
        self.checked.set_running_or_notify_cancel()

    def check(self, grammar: Grammar, field: str, owner: str = "") -> Future[None]:
        self.begun.set()
        return self.checked


async def test_a_check_goes_on_for_a_request_that_was_cancelled() -> None:
    checker, work, done = SlowChecker(), ThreadWork(), asyncio.Event()
    preparer = ToolPreparer(tokenizer("<tool_call>", special=False), checker)
    asked = asyncio.create_task(preparer.grammar(REQUIRED, None, work))
    await checker.begun.wait()
    await end(asked)
    work.when_done(done.set)
    assert not done.is_set()
    checker.checked.set_result(None)
    async with asyncio.timeout(15):
        await done.wait()


@pytest.mark.parametrize("format_", [ToolFormat.HERMES, ToolFormat.LLAMA3_JSON, ToolFormat.QWEN3_CODER])
@pytest.mark.parametrize("value", [2**64 - 1, math.nan])
async def test_a_number_that_cannot_be_demanded_of_calls_is_refused_by_its_tool(format_, value) -> None:
    preparer = ToolPreparer(byte_tokenizer(), GrammarChecker(), format_)
    schema = {"type": "object", "properties": {"a": {"enum": [value]}}}
    place = "tools[0].function"
    use = ToolUse(tools=(Tool(name="add", parameters=schema, place=place),), required=True)
    with pytest.raises(InvalidRequestError, match=str(value) if value > 0 else "NaN") as caught:
        await preparer.grammar(use, None, ThreadWork())
    assert caught.value.field == f"{place}.parameters"
