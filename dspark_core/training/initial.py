"""Initial state of a drafter: its draft vocabulary, and weights copied from the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dspark_core.errors import ConfigError
from dspark_core.models.config import DrafterConfig
from dspark_core.models.decoder import Decoder
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.gemma_config import LayerType
from dspark_core.models.heads import MarkovHead
from dspark_core.models.weight_layout import SourceTensor, weight_layout

_ZIPF_OFFSET = 500.0
_PRIOR_WEIGHT = 0.3


def choose_draft_vocab(counts: Tensor, size: int, always: Sequence[int] = ()) -> Tensor:
    """The `size` most frequent token ids, `always` among them, ascending [size].

    counts [vocab]: occurrences of each token in the training data. In a small data set most tokens
    occur rarely or never. BPE numbers tokens in the order of their merges, so Zipf's law over ids
    serves as a prior. Raises ConfigError naming the value that is out of range.
    """
    vocab_size = len(counts)
    if not len(set(always)) <= size <= vocab_size:
        raise ConfigError(
            f"draft_vocab_size must be in [{len(set(always))} always kept tokens, {vocab_size}], got {size}"
        )
    for token in always:
        if not 0 <= token < vocab_size:
            raise ConfigError(f"always_tokens must be in [0, {vocab_size}), got {token}")
    prior = 1 / (torch.arange(vocab_size) + _ZIPF_OFFSET)
    score = counts / counts.sum().clamp_min(1) + _PRIOR_WEIGHT * prior / prior.sum()
    score[list(always)] = torch.inf
    order = torch.sort(score, descending=True, stable=True).indices
    return order[:size].sort().values


@torch.no_grad()
def new_drafter(
    config: DrafterConfig,
    decoder: Decoder,
    draft_vocab_ids: Tensor | None,
    source_layers: Sequence[int] = (),
) -> DSparkDrafter:
    """A float32 drafter over the target's frozen embedding and LM head.

    `source_layers` names the target layer each draft layer is copied from; empty: random layers.
    The Markov bias starts at zero: `markov_w2` is zero, while the rows of `markov_w1` are projected
    token embeddings and so already distinguish the previous tokens.
    """
    embed = decoder.embed_tokens.weight.detach().float()
    head = decoder.lm_head.weight.detach().float()
    if draft_vocab_ids is not None:
        head = head[draft_vocab_ids]
    drafter = DSparkDrafter(config, embed, head, draft_vocab_ids)
    for parameter in drafter.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    for layer, source in zip(drafter.layers, source_layers, strict=bool(source_layers)):
        state = target_layer_state(decoder, source)
        if config.moe is not None:  # experts have no counterpart in the target: they stay random
            state = {name: value for name, value in state.items() if not name.startswith("mlp.")}
        layer.load_state_dict(state, strict=config.moe is None)
    drafter.norm.load_state_dict(decoder.norm.state_dict())
    start_projection_at_last_tap(drafter.projection.fc)
    if drafter.markov_head is not None:
        _start_markov_head(drafter.markov_head, embed)
    if drafter.confidence_head is not None:
        nn.init.zeros_(drafter.confidence_head.proj.weight)
        nn.init.zeros_(drafter.confidence_head.proj.bias)
    return drafter


def target_layer_state(decoder: Decoder, index: int) -> dict[str, Tensor]:
    """State of one target layer under the names of a draft layer.

    Raises ConfigError for a layer without readable weights, or (Gemma) without full attention.
    """
    gemma = decoder.config.gemma
    if gemma is not None and index < len(gemma.layer_types):
        full = [i for i in range(gemma.num_own_layers) if gemma.layer_types[i] is LayerType.FULL]
        if index not in full:
            raise ConfigError(
                f"source_layers must be full-attention layers of the target, {full}, got {index}"
            )
    state = {name: value.float() for name, value in decoder.state_dict().items()}
    prefix = f"layers.{index}."
    if not any(name.startswith(prefix) for name in state):
        raise ConfigError(f"target layer {index} has no readable weights: absent, or packed for inference")
    found: dict[str, Tensor] = {}
    for name, parts in weight_layout(decoder.config).items():
        if name.startswith(prefix):
            found |= dict(_split(state[name], parts, prefix))
    # Draft layers have no per-layer inputs.
    return {name: value for name, value in found.items() if "per_layer_" not in name}


def _split(value: Tensor, parts: Sequence[SourceTensor], prefix: str) -> list[tuple[str, Tensor]]:
    pieces = torch.split(value, [part.rows for part in parts])
    return [
        (part.name.removeprefix(prefix), piece[0] if part.repeat_heads else piece)
        for part, piece in zip(parts, pieces, strict=True)
    ]


def start_projection_at_last_tap(fc: nn.Linear) -> None:
    """Features start close to the deepest tapped state, which is nearest to the prediction."""
    weight = fc.weight
    size = weight.shape[0]
    weight.mul_(0.1)
    weight[:, -size:] += torch.eye(size)


def _start_markov_head(head: MarkovHead, embed: Tensor) -> None:
    if head.rank > min(embed.shape):
        raise ConfigError(
            f"markov_rank must be at most {min(embed.shape)}, of the target's embedding, got {head.rank}"
        )
    _, _, directions = torch.pca_lowrank(embed, q=head.rank)
    rows = embed @ directions
    head.markov_w1.weight.copy_(rows / rows.std())
    nn.init.zeros_(head.markov_w2.weight)
