"""Requests that come together and begin alike: what they share is read once, and no token changes."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest

from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.records import RoundReport
from tests.unit.engine.tiny import (
    VOCAB,
    ScriptedDrafts,
    make_loop,
    naive_greedy,
    request,
    run,
    tiny_decoder,
    tiny_engine,
)

PAGE = 4
COUNT = 5


class Counting(FullPlanSource):
    def __init__(self) -> None:
        self.tokens = 0

    def report(self, report: RoundReport) -> None:
        self.tokens += report.batch_tokens


def some_tokens(source: random.Random, count: int) -> list[int]:
    return [source.randrange(VOCAB) for _ in range(count)]


def alike(count: int, common: int, own: int) -> dict[str, list[int]]:
    source = random.Random(7)
    begin = some_tokens(source, common)
    return {f"r{index}": begin + some_tokens(source, own) for index in range(count)}


@pytest.fixture(scope="module")
def expected() -> dict[tuple[int, ...], list[int]]:
    return {}


def naive(known: dict[tuple[int, ...], list[int]], prompt: Sequence[int]) -> list[int]:
    key = tuple(prompt)
    if key not in known:
        known[key] = naive_greedy(tiny_decoder(), prompt, COUNT)
    return known[key]


@pytest.mark.parametrize("chunk", [3, 8, 30, 200])
@pytest.mark.parametrize(("common", "own"), [(32, 5), (33, 5), (32, 1), (31, 0), (33, 0)])
def test_a_common_prefix_is_computed_once(expected, chunk, common, own) -> None:
    given, counting = alike(6, common, own), Counting()
    loop = make_loop(planner=counting, prefill_chunk_tokens=chunk, max_batch_tokens=256)
    told = run(loop, [request(name, prompt, COUNT) for name, prompt in given.items()])
    assert told == {name: naive(expected, prompt) for name, prompt in given.items()}
    shared = min(common, common + own - 1) // PAGE * PAGE
    decoded = len(given) * (COUNT - 1)
    alone = sum(len(prompt) for prompt in given.values()) - (len(given) - 1) * shared
    # Small chunks end within pages, and what is left of a round's budget goes to whoever is next.
    assert alone <= counting.tokens - decoded <= alone + (len(given) - 1) * (PAGE - 1)
    assert loop.free_kv_fraction == 1.0


def test_what_was_shared_is_told_as_cached(expected) -> None:
    given = alike(3, 32, 5)
    loop = make_loop(prefill_chunk_tokens=8)
    for name, prompt in given.items():
        loop.submit(request(name, prompt, COUNT))
    cached: dict[str, int] = {}
    while loop.has_work:
        for output in loop.step():
            cached.setdefault(output.request_id, output.chunk.cached_prompt_tokens)
    assert cached["r0"] == 0
    assert all(32 - PAGE < cached[name] <= 32 for name in ("r1", "r2"))


@pytest.mark.parametrize("at_once", [True, False])
def test_only_requests_of_one_salt_share(expected, at_once) -> None:
    salts = {"r0": "a", "r1": "b", "r2": "", "r3": "a"}
    given = alike(4, 32, 5)
    loop = make_loop(prefill_chunk_tokens=8)
    told: dict[str, list[int]] = {name: [] for name in given}
    cached: dict[str, int] = {}
    for name, prompt in given.items():
        loop.submit(dataclasses.replace(request(name, prompt, COUNT), cache_salt=salts[name]))
        while loop.has_work and not (at_once and name != "r3"):
            for output in loop.step():
                told[output.request_id] += output.chunk.token_ids
                cached.setdefault(output.request_id, output.chunk.cached_prompt_tokens)
    assert [cached[name] for name in ("r0", "r1", "r2")] == [0, 0, 0]
    assert 32 - PAGE < cached["r3"] <= 32
    assert told == {name: naive(expected, prompt) for name, prompt in given.items()}
    assert loop.free_kv_fraction == 1.0


def test_the_others_go_on_when_the_one_that_reads_is_cancelled(expected) -> None:
    given = alike(4, 32, 5)
    for steps in range(1, 8):
        loop = make_loop(prefill_chunk_tokens=8)
        for name, prompt in given.items():
            loop.submit(request(name, prompt, COUNT))
        tokens: dict[str, list[int]] = {name: [] for name in given}
        for _ in range(steps):
            collect(loop, tokens)
        loop.cancel("r0")
        while loop.has_work:
            collect(loop, tokens)
        for name in ("r1", "r2", "r3"):
            assert tokens[name] == naive(expected, given[name])
        assert loop.free_kv_fraction == 1.0


def collect(loop: RoundLoop, tokens: dict[str, list[int]]) -> None:
    for output in loop.step():
        tokens[output.request_id] += output.chunk.token_ids


class Watched:
    """An engine that fails when a run writes where another of its pass reads."""

    def __init__(self, engine: TargetEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def forward(self, runs: Sequence[Run]) -> object:
        written = [set(self._written(one)) for one in runs]
        for index, one in enumerate(runs):
            others = set().union(*(pages for other, pages in enumerate(written) if other != index))
            assert not others & set(one.pages), "a page that another run writes"
        return self._engine.forward(runs)

    @staticmethod
    def _written(one: Run) -> Sequence[int]:
        return one.pages[one.start // PAGE : (one.start + len(one.token_ids) - 1) // PAGE + 1]


@pytest.mark.parametrize("seed", range(12))
def test_whatever_comes_goes_and_begins_alike_the_tokens_are_the_same(expected, seed) -> None:
    source = random.Random(seed)
    stems = [some_tokens(source, length) for length in (9, 24, 24)]
    stems.append(stems[1][:13] + some_tokens(source, 6))
    prompts = [source.choice(stems) + some_tokens(source, source.randrange(1, 6)) for _ in range(12)]
    engine = Watched(tiny_engine(num_pages=source.choice((24, 48, 128)), page_tokens=PAGE))
    waiting = [(f"r{index}", prompt) for index, prompt in enumerate(prompts)]
    answers = {name: naive(expected, prompt) for name, prompt in waiting}
    drafts = ScriptedDrafts(answers, prompt_lengths={name: len(prompt) for name, prompt in waiting})
    loop = make_loop(
        engine,
        drafts if seed % 2 else None,
        prefill_chunk_tokens=source.choice((3, 7, 16, 64)),
        max_batch_tokens=64,
        max_running=source.choice((3, 12)),
    )
    given, tokens, cancelled = dict(waiting), {name: [] for name, _ in waiting}, set()
    rounds = 0
    while waiting or loop.has_work:
        for _ in range(min(len(waiting), source.randrange(4))):
            loop.submit(request(*waiting.pop(0), COUNT))
        if source.random() < 0.1:
            name = source.choice(list(given))
            if name not in dict(waiting):
                loop.cancel(name)
                cancelled.add(name)
        collect(loop, tokens)
        rounds += 1
        assert rounds < 1000, "it does not end"
    for name in given:
        told, right = tokens[name], answers[name]
        assert told == (right[: len(told)] if name in cancelled else right), name
    assert loop.free_kv_fraction == 1.0
