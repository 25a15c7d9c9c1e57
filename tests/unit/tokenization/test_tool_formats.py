"""Which way a template has calls written, and conversations for templates that know nothing of tools."""

from __future__ import annotations

import json

import pytest

from dspark_core.tokenization.chat_template import ChatTemplate
from dspark_core.tokenization.tool_formats import ToolFormat
from dspark_core.tokenization.tool_messages import adapt_messages
from dspark_core.tokenization.tool_prompts import spell_out_tools
from dspark_core.tokenization.tool_style import ToolStyle, tool_style
from tests.support.tool_templates import (
    GEMMA,
    GEMMA_FIRST,
    MISTRAL,
    MISTRAL_IDS,
    MISTRAL_LIST,
    QWEN_CODER,
)

PLAIN = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"

# What Qwen3's template does about tools, and what else it does left out.
QWEN = """
{%- if tools %}{{- '[system]' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}
{{- 'as <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' }}{%- endif %}
{%- for message in messages %}
    {{- '[' + message.role + ']' + message.content }}
    {%- for tool_call in message.tool_calls %}
        {%- set tool_call = tool_call.function %}
        {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
        {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
        {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
        {{- '}\n</tool_call>' }}
    {%- endfor %}
{%- endfor %}"""

# Llama 3's.
LLAMA = """
{%- if tools is not none %}
    {{- 'Respond in the format {"name": function name, "parameters": dictionary of its arguments}.' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '[assistant]{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- '}' }}
    {%- else %}{{- '[' + message.role + ']' + message.content }}{%- endif %}
{%- endfor %}"""

WHOLE_CALLS = """
{%- for t in tools or [] %}{{ t | tojson }}{% endfor %}
{%- for m in messages %}{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}
{%- endfor %}"""

OTHER = """
{%- for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}
{%- for m in messages %}{{ m.content }}
{%- for call in m.tool_calls %}<tool_call>call:{{ call.function.name }}{% raw %}{}{% endraw %}{% endfor %}
{%- endfor %}"""

NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + PLAIN


@pytest.mark.parametrize(
    ("source", "format_", "native", "has_system"),
    [
        (PLAIN, ToolFormat.HERMES, False, True),
        (NO_SYSTEM, ToolFormat.HERMES, False, False),
        (QWEN, ToolFormat.HERMES, True, True),
        (LLAMA, ToolFormat.LLAMA3_JSON, True, True),
        (WHOLE_CALLS, ToolFormat.HERMES, True, True),
        (MISTRAL_LIST, ToolFormat.MISTRAL_LIST, True, True),
        (MISTRAL_IDS, ToolFormat.MISTRAL, True, True),
        (MISTRAL, ToolFormat.MISTRAL, True, True),
        (GEMMA, ToolFormat.GEMMA4, True, True),
        (GEMMA_FIRST, ToolFormat.GEMMA4, True, True),
        (QWEN_CODER, ToolFormat.QWEN3_CODER, True, True),
        (OTHER, ToolFormat.HERMES, False, True),  # its own format is not understood
    ],
)
def test_the_format_of_a_template_is_what_it_writes(source, format_, native, has_system) -> None:
    style = tool_style(ChatTemplate(source, {}))
    assert (style.syntax.format, style.native, style.has_system) == (format_, native, has_system)


def test_a_format_may_be_asked_for() -> None:
    for source, native in ((PLAIN, False), (QWEN, True), (OTHER, True)):
        style = tool_style(ChatTemplate(source, {}), ToolFormat.LLAMA3_JSON)
        assert (style.syntax.format, style.native) == (ToolFormat.LLAMA3_JSON, native)
    assert tool_style(None).syntax.format is ToolFormat.HERMES


@pytest.mark.parametrize(
    ("format_", "written"),
    [
        (ToolFormat.HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'),
        (ToolFormat.LLAMA3_JSON, '{"name": "f", "parameters": {"a": 1}}'),
    ],
)
def test_calls_are_written_as_models_write_them(format_, written) -> None:
    assert tool_style(None, format_).syntax.written("f", '{"a": 1}') == written


@pytest.mark.parametrize(
    ("source", "written"),
    [
        (MISTRAL_LIST, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}]'),
        (MISTRAL_IDS, '[TOOL_CALLS]f[CALL_ID]call00000[ARGS]{"a": 1}'),
        (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": 1}'),
        (MISTRAL.replace("[ARGS]", ""), '[TOOL_CALLS]f{"a": 1}'),
        (GEMMA, "<|tool_call>call:f{a:1}<tool_call|>"),
        (
            QWEN_CODER,
            "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
        ),
    ],
)
def test_details_of_a_format_are_those_of_the_template(source, written) -> None:
    assert style(source).syntax.written("f", '{"a": 1}') == written


def test_calls_with_bare_keys_quote_what_needs_it() -> None:
    arguments = {"a": ['x"', None, True, 1.5, {"b c": {}}], "": "é"}
    written = tool_style(None, ToolFormat.GEMMA4).syntax.written("f", json.dumps(arguments))
    assert written == (
        '<|tool_call>call:f{a:[<|"|>x"<|"|>,null,true,1.5,{<|"|>b c<|"|>:{}}],'
        '<|"|><|"|>:<|"|>é<|"|>}<tool_call|>'
    )
    assert tool_style(None, ToolFormat.GEMMA4).syntax.written("f", "{...}") == (
        "<|tool_call>call:f{...}<tool_call|>"
    )


ANSWERED = [
    {"role": "user", "content": "go"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": f"call_{'0' * 30}{index}", "function": {"name": name, "arguments": {"a": "é"}}}
            for index, name in enumerate("fg")
        ],
    },
    {"role": "tool", "content": "1", "tool_call_id": f"call_{'0' * 30}0", "name": "f"},
    {"role": "tool", "content": "2", "tool_call_id": f"call_{'0' * 30}1", "name": "g"},
    {"role": "user", "content": "on"},
]


