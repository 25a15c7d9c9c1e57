"""A packed decoder as one native call per step: no Python, and no gathered cache, in between."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_core.kernels.library import (
    MAX_HEAD_DIM,
    BatchStruct,
    DecoderShapeStruct,
    Kernels,
    LayerStruct,
    native_kernels,
)
from dspark_core.kernels.matrix import NativeMatrix
from dspark_core.kernels.memory import huge_zeros
from dspark_core.models.config import Family
from dspark_core.models.decoder import Decoder, DecoderLayer
from dspark_core.models.packing import PackedLinear

FAMILIES = (Family.LLAMA, Family.QWEN3)
"""What `decoder.h` computes; others go through PyTorch."""


@dataclass(frozen=True, slots=True)
class NativeCache:
    """Keys and values in the kernels' layout (`attention.h`)."""

    keys: Tensor  # [bytes] uint8
    values: Tensor
    num_pages: int
    page_tokens: int


@dataclass(frozen=True, slots=True)
class NativeBatch:
    """A flattened ragged batch. All tensors are contiguous and on the CPU."""

    token_ids: Tensor  # [tokens] int64
    runs: Tensor  # [runs, 4] int32: first row, tokens, first position, offset of its pages
    pages: Tensor  # int32, the runs' page tables one after the other
    logit_rows: Tensor  # [rows] int64


class NativeDecoder:
    """Shares the packed weights of a `Decoder`, which must outlive its last step unchanged.

    A token's results are the same bits whatever else is in the batch.
    """

    def __init__(self, decoder: Decoder, kernels: Kernels, matrices: list[NativeMatrix]) -> None:
        """Use `native_decoder`; `matrices` in order: four per layer, then the output projection."""
        config = decoder.config
        self.config = config
        self.dtype = decoder.embed_tokens.weight.dtype
        self._kernels = kernels
        self._kept: list[Tensor | NativeMatrix] = [*matrices]  # the structures below point into these
        layers = (LayerStruct * config.num_layers)()
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            norm = layer.self_attn.qk_norm
            layers[index].input_norm = self._pointer(layer.input_layernorm.weight)
            layers[index].attention_norm = self._pointer(layer.post_attention_layernorm.weight)
            layers[index].qk_norm = None if norm is None else self._pointer(norm)
            names = ("qkv", "output", "gate_up", "down")
            for name, matrix in zip(names, matrices[4 * index : 4 * index + 4], strict=True):
                setattr(layers[index], name, matrix.struct)
        shape = DecoderShapeStruct(
            layers=config.num_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            bfloat16=int(self.dtype is torch.bfloat16),
            eps=config.rms_norm_eps,
            cosines=self._pointer(decoder.rotary.cos),
            sines=self._pointer(decoder.rotary.sin),
            embedding=self._pointer(decoder.embed_tokens.weight, self.dtype),
            final_norm=self._pointer(decoder.norm.weight),
            head=matrices[-1].struct,
        )
        create = kernels.functions.dspark_decoder_create
        self._handle = ctypes.c_void_p(create(ctypes.byref(shape), layers))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._kernels.functions.dspark_decoder_destroy(self._handle)

    def new_cache(self, num_pages: int, page_tokens: int) -> NativeCache:
        size = cache_bytes(self, num_pages, page_tokens)
        return NativeCache(huge_zeros(size), huge_zeros(size), num_pages, page_tokens)

    def forward(
        self, batch: NativeBatch, cache: NativeCache, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Writes the batch's keys and values, and returns

        float32 logits [logit_rows, vocab] and taps [tokens, m * hidden], in the order of tap_layers.
        """
        tokens, rows = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        logits = torch.empty((rows, self.config.vocab_size))
        taps = torch.empty((tokens, len(tap_layers) * self.config.hidden_size), dtype=self.dtype)
        wanted = (ctypes.c_int32 * max(1, len(tap_layers)))(*tap_layers)
        struct = BatchStruct(
            token_ids=batch.token_ids.data_ptr(),
            runs=batch.runs.data_ptr(),
            pages=batch.pages.data_ptr(),
            logit_rows=batch.logit_rows.data_ptr(),
            taps=ctypes.addressof(wanted),
            keys=cache.keys.data_ptr(),
            values=cache.values.data_ptr(),
            tapped=taps.data_ptr(),
            logits=logits.data_ptr(),
            tokens=tokens,
            num_runs=batch.runs.shape[0],
            num_logit_rows=rows,
            num_taps=len(tap_layers),
            num_pages=cache.num_pages,
            page_tokens=cache.page_tokens,
            threads=torch.get_num_threads(),
        )
        self._kernels.functions.dspark_decoder_forward(self._handle, ctypes.byref(struct))
        return logits, taps

    def _pointer(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Of a copy in `dtype` that lives as long as this object."""
        kept = tensor.detach().to(dtype).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    @property
    def kernels(self) -> Kernels:
        return self._kernels


def cache_bytes(decoder: NativeDecoder, num_pages: int, page_tokens: int) -> int:
    """Of keys, or of values."""
    config = decoder.config
    size: int = decoder.kernels.functions.dspark_cache_bytes(
        config.num_layers,
        num_pages,
        page_tokens,
        config.num_kv_heads,
        config.head_dim,
        decoder.dtype.itemsize,
    )
    return size


def native_decoder(decoder: Decoder) -> NativeDecoder | None:
    """None where the kernels are missing, or do not compute this model or hold all its matrices."""
    kernels = native_kernels()
    config = decoder.config
    if kernels is None or config.family not in FAMILIES or config.head_dim > MAX_HEAD_DIM:
        return None
    linears: list[object] = []
    for layer in decoder.layers:
        if type(layer) is not DecoderLayer:
            return None
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj]
    linears.append(decoder.packed_head)
    matrices = [linear.native for linear in linears if isinstance(linear, PackedLinear)]
    held = [matrix for matrix in matrices if matrix is not None]
    return NativeDecoder(decoder, kernels, held) if len(held) == len(linears) else None
