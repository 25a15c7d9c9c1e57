"""The target by vLLM's workers against our own engine, pass by pass and round by round."""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.context_features import ContextProjection
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import ConfigError
from dspark_core.models.loading import load_target, read_target_facts
from dspark_core.records import SamplingParams, Verification
from tests.unit.engine import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]

TAPS = (2, -1, 3, 0)
PARALLEL = {
    "one worker": {},
    "tensor parallel": {"tensor_parallel_size": 2},
}


def options(directory: Path, **arguments: Any) -> EngineOptions:
    return EngineOptions(
        target_model=str(directory),
        drafter=None,
        dtype="float32",
        device="cpu",
        kv_cache_bytes=64 * 2**20,
        engine="vllm",
        vllm_arguments={"enforce_eager": True, **arguments},
        max_running=6,
        max_batch_tokens=256,
    )


def projection() -> ContextProjection:
    return ContextProjection(project=torch.nn.Identity(), target_layer_ids=TAPS, feature_size=len(TAPS) * 64)


@pytest.fixture(scope="module", params=PARALLEL)
def by_vllm(request: pytest.FixtureRequest, target_directory: Path) -> Iterator[TargetEngine]:
    from dspark_core.vllm_engine.building import build_vllm_engine

    given = options(target_directory, **PARALLEL[request.param])
    engine = build_vllm_engine(given, read_target_facts(str(target_directory)), projection(), None)
    yield engine
    engine.close()


def by_us(directory: Path, like: TargetEngine) -> TargetEngine:
    loaded = load_target(str(directory), torch.float32)
    return TargetEngine.of_decoder(
        loaded.decoder,
        loaded.config,
        num_pages=like.num_pages,
        page_tokens=like.page_tokens,
        projection=projection(),
    )


def test_passes_agree(by_vllm: TargetEngine, target_directory: Path) -> None:
    """Chunks of prompts, drafts of every length, rejected ones written over, some that sit out."""
    ours, source = by_us(target_directory, by_vllm), random.Random(0)
    texts = [[source.randrange(192) for _ in range(300)] for _ in range(5)]
    needed = -(-300 // by_vllm.page_tokens)
    pages = [list(range(1 + needed * i, 1 + needed * (i + 1))) for i in range(5)]
    computed = [0] * 5
    for _ in range(30):
        runs = []
        for index in source.sample(range(5), source.randint(1, 5)):
            start = computed[index]
            if start < 40:  # still its prompt
                count = min(source.randint(1, 25), 40 - start)
                rows = 1 if start + count == 40 else 0
                computed[index] += count
            else:
                count = rows = source.randint(1, 9)
                computed[index] += source.randint(1, count)
            held = pages[index][: -(-(start + count) // by_vllm.page_tokens)]
            runs.append(Run(texts[index][start : start + count], start, held, rows, f"text {index}"))
        found, expected = by_vllm.forward(runs).clone(), ours.forward(runs)
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
        for run in runs:
            span = (run.pages, run.start, run.start + len(run.token_ids))
            torch.testing.assert_close(
                by_vllm.read_features(*span), ours.read_features(*span), rtol=1e-4, atol=1e-3
            )


def test_runs_without_a_name_are_computed_too(by_vllm: TargetEngine, target_directory: Path) -> None:
    ours = by_us(target_directory, by_vllm)
    for run in (Run([1, 2, 3], 0, [1], 3), Run([4, 5], 3, [1], 2), Run([9], 4, [1], 1)):
        torch.testing.assert_close(by_vllm.forward([run]), ours.forward([run]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(temperature=0.0), SamplingParams(temperature=1.0, seed=7)],
    ids=["greedy", "seeded"],
)
def test_rounds_are_lossless(by_vllm: TargetEngine, target_directory: Path, sampling: SamplingParams) -> None:
    """Drafts right and wrong, more requests than fit at once: every token as without drafts, by us."""
    asked = [
        replace(tiny.request(f"{i}", prompt, 24), sampling=sampling)
        for i, prompt in enumerate(tiny.prompts(9))
    ]
    plain = tiny.run(tiny.make_loop(by_us(target_directory, by_vllm)), asked)
    drafts = WideDrafts(plain, prompt_lengths={r.request_id: len(r.prompt_token_ids) for r in asked})
    loop = tiny.make_loop(by_vllm, drafts, max_running=5, prefill_chunk_tokens=8)
    assert tiny.run(loop, asked) == plain
    assert asked[0].verification is (
        Verification.COUPLED if sampling.seed is not None else Verification.REJECTION
    )


class WideDrafts(tiny.ScriptedDrafts):
    """For features of the projection above."""

    def __init__(self, continuations: dict[str, list[int]], **given: Any) -> None:
        super().__init__(continuations, **given)
        self._geometry = replace(self._geometry, feature_size=len(TAPS) * 64, vocab_size=192)


def test_a_pass_that_fails_does_not_spoil_the_next(by_vllm: TargetEngine, target_directory: Path) -> None:
    ours = by_us(target_directory, by_vllm)
    first, second = Run([1, 2, 3], 0, [1], 1, "a"), Run([4], 3, [1], 1, "a")
    by_vllm.forward([first])
    ours.forward([first])
    too_many = [Run([1], 0, [2], 1, f"{i}") for i in range(7)]
    with pytest.raises(ValueError, match="may hold 6 runs, got 7"):
        by_vllm.forward(too_many)
    torch.testing.assert_close(by_vllm.forward([second]), ours.forward([second]), rtol=1e-4, atol=1e-3)


def test_wrong_arguments_are_told_before_anything_is_loaded(target_directory: Path) -> None:
    with pytest.raises(ConfigError, match="vllm arguments dtype, model are set by dspark itself"):
        build_target(options(target_directory, dtype="half", model="other"))
    with pytest.raises(ConfigError, match="pipeline_parallel_size are set by dspark itself"):
        build_target(options(target_directory, pipeline_parallel_size=2))
    with pytest.raises(ConfigError, match=r"vLLM refuses its arguments: .*no_such_argument"):
        build_target(options(target_directory, no_such_argument=1))
    with pytest.raises(ConfigError, match=r"(?s)vLLM refuses .*divisible by tensor parallel size"):
        build_target(options(target_directory, tensor_parallel_size=3))
