"""The zoo's drafters, one of each kind, draft for the demo target and change no token."""

from __future__ import annotations

import pytest

from dspark_core.engine.building import BuiltTarget, EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationStats
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import resolve_drafter_path, shipped_drafters

pytestmark = pytest.mark.xdist_group("shipped-drafters")

MOST_BYTES = 40_000_000
TOKENS = 20
BLOCKS = {"dspark": 7, "dflash": 7, "dflash-5": 7, "eagle3": 7, "mtp1": 1}
DRAFTERS = [f"smollm2-135m-instruct-{kind}" for kind in BLOCKS]


def options(name: str) -> EngineOptions:
    return EngineOptions(target_model=DEFAULT_MODEL, drafter=name, dtype="float32", kv_cache_bytes=2**26)


@pytest.fixture(scope="module")
def prompt() -> tuple[int, ...]:
    tokenizer = load_tokenizer(resolve_model_path())
    return tokenizer.encode_chat([{"role": "user", "content": "Count from one to twenty in words."}])


def answer(
    target: BuiltTarget, prompt: tuple[int, ...], drafter: str | None
) -> tuple[list[int], SpeculationStats]:
    drafting = None
    if drafter is not None:
        source = LocalDraftSource(build_drafter(options(drafter), target.loaded))
        drafting = Drafting(source, target.engine, deadline_seconds=60.0)
    loop = RoundLoop(target.engine, FullPlanSource(), drafting=drafting)
    loop.submit(
        GenerateRequest(
            request_id="r",
            prompt_token_ids=prompt,
            max_tokens=TOKENS,
            sampling=SamplingParams(temperature=0.0),
        )
    )
    tokens: list[int] = []
    stats = SpeculationStats()
    while loop.has_work:
        for output in loop.step():
            tokens += output.chunk.token_ids
            stats = output.chunk.stats or stats
    return tokens, stats


def test_the_zoo_holds_these_and_tells_what_they_are() -> None:
    assert set(shipped_drafters()) == set(DRAFTERS)
    for name in DRAFTERS:
        directory = resolve_drafter_path(name)
        assert (directory / "model.safetensors").stat().st_size <= MOST_BYTES
        card = (directory / "README.md").read_text(encoding="utf-8")
        assert all(word in card for word in (f"# {name}", "Licence: Apache-2.0", "## Data", "macro mean"))


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_shipped_drafter_saves_rounds_and_changes_nothing(prompt, kind: str) -> None:
    name = f"smollm2-135m-instruct-{kind}"
    target = build_target(options(name))  # with the drafter's own projection of the target's states
    plain, without = answer(target, prompt, None)
    tokens, stats = answer(target, prompt, name)
    assert tokens == plain
    assert stats.accepted_tokens > 0
    assert stats.rounds < without.rounds
    assert stats.verified_tokens <= BLOCKS[kind] * stats.rounds
