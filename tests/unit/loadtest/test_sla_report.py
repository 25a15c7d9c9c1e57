"""The verdict and the numbers of the report."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.meter import ChatSample, UnfinishedChat
from loadtest.sla import Outcomes, Promise, judge, percentile, render, report

SPEEDS = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=50)


def sample(speed: float | None, accepted: float | None = 2.0) -> ChatSample:
    return ChatSample(
        first_token_seconds=0.25,
        total_seconds=1.0,
        completion_tokens=11,
        tokens_per_second=speed,
        accepted_length=accepted,
    )


def outcomes(*speeds: float | None, failed: int = 0, refused: int = 0) -> Outcomes:
    return Outcomes(samples=tuple(map(sample, speeds)), failed=failed, refused=refused)


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.0, 1), (0.2, 1), (0.21, 2), (0.5, 3), (0.95, 5), (1.0, 5)]
)
def test_percentile_is_the_nearest_rank(fraction, expected):
    assert percentile([5, 3, 1, 2, 4], fraction) == expected


@given(SPEEDS, st.floats(0, 1))
def test_percentile_is_a_value_that_at_least_the_fraction_does_not_exceed(values, fraction):
    value = percentile(values, fraction)
    assert value in values
    assert sum(v <= value for v in values) >= fraction * len(values)
    assert sum(v < value for v in values) <= fraction * len(values)


@pytest.mark.parametrize(
    ("values", "fraction"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1), ([1.0], float("nan"))]
)
def test_percentile_refuses_what_it_cannot_answer(values, fraction):
    with pytest.raises(ValueError, match=r"no values|fraction must be in \[0, 1\]"):
        percentile(values, fraction)


def test_promise_is_kept_at_exactly_the_promised_share():
    promise = Promise(min_tokens_per_second=20, share=0.75)
    assert judge(outcomes(20, 30, 40, 19.9), promise).kept
    assert not judge(outcomes(20, 30, 19.8, 19.9), promise).kept


def test_a_failed_chat_breaks_the_promise_and_a_refused_one_is_not_judged():
    promise = Promise(min_tokens_per_second=20, share=1.0)
    assert not judge(outcomes(50, failed=1), promise).kept
    assert judge(outcomes(50, refused=9), promise).kept


@pytest.mark.parametrize(
    ("first_token_seconds", "promise", "broken"),
    [
        (1.0, Promise(min_tokens_per_second=20), False),  # 20 tokens within a second
        (1.0, Promise(min_tokens_per_second=20.1), True),
        (None, Promise(min_tokens_per_second=10), False),  # 20 tokens within two seconds
        (None, Promise(min_tokens_per_second=10.1), True),
        (1.0, Promise(max_first_token_ms=1000), False),
        (1.0, Promise(max_first_token_ms=999), True),
        (None, Promise(max_first_token_ms=2000), False),
        (None, Promise(max_first_token_ms=1999), True),
    ],
)
def test_an_unfinished_chat_breaks_the_promise_if_it_is_already_worse(first_token_seconds, promise, broken):
    chat = UnfinishedChat(waited_seconds=2.0, first_token_seconds=first_token_seconds, tokens_at_most=20)
    verdict = judge(replace(outcomes(50), unfinished=(chat,)), promise)
    assert (verdict.judged, verdict.kept) == (1 + broken, not broken)
    assert ("already broken when cut off: 1" in verdict.reason) == broken
    assert "unfinished 1" in render(replace(outcomes(50), unfinished=(chat,)), promise)


def test_chats_too_short_to_have_a_speed_are_not_judged():
    assert judge(outcomes(None, 50), Promise(min_tokens_per_second=20)).judged == 1


@pytest.mark.parametrize(("limit", "good"), [(249, 0), (250, 3)])
def test_a_promised_first_token_is_judged_for_every_chat(limit, good):
    """Each of them took 250 ms to it; one is too short to have a speed."""
    verdict = judge(outcomes(None, 50, 60), Promise(max_first_token_ms=limit))
    assert (verdict.judged, verdict.kept) == (3, bool(good))
    assert verdict.reason.startswith(f"{good} of 3 chats")
    assert f"reached a first token in {limit} ms;" in verdict.reason


def test_both_promises_have_to_be_kept():
    verdict = judge(outcomes(10, 30), Promise(min_tokens_per_second=20, max_first_token_ms=250))
    assert "1 of 2 chats (50.0%) reached 20 tokens/s and a first token in 250 ms" in verdict.reason
    assert not verdict.kept


def test_the_report_tells_what_all_users_got_together():
    run = replace(outcomes(10, 30), seconds=4.0)
    assert report(run, None)["total_tokens_per_second"] == 22 / 4.0
    assert "in 4.0 s   tokens/s of all 5.5" in render(run, None)
    assert report(outcomes(10), None)["total_tokens_per_second"] is None


def test_a_run_without_a_judged_chat_never_passes():
    verdict = judge(outcomes(None, refused=3), Promise(min_tokens_per_second=0))
    assert (verdict.kept, verdict.judged) == (False, 0)


@given(SPEEDS, st.floats(0, 1e4), st.floats(0.01, 1))
def test_a_lower_promise_is_never_harder_to_keep(speeds, floor, share):
    if judge(outcomes(*speeds), Promise(min_tokens_per_second=floor, share=share)).kept:
        assert judge(outcomes(*speeds), Promise(min_tokens_per_second=floor / 2, share=share)).kept


@pytest.mark.parametrize(
    ("field", "promise"),
    [
        ("min_tokens_per_second", {"min_tokens_per_second": -1}),
        ("min_tokens_per_second", {"min_tokens_per_second": float("nan")}),
        ("max_first_token_ms", {"max_first_token_ms": 0}),
        ("share", {"min_tokens_per_second": 1, "share": 0}),
        ("share", {"min_tokens_per_second": 1, "share": 1.01}),
    ],
)
def test_a_senseless_promise_is_refused_by_name(field, promise):
    with pytest.raises(ValueError, match=field):
        Promise(**promise)


def test_report_gives_the_slow_end_of_speeds_and_survives_json():
    speeds = [float(speed) for speed in range(1, 101)]
    value = json.loads(json.dumps(report(outcomes(*speeds), Promise(min_tokens_per_second=6))))
    assert value["tokens_per_second"] == {"p50": 50.0, "p05": 5.0, "p01": 1.0}
    assert value["first_token_ms"] == {"p50": 250.0, "p95": 250.0, "p99": 250.0}
    assert value["accepted_length"] == {"mean": 2.0}
    assert value["completion_tokens"] == 1100
    assert value["verdict"]["share"] == 0.95
    assert value["verdict"]["kept"] is True


def test_printed_report_says_what_was_promised_and_what_came():
    text = render(outcomes(10, 30, failed=1, refused=2), Promise(min_tokens_per_second=20))
    assert "failed 1" in text
    assert "refused (429) 2" in text
    assert "promise BROKEN: 1 of 3 chats (33.3%) reached 20 tokens/s; promised 95.0%" in text


def test_an_empty_run_can_be_printed():
    assert "tokens/s per user        none" in render(Outcomes(), None)
