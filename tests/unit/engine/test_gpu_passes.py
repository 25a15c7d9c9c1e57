"""The GPU's target pass, run on a CPU: padded shapes, replays and devices change no token."""

from __future__ import annotations

import gc
import time
import weakref

import pytest
import torch

from dspark_core.engine.profiling.profiler import ProfileSettings, profile_step_time
from dspark_core.engine.target.batch import Run
from dspark_core.records import SamplingParams
from tests.support.gpu_parts import CallAgain, KeepsNothing, PlainKernels, plain_gpu
from tests.support.pretend_cuda import move_module, pretend_cuda, read
from tests.unit.engine.tiny import (
    VOCAB,
    ScriptedDrafts,
    make_loop,
    naive_greedy,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
    tiny_projection,
)

SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "seeded": SamplingParams(temperature=0.9, top_p=0.9, seed=11),
    "sampled": SamplingParams(temperature=0.9, top_k=20),
}


@pytest.fixture(scope="module")
def greedy_cases():
    decoder = tiny_decoder()
    given = {f"r{i}": prompt for i, prompt in enumerate(prompts(6))}
    return given, {name: naive_greedy(decoder, prompt, 14) for name, prompt in given.items()}


def drafts_for(cases):
    given, expected = cases
    return ScriptedDrafts(expected, prompt_lengths={name: len(prompt) for name, prompt in given.items()})


def answers(cases, sampling, gpu, engine=None, **limits):
    loop = make_loop(engine or tiny_engine(gpu=gpu), drafts_for(cases), **limits)
    return run(loop, [request(name, prompt, 14, sampling=sampling) for name, prompt in cases[0].items()])


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_replayed_passes_decode_the_same_tokens(greedy_cases, sampling):
    recorder = CallAgain()
    plain = answers(greedy_cases, sampling, plain_gpu())
    assert answers(greedy_cases, sampling, plain_gpu(recorder)) == plain
    assert recorder.replays > recorder.records > 2
    if sampling.temperature == 0.0:
        assert plain == greedy_cases[1]


@pytest.mark.parametrize("max_tokens", [8, 40])
def test_what_no_bucket_holds_is_computed_as_it_is(greedy_cases, max_tokens):
    recorder = CallAgain()
    gpu = plain_gpu(recorder, max_tokens=max_tokens)
    limits = {"prefill_chunk_tokens": 7, "max_batch_tokens": 64}
    assert answers(greedy_cases, SAMPLINGS["greedy"], gpu, **limits) == greedy_cases[1]
    assert recorder.replays > 0


def test_each_shape_is_recorded_once():
    recorder = CallAgain()
    engine = tiny_engine(gpu=plain_gpu(recorder, requests=(2,), tokens_per_request=(1, 3)))
    pages = [[1, 2, 3], [4, 5, 6]]
    engine.forward([Run([7], 0, pages[0], 1)])
    engine.forward([Run([8], 1, pages[0], 1), Run([9], 0, pages[1], 1)])
    assert (recorder.records, recorder.replays) == (1, 2)
    engine.forward([Run([8, 1, 2], 1, pages[0], 3)])
    assert (recorder.records, recorder.replays) == (2, 3)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_what_was_prepared_decodes_the_same_tokens_and_records_nothing_more(greedy_cases, sampling):
    recorder = CallAgain()
    gpu = plain_gpu(recorder)
    engine = tiny_engine(gpu=gpu)
    engine.prepare(6)
    assert recorder.records == len(gpu.grid.all())
    engine.prepare(6)
    assert answers(greedy_cases, sampling, gpu, engine) == answers(greedy_cases, sampling, plain_gpu())
    assert recorder.records == len(gpu.grid.all())
    assert recorder.replays > 0


@pytest.mark.parametrize("recorded", [False, True])
def test_kernels_are_compiled_ahead_for_every_tile(recorded):
    """Once for few tiles, whose contexts are split among programs, and once for many."""

    class Tiles(PlainKernels):
        def __init__(self):
            super().__init__()
            self.launched = set()

        def tile_queries(self, longest_run, **_):
            return min(8, 1 << (longest_run - 1).bit_length())

        def attend(self, q, keys, values, where, window):
            self.launched.add((where.tile_queries, len(where.tiles) > 4))
            return super().attend(q, keys, values, where, window)

    kernels = Tiles()
    engine = tiny_engine(gpu=plain_gpu(CallAgain() if recorded else None, kernels=kernels))
    engine.prepare(8)
    assert kernels.launched == {(queries, many) for queries in (1, 2, 4, 8) for many in (False, True)}


def test_nothing_of_a_sequence_is_touched_by_what_is_prepared():
    engine, bare = tiny_engine(gpu=plain_gpu(CallAgain())), tiny_engine(gpu=plain_gpu())
    prompt, pages = [5, 6, 7, 8, 9], [1, 2]
    for one in (engine, bare):
        one.forward([Run(prompt, 0, pages, 1)])
    engine.prepare(8)
    torch.testing.assert_close(engine.read_features(pages, 0, 5), bare.read_features(pages, 0, 5))
    torch.testing.assert_close(engine.forward([Run([3], 5, pages, 1)]), bare.forward([Run([3], 5, pages, 1)]))


