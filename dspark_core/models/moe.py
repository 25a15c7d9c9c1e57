"""Mixture-of-experts feed-forward layers for draft backbones, as in DeepSeek-V3 (arXiv 2412.19437, 2.1.2).

Affinities are sigmoids; a token's gates are those of its chosen experts, normalised to sum to one. The
choice, but not the gates, includes a bias per expert, which training adjusts to balance their loads.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_core.models.config import DecoderConfig
from dspark_core.models.layers import MLP
from dspark_core.models.moe_config import Balance, MoeConfig


class Router(nn.Module):
    """Routes in float32, so that the choice does not depend on how a dtype rounds close affinities."""

    def __init__(self, config: MoeConfig, hidden_size: int) -> None:
        super().__init__()
        self._chosen = config.experts_per_token
        self._scale = config.routed_scale
        self.weight = nn.Parameter(torch.zeros(config.num_experts, hidden_size))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [tokens, d] -> affinities [tokens, experts], chosen experts and their gates [tokens, k]."""
        affinities = torch.sigmoid(F.linear(x.float(), self.weight.float()))
        ranked = affinities.detach() + self.e_score_correction_bias.detach().float()
        chosen = ranked.topk(self._chosen, dim=-1).indices
        gates = affinities.gather(-1, chosen)
        gates = gates / gates.sum(dim=-1, keepdim=True).clamp_min(1e-20) * self._scale
        return affinities, chosen, gates


class MoeMLP(nn.Module):
    """Drop-in replacement for a dense `MLP`."""

    def __init__(self, backbone: DecoderConfig, config: MoeConfig) -> None:
        super().__init__()
        self.config = config
        expert = dataclasses.replace(backbone, intermediate_size=config.expert_size)
        self.gate = Router(config, backbone.hidden_size)
        self.experts = nn.ModuleList(MLP(expert) for _ in range(config.num_experts))
        self.shared_experts: MLP | None = None
        if config.num_shared_experts > 0:
            size = config.num_shared_experts * config.expert_size
            self.shared_experts = MLP(dataclasses.replace(backbone, intermediate_size=size))
        self._balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [tokens, d] -> the same shape."""
        affinities, chosen, gates = self.gate(x)
        if self.training:
            self._balance_loss = self._imbalance(affinities, chosen)
        out = torch.zeros_like(x) if self.shared_experts is None else self.shared_experts(x)
        gates = gates.to(x.dtype)
        for index, expert in enumerate(self.experts):
            tokens, slots = (chosen == index).nonzero(as_tuple=True)
            # In training, experts without tokens run too, so that their gradient is zero rather than None.
            if len(tokens) or self.training:
                out = out.index_add(0, tokens, expert(x[tokens]) * gates[tokens, slots, None])
        return out

    def take_balance_loss(self) -> Tensor | None:
        """Balance loss of the last training forward pass, a scalar; returned once."""
        loss, self._balance_loss = self._balance_loss, None
        return loss

    def _imbalance(self, affinities: Tensor, chosen: Tensor) -> Tensor:
        experts = self.config.num_experts
        load = expert_loads(chosen, experts)
        if self.config.balance is Balance.BIAS:
            # Linear in the bias: gradient descent lowers it where the load is above the mean.
            over = torch.sign(load - 1 / experts)
            return self.config.balance_weight * (self.gate.e_score_correction_bias.float() * over).sum()
        share = (affinities / affinities.sum(dim=-1, keepdim=True)).mean(dim=0)
        unmoved = 0.0 * self.gate.e_score_correction_bias.float().sum()  # gives the bias a zero gradient
        return self.config.balance_weight * experts * (load * share).sum() + unmoved


def take_balance_loss(module: nn.Module) -> Tensor | None:
    """Sum over all expert layers under `module` since last taken; None if there are none."""
    losses = [layer.take_balance_loss() for layer in module.modules() if isinstance(layer, MoeMLP)]
    found = [loss for loss in losses if loss is not None]
    return torch.stack(found).sum() if found else None


def expert_loads(chosen: Tensor, num_experts: int) -> Tensor:
    """chosen [tokens, k] -> share of the assignments that went to each expert [experts]."""
    return torch.bincount(chosen.flatten(), minlength=num_experts) / chosen.numel()