def rendered(source: str) -> str:
    return ChatTemplate(source, {}).render(adapt_messages(ANSWERED, style(source)))


def test_ids_are_short_where_a_template_takes_no_others() -> None:
    calls, *_ = adapt_messages(ANSWERED, style(MISTRAL_LIST))[1:2]
    first, second = (call["id"] for call in calls["tool_calls"])
    assert (len(first), len(second), first != second) == (9, 9, True)
    assert rendered(MISTRAL_LIST) == (
        f'[INST]go[/INST][TOOL_CALLS] [{{"name": "f", "arguments": {{"a": "é"}}, "id": "{first}"}}, '
        f'{{"name": "g", "arguments": {{"a": "é"}}, "id": "{second}"}}]</s>'
        f'[TOOL_RESULTS] {{"content": 1, "call_id": "{first}"}}'
        f'[TOOL_RESULTS] {{"content": 2, "call_id": "{second}"}}[INST]on[/INST]'
    )
    for source in (MISTRAL, QWEN, LLAMA, GEMMA, PLAIN):
        assert adapt_messages(ANSWERED, style(source)) == ANSWERED
    kept = [{"role": "tool", "content": "1", "tool_call_id": "a1B2c3D4e"}]
    assert adapt_messages(kept, style(MISTRAL_IDS)) == kept


def test_results_are_a_part_of_the_calls_where_a_template_has_them_there() -> None:
    calls = '<|tool_call>call:f{a:<|"|>é<|"|>}<tool_call|><|tool_call>call:g{a:<|"|>é<|"|>}<tool_call|>'
    results = "".join(
        f'<|tool_response>response:{name}{{value:<|"|>{text}<|"|>}}<tool_response|>'
        for name, text in (("f", "1"), ("g", "2"))
    )
    assert rendered(GEMMA_FIRST) == (
        f"<|turn>usergo<turn|><|turn>assistant{calls}{results}<turn|><|turn>useron<turn|>"
    )
    assert rendered(GEMMA) == (
        f"<|turn>usergo<turn|>{calls}<|turn>assistant<turn|>{results}<|turn>useron<turn|>"
    )
    assert not style(GEMMA).results_in_calls
    assert ANSWERED[2]["role"] == "tool"
    assert "tool_responses" not in ANSWERED[1]


def call(arguments: object) -> dict[str, object]:
    return {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "f", "description": "Does é.", "parameters": {}}}]
TALK = [
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "", "tool_calls": [call({"a": "é"}), call("no json")]},
    {"role": "tool", "content": "1", "tool_call_id": "c"},
    {"role": "tool", "content": "2", "tool_call_id": "c"},
    {"role": "assistant", "content": "Well.", "tool_calls": [call({})]},
]


def style(source: str) -> ToolStyle:
    return tool_style(ChatTemplate(source, {}))


def test_calls_and_results_become_plain_turns() -> None:
    assert spell_out_tools(TALK, [], style(PLAIN)) == [
        {"role": "user", "content": "go"},
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "f", "arguments": no json}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response>",
        },
        {"role": "assistant", "content": 'Well.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'},
    ]


def test_tools_are_told_of_in_front_of_all_else() -> None:
    system, *rest = spell_out_tools(TALK, TOOLS, style(PLAIN))
    assert system["role"] == "system"
    assert f"<tools>\n{json.dumps(TOOLS[0]['function'], ensure_ascii=False)}\n</tools>" in system["content"]
    assert '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>' in system["content"]
    assert rest == spell_out_tools(TALK, [], style(PLAIN))
    own = [{"role": "system", "content": "Be brief."}, *TALK]
    assert spell_out_tools(own, TOOLS, style(PLAIN))[0] == {
        "role": "system",
        "content": f"{system['content']}\n\nBe brief.",
    }
    first = spell_out_tools(TALK, TOOLS, style(NO_SYSTEM))[0]
    assert first == {"role": "user", "content": f"{system['content']}\n\ngo"}


def test_where_calls_are_tags_the_model_is_shown_tags() -> None:
    system, *_ = spell_out_tools(TALK, TOOLS, tool_style(ChatTemplate(PLAIN, {}), ToolFormat.QWEN3_CODER))
    example = "<function=NAME>\n<parameter=PARAMETER>\nVALUE\n</parameter>\n</function>"
    assert f"its arguments, and nothing else:\n<tool_call>\n{example}\n</tool_call>\n" in system["content"]
