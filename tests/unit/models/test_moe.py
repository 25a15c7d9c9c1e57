"""Expert layers: what they compute, how loads are balanced, and that drafters carry them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.drafter_checkpoint import load_drafter, save_drafter
from dspark_core.models.drafter_config import read_drafter_config
from dspark_core.models.moe import MoeMLP, expert_loads, take_balance_loss
from dspark_core.models.moe_config import Balance, MoeConfig
from tests.unit.models.dspark_tiny import BACKBONE, TARGET, tiny_config, tiny_drafter

MOE = MoeConfig(num_experts=6, experts_per_token=2, expert_size=8, num_shared_experts=2, routed_scale=1.5)
TOKENS = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))


def layer(config: MoeConfig = MOE) -> MoeMLP:
    generator = torch.Generator().manual_seed(0)
    made = MoeMLP(BACKBONE, config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.eval()


@torch.no_grad()
def test_a_token_is_the_gated_sum_of_its_experts() -> None:
    moe = layer()
    affinities = torch.sigmoid(TOKENS @ moe.gate.weight.T)
    expected = moe.shared_experts(TOKENS)
    for row, token in enumerate(TOKENS):
        chosen = (affinities[row] + moe.gate.e_score_correction_bias).topk(2).indices
        gates = affinities[row, chosen] / affinities[row, chosen].sum() * 1.5
        for index, gate in zip(chosen.tolist(), gates, strict=True):
            expected[row] += gate * moe.experts[index](token)
    torch.testing.assert_close(moe(TOKENS), expected)


@torch.no_grad()
def test_a_token_is_routed_alike_in_any_batch_and_in_training() -> None:
    moe = layer()
    alone = torch.cat([moe(token[None]) for token in TOKENS])
    torch.testing.assert_close(moe(TOKENS), alone)
    torch.testing.assert_close(moe.train()(TOKENS), alone)


def test_without_shared_experts_only_the_routed_ones_count() -> None:
    moe = layer(dataclasses.replace(MOE, num_shared_experts=0))
    for expert in moe.experts:
        expert.down_proj.weight.data.zero_()
    assert not moe(TOKENS).any()


def test_every_parameter_gets_a_gradient_even_of_experts_without_tokens() -> None:
    for balance in Balance:
        moe = layer(dataclasses.replace(MOE, balance=balance)).train()
        moe.gate.e_score_correction_bias.data[0] = -100  # never chosen
        (moe(TOKENS).sum() + take_balance_loss(moe)).backward()
        assert all(parameter.grad is not None for parameter in moe.parameters())
        assert not moe.experts[0].up_proj.weight.grad.any()


def loads(moe: MoeMLP) -> torch.Tensor:
    return expert_loads(moe.gate(TOKENS)[1], 6)


@pytest.mark.parametrize("balance", list(Balance))
def test_balancing_evens_the_loads_out(balance: Balance) -> None:
    moe = layer(dataclasses.replace(MOE, balance=balance, balance_weight=1.0)).train()
    moe.gate.e_score_correction_bias.data.zero_()
    moe.gate.weight.data[0] += 0.5 * F.normalize(TOKENS.mean(dim=0), dim=0) * 4
    before = float(loads(moe).max())
    optimizer = torch.optim.AdamW([*moe.gate.parameters()], lr=0.02, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        moe(TOKENS)
        loss = take_balance_loss(moe)
        assert loss is not None
        loss.backward()
        optimizer.step()
    assert before > 0.27 > 0.24 > float(loads(moe).max())  # a sixth would be even


def test_the_bias_changes_the_choice_and_not_the_gates() -> None:
    moe = layer()
    moe.gate.e_score_correction_bias.data.zero_()
    affinities, _, _ = moe.gate(TOKENS)
    moe.gate.e_score_correction_bias.data[:2] = 100
    _, chosen, gates = moe.gate(TOKENS)
    assert set(chosen.flatten().tolist()) == {0, 1}
    expected = affinities.gather(-1, chosen)
    torch.testing.assert_close(gates, 1.5 * expected / expected.sum(dim=-1, keepdim=True))


def test_a_balance_loss_is_taken_once_and_only_in_training() -> None:
    moe = layer()
    moe(TOKENS)
    assert take_balance_loss(moe) is None
    moe.train()(TOKENS)
    assert take_balance_loss(moe) is not None
    assert take_balance_loss(moe) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_drafter_with_experts_is_saved_and_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    drafter = tiny_drafter(tiny_config(moe=MOE)).to(dtype)
    save_drafter(tmp_path, drafter)
    assert read_drafter_config(tmp_path) == drafter.config
    loaded = load_drafter(tmp_path, drafter.embed_tokens, drafter.lm_head, TARGET, dtype)
    for name, value in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    assert "layers.0.mlp.experts.5.up_proj.weight" in drafter.state_dict()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 7}, "experts_per_token must be at most num_experts=6, got 7"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ({"n_routed_experts": 0}, "n_routed_experts=0 must be a positive integer"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be an integer >= 0"),
        ({"scoring_func": "softmax"}, "scoring_func='softmax' is not supported; supported: 'sigmoid'"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False is not supported"),
        ({"moe_balance": "luck"}, r"moe_balance='luck' must be one of \['bias', 'auxiliary_loss'\]"),
    ],
)
def test_fields_of_no_use_are_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    save_drafter(tmp_path, tiny_drafter(tiny_config(moe=MOE)))
    values = json.loads((tmp_path / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        read_drafter_config(tmp_path)


@pytest.mark.parametrize("field", ["num_experts", "expert_size", "balance_weight", "routed_scale"])
def test_geometry_of_no_use_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be"):
        dataclasses.replace(MOE, **{field: 0})
