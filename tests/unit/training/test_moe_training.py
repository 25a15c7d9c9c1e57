"""Drafters with expert layers are trained on a CPU, and what comes out is a checkpoint."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dspark_core.models.drafter_checkpoint import load_drafter
from dspark_core.models.moe_config import Balance, MoeConfig
from dspark_core.training.objectives.dspark import DSparkObjective, build_dspark
from dspark_core.training.recipe import DrafterRecipe, LossConfig
from tests.unit.models.dspark_golden import golden, golden_target
from tests.unit.training.training_sequences import GOLDEN_LAYERS, greedy_sequence

MOE = MoeConfig(num_experts=4, experts_per_token=2, expert_size=32)


def objective(moe: MoeConfig = MOE) -> DSparkObjective:
    torch.manual_seed(0)
    recipe = DrafterRecipe(
        algorithm="dspark",
        target_layer_ids=GOLDEN_LAYERS,
        num_layers=3,
        source_layers=(5, 6, 7),
        block_size=5,
        mask_token_id=511,
        markov_rank=8,
        context_window=16,
        moe=moe,
    )
    made = build_dspark(recipe, LossConfig(anchors_per_sequence=16), golden_target(), None)
    made.module.requires_grad_(True).train()
    return made


def train(made: DSparkObjective, steps: int) -> list[float]:
    rows = [golden("dspark_vanilla")["generation"][i] for i in range(3)]
    sequences = [greedy_sequence(row["output"], len(row["prompt"])) for row in rows]
    optimizer = torch.optim.AdamW(made.module.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        generators = [torch.Generator().manual_seed(i) for i in range(len(sequences))]
        report = made.backward(sequences, generators, lambda sums: sums)
        assert all(parameter.grad is not None for parameter in made.module.parameters())
        optimizer.step()
        losses.append(float(report.cross_entropy.mean()))
    return losses


@pytest.mark.parametrize("balance", list(Balance))
def test_the_loss_falls_and_the_checkpoint_holds_the_experts(balance: Balance, tmp_path: Path) -> None:
    made = objective(dataclasses.replace(MOE, balance=balance))
    losses = train(made, 12)
    assert losses[-1] < 0.9 * losses[0]
    biases = [v for k, v in made.module.named_parameters() if k.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    assert all(bool(bias.any()) is (balance is Balance.BIAS) for bias in biases)
    made.save(tmp_path)
    decoder = golden_target().decoder
    embed, head = decoder.embed_tokens.weight, decoder.lm_head.weight
    loaded = load_drafter(tmp_path, embed, head, golden_target().config, torch.float32)
    assert loaded.config.moe == made.module.config.moe
    for name, value in made.module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_attention_starts_from_the_target_and_experts_do_not() -> None:
    made = objective()
    qkv = golden_target().decoder.state_dict()["layers.7.self_attn.qkv_proj.weight"]
    own = made.module.state_dict()
    assert torch.equal(own["layers.2.self_attn.q_proj.weight"], qkv[:64])
    first, second = (own[f"layers.2.mlp.experts.{i}.up_proj.weight"] for i in (0, 1))
    assert not torch.equal(first, second)
