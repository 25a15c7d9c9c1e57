"""Building blocks shared by target decoders and drafters.

Attention itself is not here: a layer passes rotated q, k, v to an `Attend` callable, which owns
the cache. The same modules therefore serve paged inference, simple tests and packed training.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_core.models.config import DecoderConfig
from dspark_core.models.gemma_config import AttentionKind
from dspark_core.models.rope_scaling import AnyRopeScaling, LinearScaling, RopeScaling, YarnScaling


class Attend(Protocol):
    """Attention over the context that the caller keeps for `layer`."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> like q."""
        ...


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class ShiftedRMSNorm(RMSNorm):
    """RMSNorm whose weight is stored minus one; adding it in advance would lose precision to rounding."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.float() + 1.0
        return F.rms_norm(x.float(), (x.shape[-1],), weight, self.eps).to(x.dtype)


class PlainNorm(nn.Module):
    """RMSNorm without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), None, self.eps)


def build_norm(config: DecoderConfig, size: int | None = None) -> RMSNorm:
    """The decoder's kind of norm over `size` elements; None: the hidden size."""
    shifted = config.gemma is not None and config.gemma.shifted_norms
    kind = ShiftedRMSNorm if shifted else RMSNorm
    return kind(config.hidden_size if size is None else size, config.rms_norm_eps)


def embed(token_ids: Tensor, weight: Tensor, scale: float) -> Tensor:
    """token_ids [...] -> [..., d] rows of weight [vocab, d], times `scale` rounded to their dtype."""
    rows = F.embedding(token_ids, weight)
    return rows if scale == 1.0 else rows * rows.new_full((), scale)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """`cap tanh(logits / cap)`; None: returns the logits unchanged."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


def activate(config: DecoderConfig, gate: Tensor) -> Tensor:
    """The MLP's activation function."""
    return F.silu(gate) if config.gemma is None else F.gelu(gate, approximate="tanh")


class RotaryEmbedding(nn.Module):
    """cos and sin tables by absolute position, float32, rotate-half layout."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        scaling = config.rope_scaling
        with torch.device("cpu"):
            frequencies = rope_frequencies(config.head_dim, config.rope_theta, scaling)
            angles = torch.outer(torch.arange(config.max_context_tokens, dtype=torch.float32), frequencies)
        angles = torch.cat((angles, angles), dim=-1)  # [positions, head_dim]
        length = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
        self.register_buffer("cos", angles.cos() * length, persistent=False)
        self.register_buffer("sin", angles.sin() * length, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [tokens] -> cos, sin [tokens, 1, head_dim]."""
        return self.cos[positions].to(dtype).unsqueeze(-2), self.sin[positions].to(dtype).unsqueeze(-2)


def rope_frequencies(head_dim: int, theta: float, scaling: AnyRopeScaling | None) -> Tensor:
    """Inverse frequencies [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    powers = theta**exponents
    match scaling:
        case RopeScaling():
            return _llama3_frequencies(1.0 / powers, scaling)
        case LinearScaling():
            return 1.0 / powers / scaling.factor
        case YarnScaling():
            return _yarn_frequencies(powers, scaling, scaling.mixed_range(head_dim, theta))
        case None:
            return 1.0 / powers


def _llama3_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Stretches the long wavelengths."""
    wavelengths = 2 * math.pi / frequencies
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_positions / wavelengths - scaling.low_freq_factor) / span
    smooth = smooth.clamp(0.0, 1.0)
    return frequencies * (smooth + (1.0 - smooth) / scaling.factor)


def _yarn_frequencies(powers: Tensor, scaling: YarnScaling, mixed: tuple[float, float]) -> Tensor:
    """Follows the order of operations in `transformers`: large positions amplify rounding differences."""
    low, high = mixed
    span = high - low or 0.001
    kept = 1.0 - ((torch.arange(len(powers), dtype=torch.float32) - low) / span).clamp(0.0, 1.0)
    return 1.0 / (scaling.factor * powers) * (1.0 - kept) + 1.0 / powers * kept


class ComputedRotary(nn.Module):
    """cos and sin computed on demand: tables for a long context and large heads, one per kind of
    layer, would take as much memory as a small model."""

    frequencies: Tensor

    def __init__(self, kind: AttentionKind) -> None:
        super().__init__()
        with torch.device("cpu"):
            frequencies = rope_frequencies(kind.head_dim, kind.rope_theta, None) / kind.rope_factor
        frequencies[int(kind.rotated_fraction * kind.head_dim // 2) :] = 0.0
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [tokens] -> cos, sin [tokens, 1, head_dim]."""
        angles = torch.outer(positions.float(), self.frequencies)
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


Rotary = RotaryEmbedding | ComputedRotary


def build_rotary(config: DecoderConfig, extra_positions: int = 0) -> Rotary:
    """RoPE of a decoder with uniform layers, for its context plus `extra_positions`."""
    if config.gemma is not None:
        return ComputedRotary(config.gemma.full)
    positions = config.max_context_tokens + extra_positions
    return RotaryEmbedding(dataclasses.replace(config, max_context_tokens=positions))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim]; cos, sin [tokens, 1, head_dim]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class MLP(nn.Module):
    """SwiGLU, or GELU gating for Gemma."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self._config = config
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(activate(self._config, self.gate_proj(x)) * self.up_proj(x))
        return out


class AttentionProjections(nn.Module):
    """q, k, v and output projections with optional per-head norms; RoPE is applied here."""

    def __init__(self, config: DecoderConfig, input_size: int | None = None) -> None:
        """`input_size`: input elements per token of q, k and v; None: the hidden size."""
        super().__init__()
        input_size = config.hidden_size if input_size is None else input_size
        self.num_heads, self.num_kv_heads, self.head_dim = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        bias = config.attention_bias
        self.q_proj = nn.Linear(input_size, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(input_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.v_proj: nn.Linear | None = None
        if config.gemma is None or not config.gemma.full.values_are_keys:
            self.v_proj = nn.Linear(input_size, self.num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)
        self.q_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = build_norm(config, self.head_dim) if config.qk_norm else nn.Identity()
        with_value_norm = config.gemma is not None and config.gemma.value_norm
        self.v_norm = PlainNorm(config.rms_norm_eps) if with_value_norm else nn.Identity()
        self._query_scale = query_scale(config, self.head_dim)

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [tokens, input_size] -> rotated q [tokens, heads, head_dim]."""
        q = self.q_proj(x).view(*x.shape[:-1], self.num_heads, self.head_dim)
        q = apply_rope(self.q_norm(q), cos, sin)
        return q if self._query_scale == 1.0 else q * self._query_scale

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [tokens, input_size] -> rotated k and v, each [tokens, kv_heads, head_dim]."""
        k = self.k_proj(x).view(*x.shape[:-1], self.num_kv_heads, self.head_dim)
        v = k if self.v_proj is None else self.v_proj(x).view(k.shape)
        return apply_rope(self.k_norm(k), cos, sin), self.v_norm(v)


def query_scale(config: DecoderConfig, head_dim: int) -> float:
    """Factor applied to q; `Attend` always divides scores by sqrt(head_dim)."""
    return 1.0 if config.gemma is None else config.gemma.attention_scale * head_dim**0.5
