"""The round loop compared to naive decoding: the tokens are the same whatever drafts, chunks or pages do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import chisquare

from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.errors import ContextLengthError, InvalidRequestError, QueueFullError
from dspark_core.records import (
    FinishReason,
    RoundReport,
    SamplingParams,
    SpeculationOptions,
    Verification,
)
from tests.unit.engine.tiny import (
    TAPS,
    VOCAB,
    ScriptedDrafts,
    causal_attend,
    make_loop,
    naive_greedy,
    naive_logits,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
    tiny_projection,
)


class Reports(FullPlanSource):
    """Records reports."""

    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def report(self, report: RoundReport) -> None:
        self.reports.append(report)


@pytest.fixture(scope="module")
def greedy_cases() -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Prompts and their naive greedy continuations."""
    decoder = tiny_decoder()
    given = {f"r{i}": prompt for i, prompt in enumerate(prompts(6))}
    return given, {name: naive_greedy(decoder, prompt, 14) for name, prompt in given.items()}


def drafts_for(cases: tuple[dict[str, list[int]], dict[str, list[int]]], **options: object) -> ScriptedDrafts:
    given, expected = cases
    lengths = {name: len(prompt) for name, prompt in given.items()}
    return ScriptedDrafts(expected, prompt_lengths=lengths, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("error_rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("window", [None, 3])
def test_greedy_output_is_the_targets_own(greedy_cases, error_rate, window) -> None:
    given, expected = greedy_cases
    loop = make_loop(drafts=drafts_for(greedy_cases, error_rate=error_rate, window=window))
    assert run(loop, [request(name, prompt, 14) for name, prompt in given.items()]) == expected


def test_right_drafts_are_accepted_and_counted(greedy_cases) -> None:
    given, _ = greedy_cases
    loop = make_loop(drafts=drafts_for(greedy_cases, error_rate=0.0))
    loop.submit(request("r0", given["r0"], 14))
    chunks = [output.chunk for _ in range(10) for output in loop.step()]
    stats = chunks[-1].stats
    assert stats is not None
    # One token from prefill, then blocks of four plus a bonus token: 5 + 5 + the remaining 3.
    assert (stats.rounds, stats.committed_tokens, stats.accepted_tokens) == (3, 13, 10)
    assert [len(chunk.token_ids) for chunk in chunks] == [1, 5, 5, 3]
    assert chunks[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    "limits",
    [
        {"prefill_chunk_tokens": 3},
        {"max_running": 2},
        {"max_running": 3, "max_batch_tokens": 5, "prefill_chunk_tokens": 4},
    ],
)
def test_chunking_and_batching_do_not_change_tokens(greedy_cases, limits) -> None:
    given, expected = greedy_cases
    loop = make_loop(drafts=drafts_for(greedy_cases), **limits)
    assert run(loop, [request(name, prompt, 14) for name, prompt in given.items()]) == expected


def test_running_out_of_pages_preempts_and_resumes(greedy_cases) -> None:
    given, expected = greedy_cases
    engine = tiny_engine(num_pages=16, page_tokens=4)
    loop = make_loop(engine, drafts_for(greedy_cases, window=3))
    assert run(loop, [request(name, prompt, 14) for name, prompt in given.items()]) == expected
    assert loop.batcher.preemptions > 0
    assert loop.free_kv_fraction == 1.0


def test_sequences_are_told_apart_without_comparing_what_they_hold() -> None:
    """Otherwise a round of n requests would compare the tokens of n * n / 2 pairs."""
    one, twin = (
        SequenceState(request=request("a", (1, 2, 3), 4), order=0, noise_seed=0, max_length=7)
        for _ in range(2)
    )
    assert one == one
    assert one != twin


def test_a_prefix_hit_skips_prefill_and_keeps_features(greedy_cases) -> None:
    given, expected = greedy_cases
    name = max(given, key=lambda n: len(given[n]))
    drafts = drafts_for(greedy_cases)
    loop = make_loop(drafts=drafts)
    run(loop, [request(name, given[name], 14)])
    first = {p: row for p, row in drafts.features[name].items() if p < len(given[name])}
    drafts.features.clear()
    loop.submit(request(name, given[name], 14))
    outputs = []
    while loop.has_work:
        outputs.extend(loop.step())
    assert outputs[0].chunk.cached_prompt_tokens == (len(given[name]) - 1) // 4 * 4 > 0
    assert [t for output in outputs for t in output.chunk.token_ids] == expected[name]
    for position, row in first.items():
        torch.testing.assert_close(drafts.features[name][position], row)


class Ticking:
    """A clock that advances by one second per reading."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_reported_times_add_up_to_the_time_that_passed(greedy_cases) -> None:
    """Drafting, passes and the time between them: nothing is omitted or counted twice."""
    given, _ = greedy_cases
    clock, plans = Ticking(), Reports()
    loop = make_loop(drafts=drafts_for(greedy_cases), planner=plans, clock=clock)
    for name, prompt in given.items():
        loop.submit(request(name, prompt, 14))
    ends = []
    while loop.has_work:
        loop.step()
        ends.append(clock.now)
        clock.now += 5.0  # delivering
    reports = plans.reports
    assert [r.loop_seconds for r in reports[:1]] == [0.0]
    assert sum(r.loop_seconds for r in reports) > 5.0 * (len(reports) - 1)
    whole = sum(r.step_seconds + r.draft_seconds + r.loop_seconds for r in reports)
    assert whole == ends[-1] - 1.0  # the clock's first reading began the first pass


def test_a_rest_is_no_work_between_rounds(greedy_cases) -> None:
    given, _ = greedy_cases
    clock, plans = Ticking(), Reports()
    loop = make_loop(planner=plans, clock=clock)
    for _ in range(2):
        run(loop, [request("r0", given["r0"], 3)])
        clock.now += 1000.0
    assert max(report.loop_seconds for report in plans.reports) < 10.0


def test_features_sent_are_the_projected_taps(greedy_cases) -> None:
    given, expected = greedy_cases
    drafts = drafts_for(greedy_cases)
    decoder = tiny_decoder()
    engine = tiny_engine(decoder)
    run(make_loop(engine, drafts), [request("r1", given["r1"], 14)])
    whole = given["r1"] + expected["r1"]
    with torch.inference_mode():
        taps = decoder(torch.tensor(whole), torch.arange(len(whole)), causal_attend, TAPS).taps
        features = tiny_projection().project(taps)
    sent = drafts.features["r1"]
    assert len(sent) >= len(whole) - 6
    for position, row in sent.items():
        torch.testing.assert_close(row, features[position], atol=1e-4, rtol=1e-4)


def test_losing_drafts_mid_stream_changes_no_token(greedy_cases) -> None:
    given, expected = greedy_cases
    drafts = drafts_for(greedy_cases)
    loop = make_loop(drafts=drafts)
    for name, prompt in given.items():
        loop.submit(request(name, prompt, 14))
    tokens: dict[str, list[int]] = {name: [] for name in given}
    rounds = 0
    while loop.has_work:
        rounds += 1
        drafts.fail = rounds in (3, 4)
        if rounds == 5:
            drafts.lose_state()  # another replica took over: every context must be re-primed
        for output in loop.step():
            tokens[output.request_id].extend(output.chunk.token_ids)
    assert tokens == expected


def test_stop_tokens_end_the_request_and_are_part_of_it(greedy_cases) -> None:
    given, expected = greedy_cases
    stop = expected["r2"][5]
    first = expected["r2"].index(stop)
    loop = make_loop(drafts=drafts_for(greedy_cases, error_rate=0.0))
    loop.submit(request("r2", given["r2"], 14, stop=(stop,)))
    chunks = []
    while loop.has_work:
        chunks.extend(output.chunk for output in loop.step())
    assert [t for chunk in chunks for t in chunk.token_ids] == expected["r2"][: first + 1]
    assert chunks[-1].finish_reason is FinishReason.STOP


def test_cancelling_frees_pages_at_once_and_tells_the_drafter(greedy_cases) -> None:
    given, _ = greedy_cases
    drafts = drafts_for(greedy_cases)
    loop = make_loop(drafts=drafts)
    for name in ("r0", "r1"):
        loop.submit(request(name, given[name], 50))
    for _ in range(3):
        loop.step()
    loop.cancel("r0")
    loop.cancel("r1")
    assert loop.free_kv_fraction == 1.0
    assert not loop.has_work
    assert drafts.released == ["r0", "r1"]
    loop.cancel("r0")  # gone already: nothing happens


def test_speculation_off_asks_for_no_drafts(greedy_cases) -> None:
    given, expected = greedy_cases
    drafts = drafts_for(greedy_cases)
    plain = request("r0", given["r0"], 14, speculation=SpeculationOptions(enabled=False))
    assert run(make_loop(drafts=drafts), [plain]) == {"r0": expected["r0"]}
    assert drafts.items == []


def test_the_context_limit_ends_a_request() -> None:
    loop = make_loop(tiny_engine(num_pages=6, page_tokens=4))  # 20 positions
    tokens = run(loop, [request("a", [1, 2, 3], None)])
    assert len(tokens["a"]) == 17


SAMPLED = SamplingParams(temperature=1.3, top_k=20, top_p=0.95, seed=7)


@pytest.mark.parametrize("sampling", [SAMPLED, SamplingParams(temperature=0.8, seed=123)])
def test_a_seed_makes_output_a_function_of_the_request_alone(sampling: SamplingParams) -> None:
    """Same tokens alone without drafts, and in a batch with good or bad drafts, chunks and preemption."""
    asked = [request(f"s{i}", prompt, 12, sampling=sampling) for i, prompt in enumerate(prompts(4, seed=3))]
    alone = {}
    for one in asked:
        plain = request(
            one.request_id,
            one.prompt_token_ids,
            12,
            sampling=sampling,
            speculation=SpeculationOptions(enabled=False),
        )
        alone |= run(make_loop(), [plain])
    assert len({tuple(tokens) for tokens in alone.values()}) > 1
    lengths = {one.request_id: len(one.prompt_token_ids) for one in asked}
    for error_rate, pages in ((0.0, 64), (0.5, 14)):
        drafts = ScriptedDrafts(alone, prompt_lengths=lengths, error_rate=error_rate)
        loop = make_loop(tiny_engine(num_pages=pages), drafts, prefill_chunk_tokens=5)
        assert run(loop, asked) == alone


def test_rejection_sampling_keeps_the_targets_distribution() -> None:
    """First two tokens of many unseeded requests against the exact distribution (chi-square, p > 0.001).

    The second token goes through rejection of a uniform proposal. With 4,000 samples over the nine most
    likely pairs, a total-variation bias of 5 % fails. The algorithm itself, where samples are cheap, is
    tested with higher power.
    """
    decoder = tiny_decoder()
    prompt = [5, 9, 2]
    sampling = SamplingParams(temperature=1.0, top_k=3)

    def law(tokens: list[int]) -> dict[int, float]:
        logits = naive_logits(decoder, tokens)[-1].topk(3)
        return dict(zip(logits.indices.tolist(), logits.values.double().softmax(-1).tolist(), strict=True))

    exact = {(a, b): pa * pb for a, pa in law(prompt).items() for b, pb in law([*prompt, a]).items()}
    # Three tokens, so that the second is a verified draft and not the last one.
    count, seen = 4000, dict.fromkeys(exact, 0)
    loop = make_loop(tiny_engine(decoder, num_pages=400), ScriptedDrafts(), max_running=64)
    asked = [request(f"q{i}", prompt, 3, sampling=sampling) for i in range(count)]
    for start in range(0, count, 250):
        for tokens in run(loop, asked[start : start + 250]).values():
            seen[tokens[0], tokens[1]] += 1
    expected = [count * p for p in exact.values()]
    assert chisquare(list(seen.values()), expected).pvalue > 0.001


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([VOCAB], InvalidRequestError, f"got {VOCAB}"),
        ([-1, 3], InvalidRequestError, "got -1"),
        (list(range(1, 21)), ContextLengthError, "limit is 20"),
    ],
)
def test_bad_prompts_are_refused_by_name(prompt, error, message) -> None:
    loop = make_loop(tiny_engine(num_pages=6, page_tokens=4))
    with pytest.raises(error, match=message):
        loop.submit(request("a", prompt))
    assert not loop.has_work


def test_queue_and_ids_are_bounded() -> None:
    loop = make_loop(max_running=1, max_waiting=2)
    loop.submit(request("a", [1]))
    with pytest.raises(InvalidRequestError, match="'a' is already running"):
        loop.submit(request("a", [1]))
    loop.submit(request("b", [1]))
    with pytest.raises(QueueFullError, match="2 requests"):
        loop.submit(request("c", [1]))


class Undeclared(ScriptedDrafts):
    """Omits the distributions its drafts were drawn from."""

    def _block(self, item):
        return dataclasses.replace(super()._block(item), distribution=None)


def test_drafts_without_their_distribution_are_not_verified() -> None:
    loop = make_loop(drafts=Undeclared())
    loop.submit(request("a", [1, 2, 3], 5, sampling=SamplingParams(temperature=1.0)))
    chunks = []
    while loop.has_work:
        chunks.extend(output.chunk for output in loop.step())
    assert [len(chunk.token_ids) for chunk in chunks] == [1] * 5
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.verified_tokens == 0


def test_rejection_with_a_seed_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="seed 3"):
        request(
            "a",
            [1],
            sampling=SamplingParams(seed=3),
            speculation=SpeculationOptions(verification=Verification.REJECTION),
        )
