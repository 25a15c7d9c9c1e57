"""Eagle3's training-time test (arXiv 2503.01840): the drafter is unrolled on its own hidden states.

Step 1 reads the target's feature before the anchor, every later step the previous step's hidden state, as
in inference; the tokens are teacher-forced. Each step is trained against the target's distribution, with
weights that decay by `exp(-1/loss_decay)` per step, 0.8 by default.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dspark_core.errors import ConfigError
from dspark_core.models.config import Eagle3Config, draft_backbone
from dspark_core.models.eagle3 import Eagle3Drafter
from dspark_core.models.eagle3_checkpoint import save_eagle3
from dspark_core.models.layers import build_norm
from dspark_core.models.loading import LoadedTarget
from dspark_core.training.chain_attention import ChainAttention
from dspark_core.training.features import FeatureSequence
from dspark_core.training.initial import start_projection_at_last_tap, target_layer_state
from dspark_core.training.objectives.chains import ChainObjective, PairedBatch
from dspark_core.training.recipe import DrafterRecipe, LossConfig

STEP_DECAY_LOSS = 4.4814
"""`loss_decay` that weights each step 0.8 times the one before, as DeepSpec does."""


def build_eagle3(
    recipe: DrafterRecipe, losses: LossConfig, target: LoadedTarget, draft_vocab_ids: Tensor | None
) -> Eagle3Objective:
    """Raises ConfigError for more than one layer, experts or a context window."""
    config = Eagle3Config(
        backbone=draft_backbone(target.config, 1),
        num_target_layers=target.config.num_layers,
        target_layer_ids=recipe.target_layer_ids,
        block_size=recipe.block_size,
        draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
    )
    source = only_source_layer(recipe)
    return Eagle3Objective(new_eagle3(config, target, draft_vocab_ids, source), losses)


class Eagle3Objective(ChainObjective):
    soft_labels = True

    def __init__(self, drafter: Eagle3Drafter, config: LossConfig) -> None:
        super().__init__(drafter, config)
        self.module = drafter

    def save(self, directory: Path) -> None:
        save_eagle3(directory, self.module)

    def inputs(self, sequence: FeatureSequence) -> FeatureSequence:
        size, config = sequence.taps.shape[1], self.module.config
        if size != config.tap_size:
            raise ConfigError(
                f"target_layer_ids {list(config.target_layer_ids)} needs {config.tap_size} tapped values "
                f"per token, the features hold {size}"
            )
        return sequence

    def chains(self, batch: PairedBatch, taps: Tensor) -> Tensor:
        drafter, packed = self.module, batch.packed
        features = drafter.projection(taps)
        context = drafter.context_keys_values(features, batch.next_ids, packed.positions)
        attend = ChainAttention(packed, *context)
        embedded = drafter.embedded(packed.previous_ids)  # [anchors, steps, d]
        hidden, steps = features[batch.first_rows], []
        for step in range(self.block_size):
            cos, sin = drafter.rotary(packed.anchor_positions - 1 + step, hidden.dtype)
            hidden = drafter.layer(embedded[:, step], hidden, cos, sin, attend)
            steps.append(drafter.norm(hidden))
        return torch.stack(steps, dim=1)


@torch.no_grad()
def new_eagle3(
    config: Eagle3Config, target: LoadedTarget, draft_vocab_ids: Tensor | None, source_layer: int | None
) -> Eagle3Drafter:
    """A float32 drafter over the target's frozen embedding and LM head.

    With a source layer, q, k and v start as that layer's on the hidden half of their input.
    """
    decoder = target.decoder
    embed, head = decoder.embed_tokens.weight.detach().float(), decoder.lm_head.weight.detach().float()
    if draft_vocab_ids is not None:
        head = head[draft_vocab_ids]
    drafter = Eagle3Drafter(config, embed, head, draft_vocab_ids)
    for parameter in drafter.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    if source_layer is not None:
        _start_layer(drafter, target_layer_state(decoder, source_layer))
    drafter.norm.load_state_dict(decoder.norm.state_dict())
    start_projection_at_last_tap(drafter.projection.fc)
    return drafter


def only_source_layer(recipe: DrafterRecipe) -> int | None:
    """Raises ConfigError when the recipe asks for something these drafters do not have."""
    if recipe.moe is not None:
        raise ConfigError(f"moe does not apply to {recipe.algorithm}, whose one layer is dense")
    if recipe.context_window is not None:
        raise ConfigError(f"window does not apply to {recipe.algorithm}, which reads the whole context")
    if len(recipe.source_layers) > 1:
        raise ConfigError(
            f"source_layers of {recipe.algorithm} must name one layer, got {list(recipe.source_layers)}"
        )
    if recipe.num_layers not in (None, 1):
        raise ConfigError(f"layers of {recipe.algorithm} must be 1 or left out, got {recipe.num_layers}")
    return recipe.source_layers[0] if recipe.source_layers else None


def _start_layer(drafter: Eagle3Drafter, state: dict[str, Tensor]) -> None:
    own = dict(drafter.layer.named_parameters()) | dict(drafter.layer.named_buffers())
    size = drafter.config.backbone.hidden_size
    for name, value in state.items():
        if own[name].shape == value.shape:
            own[name].copy_(value)
        else:  # q, k, v: [embedding | hidden]
            own[name][:, size:] = value
    drafter.layer.hidden_norm.weight.copy_(state["input_layernorm.weight"])
    drafter.layer.input_layernorm.weight.copy_(build_norm(drafter.config.backbone).weight)
