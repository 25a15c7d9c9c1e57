"""Calls in answers that arrive in pieces: found wherever the text is cut, with nothing lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dspark_core.tokenization.chat_template import ChatTemplate
from dspark_core.tokenization.tool_formats import SYNTAX, CallShape, CallSyntax, ToolFormat
from dspark_core.tokenization.tool_style import tool_style
from services.gateway.tools.parameter_kinds import parameter_kinds
from services.gateway.tools.tool_stream import CallDelta, CallStream, Parsed

HERMES = tool_style(None, ToolFormat.HERMES).syntax
LLAMA = tool_style(None, ToolFormat.LLAMA3_JSON).syntax
MISTRAL = SYNTAX[ToolFormat.MISTRAL]
MISTRAL_WITH_IDS = replace(MISTRAL, id_mark="[CALL_ID]")
MISTRAL_LIST = SYNTAX[ToolFormat.MISTRAL_LIST]
GEMMA = SYNTAX[ToolFormat.GEMMA4]
ALL = (*SYNTAX.values(), MISTRAL_WITH_IDS)
QWEN_CODER = SYNTAX[ToolFormat.QWEN3_CODER]
NAMES = frozenset({"weather", "add"})
KINDS = {
    "weather": parameter_kinds({"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}),
    "add": parameter_kinds({"properties": {"note": {"type": ["string", "null"]}}}),
}
"""Of parameters; those of other names may be anything."""

PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
MARKS = 'a </tool_call> \\" { b'
HALF = '<tool_call>{"name": "add", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'
"""Half of a character (a lone surrogate), in arguments given as a string."""
BARE = f'{{"name": "weather", "parameters": {PARIS}}}'


def read(
    pieces: Sequence[str],
    syntax: CallSyntax = HERMES,
    *,
    eager: bool = False,
    parallel: bool = True,
    forced: bool = False,
) -> tuple[str, list[tuple[str, str]], bool]:
    """Returns the content, (name, arguments) of each call, and whether the answer counts as calls."""
    stream = CallStream(syntax, NAMES, eager=eager, parallel=parallel, forced=forced, kinds=KINDS)
    parsed = [*(stream.push(piece) for piece in pieces), stream.flush()]
    calls: dict[int, list[str]] = {}
    for one in parsed:
        for delta in one.calls:
            if delta.name is not None:
                assert (delta.index, delta.arguments) == (len(calls), "")
                calls[delta.index] = [delta.name, ""]
            else:
                calls[delta.index][1] += delta.arguments
    return "".join(one.text for one in parsed), [(n, a) for n, a in calls.values()], stream.called


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (CALL, "", [("weather", PARIS)]),
        (f"\n\n{CALL}\n", "", [("weather", PARIS)]),
        (f"Let me see.\n{CALL}", "Let me see.", [("weather", PARIS)]),
        (f"{CALL}\n{CALL}", "", [("weather", PARIS)] * 2),
        (f"{CALL}{CALL} Done.", " Done.", [("weather", PARIS)] * 2),
        (CALL.replace("\n", ""), "", [("weather", PARIS)]),
        (CALL.removesuffix("</tool_call>"), "", [("weather", PARIS)]),
        (CALL.replace("}}", "}"), "", [("weather", PARIS)]),  # the last brace is missing
        (CALL.replace(PARIS, "{}"), "", [("weather", "{}")]),
        (
            CALL.replace("Paris", 'a </tool_call> \\" { b'),
            "",
            [("weather", '{"city": "a </tool_call> \\" { b"}')],
        ),
        ('<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', "", [("add", '{"a": 1}')]),
        ('<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
        ('<tool_call>{"name": {"a": []}}</tool_call>', '<tool_call>{"name": {"a": []}}</tool_call>', []),
        (HALF, HALF, []),
        ('<tool_call>{"id": 3, "name": "add", "arguments": {}}</tool_call>', "", [("add", "{}")]),
        ("No call: 1 < 2 <tool> ", "No call: 1 < 2 <tool> ", []),
        ("A <tool_call> is", "A <tool_call> is", []),
        (f"<tool_call>{CALL}", "<tool_call>", [("weather", PARIS)]),
        ("<tool_call>\nweather(Paris)\n</tool_call>", "<tool_call>\nweather(Paris)\n</tool_call>", []),
        (CALL.replace("weather", "sing"), CALL.replace("weather", "sing"), []),
        ("<tool_call>[1]</tool_call>", "<tool_call>[1]</tool_call>", []),
        ("<tool_call>", "<tool_call>", []),
        ('x <tool_call>\n{"name": "wea', 'x <tool_call>\n{"name": "wea', []),
        ("half a mark <tool_", "half a mark <tool_", []),
        (" \n", " \n", []),
        ("", "", []),
    ],
)
def test_hermes(text, content, calls, eager) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, eager=eager) == (content, calls, bool(calls))


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (BARE, "", [("weather", PARIS)]),
        (f" \n{BARE} ", "", [("weather", PARIS)]),
        (f"<|python_tag|>{BARE}", "", [("weather", PARIS)]),
        (f"I look. <|python_tag|>{BARE}", "I look.", [("weather", PARIS)]),
        (f"{BARE}; {BARE}", "", [("weather", PARIS)] * 2),
        (f"{BARE} and more", " and more", [("weather", PARIS)]),
        (f"{BARE};", ";", [("weather", PARIS)]),
        (f"As JSON: {BARE}", f"As JSON: {BARE}", []),
        ('{"answer": 3}', '{"answer": 3}', []),
        ('{"name": "sing", "parameters": {}} la', '{"name": "sing", "parameters": {}} la', []),
        ("{no", "{no", []),
        ("<|python_tag|>print(1)", "print(1)", []),
        ("<|pyth", "<|pyth", []),
    ],
)
def test_llama3_json(text, content, calls, eager) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, LLAMA, eager=eager) == (content, calls, bool(calls))


NAMED = f"[TOOL_CALLS]weather[ARGS]{PARIS}"
LISTED = f'{{"name": "weather", "arguments": {PARIS}}}'


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("syntax", "text", "content", "calls"),
    [
        (MISTRAL, NAMED, "", [("weather", PARIS)]),
        (MISTRAL, f"I look. {NAMED}{NAMED}", "I look.", [("weather", PARIS)] * 2),
        (MISTRAL, f"[TOOL_CALLS] weather {PARIS}\n", "", [("weather", PARIS)]),  # models before 2025-10
        (MISTRAL, "[TOOL_CALLS]add[ARGS]{}", "", [("add", "{}")]),
        (MISTRAL, f"{NAMED} So.", " So.", [("weather", PARIS)]),
        (MISTRAL, NAMED.replace("weather", "sing"), NAMED.replace("weather", "sing"), []),
        (MISTRAL, f"[TOOL_CALLS][{LISTED}]", f"[TOOL_CALLS][{LISTED}]", []),
        (MISTRAL, "[TOOL_CALLS]weather[ARGS]", "[TOOL_CALLS]weather[ARGS]", []),
        (MISTRAL, f"[TOOL_CALLS]{'a' * 200}{{}}", f"[TOOL_CALLS]{'a' * 200}{{}}", []),
        (MISTRAL_WITH_IDS, NAMED.replace("[A", "[CALL_ID]a1b2c3d4e[A"), "", [("weather", PARIS)]),
        (MISTRAL_WITH_IDS, NAMED, "", [("weather", PARIS)]),
        (MISTRAL_LIST, f"[TOOL_CALLS][{LISTED}]", "", [("weather", PARIS)]),
        (MISTRAL_LIST, f"Hm. [TOOL_CALLS] [{LISTED}, {LISTED}]", "Hm.", [("weather", PARIS)] * 2),
        (MISTRAL_LIST, f"[TOOL_CALLS]{LISTED}", "", [("weather", PARIS)]),  # the list's bracket is missing
        (MISTRAL_LIST, f"[TOOL_CALLS][{LISTED}", "", [("weather", PARIS)]),
        (MISTRAL_LIST, f"[TOOL_CALLS][{LISTED}] Done.", " Done.", [("weather", PARIS)]),
        (MISTRAL_LIST, f"[TOOL_CALLS][{LISTED}, 3]", ", 3]", [("weather", PARIS)]),
        (
            MISTRAL_LIST,
            f'[TOOL_CALLS][{LISTED[:-1]}, "id": "call00001"}}]',
            "",
            [("weather", PARIS)],
        ),
        (MISTRAL_LIST, "[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
        (GEMMA, '<|tool_call>call:weather{city:<|"|>Paris<|"|>}<tool_call|>', "", [("weather", PARIS)]),
        (
            GEMMA,
            "So: <|tool_call>call:add{}<tool_call|><|tool_call>call:add{a:1,b:[-2.5,{c:true}]}<tool_call|>",
            "So:",
            [("add", "{}"), ("add", '{"a": 1, "b": [-2.5, {"c": true}]}')],
        ),
        (
            GEMMA,
            '<|tool_call>call:add{a:<|"|>}, "{\\n\n<|"<|"|>,b:<|"|><|"|>}<tool_call|>',
            "",
            [("add", '{"a": "}, \\"{\\\\n\\n<|\\"", "b": ""}')],
        ),
        (
            GEMMA,
            '<|tool_call> call:add{ <|"|>a b<|"|> : "x, \\"y" , b: None, c:[ ], d:Paris}<tool_call|>',
            "",
            [("add", '{"a b": "x, \\"y", "b": null, "c": [], "d": "Paris"}')],
        ),
        (GEMMA, "<|tool_call>call:sing{a:1}<tool_call|>", "<|tool_call>call:sing{a:1}<tool_call|>", []),
        (GEMMA, "<|tool_call>weather{}<tool_call|>", "<|tool_call>weather{}<tool_call|>", []),
        (GEMMA, f"<|tool_call>{LISTED}<tool_call|>", f"<|tool_call>{LISTED}<tool_call|>", []),
    ],
)
def test_other_formats(syntax, text, content, calls, eager) -> None:
    for pieces in ([text], list(text)):
        assert read(pieces, syntax, eager=eager) == (content, calls, bool(calls))


def tagged(function: str, *parameters: tuple[str, str]) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={function}>\n{inner}</function>\n</tool_call>"


TAGGED = tagged("weather", ("city", "Paris"))
CODE = 'if a < b:\n    print("</p>")\n\n'


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (TAGGED, "", [("weather", {"city": "Paris"})]),
        (f"I look.\n\n{TAGGED}\n{TAGGED} So.", "I look. So.", [("weather", {"city": "Paris"})] * 2),
        (TAGGED.replace("\n", ""), "", [("weather", {"city": "Paris"})]),
        (TAGGED.removesuffix("</tool_call>"), "", [("weather", {"city": "Paris"})]),
        (tagged("weather"), "", [("weather", {})]),
        (tagged("weather", ("city", CODE)), "", [("weather", {"city": CODE})]),
        (tagged("weather", ("city", "12"), ("days", "12")), "", [("weather", {"city": "12", "days": 12})]),
        (tagged("weather", ("days", "soon"), ("city", "")), "", [("weather", {"days": "soon", "city": ""})]),
        (tagged("add", ("note", "null"), ("b", "None")), "", [("add", {"note": None, "b": None})]),
        (tagged("add", ("note", "7"), ("b", "True")), "", [("add", {"note": "7", "b": True})]),
        (
            tagged("add", ("a", '[1, {"x": "é"}]'), ("b", "x y")),
            "",
            [("add", {"a": [1, {"x": "é"}], "b": "x y"})],
        ),
        (tagged("add", ("a", "NaN")), "", [("add", {"a": "NaN"})]),
        (tagged("sing", ("a", "1")), tagged("sing", ("a", "1")), []),
        (CALL, CALL, []),
        ("<tool_call>\n<function=weather", "<tool_call>\n<function=weather", []),
    ],
)
def test_qwen3_coder(text, content, calls, eager) -> None:
    for pieces in ([text], list(text)):
        found, told, called = read(pieces, QWEN_CODER, eager=eager)
        assert (found, called) == (content, bool(calls))
        assert [(name, json.loads(arguments)) for name, arguments in told] == calls


def test_texts_of_qwen3_coder_come_as_they_are_written() -> None:
    stream = CallStream(QWEN_CODER, NAMES, eager=True, parallel=True, kinds=KINDS)
    pieces = (
        "<tool_call>\n<function=wea",
        "ther>\n<parameter=city",
        ">\nPa",
        "r\n</par",
        "is\n</parameter>\n",
    )
    told = [stream.push(piece) for piece in (*pieces, "</function>\n</tool_call>")]
    assert [[call.name or call.arguments for call in one.calls] for one in told] == [
        [],
        ["weather", "{"],
        ['"city": "Pa'],
        ["r"],
        ['\\n</paris"'],
        ["}"],
    ]


@pytest.mark.parametrize(
    "arguments", ["{a:1,}", "{a}", "{a:}", "{a:1]", "{a:[1}", "{:1", '{a:<|"|>x', "{a:1", "{{}}", "{a:,}"]
)
def test_calls_of_gemma_that_break_off_are_content(arguments) -> None:
    text = f"Look: <|tool_call>call:add{arguments}"
    for pieces in ([text], list(text)):
        assert read(pieces, GEMMA) == (text, [], False)
        content, ((name, told),), called = read(pieces, GEMMA, eager=True)
        assert (content[:5], name, called) == ("Look:", "add", False)
        with pytest.raises(ValueError, match=r".+"):
            json.loads(told)


def test_fragments_of_gemma_are_json_as_it_comes() -> None:
    stream = CallStream(GEMMA, NAMES, eager=True, parallel=True)
    pieces = ("<|tool_call>call:wea", "ther{ci", 'ty:<|"|>Pa', 'r\n<|"', "|>,days:1", "2}<tool", "_call|>")
    told = [stream.push(piece) for piece in pieces]
    assert [[call.name or call.arguments for call in one.calls] for one in told] == [
        [],
        ["weather", "{"],
        ['"city": "Pa'],
        ["r\\n"],
        ['", "days": '],
        ["12}"],
        [],
    ]
    assert not any(one.text for one in (*told, stream.flush()))


@pytest.mark.parametrize(
    "broken",
    [
        CALL.replace('"Paris"', "Paris"),
        CALL.replace('"Paris"', '"Par\nis"'),
        CALL.replace('"Paris"', '"Paris",'),
        CALL[: CALL.index("is")],
    ],
)
def test_calls_that_break_off_are_content_and_what_was_told_stays_told(broken) -> None:
    text = f"Look: {broken}"
    assert read([text]) == (text, [], False)
    content, calls, called = read([text], eager=True)
    assert content.startswith("Look:")
    ((name, arguments),) = calls
    assert name == "weather"
    assert arguments.startswith('{"city": ')
    with pytest.raises(ValueError, match=r".+"):
        json.loads(arguments)
    assert not called


@pytest.mark.parametrize("syntax", ALL, ids=lambda syntax: syntax.format.value)
def test_forced_calls_that_break_off_are_never_content(syntax: CallSyntax) -> None:
    """What was written of a call before its function is known is dropped."""
    call, whole = syntax.written("weather", PARIS), []
    for length in range(1, len(call) + 1):
        content, calls, called = read(call[:length], syntax, eager=True, forced=True)
        assert content == ""
        assert all(name == "weather" and PARIS.startswith(arguments) for name, arguments in calls)
        assert called == (calls == [("weather", PARIS)])
        whole.append(called)
    assert whole[-1]
    assert not whole[0]


def test_an_answer_of_forced_calls_whose_last_one_breaks_off_is_not_complete() -> None:
    text = f"{CALL}\n{CALL}"
    for length in range(len(CALL) + 2, len(text) - len("}\n</tool_call>")):
        content, calls, called = read([text[:length]], eager=True, forced=True)
        assert (content, called, calls[0]) == ("", False, ("weather", PARIS))
    assert read([f"{CALL}\n"], eager=True, forced=True) == ("", [("weather", PARIS)], True)
    assert read([f"{CALL}\n<tool"], eager=True) == ("\n<tool", [("weather", PARIS)], True)


@pytest.mark.parametrize(
    "broken", [PARIS.replace("}", ",}"), '{"a": True}', '{"a": 01}'], ids=["comma", "word", "number"]
)
@pytest.mark.parametrize("before", ["", CALL])
def test_an_answer_with_arguments_that_do_not_parse_is_no_answer_of_calls(before, broken) -> None:
    text = before + CALL.replace(PARIS, broken)
    for cut_at in range(1, len(text), 7):
        content, calls, called = read([text[:cut_at], text[cut_at:]], eager=True)
        assert not called
        assert len(calls) == 1 + bool(before)  # what was emitted stays a call
    content, calls, called = read([text], eager=False)
    assert (bool(content), len(calls), called) == (True, bool(before), bool(before))


def test_one_call_is_enough_where_no_more_are_wanted() -> None:
    for eager in (False, True):
        stream = CallStream(HERMES, NAMES, eager=eager, parallel=False)
        stream.push("a " + CALL[: CALL.index("}")])
        assert not stream.done
        stream.push("}")
        assert stream.done
        assert stream.push(CALL) == Parsed("")
        assert stream.flush() == Parsed("")


def test_fragments_come_as_they_are_written_and_half_marks_do_not() -> None:
    stream = CallStream(HERMES, NAMES, eager=True, parallel=True)
    told = [
        stream.push(piece)
        for piece in (
            "Hm. <tool",
            '_call>\n{"name": "wea',
            'ther", "arguments": {"ci',
            'ty": 1',
            "}}\n</tool",
            "_call>",
        )
    ]
    assert told == [
        Parsed("Hm."),
        Parsed(""),
        Parsed("", (CallDelta(0, "weather"), CallDelta(0, None, '{"ci'))),
        Parsed("", (CallDelta(0, None, 'ty": 1'),)),
        Parsed("", (CallDelta(0, None, "}"),)),
        Parsed(""),
    ]
    assert stream.flush() == Parsed("")


def test_a_call_is_told_whole_where_it_may_still_turn_out_to_be_none() -> None:
    stream = CallStream(HERMES, NAMES, eager=False, parallel=True)
    assert stream.push(CALL[:-20]).calls == ()
    assert stream.push(CALL[-20:]).calls == (CallDelta(0, "weather"), CallDelta(0, None, PARIS))


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.text(max_size=6)
    | st.sampled_from(["</tool_call>", "{", '"']),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.text(max_size=4), JSON_VALUES, max_size=3).map(json.dumps)
CALLS = st.lists(st.tuples(st.sampled_from(sorted(NAMES)), ARGUMENTS), min_size=1, max_size=3)


def cut(text: str, places: list[int]) -> list[str]:
    edges = sorted({min(place, len(text)) for place in places} | {0, len(text)})
    return [text[a:b] for a, b in itertools.pairwise(edges)]


PLACES = st.lists(st.integers(0, 400), max_size=12)


@given(st.lists(st.text('a\n<>/par{"\\ ', max_size=12), max_size=3), PLACES, st.booleans())
def test_texts_of_qwen3_coder_are_those_that_were_written(texts, places, eager) -> None:
    arguments = {"city": "".join(texts), "days": len(texts), "more": texts}
    text = QWEN_CODER.written("weather", json.dumps(arguments))
    _, ((name, told),), called = read(cut(text, places), QWEN_CODER, eager=eager)
    assert (name, json.loads(told), called) == ("weather", arguments, True)


@given(CALLS, st.text("ab<tool_cal> {\n", max_size=20), PLACES, st.booleans())
def test_calls_and_content_are_found_wherever_the_text_is_cut(calls, before, places, eager) -> None:
    for syntax in (one for one in ALL if one is not QWEN_CODER):  # its texts depend on their kinds
        content = f"x{before}".rstrip()
        mark = "\n<|python_tag|>" if syntax is LLAMA else "\n"
        written = (";" if syntax is LLAMA else "\n").join(syntax.written(*call) for call in calls)
        text = content + mark + written
        found, told, called = read(cut(text, places), syntax, eager=eager)
        assert (found, called) == (content, True)
        assert [(name, json.loads(one)) for name, one in told] == [(n, json.loads(a)) for n, a in calls]
        if syntax.shape is not CallShape.BARE_KEYS:
            assert told == calls


_MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "<tool", "<"]
_MARKS += ["[TOOL_CALLS]", "[ARGS]", "add", "<|tool_call>", "<tool_call|>", "call:add{a:", '<|"|>']
_MARKS += ["<function=add>", "<parameter=a>", "</parameter>", "</function>"]
_HEADS = ['{"name": "add", "arguments": ', '{"name": "add", "parameters": ']
_JSON = ['{"a": 1}', *'{}[],:;"\\x \n']
TANGLE = st.lists(st.sampled_from([*_MARKS, *_HEADS, *_JSON]), max_size=14).map("".join)


@given(TANGLE, PLACES, st.booleans(), st.booleans())
@example("{}", [1], False, True)
def test_any_text_reads_the_same_however_it_is_cut(text, places, eager, parallel) -> None:
    for syntax in ALL:
        whole = read([text], syntax, eager=eager, parallel=parallel)
        assert read(cut(text, places), syntax, eager=eager, parallel=parallel) == whole
        assert read(list(text), syntax, eager=eager, parallel=parallel) == whole


@given(TANGLE, st.booleans())
def test_text_without_calls_is_content_as_it_is(text, eager) -> None:
    for syntax in ALL:
        content, calls, _ = read([text], syntax, eager=eager)
        if not calls and syntax is not LLAMA:
            assert content == text
    content, calls, _ = read([text], LLAMA, eager=eager)
    if not calls and "<|python_tag|>" not in text:  # a mark that is never content
        assert content == text


def test_the_format_is_a_function_of_the_template() -> None:
    assert tool_style(ChatTemplate("{{ messages }}", {})).syntax is HERMES


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_calls_are_told_at_their_place_in_the_text(eager, size) -> None:
    text = f"I look. {CALL} Done. {CALL}"
    stream = CallStream(HERMES, NAMES, eager=eager, parallel=True)
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    said = ""
    places = []
    for parsed in [*map(stream.push, pieces), stream.flush()]:
        places += [len(said) + call.text_before for call in parsed.calls if call.name is not None]
        said += parsed.text
    assert said == "I look. Done."
    assert places == [len("I look."), len(said)]
