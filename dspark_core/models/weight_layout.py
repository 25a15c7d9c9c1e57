"""Maps each parameter of a `Decoder` to its checkpoint tensors, by their Hugging Face names."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.models.config import DecoderConfig
from dspark_core.models.gemma_config import GemmaConfig


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One checkpoint tensor and the rows it fills."""

    name: str
    shape: tuple[int, ...]
    repeat_heads: int | None = None
    """If set, a per-head vector that is repeated for this many heads."""

    @property
    def rows(self) -> int:
        return self.shape[0] if self.repeat_heads is None else self.repeat_heads


Layout = dict[str, tuple[SourceTensor, ...]]
"""Parameter name -> its sources, from the top row down."""


def weight_layout(config: DecoderConfig) -> Layout:
    """Layout of the whole decoder. A tied output projection has no entry."""
    hidden = config.hidden_size
    embedding = (config.vocab_size, hidden)
    layout = {"embed_tokens.weight": _single("embed_tokens.weight", embedding)}
    if config.gemma is not None and config.gemma.per_layer_input_size:
        layout |= _per_layer_inputs(config, config.gemma)
    for index in range(config.num_layers):
        layout |= _layer_layout(config, index)
    layout["norm.weight"] = _single("norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        layout["lm_head.weight"] = _single("lm_head.weight", embedding)
    return layout


def unused_tensors(config: DecoderConfig) -> tuple[str, ...]:
    """Tensors that a checkpoint may contain but the decoder does not use."""
    # Exports of tied models may hold the same matrix twice.
    unused = ["lm_head.weight"] if config.tie_word_embeddings else []
    for layer in range(config.num_cached_layers, config.num_layers):
        names = ("k_proj", "v_proj", "k_norm")
        unused += [f"layers.{layer}.self_attn.{name}.weight" for name in names]
    return tuple(unused)


def _layer_layout(config: DecoderConfig, index: int) -> Layout:
    hidden, prefix = config.hidden_size, f"layers.{index}."
    norms = ["input_layernorm", "post_attention_layernorm"]
    inner = config.intermediate_size
    extra: Layout = {}
    if config.gemma is not None:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        extra = _gemma_layer_layout(config, config.gemma, prefix)
        inner = mlp_size(config, index)
    layout = {f"{prefix}{norm}.weight": _single(f"{prefix}{norm}.weight", (hidden,)) for norm in norms}
    mlp = prefix + "mlp."
    layout |= _attention_layout(config, index, prefix + "self_attn.") | extra
    layout[mlp + "gate_up_proj.weight"] = (
        SourceTensor(mlp + "gate_proj.weight", (inner, hidden)),
        SourceTensor(mlp + "up_proj.weight", (inner, hidden)),
    )
    layout[mlp + "down_proj.weight"] = _single(mlp + "down_proj.weight", (hidden, inner))
    return layout


def _attention_layout(config: DecoderConfig, index: int, prefix: str) -> Layout:
    hidden, kind = config.hidden_size, config.attention_kind(index)
    q_size, kv_size = config.num_heads * kind.head_dim, kind.num_kv_heads * kind.head_dim
    rows = [("q_proj", q_size)]
    norms = [SourceTensor(prefix + "q_norm.weight", (kind.head_dim,), config.num_heads)]
    if index < config.num_cached_layers:
        rows.append(("k_proj", kv_size))
        norms.append(SourceTensor(prefix + "k_norm.weight", (kind.head_dim,), kind.num_kv_heads))
        if not kind.values_are_keys:
            rows.append(("v_proj", kv_size))
    layout = {
        prefix + "qkv_proj.weight": tuple(
            SourceTensor(f"{prefix}{name}.weight", (size, hidden)) for name, size in rows
        ),
        prefix + "o_proj.weight": _single(prefix + "o_proj.weight", (hidden, q_size)),
    }
    if config.attention_bias:
        layout[prefix + "qkv_proj.bias"] = tuple(
            SourceTensor(f"{prefix}{name}.bias", (size,)) for name, size in rows
        )
        layout[prefix + "o_proj.bias"] = _single(prefix + "o_proj.bias", (hidden,))
    if config.qk_norm:
        layout[prefix + "qk_norm"] = tuple(norms)
    return layout


def mlp_size(config: DecoderConfig, layer: int) -> int:
    """Intermediate size of one layer."""
    gemma = config.gemma
    wide = gemma is not None and gemma.wide_shared_mlp and layer >= gemma.num_own_layers
    return config.intermediate_size * (2 if wide else 1)


def _gemma_layer_layout(config: DecoderConfig, gemma: GemmaConfig, prefix: str) -> Layout:
    shapes: dict[str, tuple[int, ...]] = {}
    if gemma.layer_scalar:
        shapes["layer_scalar"] = (1,)
    if gemma.per_layer_input_size:
        hidden, size = config.hidden_size, gemma.per_layer_input_size
        shapes["per_layer_input_gate.weight"] = (size, hidden)
        shapes["per_layer_projection.weight"] = (hidden, size)
        shapes["post_per_layer_input_norm.weight"] = (hidden,)
    return {prefix + name: _single(prefix + name, shape) for name, shape in shapes.items()}


def _per_layer_inputs(config: DecoderConfig, gemma: GemmaConfig) -> Layout:
    size, all_layers = gemma.per_layer_input_size, config.num_layers * gemma.per_layer_input_size
    shapes = {
        "embed_tokens_per_layer.weight": (gemma.per_layer_vocab_size, all_layers),
        "per_layer_model_projection.weight": (all_layers, config.hidden_size),
        "per_layer_projection_norm.weight": (size,),
    }
    return {f"per_layer_inputs.{name}": _single(name, shape) for name, shape in shapes.items()}


def _single(name: str, shape: tuple[int, ...]) -> tuple[SourceTensor, ...]:
    return (SourceTensor(name, shape),)
