"""The target: a decoder over a flattened ragged batch. Llama and Qwen3 here; `gemma` extends it.

It deals with positions, not sequences: `Attend` decides which tokens see which context, and
owns the cache. Query, key and value weights form one matrix, as do gate and up, because a
step over a few tokens is bound by reading weights and by the number of kernel calls;
`weight_layout` maps checkpoint tensors to parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_core.errors import ConfigError
from dspark_core.models.config import DecoderConfig
from dspark_core.models.layers import (
    Attend,
    RMSNorm,
    RotaryEmbedding,
    activate,
    apply_rope,
    build_norm,
    embed,
    soft_cap,
)
from dspark_core.models.packing import PackedLinear, PackingPlan, can_pack, pack_linears


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    hidden: Tensor  # [tokens, hidden], after the final norm
    taps: Tensor  # [tokens, m * hidden], in the order of tap_layers


class Decoder(nn.Module):
    """Random weights until `load_target` fills them."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self._layer(index) for index in range(config.num_layers))
        self.norm = build_norm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._packed_head: PackedLinear | None = None
        self.build_rotary()
        self.tie_weights()

    def build_rotary(self, device: torch.device | str | None = None) -> None:
        """Computes the RoPE constants, which are in no checkpoint and must be float32."""
        self.rotary = RotaryEmbedding(self.config).to(device)

    def tie_weights(self) -> None:
        """Ties the output projection to the embedding if the configuration asks for it."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def pack(self, plan: PackingPlan | None = None) -> None:
        """Speeds up inference on a CPU; the layers' weights are no longer parameters afterwards.

        The embedding and `lm_head` stay parameters, as drafters and training share them.
        """
        plan = plan or PackingPlan()
        pack_linears(self.layers, plan, "layers.")
        if can_pack(self.lm_head.weight, plan):
            tied = self.config.tie_word_embeddings
            stored = plan.stored.get("embed_tokens.weight" if tied else "lm_head.weight")
            self._packed_head = PackedLinear(self.lm_head, plan=plan, stored=stored)

    @property
    def packed_head(self) -> PackedLinear | None:
        """The output projection, if packed."""
        return self._packed_head

    @property
    def packed_bytes(self) -> int:
        """Bytes of weights a step reads: every matrix in its stored form."""
        values = sum(p.numel() for p in self.layers.parameters() if p.dim() > 1)
        packed = [m for m in (*self.layers.modules(), self._packed_head) if isinstance(m, PackedLinear)]
        head = 0 if self._packed_head is not None else self.lm_head.weight.numel()
        return (values + head) * self.embed_tokens.weight.itemsize + sum(m.num_bytes for m in packed)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attend: Attend, tap_layers: Sequence[int] = ()
    ) -> DecoderOutput:
        """token_ids, positions [tokens] int64.

        Tap i is the output of layer i before the final norm, -1 is the embedding output, and
        num_layers is the final hidden state, after the norm.
        """
        check_tap_layers(tap_layers, self.config.num_layers)
        x = embed(token_ids, self.embed_tokens.weight, self.config.embedding_scale)
        tapped = {-1: x}
        for index, output in enumerate(self._layer_outputs(token_ids, positions, x, attend)):
            x = output
            if index in tap_layers:
                tapped[index] = x
        hidden = tapped[self.config.num_layers] = self.norm(x)
        if tap_layers:
            taps = torch.cat([tapped[index] for index in tap_layers], dim=-1)
        else:
            taps = x.new_empty(x.shape[0], 0)
        return DecoderOutput(hidden, taps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [rows, hidden] after the final norm -> [rows, vocab]."""
        head: nn.Module = self.lm_head
        if self._packed_head is not None and not hidden.requires_grad:
            head = self._packed_head
        return soft_cap(head(hidden), self.config.final_logit_softcap)

    def _layer(self, index: int) -> nn.Module:
        return DecoderLayer(self.config, index)

    def _layer_outputs(
        self, token_ids: Tensor, positions: Tensor, x: Tensor, attend: Attend
    ) -> Iterator[Tensor]:
        """x [tokens, hidden], the embeddings -> the output of each layer in turn."""
        cos, sin = self.rotary(positions, x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
            yield x


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = FusedAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FusedMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        # Out of place, because a tap may still hold x.
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class FusedAttention(nn.Module):
    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self._index = index
        self._head_dim = config.head_dim
        self._splits = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self._rotated_heads = config.num_heads + config.num_kv_heads
        self._eps = config.rms_norm_eps
        heads_size = config.num_heads * config.head_dim
        qkv_size = sum(self._splits) * config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, qkv_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(heads_size, config.hidden_size, bias=config.attention_bias)
        # One row per head, so that the norms of q and k run as one operation.
        norm_weight = torch.ones(self._rotated_heads, config.head_dim) if config.qk_norm else None
        self.qk_norm = None if norm_weight is None else nn.Parameter(norm_weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        tokens = x.shape[0]
        qkv = self.qkv_proj(x).view(tokens, -1, self._head_dim)
        qk = qkv[:, : self._rotated_heads]
        if self.qk_norm is not None:
            qk = F.rms_norm(qk, (self._head_dim,), None, self._eps) * self.qk_norm
        qk = apply_rope(qk, cos, sin)
        heads = self._splits[0]
        attended = attend(self._index, qk[:, :heads], qk[:, heads:], qkv[:, self._rotated_heads :])
        out: Tensor = self.o_proj(attended.reshape(tokens, -1))
        return out


class FusedMLP(nn.Module):
    """SwiGLU; Gemma's gate is a GELU."""

    def __init__(self, config: DecoderConfig, inner: int | None = None) -> None:
        """`inner`: the intermediate size; None: the configuration's."""
        super().__init__()
        self._config = config
        inner = config.intermediate_size if inner is None else inner
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(activate(self._config, gate) * up)
        return out


def check_tap_layers(tap_layers: Sequence[int], num_layers: int) -> None:
    """Raises ConfigError for a layer that the decoder does not have."""
    for layer in tap_layers:
        if not -1 <= layer <= num_layers:
            raise ConfigError(f"tap layer {layer} is not in [-1, {num_layers}] of the target")
