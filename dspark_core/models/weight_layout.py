"""Which checkpoint tensors, by their Hugging Face names, make up each parameter of a `Decoder`."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.models.config import DecoderConfig


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """One tensor of the checkpoint and the rows it fills."""

    name: str
    shape: tuple[int, ...]
    repeat_heads: int | None = None
    """A per-head vector that is written once for each of this many heads."""

    @property
    def rows(self) -> int:
        return self.shape[0] if self.repeat_heads is None else self.repeat_heads


def weight_layout(config: DecoderConfig) -> dict[str, tuple[SourceTensor, ...]]:
    """Parameter name -> its sources, top rows first. A tied output projection has none."""
    hidden = config.hidden_size
    embedding = (config.vocab_size, hidden)
    layout = {"embed_tokens.weight": _single("embed_tokens.weight", embedding)}
    for index in range(config.num_layers):
        layout |= _layer_layout(config, f"layers.{index}.")
    layout["norm.weight"] = _single("norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        layout["lm_head.weight"] = _single("lm_head.weight", embedding)
    return layout


def _layer_layout(config: DecoderConfig, prefix: str) -> dict[str, tuple[SourceTensor, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    layout = {
        f"{prefix}{norm}.weight": _single(f"{prefix}{norm}.weight", (hidden,))
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    qkv = (("q_proj", q_size), ("k_proj", kv_size), ("v_proj", kv_size))
    layout[attention + "qkv_proj.weight"] = tuple(
        SourceTensor(f"{attention}{name}.weight", (rows, hidden)) for name, rows in qkv
    )
    layout[attention + "o_proj.weight"] = _single(attention + "o_proj.weight", (hidden, q_size))
    if config.attention_bias:
        layout[attention + "qkv_proj.bias"] = tuple(
            SourceTensor(f"{attention}{name}.bias", (rows,)) for name, rows in qkv
        )
        layout[attention + "o_proj.bias"] = _single(attention + "o_proj.bias", (hidden,))
    if config.qk_norm:
        layout[attention + "qk_norm"] = (
            SourceTensor(attention + "q_norm.weight", (config.head_dim,), config.num_heads),
            SourceTensor(attention + "k_norm.weight", (config.head_dim,), config.num_kv_heads),
        )
    layout[mlp + "gate_up_proj.weight"] = (
        SourceTensor(mlp + "gate_proj.weight", (inner, hidden)),
        SourceTensor(mlp + "up_proj.weight", (inner, hidden)),
    )
    layout[mlp + "down_proj.weight"] = _single(mlp + "down_proj.weight", (hidden, inner))
    return layout


def _single(name: str, shape: tuple[int, ...]) -> tuple[SourceTensor, ...]:
    return (SourceTensor(name, shape),)
