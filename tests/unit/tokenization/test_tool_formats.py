"""Which way a template has calls written, and conversations for templates that know nothing of tools."""

from __future__ import annotations

import json

import pytest

from dspark_core.tokenization.chat_template import ChatTemplate
from dspark_core.tokenization.tool_formats import ToolFormat, ToolStyle, tool_style
from dspark_core.tokenization.tool_prompts import told

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
    assert told(TALK, [], style(PLAIN)) == [
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
    system, *rest = told(TALK, TOOLS, style(PLAIN))
    assert system["role"] == "system"
    assert f"<tools>\n{json.dumps(TOOLS[0]['function'], ensure_ascii=False)}\n</tools>" in system["content"]
    assert '<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>' in system["content"]
    assert rest == told(TALK, [], style(PLAIN))
    own = [{"role": "system", "content": "Be brief."}, *TALK]
    assert told(own, TOOLS, style(PLAIN))[0] == {
        "role": "system",
        "content": f"{system['content']}\n\nBe brief.",
    }
    first = told(TALK, TOOLS, style(NO_SYSTEM))[0]
    assert first == {"role": "user", "content": f"{system['content']}\n\ngo"}
