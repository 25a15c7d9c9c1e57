"""Geometry of mixture-of-experts layers, under the field names of DeepSeek-V3's `config.json`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dspark_core.errors import ConfigError
from dspark_core.models.metadata import Metadata, naming_file


class Balance(Enum):
    """How training balances the experts' loads."""

    BIAS = "bias"
    """A per-expert bias, used only for routing, moves against the expert's load (arXiv 2408.15664)."""
    AUXILIARY_LOSS = "auxiliary_loss"
    """A loss on load times affinity (Switch Transformers, arXiv 2101.03961)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Every token passes through the shared experts and its `experts_per_token` highest-scoring ones."""

    num_experts: int
    """Number of routed experts."""
    experts_per_token: int
    expert_size: int
    """Intermediate size of one expert."""
    num_shared_experts: int = 1
    routed_scale: float = 1.0
    """Factor on the routed experts' sum, whose gates add up to one."""
    balance: Balance = Balance.BIAS
    balance_weight: float = 1e-3
    """Weight of the auxiliary loss, or of the bias's gradient, whose scale the optimiser normalises away."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "expert_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_shared_experts < 0:
            raise ConfigError(f"num_shared_experts must be >= 0, got {self.num_shared_experts}")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(
                f"experts_per_token must be at most num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        for name in ("routed_scale", "balance_weight"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")


def parse_moe(metadata: Metadata) -> MoeConfig | None:
    """None for dense layers. Raises CheckpointError."""
    if metadata.get("n_routed_experts") is None:
        return None
    for field, supported in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if metadata.get(field) not in (None, supported):
            raise metadata.error(field, f"is not supported; supported: {supported!r}")
    if not metadata.flag("norm_topk_prob", True):
        raise metadata.error("norm_topk_prob", "is not supported; supported: true")
    shared = metadata.get("n_shared_experts")
    if shared is not None and (type(shared) is not int or shared < 0):
        raise metadata.error("n_shared_experts", "must be an integer >= 0")
    with naming_file(metadata.origin):
        return MoeConfig(
            num_experts=metadata.integer("n_routed_experts"),
            experts_per_token=metadata.integer("num_experts_per_tok"),
            expert_size=metadata.integer("moe_intermediate_size"),
            num_shared_experts=0 if shared is None else shared,
            routed_scale=metadata.number("routed_scaling_factor", 1.0),
            balance=_balance(metadata),
            balance_weight=metadata.number("moe_balance_weight", 1e-3),
        )


def moe_fields(config: MoeConfig) -> dict[str, object]:
    """Inverse of `parse_moe`."""
    return {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "moe_intermediate_size": config.expert_size,
        "n_shared_experts": config.num_shared_experts,
        "routed_scaling_factor": config.routed_scale,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "moe_balance": config.balance.value,
        "moe_balance_weight": config.balance_weight,
    }


def _balance(metadata: Metadata) -> Balance:
    value = metadata.get("moe_balance")
    if value is None:
        return Balance.BIAS
    try:
        return Balance(value)
    except ValueError:
        kinds = [kind.value for kind in Balance]
        raise metadata.error("moe_balance", f"must be one of {kinds}") from None