def test_a_profiles_time_is_not_spent_on_recording():
    recorder = CallAgain()
    engine = tiny_engine(gpu=plain_gpu(recorder))
    recorded = []

    def clock():
        recorded.append(recorder.records)
        return time.perf_counter()

    settings = ProfileSettings(requests=(1, 2, 4), tokens_per_request=(1, 3), budget_seconds=0.5)
    profile_step_time(engine, settings, clock=clock)
    assert set(recorded) == {len(plain_gpu().grid.holding(4))}


@pytest.mark.parametrize("prepared", [False, True])
def test_logits_of_all_sizes_lie_in_the_memory_of_the_largest(prepared):
    gpu = plain_gpu(CallAgain())
    engine, bare = tiny_engine(gpu=gpu), tiny_engine(gpu=plain_gpu())
    if prepared:
        engine.prepare(8)
    one, many = [Run([5], 0, [1], 1)], [Run([6, 7, 8], 0, [2 + n], 3) for n in range(6)]
    seen = set()
    for runs in (one, many, one, many):
        logits = engine.forward(runs)
        torch.testing.assert_close(logits, bare.forward(runs))
        seen.add((logits.data_ptr(), logits.untyped_storage().nbytes()))
    largest = max(bucket.tokens for bucket in gpu.grid.all())
    if prepared:
        assert [size for _, size in seen] == [largest * VOCAB * 4]
    else:  # sized by what came so far
        assert len(seen) == 2


def test_a_chunk_of_a_prompt_is_in_no_graph():
    """However few its tokens: it needs larger tiles, and logits of at most one row."""
    recorder = CallAgain()
    engine = tiny_engine(gpu=plain_gpu(recorder, requests=(1, 4), tokens_per_request=(1, 2)))
    engine.forward([Run([5, 6, 7], 0, [1, 2], 1)])
    assert recorder.records == 0
    engine.forward([Run([8, 9], 3, [1, 2], 2)])
    assert recorder.records == 1


def test_without_memory_for_a_graph_passes_are_launched_and_right(caplog):
    class Full:
        asked = 0

        def record(self, compute):
            self.asked += 1
            raise torch.OutOfMemoryError("no more")

    full, runs = Full(), [Run([5], 0, [1, 2], 1)]
    engine, bare = tiny_engine(gpu=plain_gpu(full)), tiny_engine(gpu=plain_gpu())
    for _ in range(2):
        torch.testing.assert_close(engine.forward(runs), bare.forward(runs))
    assert full.asked == 1
    assert "launch by launch" in caplog.text
    engine.prepare(2)
    assert full.asked == len(plain_gpu().grid.holding(2))
    torch.testing.assert_close(engine.forward(runs), bare.forward(runs))


def test_an_engine_that_is_let_go_is_freed_at_once():
    """Cache, weights and graphs take most of a GPU's memory and must not wait for garbage collection."""
    decoder = tiny_decoder()
    engine = tiny_engine(decoder, gpu=plain_gpu(KeepsNothing()))
    engine.prepare(2)
    engine.forward([Run([5], 0, [1, 2], 1)])
    weights = weakref.ref(decoder)
    gc.disable()
    try:
        del engine, decoder
        assert weights() is None
    finally:
        gc.enable()


def test_a_filled_up_pass_gives_the_logits_and_features_of_the_bare_one():
    runs = [Run([5, 6, 7], 0, [1, 2], 2), Run([9], 0, [3], 1)]
    bare, filled = tiny_engine(gpu=plain_gpu()), tiny_engine(gpu=plain_gpu(CallAgain(), requests=(4,)))
    torch.testing.assert_close(filled.forward(runs), bare.forward(runs))
    for pages, end in (([1, 2], 3), ([3], 1)):
        torch.testing.assert_close(filled.read_features(pages, 0, end), bare.read_features(pages, 0, end))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_round_on_a_gpu_reads_its_verdicts_and_nothing_else(greedy_cases, sampling, recorded):
    """One read-back per round, whatever is sampled, and no operator that mixes devices."""
    expected = answers(greedy_cases, sampling, None)
    projection = tiny_projection()
    move_module(projection.project)
    gpu = plain_gpu(CallAgain() if recorded else None)
    with pretend_cuda() as mode:
        engine = tiny_engine(move_module(tiny_decoder()), projection=projection, gpu=gpu)
        engine.prepare(8)
        drafts = drafts_for(greedy_cases)
        propose = drafts.propose

        def on_the_host(items):
            for item in items:
                object.__setattr__(item, "features", read(item.features))
            return propose(items)

        drafts.propose = on_the_host
        loop = make_loop(engine, drafts)
        tokens = {name: [] for name in greedy_cases[0]}
        for name, prompt in greedy_cases[0].items():
            loop.submit(request(name, prompt, 14, sampling=sampling))
        while loop.has_work:
            mode.reads, mode.reads_allowed = 0, 1
            for output in loop.step():
                tokens[output.request_id].extend(output.chunk.token_ids)
    assert tokens == expected
