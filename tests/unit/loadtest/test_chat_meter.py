"""What is read off one streamed chat."""

import itertools
import json

import pytest

from loadtest import prompts
from loadtest.collector import Collector
from loadtest.meter import ROUND_TOKENS, ChatMeter, ChatSample, UnfinishedChat
from loadtest.sla import Outcomes
from loadtest.sse import StreamError, events

STATS = {"rounds": 4, "drafted_tokens": 28, "accepted_tokens": 6, "accepted_length": 2.5}


def text(content: str) -> dict[str, object]:
    return {"choices": [{"delta": {"content": content}}]}


def last(**fields: object) -> dict[str, object]:
    return {"choices": [], "usage": {"completion_tokens": 11}, "speculation": STATS, **fields}


def ticking(start: float = 100.0, step: float = 0.5):
    """A clock that moves by `step` with every reading; the first is start + step."""
    return itertools.count(start + step, step).__next__


def measure(chunks, clock, started: float) -> ChatSample:
    return ChatMeter(clock, started).measure(chunks)


def test_speed_counts_the_tokens_after_the_first_over_the_time_after_the_first():
    role_only = {"choices": [{"delta": {"role": "assistant", "content": ""}}]}
    chat = measure([role_only, text("a"), text("b c"), text("d"), last()], ticking(100.5), started=100.0)
    assert chat == ChatSample(
        first_token_seconds=1.0,
        total_seconds=2.0,
        completion_tokens=11,
        tokens_per_second=10.0,
        accepted_length=2.5,
    )


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_a_thought_is_the_first_text_that_a_user_sees(name):
    thought = {"choices": [{"delta": {name: "Hm"}}]}
    chat = measure([thought, thought, text("a"), last()], ticking(), started=100.0)
    assert (chat.first_token_seconds, chat.total_seconds) == (0.5, 1.5)
    assert measure([thought, last()], ticking(), started=100.0).completion_tokens == 11


def test_a_single_piece_of_text_has_no_speed():
    assert measure([text("a"), last()], ticking(), started=100.0).tokens_per_second is None


def test_a_chat_cut_off_before_its_first_token_may_have_had_all_of_them_computed():
    meter = ChatMeter(ticking(), started=100.0)
    assert meter.unfinished(max_tokens=9) == UnfinishedChat(
        waited_seconds=0.5, first_token_seconds=None, tokens_at_most=9
    )


@pytest.mark.parametrize(("max_tokens", "at_most"), [(128, len("aé".encode()) + ROUND_TOKENS), (3, 3)])
def test_a_chat_cut_off_in_its_text_has_had_no_more_tokens_than_bytes_and_a_round(max_tokens, at_most):
    meter = ChatMeter(ticking(), started=100.0)
    with pytest.raises(StreamError):
        meter.measure([text("a"), text("é")])
    chat = meter.unfinished(max_tokens)
    assert (chat.waited_seconds, chat.first_token_seconds, chat.tokens_at_most) == (1.5, 0.5, at_most)
    assert chat.tokens_per_second_at_most == at_most / 1.0


@pytest.mark.parametrize("stats", [None, {**STATS, "drafted_tokens": 0, "accepted_length": 1.0}])
def test_without_drafts_there_is_no_accepted_length(stats):
    assert measure([text("a"), last(speculation=stats)], ticking(), started=0.0).accepted_length is None


@pytest.mark.parametrize(
    ("chunks", "complaint"),
    [
        ([last()], "no text"),
        ([text("a")], "no usage"),
        (
            [text("a"), last(usage={"completion_tokens": "many"})],
            "completion_tokens must be a number, got 'many'",
        ),
        (
            [text("a"), last(speculation={**STATS, "drafted_tokens": None})],
            "drafted_tokens must be a number, got None",
        ),
    ],
)
def test_a_stream_that_cannot_be_measured_says_why(chunks, complaint):
    with pytest.raises(StreamError, match=complaint):
        measure(chunks, ticking(), started=0.0)


def test_events_are_the_data_lines_up_to_done():
    lines = [": comment", "event: x", 'data: {"n": 1}', "", 'data:{"n": 2}', "data: [DONE]", 'data: {"n": 3}']
    assert list(events(lines)) == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (['data: {"n": 1}'], r"without \[DONE\]"),
        (["data: {"], "not JSON"),
        (["data: 3"], "not a JSON object"),
        (['data: {"error": {"message": "replica lost"}}'], "replica lost"),
    ],
)
def test_a_broken_stream_is_never_a_success(lines, complaint):
    with pytest.raises(StreamError, match=complaint):
        list(events(lines))


def test_collector_starts_no_more_chats_than_allowed_and_knows_when_all_ended():
    collector = Collector(limit=2)
    assert [collector.may_start() for _ in range(3)] == [True, True, False]
    collector.add_failure()
    assert not collector.finished
    collector.add_refusal()
    assert collector.finished
    assert Collector().may_start()
    assert not Collector().finished


def test_outcomes_reach_the_master_once():
    worker, master = Collector(), Collector()
    worker.add(measure([text("a"), last()], ticking(), started=0.0))
    worker.add_unfinished(ChatMeter(ticking(), started=0.0).unfinished(max_tokens=9))
    worker.add_failure()
    master.merge(json.loads(json.dumps(worker.drain())))
    master.merge(worker.drain())
    assert len(master.outcomes().samples) == 1
    assert len(master.outcomes().unfinished) == 1
    assert master.outcomes().failed == 1
    assert worker.outcomes() == Outcomes()


def test_built_in_prompts_are_distinct():
    loaded = prompts.load()
    assert len(set(loaded)) == len(loaded) >= 16


@pytest.mark.parametrize("line", ["{", '{"kind": "chat"}', "[]"])
def test_a_broken_prompt_file_names_the_line(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "hello"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:2"):
        prompts.load(path)
