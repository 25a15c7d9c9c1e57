"""Runs the layers of a DSpark drafter as one native call per pass, and one per append to its contexts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dspark_core.kernels.library import MAX_HEAD_DIM, Format, Kernels, native_kernels
from dspark_core.kernels.matrix import NativeMatrix, supports
from dspark_core.kernels.memory import Arena
from dspark_core.models.config import DecoderConfig
from dspark_core.models.layers import MLP, AttentionProjections, RMSNorm, RotaryEmbedding
from dspark_core.models.native_stack import FAMILIES, NativeStack, StackLayer, StackWeights
from dspark_core.models.packing import multiplies_bytes


def native_draft_layers(
    config: DecoderConfig,
    layers: nn.ModuleList,
    embedding: Tensor,
    final_norm: nn.Module,
    rotary: nn.Module,
    *,
    byte_products: bool = False,
) -> NativeStack | None:
    """Packs plain layers without modifying them; None if the kernels do not support them.

    Support is decided entirely here: family, CPU, dtype, and the exact module types of a layer, so
    any addition to a layer goes through PyTorch until the kernels support it.
    `byte_products` as in `PackingPlan`.
    """
    kernels = native_kernels()
    if kernels is None or not _computable(config, embedding):
        return None
    if type(final_norm) is not RMSNorm or type(rotary) is not RotaryEmbedding:
        return None
    arena = Arena()
    packed = [_layer(kernels, layer, embedding.dtype, arena, byte_products) for layer in layers]
    held = [layer for layer in packed if layer is not None]
    if len(held) != len(packed):
        return None
    return NativeStack(
        kernels,
        StackWeights(
            config=config,
            layers=held,
            embedding=embedding,
            final_norm=final_norm.weight,
            rotary=rotary,
            head=None,
        ),
    )


def _computable(config: DecoderConfig, embedding: Tensor) -> bool:
    if config.family not in FAMILIES or config.head_dim > MAX_HEAD_DIM or embedding.device.type != "cpu":
        return False
    inputs = (config.hidden_size, config.num_heads * config.head_dim, config.intermediate_size)
    return all(supports(_format(embedding.dtype), size, embedding.dtype) for size in inputs)


def _format(dtype: torch.dtype) -> Format:
    return Format.FLOAT32 if dtype is torch.float32 else Format.BFLOAT16


def _layer(
    kernels: Kernels, layer: nn.Module, dtype: torch.dtype, arena: Arena, byte_products: bool
) -> StackLayer | None:
    before, after = layer.input_layernorm, layer.post_attention_layernorm
    attention, mlp = layer.self_attn, layer.mlp
    if type(attention) is not AttentionProjections or type(mlp) is not MLP:
        return None
    if type(before) is not RMSNorm or type(after) is not RMSNorm:
        return None
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    linears = (*parts, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    plain = [linear for linear in linears if type(linear) is nn.Linear and linear.weight.dtype is dtype]
    if len(plain) != len(linears):
        return None
    query, key, value, output, gate, up, down = plain

    def matrix(*joined: nn.Linear, paired: bool = False) -> NativeMatrix:
        weight = torch.cat([linear.weight.detach() for linear in joined])
        biases = [linear.bias.detach() for linear in joined if linear.bias is not None]
        bias = torch.cat(biases) if biases else None
        kind = _format(dtype)
        if byte_products and multiplies_bytes(kernels, weight.shape[1], dtype):
            kind = Format.I8
        return NativeMatrix(kernels, weight, kind, bias=bias, paired=paired, arena=arena)

    return StackLayer(
        input_norm=before.weight,
        attention_norm=after.weight,
        qk_norm=_qk_norm(attention),
        qkv=matrix(query, key, value),
        output=matrix(output),
        gate_up=matrix(gate, up, paired=True),
        down=matrix(down),
    )


def _qk_norm(attention: AttentionProjections) -> Tensor | None:
    """[heads + kv_heads, head_dim]"""
    queries, keys = attention.q_norm, attention.k_norm
    if not isinstance(queries, RMSNorm) or not isinstance(keys, RMSNorm):
        return None
    heads = queries.weight.expand(attention.num_heads, -1), keys.weight.expand(attention.num_kv_heads, -1)
    return torch.cat(heads)
