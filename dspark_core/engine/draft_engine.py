"""The engine of DSpark drafters: batched draft blocks for sequences at different positions."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.algorithms.calibration import ConfidenceScaling
from dspark_core.engine.block_draw import block_draw
from dspark_core.engine.context_draft_engine import ContextDraftEngine, EngineArguments
from dspark_core.engine.draft_context import ContextView, DraftContext
from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem
from dspark_core.models.dspark import DSparkDrafter


class DraftEngine(ContextDraftEngine):
    def __init__(
        self,
        drafter: DSparkDrafter,
        *,
        confidence_scaling: ConfidenceScaling | None = None,
        **arguments: Unpack[EngineArguments],
    ) -> None:
        """`confidence_scaling`: corrects the confidence logit of each position; None: taken as it is."""
        super().__init__(
            drafter.config,
            dtype=drafter.norm.weight.dtype,
            context_window=drafter.config.context_window,
            **arguments,
        )
        self._drafter = drafter
        self._draw = block_draw(drafter, self._generator)
        self._confidence_scaling: tuple[Tensor, Tensor] | None = None  # factors and biases, each [block]
        if confidence_scaling is not None:
            temperatures = torch.tensor(confidence_scaling.temperatures, dtype=torch.float32)
            biases = torch.tensor(confidence_scaling.biases, dtype=torch.float32)
            self._confidence_scaling = (1.0 / temperatures, biases)

    def _keys_values(
        self, items: Sequence[DraftItem], features: Tensor, positions: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        return self._drafter.context_keys_values(features, positions)

    def _draft(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        anchors = torch.tensor([item.anchor_token_id for item in items])
        anchor_positions = torch.tensor([item.anchor_position for item in items])
        view = self._context.view([item.sequence_id for item in items])
        attend = BlockAttention(self._context, view, self.geometry.block_size, self._kv_groups, self._dtype)
        hidden = self._drafter.block_hidden(anchors, anchor_positions, attend)
        drawn, distributions = self._draw(items, anchors, hidden)
        confidences = None
        if drawn.confidence_logits is not None:
            confidences = self._confidences(drawn.confidence_logits)
        return self._blocks(items, drawn.token_ids, confidences, distributions)

    def _confidences(self, logits: Tensor) -> Tensor:
        """[requests, block] -> calibrated probabilities of the same shape."""
        logits = logits.float()
        if self._confidence_scaling is not None:
            factors, biases = self._confidence_scaling
            logits = logits * factors + biases
        return torch.sigmoid(logits)


class BlockAttention:
    """`Attend` for draft blocks: each sees its own context and, both ways, itself."""

    def __init__(
        self, context: DraftContext, view: ContextView, block_size: int, kv_groups: int, dtype: torch.dtype
    ) -> None:
        self._context = context
        self._slots = view.slots.flatten()
        self._requests, self._width = view.slots.shape
        self._block = block_size
        self._kv_groups = kv_groups
        bias = torch.zeros((self._requests, 1, 1, self._width + block_size), dtype=dtype)
        bias[..., : self._width].masked_fill_(~view.visible[:, None, None], float("-inf"))
        self._bias = bias.expand(-1, 1, kv_groups * block_size, -1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [requests * block, heads, head_dim]; k, v [requests * block, kv_heads, head_dim] -> like q."""
        kv_heads, head_dim = k.shape[-2:]
        keys = self._with_context(self._context.keys[layer], k)
        values = self._with_context(self._context.values[layer], v)
        # Query heads that share a key/value head are folded into the query axis.
        folded = q.view(self._requests, self._block, kv_heads, self._kv_groups, head_dim).permute(
            0, 2, 3, 1, 4
        )
        folded = folded.reshape(self._requests, kv_heads, self._kv_groups * self._block, head_dim)
        out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=self._bias)
        out = out.view(self._requests, kv_heads, self._kv_groups, self._block, head_dim)
        return out.permute(0, 3, 1, 2, 4).reshape(q.shape)

    def _with_context(self, stored: Tensor, own: Tensor) -> Tensor:
        """-> [requests, kv_heads, context + block, head_dim]"""
        kv_heads, head_dim = own.shape[-2:]
        held = stored.index_select(0, self._slots).view(self._requests, self._width, kv_heads, head_dim)
        own = own.view(self._requests, self._block, kv_heads, head_dim)
        return torch.cat((held, own), dim=1).transpose(1, 2)


class LocalDraftSource:
    """`DraftSource` in the same process: proposals are ready when `propose` returns."""

    def __init__(self, engine: ContextDraftEngine) -> None:
        self._engine = engine

    @property
    def geometry(self) -> DraftGeometry:
        return self._engine.geometry

    @property
    def generation(self) -> int:
        return 0

    def propose(self, items: Sequence[DraftItem]) -> Future[list[DraftBlock]]:
        future: Future[list[DraftBlock]] = Future()
        future.set_result(self._engine.propose(items))
        return future

    def release(self, sequence_ids: Sequence[str]) -> None:
        self._engine.release(sequence_ids)
