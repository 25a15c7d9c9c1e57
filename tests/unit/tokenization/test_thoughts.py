"""Marks of thoughts: found in a chat template, and at the end of the prompts it writes."""

import pytest

from dspark_core.tokenization.thoughts import MARKS, ThoughtStart
from tests.support.byte_tokenizer import TEMPLATE, byte_tokenizer
from tests.support.thinking_templates import ALWAYS, QWEN3

THINK = MARKS[0]
ASK = [{"role": "user", "content": "Does <think> end here? <think>"}]


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (QWEN3, THINK),
        (ALWAYS, THINK),
        (QWEN3.replace("think>", "/THINK]"), None),
        (TEMPLATE, None),
        (None, None),
    ],
)
def test_a_template_that_handles_thoughts_names_their_end(template, marks) -> None:
    assert byte_tokenizer(chat_template=template).thought_marks == marks


@pytest.mark.parametrize(
    ("template", "arguments", "start"),
    [
        (QWEN3, {}, ThoughtStart.OPTIONAL),
        (QWEN3, {"enable_thinking": True}, ThoughtStart.OPTIONAL),
        (QWEN3, {"enable_thinking": False}, ThoughtStart.CLOSED),
        (ALWAYS, {}, ThoughtStart.OPEN),
    ],
)
def test_the_end_of_a_prompt_says_whether_a_thought_follows(template, arguments, start) -> None:
    prompt = byte_tokenizer(chat_template=template).render_chat(ASK, arguments=arguments)
    assert THINK.left_by(prompt) is start


def test_a_prompt_may_end_a_thought_that_it_did_not_begin() -> None:
    assert THINK.left_by("<|Assistant|></think>") is ThoughtStart.CLOSED  # DeepSeek-V3.1's
