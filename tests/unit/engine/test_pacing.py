"""Prefill joins running requests with as many tokens as the step's time budget allows."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.pacing import (
    MIN_CHUNK_TOKENS,
    PrefillPacer,
    chunk_pairs,
    prompt_shares,
    tokens_per_pair,
)
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.errors import ConfigError
from tests.unit.engine.tiny import (
    ScriptedDrafts,
    make_loop,
    naive_greedy,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
)

unread = st.lists(st.integers(1, 5000), min_size=1, max_size=40)


@given(unread, st.integers(0, 512))
def test_the_whole_budget_is_shared_and_half_of_it_is_the_oldests(unread: list[int], budget: int) -> None:
    shares = prompt_shares(unread, budget)
    assert sum(shares) == min(budget, sum(unread))
    assert all(0 <= share <= left for share, left in zip(shares, unread, strict=True))
    assert shares[0] >= min(unread[0], budget / 2)


@given(unread, st.integers(0, 512))
def test_of_the_others_the_one_with_the_fewest_left_is_done_first(unread: list[int], budget: int) -> None:
    shares = prompt_shares(unread, budget)
    others = sorted(zip(unread[1:], shares[1:], strict=True), key=lambda pair: pair[0])
    unserved = [left for left, share in others if share < left]
    assert all(share == left for left, share in others if unserved and left < unserved[0])


def test_a_short_prompt_does_not_wait_for_the_long_ones_before_it() -> None:
    loop = make_loop(tiny_engine(num_pages=256), prefill_chunk_tokens=8)
    for index, prompt in enumerate(prompts(4, seed=3)):
        loop.submit(request(f"long{index}", (prompt * 100)[:100], 4))
    assert [loop.step(), loop.step()] == [[], []]
    loop.submit(request("short", [5, 9, 2], 4))
    (output,) = loop.step()
    assert output.request_id == "short"
    assert list(output.chunk.token_ids) == naive_greedy(tiny_decoder(), [5, 9, 2], 1)


MILLISECOND_PER_TOKEN = StepTimeModel.of_curve([1, 1000], [0.001, 1.0])


def test_a_chunk_fills_the_budget_that_decoding_leaves() -> None:
    pacer = PrefillPacer(0.1, MILLISECOND_PER_TOKEN)
    assert pacer.allowance(8, 8, 0, 256) == 82  # nine tenths of the budget
    assert pacer.allowance(8, 40, 0, 256) == 50
    assert pacer.allowance(8, 8, 0, 50) == 50
    assert PrefillPacer(10.0, MILLISECOND_PER_TOKEN).allowance(8, 8, 0, 256) == 256


@pytest.mark.parametrize("truth", [0.7, 1.0, 1.4])  # true over assumed cost of attention
def test_steps_stay_in_the_budget_though_a_prompt_attends_to_ever_more(truth: float) -> None:
    per_pair = 4e-4
    pacer = PrefillPacer(0.1, MILLISECOND_PER_TOKEN, tokens_per_pair=per_pair)
    start, longest, chunks = 0, 0.0, []
    while start < 4000:
        count = pacer.allowance(8, 8, 0, 4000 - start, start=start)
        pairs = chunk_pairs(start, count)
        seconds = 0.001 * (8 + count + truth * per_pair * pairs)
        pacer.observe(8, 8, count, 0, seconds, pairs=pairs)
        start += count
        longest = max(longest, seconds)
        chunks.append(count)
    assert 0.07 < longest < 0.11
    assert chunks[-2] < 0.75 * chunks[0]


def test_attending_costs_a_wide_model_less_beside_its_linear_layers() -> None:
    small, wide = tiny_engine().config, dataclasses.replace(tiny_engine().config, intermediate_size=4096)
    assert 0 < tokens_per_pair(wide) < tokens_per_pair(small)


def test_a_prompt_is_never_starved() -> None:
    pacer = PrefillPacer(0.001, MILLISECOND_PER_TOKEN)
    assert pacer.allowance(4, 4, 0, 256) == MIN_CHUNK_TOKENS
    assert pacer.allowance(100, 100, 0, 256) == 100  # twice as long as decoding alone
    assert pacer.allowance(4, 4, 0, 3) == 3
    assert pacer.allowance(4, 4, 0, 0) == 0


def test_slower_steps_than_expected_shrink_chunks() -> None:
    pacer = PrefillPacer(0.1, MILLISECOND_PER_TOKEN)
    before = pacer.allowance(8, 8, 0, 256)
    for _ in range(40):
        pacer.observe(8, 8, before, 0, 2 * 0.001 * (8 + before))
    assert MIN_CHUNK_TOKENS < pacer.allowance(8, 8, 0, 256) < 0.75 * before


def test_chunks_shrink_faster_than_they_grow_again() -> None:
    allowances = []
    for factor in (0.5, 1.0, 2.0):  # of the expected time
        pacer = PrefillPacer(0.1, MILLISECOND_PER_TOKEN)
        pacer.observe(8, 8, 42, 0, factor * 0.050)
        allowances.append(pacer.allowance(8, 8, 0, 256))
    larger, usual, smaller = allowances
    assert usual - smaller > larger - usual > 0


@pytest.mark.parametrize("step_time", [None, MILLISECOND_PER_TOKEN])
def test_a_step_too_short_for_the_clock_teaches_nothing(step_time: StepTimeModel | None) -> None:
    pacer = PrefillPacer(0.1, step_time)
    before = pacer.allowance(8, 8, 0, 256)
    pacer.observe(8, 8, before, 0, 0.0)
    assert pacer.allowance(8, 8, 0, 256) == before


def test_an_unknown_machine_is_explored_from_small_chunks() -> None:
    pacer = PrefillPacer(0.1)
    chunks = []
    for _ in range(30):
        chunks.append(pacer.allowance(8, 8, 0, 256))
        pacer.observe(8, 8, chunks[-1], 0, 0.001 * (8 + chunks[-1]))
    assert chunks[0] == MIN_CHUNK_TOKENS
    assert all(after <= 2 * max(chunks[: index + 1]) for index, after in enumerate(chunks[1:]))
    assert 46 <= chunks[-1] <= 138  # 92 fit; times of unseen sizes are guesses


def rounds_of_a_prompt(limits: BatchLimits, step_time: StepTimeModel, prompt: list[int]) -> int:
    """Rounds until a prompt is prefilled beside a running request."""
    loop = RoundLoop(tiny_engine(), FullPlanSource(), limits=limits, step_time=step_time)
    loop.submit(request("stream", [1, 2, 3], 60))
    loop.step()
    loop.submit(request("prompt", prompt, 1))
    for rounds in range(1, 60):
        if any(output.request_id == "prompt" for output in loop.step()):
            return rounds
    raise AssertionError("the prompt was starved")


def test_drafts_leave_places_for_a_prompt() -> None:
    """Four requests whose drafts are all accepted fill the batch; then a fifth arrives."""
    decoder = tiny_decoder()
    given = {f"stream{index}": [1 + index, 2, 3] for index in range(4)}
    drafts = ScriptedDrafts(
        {name: naive_greedy(decoder, prompt, 60) for name, prompt in given.items()},
        prompt_lengths={name: len(prompt) for name, prompt in given.items()},
        block_size=7,
        error_rate=0.0,
    )
    loop = make_loop(tiny_engine(decoder), drafts, max_running=8, max_batch_tokens=4 * 8)
    for name, prompt in given.items():
        loop.submit(request(name, prompt, 60))
    loop.step()
    loop.submit(request("late", [1 + index for index in range(3 * MIN_CHUNK_TOKENS)], 1))
    told = [[output.request_id for output in loop.step()] for _ in range(3)]
    assert told == [list(given), list(given), [*given, "late"]]


def test_only_prompts_beside_running_streams_are_cut() -> None:
    prompt = [1 + index % 50 for index in range(80)]
    tight = BatchLimits(max_step_seconds=1e-9)
    hour_per_token = StepTimeModel.of_curve([1, 10000], [3600.0, 3.6e7])
    assert rounds_of_a_prompt(tight, hour_per_token, prompt) == 80 // MIN_CHUNK_TOKENS
    assert rounds_of_a_prompt(BatchLimits(), hour_per_token, prompt) == 1
    alone = RoundLoop(tiny_engine(), FullPlanSource(), limits=tight, step_time=hour_per_token)
    alone.submit(request("prompt", prompt, 1))
    assert [output.request_id for output in alone.step()] == ["prompt"]


def test_a_budget_changes_no_token() -> None:
    decoder = tiny_decoder()
    limits = BatchLimits(max_running=3, max_step_seconds=1e-9)
    loop = RoundLoop(tiny_engine(decoder), FullPlanSource(), limits=limits)
    asked = prompts(6)
    answers = run(loop, [request(str(i), prompt, 8) for i, prompt in enumerate(asked)])
    for index, prompt in enumerate(asked):
        assert answers[str(index)] == naive_greedy(decoder, prompt, 8)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_impossible_budgets_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="max_step_seconds must be > 0"):
        BatchLimits(max_step_seconds=value)
