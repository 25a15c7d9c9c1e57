from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dspark_core.output_rules import LogitAdjustments
from dspark_core.records import FinishReason, GenerateChunk, GenerateRequest, SpeculationStats, TokenLogprobs
from services.gateway.assembly import TextAssembler, TextDelta
from tests.support.byte_tokenizer import END, START, byte_tokenizer

TOKENIZER = byte_tokenizer()


def assemble(chunks: list[GenerateChunk], stop: tuple[str, ...] = ()) -> list[TextDelta]:
    request = GenerateRequest(request_id="r", prompt_token_ids=(1, 2), stop_token_ids=(END,))
    assembler = TextAssembler(TOKENIZER, request, stop)
    deltas = []
    for chunk in chunks:
        deltas.append(assembler.add(chunk))
        if deltas[-1].finish_reason is not None:
            break
    return deltas


def chunks_of(ids: list[int], size: int, reason: FinishReason = FinishReason.STOP) -> list[GenerateChunk]:
    pieces = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    return [
        GenerateChunk(token_ids=piece, finish_reason=reason if i == len(pieces) - 1 else None)
        for i, piece in enumerate(pieces)
    ]


@given(st.text(max_size=30), st.integers(1, 7))
def test_text_is_whole_characters_whatever_a_round_commits(text, size) -> None:
    deltas = assemble(chunks_of([*text.encode(), END], size))
    assert "".join(delta.text for delta in deltas) == text
    assert all("\ufffd" not in delta.text for delta in deltas) or "\ufffd" in text
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].usage.completion_tokens == len(text.encode()) + 1


def test_a_character_cut_by_the_length_limit_ends_as_a_replacement() -> None:
    deltas = assemble(chunks_of(list("né".encode())[:2], 1, FinishReason.LENGTH))
    assert [delta.text for delta in deltas] == ["n", "\ufffd"]


def test_stop_tokens_and_special_tokens_are_not_shown() -> None:
    deltas = assemble(chunks_of([START, *b"hi", END], 10))
    assert [delta.text for delta in deltas] == ["hi"]
    assert deltas[0].token_ids == (START, *b"hi", END)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
def test_a_stop_string_ends_the_request_and_uses_no_later_token(size) -> None:
    deltas = assemble(chunks_of([*b"one two three", END], size), stop=("two",))
    assert "".join(delta.text for delta in deltas) == "one "
    assert deltas[-1].finish_reason is FinishReason.STOP
    assert deltas[-1].usage.completion_tokens == len("one two")
    assert sum(len(delta.token_ids) for delta in deltas) == len("one two")


@given(
    st.text("abc", min_size=1, max_size=20),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 8),
    st.integers(1, 7),
)
@example("ababababab", ["ab"], 5, 1)
@example("aaaaaa", ["aaa"], 3, 2)
@example("abc", ["abc"], 3, 1)
def test_stop_strings_count_that_end_once_the_answer_is_as_long_as_asked(text, stops, least, size) -> None:
    """Wherever they begin, and however many tokens come at once."""
    ends = [end for end in range(least + 1, len(text) + 1) if text[:end].endswith(tuple(stops))]
    matched = [stop for stop in stops if ends and text[: ends[0]].endswith(stop)]
    shown = text[: ends[0] - max(map(len, matched))] if ends else text
    told = []
    for one_chunk in (size, len(text)):
        request = GenerateRequest(
            request_id="r", prompt_token_ids=(1,), adjustments=LogitAdjustments(min_tokens=least)
        )
        assembler = TextAssembler(TOKENIZER, request, tuple(stops))
        deltas = []
        for chunk in chunks_of(list(text.encode()), one_chunk, FinishReason.LENGTH):
            deltas.append(assembler.add(chunk))
            assert shown.startswith("".join(delta.text for delta in deltas))
            if deltas[-1].finish_reason is not None:
                break
        told.append(("".join(delta.text for delta in deltas), deltas[-1].finish_reason, deltas[-1].usage))
    assert told[0] == told[1]
    assert told[0][:2] == (shown, FinishReason.STOP if ends else FinishReason.LENGTH)
    assert told[0][2].completion_tokens == (ends[0] if ends else len(text))


def test_logprobs_are_of_the_tokens_before_the_end() -> None:
    chunk = GenerateChunk(
        token_ids=(*b"ab", END),
        finish_reason=FinishReason.STOP,
        logprobs=tuple(TokenLogprobs(-float(n)) for n in range(3)),
    )
    (delta,) = assemble([chunk])
    assert [(token.token_id, token.logprobs.logprob) for token in delta.logprobs] == [(97, 0.0), (98, -1.0)]
    (stopped,) = assemble([chunk], stop=("b",))
    assert [token.token_id for token in stopped.logprobs] == [97]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "shown"),
    [("one two three", "one "), ("one tw three", "one tw three"), ("né two", "né "), ("one t", "one t")],
)
def test_logprobs_are_of_the_text_that_is_shown_and_come_with_it(size, text, shown) -> None:
    plain = chunks_of([*text.encode(), END], size)
    told = [replace(one, logprobs=tuple(TokenLogprobs(-1.0) for _ in one.token_ids)) for one in plain]
    deltas = assemble(told, stop=("two",))
    assert bytes(one.token_id for delta in deltas for one in delta.logprobs).decode() == shown
    so_far = logprobs_so_far = 0
    for delta in deltas:
        so_far += len(delta.text.encode())
        logprobs_so_far += len(delta.logprobs)
        # The log-probabilities of a character's first bytes come with those of its last one.
        assert logprobs_so_far == so_far


def test_text_held_back_for_a_stop_string_comes_with_the_end() -> None:
    deltas = assemble(chunks_of(list(b"one tw"), 6, FinishReason.LENGTH), stop=("two",))
    assert [delta.text for delta in deltas] == ["one tw"]
    assert deltas[0].finish_reason is FinishReason.LENGTH


def test_the_newest_statistics_survive_a_stop_string() -> None:
    chunks = [
        GenerateChunk(token_ids=(*b"on",), stats=SpeculationStats(rounds=1), cached_prompt_tokens=1),
        GenerateChunk(token_ids=(*b"e two",)),
    ]
    deltas = assemble(chunks, stop=("two",))
    assert deltas[-1].stats == SpeculationStats(rounds=1)
    assert deltas[-1].usage.cached_prompt_tokens == 1
    assert deltas[-1].usage.prompt_tokens == 2
