"""Runs a packed decoder as one native call per step, without Python or a gathered cache in between."""

from __future__ import annotations

from dspark_core.kernels.library import MAX_HEAD_DIM, native_kernels
from dspark_core.models.decoder import Decoder, DecoderLayer
from dspark_core.models.native_stack import FAMILIES, NativeStack, StackLayer, StackWeights
from dspark_core.models.packing import PackedLinear


def native_decoder(decoder: Decoder) -> NativeStack | None:
    """Shares the packed weights of a `Decoder`, which must not change during its lifetime.

    None if there are no kernels, they do not support the model, or it has matrices they do not hold.
    """
    kernels = native_kernels()
    config = decoder.config
    if kernels is None or config.family not in FAMILIES or config.head_dim > MAX_HEAD_DIM:
        return None
    layers = [_layer(layer) for layer in decoder.layers if type(layer) is DecoderLayer]
    held = [layer for layer in layers if layer is not None]
    head = decoder.packed_head
    if len(held) != config.num_layers or head is None or head.native is None:
        return None
    weights = StackWeights(
        config=config,
        layers=held,
        embedding=decoder.embed_tokens.weight,
        final_norm=decoder.norm.weight,
        rotary=decoder.rotary,
        head=head.native,
    )
    return NativeStack(kernels, weights)


def _layer(layer: DecoderLayer) -> StackLayer | None:
    attention, mlp = layer.self_attn, layer.mlp
    linears: list[object] = [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]
    matrices = [linear.native for linear in linears if isinstance(linear, PackedLinear)]
    held = [matrix for matrix in matrices if matrix is not None]
    if len(held) != len(linears):
        return None
    return StackLayer(
        layer.input_layernorm.weight, layer.post_attention_layernorm.weight, attention.qk_norm, *held
    )
