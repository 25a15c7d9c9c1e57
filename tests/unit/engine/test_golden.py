"""Golden rounds of DeepSpec checkpoints, through the whole engine: paged cache, draft engine, loop."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.protocols import DraftBlock, DraftItem, DraftReply
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.records import GenerateRequest, SamplingParams

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
CASES: dict[str, Any] = json.loads((GOLDEN / "golden.json").read_text())


class Recorded(LocalDraftSource):
    """Records what was proposed."""

    def __init__(self, engine) -> None:
        super().__init__(engine)
        self.rounds: list[tuple[DraftItem, DraftBlock]] = []

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        future = super().propose(items)
        self.rounds.extend(zip(items, future.result().blocks, strict=True))
        return future


@pytest.mark.parametrize("name", ["dspark_vanilla", "dflash", "eagle3"])
def test_rounds_are_those_of_the_reference(name: str) -> None:
    check_golden_rounds(name, "cpu")


def check_golden_rounds(name: str, device: str) -> None:
    options = EngineOptions(
        target_model=str(GOLDEN / "qwen3_tiny_target"),
        drafter=str(GOLDEN / name),
        dtype="float32",
        device=device,
        kv_cache_bytes=2**22,
    )
    target = build_target(options)
    source = Recorded(build_drafter(options, target.loaded))
    loop = RoundLoop(
        target.engine, FullPlanSource(), drafting=Drafting(source, target.engine, deadline_seconds=60)
    )
    for index, case in enumerate(CASES[name]["generation"]):
        source.rounds.clear()
        prompt, output = case["prompt"], case["output"]
        # The reference drafts a whole block even if fewer tokens remain, so request more and compare what
        # both have.
        loop.submit(
            GenerateRequest(
                request_id=f"{name}-{index}",
                prompt_token_ids=tuple(prompt),
                max_tokens=len(output) - len(prompt) + 16,
                sampling=SamplingParams(temperature=0.0),
                stop_token_ids=(1,),
            )
        )
        chunks: list[tuple[int, ...]] = []
        while loop.has_work:
            chunks.extend(round_output.chunk.token_ids for round_output in loop.step())
        tokens = [*prompt, *itertools.chain.from_iterable(chunks)]
        assert tokens[: len(output)] == output
        assert len(source.rounds) >= len(case["rounds"]) == len(case["acceptance_lengths"])
        rounds = zip(case["rounds"], source.rounds, chunks[1:], strict=False)
        for expected, (item, block), committed in rounds:
            assert [item.anchor_token_id, *block.token_ids] == expected["candidates"]
            assert len(committed) == expected["accepted"] + 1
            assert committed[-1] == expected["next_token"]
            if expected["confidence_logits"] is not None:
                wanted = [1 / (1 + math.exp(-logit)) for logit in expected["confidence_logits"]]
                assert block.confidences == pytest.approx(wanted, rel=1e-4)
