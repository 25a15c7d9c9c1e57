"""Targets with scaled RoPE in the engine: chunks, and drafters trained on them, change no token."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.models.drafter_config import read_any_config
from dspark_core.models.loading import load_target
from dspark_core.records import SamplingParams
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.prefill import compute_packed
from dspark_core.training.features import FeatureSequence
from dspark_core.training.objectives.dspark import build_dspark
from dspark_core.training.objectives.eagle3 import build_eagle3
from dspark_core.training.objectives.mtp1 import build_mtp1
from dspark_core.training.recipe import DrafterRecipe, LossConfig
from tests.unit.engine.checkpoint_loops import loop_of
from tests.unit.engine.tiny import request, run
from tests.unit.models.target_checkpoints import LINEAR_ROPE, SIZES, YARN_ROPE, llama, qwen3, save_hf

TARGETS = {
    "llama linear": lambda: llama(rope_parameters=LINEAR_ROPE, max_position_embeddings=32),
    "llama yarn": lambda: llama(rope_parameters=YARN_ROPE),
    "qwen3 yarn": lambda: qwen3(rope_parameters=YARN_ROPE | {"mscale": 1.3, "mscale_all_dim": 0.7}),
}
"""All with 32 positions, scaled to 128."""
BUILDERS = {"dspark": build_dspark, "eagle3": build_eagle3, "mtp1": build_mtp1}
TOKENS, VOCAB = 40, SIZES["vocab_size"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, list[int]]]]:
    """By name: a target with drafters trained on its answers, and the answers of `transformers`."""
    found = {}
    for name, build in TARGETS.items():
        model = build()
        directory = save_hf(model, tmp_path_factory.mktemp("stretched"))
        answers = {key: answer(model, prompt) for key, prompt in prompts().items()}
        for algorithm in BUILDERS:
            train(directory, algorithm, answers)
        found[name] = directory, answers
    return found


def prompts() -> dict[str, list[int]]:
    """Their answers lie before, across and beyond the target's original positions."""
    source = random.Random(0)
    return {f"r{n}": [source.randrange(VOCAB) for _ in range(n)] for n in (1, 20, 31, 33, 80)}


@torch.inference_mode()
def answer(model: Any, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(TOKENS):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def train(directory: Path, algorithm: str, answers: dict[str, list[int]]) -> None:
    target = load_target(str(directory), torch.float32, pack=False)
    recipe = DrafterRecipe(
        algorithm=algorithm,
        target_layer_ids=(-1, 1),
        num_layers=1,
        source_layers=(2,),
        block_size=3,
        mask_token_id=VOCAB - 1,
        markov_rank=4,
        confidence_head=True,
    )
    torch.manual_seed(0)
    objective = BUILDERS[algorithm](recipe, LossConfig(sample_below=0.0), target, None)
    conversations = [Conversation(tuple(prompts()[key]), tuple(answers[key])) for key in answers]
    layers = objective.module.config.target_layer_ids
    with torch.no_grad():
        sequences: list[FeatureSequence] = compute_packed(target.decoder, conversations, layers)
    objective.module.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(objective.module.parameters(), lr=3e-3)
    for step in range(10):
        optimizer.zero_grad()
        generators = [torch.Generator().manual_seed(step) for _ in sequences]
        objective.backward(sequences, generators, lambda sums: sums)
        optimizer.step()
    objective.save(directory / algorithm)


def generated(loop: RoundLoop, **sampling: Any) -> dict[str, list[int]]:
    parameters = SamplingParams(**({"temperature": 0.0} | sampling))
    return run(loop, [request(key, p, TOKENS, sampling=parameters) for key, p in prompts().items()])


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("drafter", [None, *BUILDERS])
@pytest.mark.parametrize("name", TARGETS)
def test_greedy_output_is_that_of_transformers(
    name: str, drafter: str | None, native: bool, made: Any
) -> None:
    directory, answers = made[name]
    for limits in ({}, {"prefill_chunk_tokens": 7, "max_batch_tokens": 16, "max_running": 3}):
        assert generated(loop_of(directory, drafter, native=native, **limits), temperature=0.0) == answers


@pytest.mark.parametrize("name", TARGETS)
def test_seeded_output_is_the_same_with_and_without_drafts(name: str, made: Any) -> None:
    directory, _ = made[name]
    plain = generated(loop_of(directory, None), temperature=0.8, seed=7)
    for drafter in BUILDERS:
        assert generated(loop_of(directory, drafter), temperature=0.8, seed=7) == plain


@pytest.mark.parametrize("drafter", BUILDERS)
@pytest.mark.parametrize("name", TARGETS)
def test_drafters_turn_positions_as_their_target_and_are_heeded(name: str, drafter: str, made: Any) -> None:
    directory, _ = made[name]
    target = load_target(str(directory), torch.float32).config
    backbone = read_any_config(directory / drafter).backbone
    assert (backbone.rope_scaling, backbone.max_context_tokens) == (target.rope_scaling, 128)
    loop = loop_of(directory, drafter)
    loop.submit(request("long", prompts()["r80"], TOKENS))
    accepted = 0
    while loop.has_work:
        accepted += sum(o.chunk.stats.accepted_tokens for o in loop.step() if o.chunk.stats is not None)
    assert accepted > 0
