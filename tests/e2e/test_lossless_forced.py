"""With every draft verified, whether it pays or not, the real model answers as without drafts.

The planner would verify few drafts where they do not pay, so a static plan replaces it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from dspark_core.engine.building import BuiltTarget, EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup_building import build_lookup
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.kernels.library import native_kernels
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions, SpeculationStats
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER, NGRAMS_AUTO
from tests.e2e.prompts import PROMPTS

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

MAX_TOKENS = 16
PROMPT_COUNT = {"float32": 24, "bfloat16": 50, "stored-a8": 50}
"""Float32 takes three times as long, and `test_lossless` covers all prompts with it over HTTP."""
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=1234)


@dataclass(frozen=True, slots=True)
class Engines:
    target: BuiltTarget
    drafts: LocalDraftSource
    prompts: tuple[tuple[int, ...], ...]
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Answers:
    token_ids: list[list[int]]
    stats: list[SpeculationStats]

    @property
    def accepted(self) -> int:
        return sum(one.accepted_tokens for one in self.stats)

    @property
    def rejected(self) -> int:
        """Verified tokens that were not accepted."""
        return sum(one.verified_tokens - one.accepted_tokens for one in self.stats)


@pytest.fixture(scope="module", params=["float32", "bfloat16", "stored-a8"])
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    kernels = native_kernels()
    if request.param != "float32" and kernels is None:
        pytest.skip("PyTorch's bfloat16 depends on the batch's shape")
    if request.param == "stored-a8" and (kernels is None or not kernels.byte_products):
        pytest.skip("this machine has no products of bytes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rounded = request.param == "stored-a8"
    options = EngineOptions(
        target_model=DEFAULT_MODEL,
        drafter=DEFAULT_DRAFTER,
        dtype="bfloat16" if rounded else request.param,
        weights="stored-a8" if rounded else "stored",
        kv_cache_bytes=256 * 2**20,
    )
    target = build_target(options)
    tokenizer = load_tokenizer(target.loaded.path)
    asked = PROMPTS[: PROMPT_COUNT[request.param]]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in asked]
    drafts = LocalDraftSource(build_drafter(options, target.loaded))
    yield Engines(target, drafts, tuple(prompts), tuple(tokenizer.stop_token_ids))
    torch.set_num_threads(threads)


def answer(
    engines: Engines, sampling: SamplingParams, *, speculate: bool, together: int, looked_up: bool = False
) -> Answers:
    """Answers all prompts, `together` at a time; every drafted or looked-up token is verified."""
    target, drafting, lookup = engines.target, None, None
    if speculate and looked_up:
        lookup = build_lookup(NGRAMS_AUTO, DEFAULT_MODEL, target.loaded)
    elif speculate:
        drafting = Drafting(engines.drafts, target.engine, deadline_seconds=60.0)
    limits = BatchLimits(max_running=together)
    loop = RoundLoop(target.engine, FullPlanSource(), drafting=drafting, lookup=lookup, limits=limits)
    for index, prompt in enumerate(engines.prompts):
        loop.submit(
            GenerateRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                max_tokens=MAX_TOKENS,
                sampling=sampling,
                stop_token_ids=engines.stop_token_ids,
                speculation=SpeculationOptions(enabled=speculate),
            )
        )
    answers = Answers([[] for _ in engines.prompts], [SpeculationStats() for _ in engines.prompts])
    while loop.has_work:
        for output in loop.step():
            answers.token_ids[int(output.request_id)] += output.chunk.token_ids
            answers.stats[int(output.request_id)] = output.chunk.stats or SpeculationStats()
    return answers


def check(engines: Engines, sampling: SamplingParams, *, looked_up: bool = False) -> None:
    with_drafts = answer(engines, sampling, speculate=True, together=16, looked_up=looked_up)
    without = answer(engines, sampling, speculate=False, together=8)
    assert with_drafts.token_ids == without.token_ids
    assert with_drafts.accepted >= 50
    assert with_drafts.rejected >= 50
    assert len({tuple(one) for one in without.token_ids}) > 0.8 * len(engines.prompts)


def test_drafts_change_no_token_of_a_greedy_answer(engines: Engines) -> None:
    check(engines, GREEDY)


@pytest.mark.parametrize("engines", ["bfloat16"], indirect=True)
def test_drafts_change_no_token_of_a_seeded_answer(engines: Engines) -> None:
    check(engines, SEEDED)


@pytest.mark.parametrize("engines", ["bfloat16"], indirect=True)
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_looked_up_tokens_change_none_of_an_answer(engines: Engines, sampling: SamplingParams) -> None:
    check(engines, sampling, looked_up=True)
