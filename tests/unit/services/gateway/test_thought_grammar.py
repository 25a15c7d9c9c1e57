"""Grammars behind thoughts: the thought is free, and what follows it keeps to the grammar."""

from __future__ import annotations

import pytest
from llguidance import LLMatcher, LLTokenizer

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import MAX_GRAMMAR_CHARACTERS, Grammar, GrammarKind
from dspark_core.tokenization.grammar_checking import GrammarChecker
from dspark_core.tokenization.grammar_sources import AddedTokens, grammar_source, problem_of
from dspark_core.tokenization.thoughts import MARKS
from dspark_core.tokenization.tool_formats import ToolFormat
from services.gateway.thoughts.thought_preparation import ThoughtPreparer
from services.gateway.thread_work import ThreadWork
from services.gateway.tools.tool_preparation import ToolPreparer
from tests.support.byte_tokenizer import END, byte_tokenizer
from tests.unit.services.gateway.test_tool_preparation import CALL, REQUIRED, STRICT, TAGGED

THOUGHT = "<think>\nHm: {<tool_call>}\n\nSo.\n</think>\n\n"
BARE_CALL = TAGGED.removeprefix("<|python_tag|>")
CALL_MARKS = ("<tool_call>", "</tool_call>")
PROMPTS = {False: "<|im_start|>assistant\n", True: "<|im_start|>assistant\n<think>\n"}

JSON = Grammar(
    kind=GrammarKind.JSON_SCHEMA, text='{"type": "object",\n "properties": {"a": {"const": "/\\u007d"}}}'
)
SPELT = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"enum": ["<|im_end|", "<|im_end|>"]}')
REGEX = Grammar(kind=GrammarKind.REGEX, text='(a/"|\\})+\n?')
LARK = Grammar(
    kind=GrammarKind.LARK,
    text='%llguidance {}\nstart: thought answer\nthought: "x" // }\nanswer: TEXT*\n'
    'TEXT: /[{}]/ | "z}"\n%ignore " "',
)


UNENDED = Grammar(kind=GrammarKind.REGEX, text=r"(.|\n)*")


def accepts(grammar: Grammar, marks: tuple[str, ...], text: str, *, special: bool = False) -> bool:
    model = byte_tokenizer(added=marks, special=special)
    tokens = LLTokenizer(model.document, n_vocab=model.vocab_size, eos_token=[END])
    source = grammar_source(grammar, AddedTokens(["<|im_end|>", "<|im_start|>", *marks]))
    machine = LLMatcher(tokens, source, log_level=0)
    assert not machine.is_error(), machine.get_error()
    token_ids = list(model.encode(text, add_special_tokens=False))
    return machine.try_consume_tokens(token_ids) == len(token_ids) and machine.is_accepting()


def behind_thought(
    answer: Grammar, marks: tuple[str, ...], *, begun: bool, special: bool = False
) -> tuple[Grammar, str]:
    """The grammar, and a thought as the model writes it."""
    preparer = ThoughtPreparer(byte_tokenizer(added=marks, special=special), MARKS[0])
    reading = preparer.reading(PROMPTS[begun])
    assert reading is not None
    return preparer.grammar(answer, reading), THOUGHT.removeprefix("<think>\n") if begun else THOUGHT


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("marks", "special"),
    [((), False), (MARKS[0].both, False), (MARKS[0].both, True), ((*MARKS[0].both, *CALL_MARKS), False)],
    ids=["text", "tokens", "control", "beside others"],
)
@pytest.mark.parametrize(
    ("answer", "fine", "wrong"),
    [
        (JSON, '{"a": "/}"}', '{"a": 1}'),
        (SPELT, '"<|im_end|"', '"<|im_end"'),
        (REGEX, 'a/"}\n', "a/"),
        (LARK, "x{ }z}", "z"),
    ],
    ids=["json", "spelt", "regex", "lark"],
)
def test_what_clients_ask_for_applies_behind_the_thought(answer, fine, wrong, marks, special, begun) -> None:
    grammar, thought = behind_thought(answer, marks, begun=begun, special=special)
    assert problem_of(grammar) is None
    assert accepts(grammar, marks, thought + fine, special=special)
    assert accepts(grammar, marks, fine, special=special) is not begun
    for text in (thought, thought + wrong, thought + thought + fine):
        assert not accepts(grammar, marks, text, special=special), text


@pytest.mark.parametrize("marks", [(), MARKS[0].both], ids=["text", "tokens"])
def test_a_thought_that_has_begun_has_to_end(marks) -> None:
    grammar, thought = behind_thought(UNENDED, marks, begun=True)
    assert not accepts(grammar, marks, "So it goes.")
    assert accepts(grammar, marks, f"{thought}So it goes.")


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("marks", [MARKS[0].both, (*MARKS[0].both, *CALL_MARKS)], ids=["text", "tokens"])
@pytest.mark.parametrize("use", [REQUIRED, STRICT], ids=["required", "strict"])
async def test_calls_may_follow_a_thought(use, marks, begun) -> None:
    tools = ToolPreparer(byte_tokenizer(added=marks), GrammarChecker())
    calls = await tools.grammar(use, None, ThreadWork())
    assert calls is not None
    grammar, thought = behind_thought(calls, marks, begun=begun)
    assert accepts(grammar, marks, thought + CALL)
    assert not accepts(grammar, marks, thought + CALL.replace("1", '"1"'))
    assert accepts(grammar, marks, f"{thought}So.") is (use is STRICT)


async def test_calls_without_marks_may_follow_a_thought() -> None:
    marks = MARKS[0].both
    tools = ToolPreparer(byte_tokenizer(added=marks), GrammarChecker(), ToolFormat.LLAMA3_JSON)
    calls = await tools.grammar(REQUIRED, None, ThreadWork())
    assert calls is not None
    grammar, thought = behind_thought(calls, marks, begun=False)
    assert accepts(grammar, marks, thought + BARE_CALL)
    assert not accepts(grammar, marks, f"{thought}So: {BARE_CALL}")


def test_a_grammar_that_only_just_fits_is_too_large_behind_a_thought() -> None:
    largest = Grammar(kind=GrammarKind.REGEX, text="a" * MAX_GRAMMAR_CHARACTERS)
    with pytest.raises(InvalidRequestError, match="<= 65536 characters"):
        behind_thought(largest, (), begun=False)
