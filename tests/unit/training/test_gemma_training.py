"""Drafters of Gemma targets: trained as they draft, under the target's capped logits."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.models.drafter_kinds import load_any_drafter
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.prefill import compute_packed
from dspark_core.training.features import FeatureSequence
from dspark_core.training.losses import position_weights
from dspark_core.training.objectives.dspark import DSparkObjective, build_dspark
from dspark_core.training.objectives.eagle3 import Eagle3Objective, build_eagle3
from dspark_core.training.objectives.mtp1 import MtpObjective, build_mtp1
from dspark_core.training.packing import draw_anchors, pack
from dspark_core.training.recipe import DrafterRecipe, LossConfig
from dspark_core.training.validate import replay_greedy_rounds
from dspark_core.training.weights import LocalWeights
from tests.unit.engine.tiny import request
from tests.unit.models.gemma_tiny import GEMMAS, VOCAB, WINDOW
from tests.unit.models.target_checkpoints import save_hf
from tests.unit.models.teacher_forcing import teacher_forced
from tests.unit.training.loss_definition import block_losses, target_probabilities

LAYERS = (-1, 1, 3)
LOSSES = LossConfig(anchors_per_sequence=100, sample_below=0.0)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> LoadedTarget:
    directory = save_hf(GEMMAS["gemma4 small"](), tmp_path_factory.mktemp("gemma"))
    return load_target(str(directory), torch.float32, pack=False)


def recipe(algorithm: str, **fields: object) -> DrafterRecipe:
    defaults: dict[str, object] = {
        "target_layer_ids": LAYERS,
        "num_layers": 2 if algorithm == "dspark" else 1,
        "source_layers": (1, 3) if algorithm == "dspark" else (3,),
        "block_size": 4,
        "mask_token_id": VOCAB - 1,
        "markov_rank": 4,
        "confidence_head": True,
    }
    return DrafterRecipe(algorithm=algorithm, **(defaults | fields))


@torch.no_grad()
def greedy(target: LoadedTarget, prompt_tokens: int, seed: int) -> FeatureSequence:
    """A prompt and the target's own answer to it, past the window."""
    source = random.Random(seed)
    tokens = [source.randrange(VOCAB) for _ in range(prompt_tokens)]
    for _ in range(3 * WINDOW):
        (seen,) = compute_packed(target.decoder, [Conversation(tuple(tokens), ())], (0,))
        tokens.append(int(target.decoder.logits(seen.final[-1:]).argmax()))
    conversation = Conversation(tuple(tokens[:prompt_tokens]), tuple(tokens[prompt_tokens:]))
    return compute_packed(target.decoder, [conversation], LAYERS)[0]


def train(
    made: DSparkObjective | Eagle3Objective | MtpObjective, sequences: list[FeatureSequence], steps: int
) -> list[float]:
    made.module.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(made.module.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        generators = [torch.Generator().manual_seed(i) for i in range(len(sequences))]
        report = made.backward(sequences, generators, lambda sums: sums)
        optimizer.step()
        losses.append(float(report.cross_entropy.mean()))
    return losses


@pytest.mark.parametrize("algorithm", ["dspark", "mtp1", "eagle3"])
def test_the_loss_falls_and_what_is_saved_loads(algorithm: str, target: LoadedTarget, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build = {"dspark": build_dspark, "mtp1": build_mtp1, "eagle3": build_eagle3}[algorithm]
    made = build(recipe(algorithm), LOSSES, target, None)
    scalars = {name: value.clone() for name, value in made.module.named_buffers() if "scalar" in name}
    losses = train(made, [greedy(target, 9, seed) for seed in range(2)], 12)
    # Eagle3's loss has a floor, the entropy of the target's capped distribution.
    assert losses[-1] < (0.95 if algorithm == "eagle3" else 0.8) * losses[0]
    assert scalars
    assert all(torch.equal(value, made.module.get_buffer(name)) for name, value in scalars.items())
    made.save(tmp_path)
    found = load_any_drafter(tmp_path, target.decoder, target.config, torch.float32).state_dict()
    assert all(torch.equal(found[name], value) for name, value in made.module.state_dict().items())


def test_the_objective_is_the_definition_under_the_cap(target: LoadedTarget) -> None:
    torch.manual_seed(0)
    made = build_dspark(recipe("dspark"), LOSSES, target, None)
    drafter, sequence = made.module, greedy(target, 9, seed=0)
    anchors = draw_anchors(sequence, 100, torch.Generator())
    batch = pack([sequence], [anchors], 4, None)
    with torch.no_grad():
        hidden = packed_hidden(drafter, batch)
        logits, confidence = teacher_forced(drafter, hidden, batch.previous_ids)
        truth = target_probabilities(batch.target_hidden, drafter.lm_head, batch.log_normalizers, 3.0)
    torch.testing.assert_close(truth.sum(-1)[batch.counted], torch.ones(int(batch.counted.sum())))
    weights = batch.counted * position_weights(4, LOSSES.loss_decay)
    expected = block_losses(logits, confidence, batch.labels, truth, weights)
    report = made.backward([sequence], [torch.Generator()], lambda sums: sums)
    for found, wanted in (
        (report.cross_entropy, expected.cross_entropy),
        (report.distance, expected.distance),
    ):
        torch.testing.assert_close(found.mean(), wanted.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["dspark", "mtp1", "eagle3"])
def test_positions_are_turned_in_training_as_when_served(
    algorithm: str, target: LoadedTarget, tmp_path: Path
) -> None:
    """Also in bfloat16, and far from the start, where rounded frequencies would be turns away."""
    build = {"dspark": build_dspark, "mtp1": build_mtp1, "eagle3": build_eagle3}[algorithm]
    made = build(recipe(algorithm), LOSSES, target, None)
    LocalWeights(made.module, torch.bfloat16)
    made.save(tmp_path)
    served = load_any_drafter(tmp_path, target.decoder, target.config, torch.bfloat16)
    positions = torch.tensor([1, 500, 4000])
    trained, loaded = (m.rotary(positions, torch.float32) for m in (made.module, served))
    assert all(torch.equal(*pair) for pair in zip(trained, loaded, strict=True))
    assert {p.dtype for p in made.module.parameters()} == {torch.bfloat16}


def test_rounds_go_as_training_replays_them(target: LoadedTarget, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = build_dspark(recipe("dspark", context_window=12), LOSSES, target, None)
    sequences = [greedy(target, length, seed=length) for length in (3, 20)]
    train(made, sequences, 12)  # as trained on the very answers, some drafts are right
    made.save(tmp_path)
    options = EngineOptions(
        target_model=str(target.path), drafter=str(tmp_path), dtype="float32", kv_cache_bytes=2**21
    )
    engine = build_target(options).engine
    drafting = Drafting(LocalDraftSource(build_drafter(options)), engine, deadline_seconds=5.0)
    loop = RoundLoop(engine, FullPlanSource(), drafting=drafting, generator=torch.Generator())
    for index, sequence in enumerate(sequences):
        prompt = sequence.token_ids[: sequence.answer_start].tolist()
        loop.submit(request(f"r{index}", prompt, 3 * WINDOW))
    last = {}
    while loop.has_work:
        last |= {output.request_id: output.chunk.stats for output in loop.step()}
    rounds = sum(stats.rounds for stats in last.values())
    committed = sum(stats.committed_tokens for stats in last.values())
    replayed = replay_greedy_rounds(made.module.eval(), sequences)
    assert (rounds, committed) == (replayed.rounds, replayed.committed)
    assert committed > 1.2 * rounds
