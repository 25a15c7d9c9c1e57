"""The runner on tiny checkpoints whose rounds are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dspark_core.engine.building import BuiltTarget, EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.errors import ConfigError
from dspark_core.evaluation.acceptance import measure_acceptance
from dspark_core.evaluation.report import report_sets
from dspark_core.evaluation.round_table import RoundTable
from dspark_core.evaluation.runner import EvalPrompt, EvalRun, EvalRunner, EvalSettings, draft_generator
from dspark_core.records import MAX_SEED, Verification
from tests.unit.engine.tiny import ScriptedDrafts, tiny_engine

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
CASES: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())
STOP = (1,)


def options(drafter: str) -> EngineOptions:
    return EngineOptions(
        target_model=str(GOLDEN / "qwen3_tiny_target"),
        drafter=str(GOLDEN / drafter),
        dtype="float32",
        kv_cache_bytes=2**22,
        max_context_tokens=120,
    )


@pytest.fixture(scope="module", params=["dspark_vanilla", "dflash", "eagle3"])
def golden(request: pytest.FixtureRequest) -> tuple[str, BuiltTarget]:
    return request.param, build_target(options(request.param))


def evaluate(
    golden: tuple[str, BuiltTarget], prompts: list[EvalPrompt], settings: EvalSettings, ended: Any = None
) -> EvalRun:
    name, target = golden
    drafter = build_drafter(options(name), target.loaded, generator=draft_generator(settings.seed))
    runner = EvalRunner(target.engine, LocalDraftSource(drafter), settings, stop_token_ids=STOP)
    return runner.run(prompts, ended or (lambda _: None))


def golden_prompts(name: str) -> list[EvalPrompt]:
    return [
        EvalPrompt(set_name="golden", row=row, token_ids=tuple(case["prompt"]))
        for row, case in enumerate(CASES[name]["generation"])
    ]


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("verification", list(Verification))
def test_greedy_rounds_are_those_of_the_reference(golden, concurrency: int, verification) -> None:
    name = golden[0]
    # The reference counts its 24 tokens without the one of prefill.
    settings = EvalSettings(
        max_tokens=25, temperature=0.0, concurrency=concurrency, verification=verification
    )
    run = evaluate(golden, golden_prompts(name), settings)
    answers = {one.prompt.row: one for one in run.answered}
    for row, case in enumerate(CASES[name]["generation"]):
        rounds = answers[row].rounds
        assert [one.committed for one in rounds] == case["acceptance_lengths"]
        assert [one.accepted for one in rounds] == [r["accepted"] for r in case["rounds"]]
        assert [*case["prompt"], *answers[row].token_ids][: len(case["output"])] == case["output"]
        assert {(one.drafted, one.verified) for one in rounds} == {(7, 7)}
        for one, wanted in zip(rounds, case["rounds"], strict=True):
            logits = wanted["confidence_logits"]
            if logits is None:
                continue  # the reference has no confidence for this drafter
            expected = [
                math.prod(1 / (1 + math.exp(-x)) for x in logits[:k]) for k in range(1, len(logits) + 1)
            ]
            assert one.survival == pytest.approx(expected, rel=1e-4)
    lengths = [length for case in CASES[name]["generation"] for length in case["acceptance_lengths"]]
    (report,) = report_sets(run, ["golden"])
    assert report.acceptance.accepted_length == pytest.approx(sum(lengths) / len(lengths))
    assert report.generated_tokens == sum(lengths) + len(answers)
    assert bool(report.confidence) == bool(report.sweep) == (name != "dflash")


@pytest.mark.parametrize("verification", list(Verification))
def test_a_seed_repeats_a_sampled_run_and_another_seed_does_not(golden, verification) -> None:
    def answers(seed: int) -> list[tuple[int, ...]]:
        settings = EvalSettings(max_tokens=12, seed=seed, verification=verification, concurrency=2)
        return [one.token_ids for one in evaluate(golden, golden_prompts(golden[0]), settings).answered]

    assert answers(3) == answers(3) != answers(4)


def test_coupled_answers_are_the_same_at_any_concurrency_with_noise_of_their_own(golden) -> None:
    first = golden_prompts(golden[0])[0]
    twice = [first, EvalPrompt(set_name="golden", row=9, token_ids=first.token_ids)]

    def answers(concurrency: int) -> dict[int, tuple[int, ...]]:
        settings = EvalSettings(max_tokens=12, verification=Verification.COUPLED, concurrency=concurrency)
        return {one.prompt.row: one.token_ids[:12] for one in evaluate(golden, twice, settings).answered}

    assert answers(1) == answers(2)
    assert answers(1)[0] != answers(1)[9]


def test_prompts_beyond_the_context_are_skipped_and_counted(golden) -> None:
    prompts = [
        EvalPrompt(set_name="long", row=0, token_ids=(2,) * 120),
        *golden_prompts(golden[0])[:1],
        EvalPrompt(set_name="long", row=1, token_ids=(2, 3) * 59),
    ]
    ended: list[EvalPrompt] = []
    run = evaluate(golden, prompts, EvalSettings(max_tokens=4, temperature=0.0), ended.append)
    assert [prompt.request_id for prompt in run.too_long] == ["long/0"]
    assert sorted(one.prompt.request_id for one in run.answered) == ["golden/0", "long/1"]
    assert sorted(prompt.request_id for prompt in ended) == ["golden/0", "long/0", "long/1"]
    long, _ = report_sets(run, ["long", "golden"])
    assert (long.prompts, long.too_long_prompts) == (1, 1)


def test_a_stop_token_among_the_accepted_ends_the_round_there() -> None:
    prompt = (5, 6, 7)
    engine = tiny_engine()

    def run(continuation: list[int], stop: tuple[int, ...]) -> EvalRun:
        source = ScriptedDrafts(
            {"x/0": continuation}, prompt_lengths={"x/0": len(prompt)}, block_size=4, error_rate=0.0
        )
        settings = EvalSettings(max_tokens=14, temperature=0.0)
        runner = EvalRunner(engine, source, settings, stop_token_ids=stop)
        return runner.run([EvalPrompt(set_name="x", row=0, token_ids=prompt)])

    told = list(run([], ()).answered[0].token_ids)
    assert len(told) >= 14
    # The first token is prefill's; stop at a draft token that did not occur before.
    index = next(i for i in range(2, len(told) - 1) if told[i] not in told[:i])
    (answer,) = run(told, (told[index],)).answered
    assert answer.token_ids == tuple(told[: index + 1])
    last = answer.rounds[-1]
    assert last.stopped
    assert last.accepted == last.committed == (index - 1) % 5 + 1 <= 4
    assert last.survival == pytest.approx((0.8, 0.64, 0.512, 0.4096))


def test_a_drafter_that_fails_is_counted_in_undrafted_rounds() -> None:
    source = ScriptedDrafts()
    source.fail = True
    runner = EvalRunner(tiny_engine(), source, EvalSettings(max_tokens=5, temperature=0.0))
    run = runner.run([EvalPrompt(set_name="x", row=0, token_ids=(1, 2))])
    found = measure_acceptance(RoundTable.from_rounds(run.answered[0].rounds))
    assert (found.rounds, found.undrafted_rounds, found.accepted_length) == (4, 4, 1.0)


def test_more_answers_at_once_than_a_server_would_queue() -> None:
    prompts = [EvalPrompt(set_name="x", row=row, token_ids=(row % 60,)) for row in range(300)]
    settings = EvalSettings(max_tokens=1, temperature=0.0, concurrency=300)
    run = EvalRunner(tiny_engine(), ScriptedDrafts(), settings).run(prompts)
    assert sorted(one.prompt.row for one in run.answered) == list(range(300))


def looping_prompts() -> list[EvalPrompt]:
    return [EvalPrompt(set_name="x", row=row, token_ids=(*range(row, row + 6),) * 3) for row in range(4)]


def test_looked_up_drafts_are_measured_alone_or_as_served() -> None:
    settings = EvalSettings(max_tokens=60, temperature=0.0)
    plain = EvalRunner(tiny_engine(), ScriptedDrafts(), settings).run(looping_prompts())
    alone = EvalRunner(tiny_engine(), None, settings, lookup=LookupDrafting()).run(looping_prompts())
    wrong = ScriptedDrafts(block_size=4)  # knows no continuations
    served = EvalRunner(tiny_engine(), wrong, settings, lookup=LookupDrafting()).run(looping_prompts())
    expected = {one.prompt.row: one.token_ids[:60] for one in plain.answered}
    for run in (alone, served):
        assert {one.prompt.row: one.token_ids[:60] for one in run.answered} == expected
        rounds = [round_ for one in run.answered for round_ in one.rounds]
        assert any(round_.accepted > 4 for round_ in rounds)  # more than a block of the drafter's holds
        assert all(round_.verified == round_.drafted and round_.survival == () for round_ in rounds)
    assert any(round_.drafted == 4 for one in served.answered for round_ in one.rounds)  # it was tried


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be >= 1, got 0"),
        ({"concurrency": 0}, "concurrency must be >= 1, got 0"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": MAX_SEED}, "seed must be in"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EvalSettings(**fields)


def test_wrong_sampling_is_named_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="top_p"):
        EvalSettings(top_p=0.0)


def test_assumed_confidences_are_not_taken_for_predicted_ones() -> None:
    source = ScriptedDrafts(confidences=False)
    runner = EvalRunner(tiny_engine(), source, EvalSettings(max_tokens=6, temperature=0.0))
    run = runner.run([EvalPrompt(set_name="x", row=0, token_ids=(1, 2))])
    assert {(one.drafted, one.survival) for one in run.answered[0].rounds} == {(4, ())}
