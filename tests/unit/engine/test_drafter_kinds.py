"""Every kind of drafter through the whole engine: the output is the target's, whatever is drafted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.target.batch import Run
from dspark_core.models.config import DrafterConfig
from dspark_core.models.drafter_checkpoint import save_drafter
from dspark_core.models.drafter_kinds import load_any_projection
from dspark_core.models.moe_config import MoeConfig
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions, Verification
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.prefill import compute_packed
from tests.unit.models.autoregressive_tiny import BACKBONE, EAGLE3, MTP, random_drafter, save
from tests.unit.models.dspark_golden import GOLDEN, golden_target
from tests.unit.models.dspark_tiny import tiny_drafter

SUBSET = torch.arange(0, 512, 2)


def block_config(num_layers: int, **fields: Any) -> DrafterConfig:
    return DrafterConfig(
        backbone=dataclasses.replace(BACKBONE, num_layers=num_layers),
        num_target_layers=8,
        target_layer_ids=(1, 5),
        block_size=5,
        mask_token_id=511,
        **fields,
    )


def production_shape(directory: Path) -> Path:
    """Three expert layers, a window and five draft tokens."""
    config = block_config(
        3,
        markov_rank=8,
        confidence_head=True,
        confidence_head_with_markov=True,
        context_window=16,
        moe=MoeConfig(num_experts=4, experts_per_token=2, expert_size=32),
    )
    save_drafter(directory, tiny_drafter(config))
    return directory


def short(config):
    """The config of a checkpoint trained on short texts, with less context than the target."""
    return dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, max_context_tokens=16))


def short_block(directory: Path) -> Path:
    """Without heads, as DFlash."""
    config = block_config(2, markov_rank=0, confidence_head=False)
    save_drafter(directory, tiny_drafter(short(config)))
    return directory


MAKERS: dict[str, Callable[[Path], Path]] = {
    "mtp1": lambda path: save(path, random_drafter(MTP)),
    "mtp1-reduced": lambda path: save(path, random_drafter(MTP, SUBSET)),
    "eagle3-reduced": lambda path: save(path, random_drafter(EAGLE3, SUBSET)),
    "experts": production_shape,
    "mtp1-short": lambda path: save(path, random_drafter(short(MTP))),
    "eagle3-short": lambda path: save(path, random_drafter(short(EAGLE3))),
    "dflash-short": short_block,
}
KINDS = pytest.mark.parametrize("kind", list(MAKERS))


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: make(tmp_path_factory.mktemp(kind)) for kind, make in MAKERS.items()}


def build_loop(directory: Path) -> RoundLoop:
    options = EngineOptions(
        target_model=str(GOLDEN / "qwen3_tiny_target"),
        drafter=str(directory),
        dtype="float32",
        kv_cache_bytes=2**22,
    )
    target = build_target(options)
    drafter = build_drafter(options, target.loaded, generator=torch.Generator().manual_seed(1))
    assert drafter.geometry == target.geometry
    drafting = Drafting(LocalDraftSource(drafter), target.engine, deadline_seconds=60)
    return RoundLoop(
        target.engine, FullPlanSource(), drafting=drafting, generator=torch.Generator().manual_seed(2)
    )


def generate(
    loop: RoundLoop, sampling: SamplingParams, verification: Verification, *, speculate: bool
) -> tuple[dict[str, list[int]], int]:
    """Generates for two prompts together; returns their tokens and the number of verified draft tokens."""
    tokens: dict[str, list[int]] = {}
    verified = 0
    for name, prompt in (("one", range(3, 30)), ("two", (7, 8, 9))):
        tokens[name] = []
        loop.submit(
            GenerateRequest(
                request_id=name,
                prompt_token_ids=tuple(prompt),
                max_tokens=24,
                sampling=sampling,
                speculation=SpeculationOptions(enabled=speculate, verification=verification),
            )
        )
    while loop.has_work:
        for output in loop.step():
            tokens[output.request_id].extend(output.chunk.token_ids)
            if output.chunk.finish_reason is not None and output.chunk.stats is not None:
                verified += output.chunk.stats.verified_tokens
    return tokens, verified


@KINDS
@pytest.mark.parametrize(
    ("sampling", "verification"),
    [
        (SamplingParams(temperature=0.0), Verification.REJECTION),
        (SamplingParams(temperature=0.0), Verification.COUPLED),
        (SamplingParams(temperature=0.9, top_p=0.95, seed=5), Verification.COUPLED),
    ],
)
def test_output_is_the_same_with_and_without_drafts(
    directories: dict[str, Path], kind: str, sampling: SamplingParams, verification: Verification
) -> None:
    loop = build_loop(directories[kind])
    drafted, verified = generate(loop, sampling, verification, speculate=True)
    plain, none = generate(loop, sampling, verification, speculate=False)
    assert drafted == plain
    assert verified > none == 0


@KINDS
def test_sampled_drafts_are_verified_by_rejection(directories: dict[str, Path], kind: str) -> None:
    loop = build_loop(directories[kind])
    tokens, verified = generate(loop, SamplingParams(temperature=1.0), Verification.REJECTION, speculate=True)
    assert [len(row) for row in tokens.values()] == [24, 24]
    assert verified > 0


@KINDS
def test_served_features_are_those_of_training(directories: dict[str, Path], kind: str) -> None:
    """The verifier sends projected features, for MTP-1 those of the final hidden states."""
    options = EngineOptions(
        target_model=str(GOLDEN / "qwen3_tiny_target"),
        drafter=str(directories[kind]),
        dtype="float32",
        kv_cache_bytes=2**22,
    )
    built = build_target(options)
    prompt = [5, 6, 7, 300, 2, 9, 11]
    pages = [1]  # page 0 is scratch
    built.engine.forward([Run(prompt, 0, pages, 1)])
    served = built.engine.read_features(pages, 0, len(prompt))
    config = build_drafter(options, built.loaded).geometry
    assert served.shape == (len(prompt), config.feature_size)
    torch.testing.assert_close(served, trained_features(directories[kind], prompt), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def trained_features(directory: Path, tokens: Sequence[int]) -> torch.Tensor:
    target = golden_target()
    projection = load_any_projection(directory, target.config, torch.float32)
    tapped = [layer for layer in projection.target_layer_ids if layer < target.config.num_layers]
    conversation = Conversation(tuple(tokens[:3]), tuple(tokens[3:]))
    [sequence] = compute_packed(target.decoder, [conversation], tapped or [0])
    return projection(sequence.taps if tapped else sequence.final)
