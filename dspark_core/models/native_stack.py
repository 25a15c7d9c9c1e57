"""Layers computed by the kernels in one call: weights, caches and batches of a native stack.

Both a target's decoder (`native_decoder`) and a drafter's blocks (`native_draft`) are such stacks.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_core.kernels.library import BatchStruct, DecoderShapeStruct, Kernels, LayerStruct, MatrixStruct
from dspark_core.kernels.matrix import NativeMatrix
from dspark_core.kernels.memory import huge_zeros
from dspark_core.kernels.reused_rows import ReusedRows
from dspark_core.models.config import DecoderConfig, Family
from dspark_core.models.layers import RotaryEmbedding

FAMILIES = (Family.LLAMA, Family.QWEN3)
"""Families that `decoder.h` supports; others go through PyTorch."""


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
    runs: Tensor  # [runs, 4] int32: first row, tokens, first position, offset of its page table
    pages: Tensor  # int32, concatenated page tables of the runs
    logit_rows: Tensor  # [rows] int64
    slots: Tensor | None = None  # [runs] int32: cache slot of each run's first token; None: its position
    two_way: bool = False
    """Tokens of a run attend to each other bidirectionally, and to all cached before the run's slot."""


@dataclass(frozen=True, slots=True)
class StackLayer:
    input_norm: Tensor  # [hidden]
    attention_norm: Tensor  # [hidden], after attention
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
    qkv: NativeMatrix
    output: NativeMatrix
    gate_up: NativeMatrix  # paired
    down: NativeMatrix


@dataclass(frozen=True, slots=True)
class StackWeights:
    """Everything a stack computes with; tensors are shared rather than copied where possible."""

    config: DecoderConfig
    layers: Sequence[StackLayer]
    embedding: Tensor  # [vocab, hidden]; its dtype is that of activations, keys and values
    final_norm: Tensor  # [hidden]
    rotary: RotaryEmbedding
    head: NativeMatrix | None  # None: no logits


class NativeStack:
    """Weights passed in must not change afterwards.

    A token's results are bitwise independent of the rest of the batch.
    """

    def __init__(self, kernels: Kernels, weights: StackWeights) -> None:
        config, head = weights.config, weights.head
        self.config = config
        self.dtype = weights.embedding.dtype
        self.num_logits = 0 if head is None else head.out_features
        self._kernels = kernels
        self._results = ReusedRows()
        self._kept: list[Tensor | NativeMatrix] = [] if head is None else [head]  # keeps pointers valid
        layers = (LayerStruct * config.num_layers)(*(self._layer(layer) for layer in weights.layers))
        shape = DecoderShapeStruct(
            layers=config.num_layers,
            hidden=config.hidden_size,
            inner=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab=self.num_logits,
            bfloat16=int(self.dtype is torch.bfloat16),
            eps=config.rms_norm_eps,
            cosines=self._pointer(weights.rotary.cos),
            sines=self._pointer(weights.rotary.sin),
            embedding=self._pointer(weights.embedding, self.dtype),
            final_norm=self._pointer(weights.final_norm),
            head=MatrixStruct() if head is None else head.struct,
        )
        create = kernels.functions.dspark_decoder_create
        self._handle = ctypes.c_void_p(create(ctypes.byref(shape), layers))

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._kernels.functions.dspark_decoder_destroy(self._handle)

    def new_cache(self, num_pages: int, page_tokens: int) -> NativeCache:
        size = self._kernels.functions.dspark_cache_bytes(
            self.config.num_layers,
            num_pages,
            page_tokens,
            self.config.num_kv_heads,
            self.config.head_dim,
            self.dtype.itemsize,
        )
        return NativeCache(huge_zeros(size), huge_zeros(size), num_pages, page_tokens)

    def forward(
        self, batch: NativeBatch, cache: NativeCache, tap_layers: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Writes the batch's keys and values to the cache.

        Returns float32 logits [logit_rows, vocab] and taps [tokens, m * hidden], in the order of tap_layers.
        """
        tokens, rows = batch.token_ids.shape[0], batch.logit_rows.shape[0]
        logits = self._results.take(rows, self.num_logits)
        taps = torch.empty((tokens, len(tap_layers) * self.config.hidden_size), dtype=self.dtype)
        wanted = (ctypes.c_int32 * max(1, len(tap_layers)))(*tap_layers)
        struct = _batch_struct(batch, cache, tokens)
        struct.token_ids = batch.token_ids.data_ptr()
        struct.logit_rows, struct.num_logit_rows = batch.logit_rows.data_ptr(), rows
        struct.taps, struct.num_taps = ctypes.addressof(wanted), len(tap_layers)
        struct.tapped, struct.logits = taps.data_ptr(), logits.data_ptr()
        self._kernels.functions.dspark_decoder_forward(self._handle, ctypes.byref(struct))
        return logits, taps

    def append(self, features: Tensor, batch: NativeBatch, cache: NativeCache) -> None:
        """Writes the keys and values that every layer computes from features [tokens, hidden].

        The batch's token ids and logit rows are ignored.
        """
        struct = _batch_struct(batch, cache, features.shape[0])
        struct.features = features.data_ptr()
        self._kernels.functions.dspark_decoder_forward(self._handle, ctypes.byref(struct))

    def _layer(self, layer: StackLayer) -> LayerStruct:
        matrices = (layer.qkv, layer.output, layer.gate_up, layer.down)
        self._kept.extend(matrices)
        return LayerStruct(
            self._pointer(layer.input_norm),
            self._pointer(layer.attention_norm),
            None if layer.qk_norm is None else self._pointer(layer.qk_norm),
            *(matrix.struct for matrix in matrices),
        )

    def _pointer(self, tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        """Address of a copy in `dtype` that lives as long as this object."""
        kept = tensor.detach().to(dtype).contiguous()
        self._kept.append(kept)
        return kept.data_ptr()


def _batch_struct(batch: NativeBatch, cache: NativeCache, tokens: int) -> BatchStruct:
    return BatchStruct(
        runs=batch.runs.data_ptr(),
        pages=batch.pages.data_ptr(),
        slots=None if batch.slots is None else batch.slots.data_ptr(),
        keys=cache.keys.data_ptr(),
        values=cache.values.data_ptr(),
        tokens=tokens,
        num_runs=batch.runs.shape[0],
        num_pages=cache.num_pages,
        page_tokens=cache.page_tokens,
        threads=torch.get_num_threads(),
        two_way=int(batch.two_way),
    )
