"""Differentiable attention of packed draft blocks over the context before the anchor and the block itself."""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.models.dspark import DSparkDrafter
from dspark_core.training.packing import PackedBatch


def packed_hidden(drafter: DSparkDrafter, batch: PackedBatch) -> Tensor:
    """The backbone over a packed batch -> hidden states [anchors, block, d]."""
    features = drafter.project(batch.taps.to(drafter.norm.weight.dtype))
    context = drafter.context_keys_values(features, batch.positions)
    attend = PackedBlockAttention(batch, context, drafter.config.block_size, drafter.config.context_window)
    return drafter.block_hidden(batch.anchor_ids, batch.anchor_positions, attend)


class PackedBlockAttention:
    """`Attend` for a packed batch.

    Per sequence, one matrix product scores all its blocks against their shared context, and one
    batched product scores each block against itself. A single softmax spans both.
    """

    def __init__(
        self, batch: PackedBatch, context: list[tuple[Tensor, Tensor]], block_size: int, window: int | None
    ) -> None:
        """context: per layer k, v [tokens, kv_heads, head_dim] of the packed context."""
        self._batch = batch
        self._context = context
        self._block = block_size
        self._hidden = [self._hidden_context(span.tokens, span.anchors, window) for span in batch.spans]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [anchors * block, heads, head_dim]; k, v [anchors * block, kv_heads, head_dim] -> like q."""
        kv_heads, head_dim = k.shape[1:]
        groups = q.shape[1] // kv_heads
        blocks = (-1, self._block, kv_heads)
        q = q.view(*blocks, groups, head_dim).permute(2, 0, 1, 3, 4)  # [kv, anchors, block, groups, hd]
        q = q.reshape(kv_heads, -1, self._block * groups, head_dim) * head_dim**-0.5
        k = k.view(*blocks, head_dim).permute(2, 0, 1, 3)  # [kv, anchors, block, hd]
        v = v.view(*blocks, head_dim).permute(2, 0, 1, 3)
        keys, values = self._context[layer]
        outs = []
        for span, hidden in zip(self._batch.spans, self._hidden, strict=True):
            at = span.anchors
            context = keys[span.tokens].transpose(0, 1), values[span.tokens].transpose(0, 1)
            outs.append(attend_with_context(q[:, at], k[:, at], v[:, at], *context, hidden))
        out = torch.cat(outs, dim=1).view(kv_heads, -1, self._block, groups, head_dim)
        return out.permute(1, 2, 0, 3, 4).reshape(-1, kv_heads * groups, head_dim)

    def _hidden_context(self, tokens: slice, anchors: slice, window: int | None) -> Tensor:
        """[anchors, 1, context] bool: context positions a block must not see."""
        positions = self._batch.positions[tokens]
        at = self._batch.anchor_positions[anchors][:, None]
        hidden = positions >= at
        if window is not None:
            hidden |= positions < at - window
        return hidden[:, None]


def attend_with_context(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, hidden: Tensor
) -> Tensor:
    """Within one sequence, q (already scaled) attends to the shared context and its anchor's own keys.

    q [kv, anchors, rows, hd]; k, v [kv, anchors, own, hd], own may be 0; keys, values
    [kv, context, hd]; hidden [anchors, 1, context] bool, positions to mask out -> like q.
    """
    kv, anchors, rows, head_dim = q.shape
    outer = torch.bmm(q.reshape(kv, -1, head_dim), keys.transpose(1, 2)).view(kv, anchors, rows, -1)
    outer = outer.masked_fill(hidden, float("-inf"))
    inner = torch.matmul(q, k.transpose(-1, -2))
    weights = torch.softmax(torch.cat((outer, inner), dim=-1), dim=-1)
    context = keys.shape[1]
    out = torch.bmm(weights[..., :context].reshape(kv, -1, context), values)
    return out.view(q.shape) + torch.matmul(weights[..., context:], v)
