"""Requests that begin alike hold what they share once, from their admission on, whatever becomes of whom."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.rounds.loop import BatchLimits, RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.records import GenerateRequest, SamplingParams
from tests.unit.engine.page_engine import CheckedDrafts, PageEngine
from tests.unit.engine.tiny import VOCAB, make_loop, request, run

PAGE = 4


def some_tokens(count: int, seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB) for _ in range(count)]


COMMON = some_tokens(200, seed=7)
ALIKE = {f"r{index}": COMMON + some_tokens(8, seed=index) for index in range(16)}
OTHER = some_tokens(60, seed=99)


def submitted(loop: RoundLoop, given: dict[str, list[int]], count: int = 8) -> RoundLoop:
    for name, prompt in given.items():
        loop.submit(request(name, prompt, count))
    return loop


def finished(loop: RoundLoop) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for _ in range(2000):
        if not loop.has_work:
            return tokens
        for output in loop.step():
            tokens.setdefault(output.request_id, []).extend(output.chunk.token_ids)
    raise AssertionError("it does not end")


def alone(one: GenerateRequest) -> list[int]:
    return run(make_loop(PageEngine(128, PAGE)), [one])[one.request_id]


def test_all_that_fit_together_run_from_the_first_round_on() -> None:
    # 50 pages in common and three each; alone, each takes 53.
    loop = submitted(make_loop(PageEngine(1 + 50 + 16 * 3, PAGE), prefill_chunk_tokens=16), ALIKE)
    loop.step()
    assert len(loop.batcher.running) == len(ALIKE)
    assert loop.free_kv_fraction == 0.0
    assert finished(loop) == {name: alone(request(name, prompt, 8)) for name, prompt in ALIKE.items()}
    assert loop.free_kv_fraction == 1.0


def test_no_more_run_than_fit_together() -> None:
    loop = submitted(make_loop(PageEngine(1 + 50 + 5 * 3 + 2, PAGE), prefill_chunk_tokens=16), ALIKE)
    loop.step()
    assert len(loop.batcher.running) == 5
    assert loop.batcher.preemptions == 0


def test_what_they_do_not_need_stays_cached() -> None:
    loop = make_loop(PageEngine(1 + 50 + 16 * 4 + 17, PAGE), prefill_chunk_tokens=16)
    run(loop, [request("before", OTHER, 4)])
    finished(submitted(loop, ALIKE))
    loop.submit(request("again", [*OTHER, 1, 2], 4))
    assert loop.step()[0].chunk.cached_prompt_tokens == 60


def test_others_do_not_wait_behind_those_that_begin_alike() -> None:
    loop = submitted(make_loop(PageEngine(1 + 50 + 16 * 4 + 17, PAGE), prefill_chunk_tokens=256), ALIKE)
    submitted(loop, {"short": some_tokens(8, seed=50)})
    assert "short" in {output.request_id for output in loop.step()}


@pytest.mark.parametrize("steps", range(16))
def test_the_others_go_on_where_the_one_that_computed_was_cancelled(steps: int) -> None:
    engine = PageEngine(1 + 50 + 16 * 4, PAGE)
    loop = submitted(make_loop(engine, prefill_chunk_tokens=14), ALIKE)
    for _ in range(steps):
        loop.step()
    computed = engine.tokens
    loop.cancel("r0")
    rest = {name: prompt for name, prompt in ALIKE.items() if name != "r0"}
    assert finished(loop) == {name: alone(request(name, prompt, 8)) for name, prompt in rest.items()}
    # A page at most was half computed; the rest is not computed again.
    own = sum(len(prompt) - len(COMMON) + 7 for prompt in rest.values())
    if steps:
        assert engine.tokens - computed <= max(len(COMMON) - 14 * steps, 0) + PAGE - 1 + own
    assert loop.free_kv_fraction == 1.0


def test_what_was_never_computed_is_not_found_later() -> None:
    """All that shared a prompt leave before its end, or the pass that computes it fails."""
    engine = PageEngine(128, PAGE)
    loop = make_loop(engine, prefill_chunk_tokens=20)
    submitted(loop, {name: ALIKE[name] for name in ("r0", "r1")})
    loop.step()
    engine.fails_next = True
    with pytest.raises(RuntimeError):
        loop.step()
    for name in ("r0", "r1"):
        loop.cancel(name)
    assert loop.free_kv_fraction == 1.0
    loop.submit(request("r2", ALIKE["r2"], 8))
    outputs = []
    while loop.has_work:
        outputs += loop.step()
    assert outputs[0].chunk.cached_prompt_tokens == 20
    assert [t for output in outputs for t in output.chunk.token_ids] == alone(request("r2", ALIKE["r2"], 8))


def test_a_large_request_is_not_overtaken_by_those_that_find_their_pages_shared() -> None:
    loop = make_loop(PageEngine(1 + 50 + 4 * 5, PAGE), prefill_chunk_tokens=32)
    submitted(loop, {name: ALIKE[name] for name in ("r0", "r1", "r2")})
    loop.step()
    submitted(loop, {"large": some_tokens(160, seed=3)})
    ended: list[str] = []
    arrivals = iter([name for name in ALIKE if name not in ("r0", "r1", "r2")])
    while loop.has_work:
        if name := next(arrivals, None):
            submitted(loop, {name: ALIKE[name]})
        ended += [o.request_id for o in loop.step() if o.chunk.finish_reason is not None]
    assert ended[:4] == ["r0", "r1", "r2", "large"]


def test_what_a_preempted_request_finds_of_its_own_is_not_told_as_cached() -> None:
    loop = submitted(make_loop(PageEngine(1 + 18, PAGE), prefill_chunk_tokens=3), {"first": [1, 2, 3]}, 40)
    for _ in range(3):
        loop.step()
    submitted(loop, {"preempted": OTHER})
    cached: dict[str, int] = {}
    while loop.has_work:
        for output in loop.step():
            cached[output.request_id] = output.chunk.cached_prompt_tokens
    assert loop.batcher.preemptions == 1
    assert cached["preempted"] == 0


STEMS = [some_tokens(length, seed) for length, seed in ((9, 1), (24, 2), (40, 3))]
STEMS += [STEMS[1][:13] + some_tokens(6, seed=4), STEMS[2][:32]]


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[int], int, SamplingParams]:
    stem = draw(st.sampled_from(STEMS))
    own = draw(st.lists(st.integers(0, 1), max_size=5))
    seed = draw(st.sampled_from((None, None, 5)))
    sampling = SamplingParams(temperature=0.0) if seed is None else SamplingParams(temperature=1.0, seed=seed)
    return stem + own, draw(st.integers(1, 9)), sampling


Event = tuple[str, int]
EVENTS = st.one_of(
    st.tuples(st.just("arrive"), st.integers(1, 6)),
    st.tuples(st.just("cancel"), st.integers(0, 15)),
    st.tuples(st.just("fail"), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


class Service:
    """A loop, and what its callers see: as the verifier does, it cancels all when a pass fails."""

    def __init__(self, loop: RoundLoop, engine: PageEngine) -> None:
        self.loop = loop
        self.engine = engine
        self.alive: dict[str, GenerateRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: set[str] = set()

    def submit(self, one: GenerateRequest) -> None:
        self.loop.submit(one)
        self.alive[one.request_id] = one
        self.tokens[one.request_id] = []

    def cancel(self, names: Sequence[str]) -> None:
        for name in names:
            self.loop.cancel(name)
            del self.alive[name]
        self.check()

    def step(self) -> None:
        if not self.loop.has_work:
            return
        try:
            outputs = self.loop.step()
        except RuntimeError:
            self.cancel(list(self.alive))
            return
        for output in outputs:
            self.tokens[output.request_id] += output.chunk.token_ids
            if output.chunk.finish_reason is not None:
                self.ended.add(output.request_id)
                del self.alive[output.request_id]
        self.check()

    def check(self) -> None:
        """No page is lost or free while held, and none is served before those that came earlier."""
        running, waiting = self.loop.batcher.running, self.loop.batcher.waiting
        held = {page for sequence in running for page in sequence.pages}
        assert not any(sequence.pages for sequence in waiting)
        usable = self.engine.num_pages - 1
        assert round(self.loop.free_kv_fraction * usable) == usable - len(held)
        if running and waiting:
            assert max(s.order for s in running) < min(s.order for s in waiting)


@settings(max_examples=150)
@given(
    requests=st.lists(asked(), min_size=1, max_size=14),
    events=st.lists(EVENTS, max_size=30),
    pages=st.sampled_from((15, 20, 28, 60)),
    chunk=st.sampled_from((1, 3, 7, 16, 64)),
    max_running=st.sampled_from((2, 14)),
    drafted=st.sampled_from(("no", "drafter", "drafter and lookup")),
    cohorts=st.sampled_from((1, 2)),
)
def test_whatever_comes_goes_and_fails_the_tokens_are_those_of_each_alone(
    requests, events, pages, chunk, max_running, drafted, cohorts
) -> None:
    named = [
        request(f"r{index}", prompt, count, sampling=sampling)
        for index, (prompt, count, sampling) in enumerate(requests)
    ]
    right = {one.request_id: alone(one) for one in named}
    engine = PageEngine(pages, PAGE)
    service = Service(loop_of(engine, named, right, drafted, chunk, max_running, cohorts), engine)
    coming = list(named)
    for kind, number in events:
        if kind == "arrive":
            for one in coming[:number]:
                service.submit(one)
            del coming[:number]
        elif kind == "cancel" and f"r{number}" in service.alive:
            service.cancel([f"r{number}"])
        elif kind == "fail":
            engine.fails_next = True
        elif kind == "step":
            for _ in range(number):
                service.step()
    engine.fails_next = False
    for one in coming:
        service.submit(one)
    for _ in range(3000):
        service.step()
    assert not service.loop.has_work, "it does not end"
    for name, told in service.tokens.items():
        assert told == (right[name] if name in service.ended else right[name][: len(told)]), name
    assert service.loop.free_kv_fraction == 1.0


def loop_of(engine, named, right, drafted, chunk, max_running, cohorts) -> RoundLoop:
    lengths = {one.request_id: len(one.prompt_token_ids) for one in named}
    drafts = CheckedDrafts(right, prompt_lengths=lengths, window=5) if drafted != "no" else None
    return RoundLoop(
        engine,
        FullPlanSource(),
        drafting=Drafting(drafts, engine, deadline_seconds=30.0) if drafts else None,
        lookup=LookupDrafting() if drafted == "drafter and lookup" else None,
        cohorts=cohorts,
        limits=BatchLimits(prefill_chunk_tokens=chunk, max_batch_tokens=64, max_running=max_running),
    )
