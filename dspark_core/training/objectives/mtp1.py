"""MTP-1's objective (DeepSeek-V3, arXiv 2412.19437, section 2.2): cross-entropy of the token after next.

Trains on every answer position unless `anchors_per_sequence` limits them. `distance_weight` adds the L1
distance to the target's distribution, which determines acceptance.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from dspark_core.models.config import MtpConfig, draft_backbone
from dspark_core.models.loading import LoadedTarget
from dspark_core.models.mtp import MtpDrafter
from dspark_core.models.mtp_checkpoint import save_mtp
from dspark_core.training.chain_attention import ChainAttention
from dspark_core.training.features import FeatureSequence
from dspark_core.training.initial import target_layer_state
from dspark_core.training.objectives.chains import ChainObjective, PairedBatch, final_states
from dspark_core.training.objectives.eagle3 import only_source_layer
from dspark_core.training.recipe import DrafterRecipe, LossConfig

ALL_POSITIONS = 2**31 - 1
"""`anchors_per_sequence` that trains on every answer position."""


def build_mtp1(
    recipe: DrafterRecipe, losses: LossConfig, target: LoadedTarget, draft_vocab_ids: Tensor | None
) -> MtpObjective:
    """Ignores `block_size` (one draft token) and `target_layer_ids` (the input is the final hidden state).

    Raises ConfigError for more than one layer, experts or a context window.
    """
    config = MtpConfig(
        backbone=draft_backbone(target.config, 1),
        num_target_layers=target.config.num_layers,
        draft_vocab_size=None if draft_vocab_ids is None else len(draft_vocab_ids),
    )
    return MtpObjective(new_mtp(config, target, draft_vocab_ids, only_source_layer(recipe)), losses)


class MtpObjective(ChainObjective):
    matrix_prefixes = ("layer.", "eh_proj.")
    soft_labels = False

    def __init__(self, drafter: MtpDrafter, config: LossConfig) -> None:
        super().__init__(drafter, config)
        self.module = drafter

    def save(self, directory: Path) -> None:
        save_mtp(directory, self.module)

    def inputs(self, sequence: FeatureSequence) -> FeatureSequence:
        return final_states(sequence)

    def chains(self, batch: PairedBatch, taps: Tensor) -> Tensor:
        drafter, packed = self.module, batch.packed
        layer, features = drafter.layer, drafter.projection(taps)
        combined = drafter.combine(features, batch.next_ids)
        cos, sin = drafter.rotary(packed.positions, combined.dtype)
        keys, values = layer.self_attn.keys_values(layer.input_layernorm(combined), cos, sin)
        at = batch.first_rows
        hidden = layer(0, combined[at], cos[at], sin[at], ChainAttention(packed, keys, values))
        normed: Tensor = drafter.norm(hidden)
        return normed[:, None]


@torch.no_grad()
def new_mtp(
    config: MtpConfig, target: LoadedTarget, draft_vocab_ids: Tensor | None, source_layer: int | None
) -> MtpDrafter:
    """A float32 drafter over the target's frozen embedding and LM head.

    Its layer starts as the source layer, if there is one, with nearly the plain hidden state as input.
    """
    decoder = target.decoder
    embed, head = decoder.embed_tokens.weight.detach().float(), decoder.lm_head.weight.detach().float()
    if draft_vocab_ids is not None:
        head = head[draft_vocab_ids]
    drafter = MtpDrafter(config, embed, head, draft_vocab_ids)
    for parameter in drafter.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    if source_layer is not None:
        drafter.layer.load_state_dict(target_layer_state(decoder, source_layer))
    size = config.backbone.hidden_size
    drafter.eh_proj.weight[:, size:] += torch.eye(size)
    drafter.norm.load_state_dict(decoder.norm.state_dict())
    return drafter
