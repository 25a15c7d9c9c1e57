"""Whole rounds on a GPU: the same tokens with drafts and without, in graphs and launch by launch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.draft_engines.gpu_blocks import GpuDraftEngine
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.records import GenerateRequest, SamplingParams
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER
from tests.e2e.prompts import PROMPTS
from tests.support.gpu_parts import generator
from tests.unit.engine.test_golden import check_golden_rounds

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=1234)
MAX_TOKENS = 64
NEAR_TIE = 0.25
"""Logits this close may change places when bfloat16 is summed in another order."""


def options(dtype="float32", device="cuda", **fields):
    return EngineOptions(
        target_model=DEFAULT_MODEL,
        drafter=DEFAULT_DRAFTER,
        dtype=dtype,
        device=device,
        kv_cache_bytes=512 * 2**20,
        **fields,
    )


def answers(given, sampling, *, speculate, together=8, count=16):
    """Generated tokens of the first prompts, and how many drafts stood."""
    target = build_target(given)
    drafting = None
    if speculate:
        source = LocalDraftSource(build_drafter(given, target.loaded, generator=generator(0)))
        drafting = Drafting(source, target.engine, deadline_seconds=60.0)
    tokenizer = load_tokenizer(target.loaded.path)
    limits = BatchLimits(max_running=together)
    loop = RoundLoop(
        target.engine, FullPlanSource(), drafting=drafting, limits=limits, generator=generator(1)
    )
    prompts = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in PROMPTS[:count]]
    for index, prompt in enumerate(prompts):
        loop.submit(
            GenerateRequest(
                request_id=str(index),
                prompt_token_ids=prompt,
                max_tokens=MAX_TOKENS,
                sampling=sampling,
                stop_token_ids=tuple(tokenizer.stop_token_ids),
            )
        )
    tokens = [[] for _ in prompts]
    accepted = 0
    while loop.has_work:
        for output in loop.step():
            tokens[int(output.request_id)] += output.chunk.token_ids
            if output.chunk.finish_reason is not None and output.chunk.stats is not None:
                accepted += output.chunk.stats.accepted_tokens
    return tokens, accepted, prompts, target


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_drafts_change_no_token_in_float32(sampling):
    with_drafts, accepted, _, target = answers(options(), sampling, speculate=True)
    assert "Triton kernels in CUDA graphs" in target.engine.computed_by
    without, _, _, _ = answers(options(), sampling, speculate=False, together=5)
    assert with_drafts == without
    assert accepted >= 50


def test_a_gpu_gives_the_tokens_of_a_cpu_in_float32():
    there, _, _, _ = answers(options(), GREEDY, speculate=True)
    here, _, _, _ = answers(options(device="cpu"), GREEDY, speculate=False)
    same = sum(a == b for a, b in zip(there, here, strict=True))
    assert same >= len(here) - 1, "more than one answer differs: that is no near tie"


def test_graphs_change_nothing_but_the_launches():
    graphs, accepted, _, _ = answers(options(), GREEDY, speculate=True)
    bare = dataclasses.replace(options(), cuda_graphs=False)
    launched, accepted_too, _, _ = answers(bare, GREEDY, speculate=True)
    assert graphs == launched
    assert accepted == pytest.approx(accepted_too, rel=0.02)


def test_bfloat16_differs_only_from_a_near_tie_on():
    """The order of bfloat16 sums depends on the batch, as in other engines; nothing else may differ."""
    with_drafts, accepted, prompts, target = answers(options("bfloat16"), GREEDY, speculate=True)
    without, _, _, _ = answers(options("bfloat16"), GREEDY, speculate=False)
    assert accepted >= 50
    for prompt, ours, plain in zip(prompts, with_drafts, without, strict=True):
        pairs = enumerate(zip(ours, plain, strict=False))
        split = next((index for index, (a, b) in pairs if a != b), None)
        if split is not None:
            logits = _next_logits(target.engine, [*prompt, *plain[:split]])
            gap = (logits[ours[split]] - logits[plain[split]]).abs().item()
            assert gap <= NEAR_TIE, f"token {split}: logits differ by {gap}"


@pytest.mark.parametrize("name", ["dspark_vanilla", "dflash", "eagle3"])
def test_golden_rounds_hold(name):
    check_golden_rounds(name, "cuda")


def test_the_drafter_is_the_one_for_gpus():
    given = options()
    assert isinstance(build_drafter(given, build_target(given).loaded), GpuDraftEngine)


def _next_logits(engine, tokens):
    from dspark_core.engine.target.batch import Run

    pages = list(range(1, 2 + len(tokens) // engine.page_tokens))
    return engine.forward([Run(tokens, 0, pages, 1)])[0].float().clone()


def test_a_device_that_is_not_there_is_named():
    from dspark_core.errors import ConfigError

    with pytest.raises(ConfigError, match=f"cuda:{torch.cuda.device_count()}"):
        build_target(options(device=f"cuda:{torch.cuda.device_count()}"))
