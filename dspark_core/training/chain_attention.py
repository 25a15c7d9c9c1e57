"""Differentiable attention of packed draft chains: the context up to an anchor, then the chain's own steps.

A chain drafts token by token from one anchor. Its first step is the last entry of the context (the
pair of the last feature and the anchor); each later step sees the context, the later steps before it
and itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_core.training.block_attention import attend_with_context
from dspark_core.training.packing import PackedBatch


class ChainAttention:
    """`Attend`, called once per step with one row per anchor of the packed batch."""

    def __init__(self, batch: PackedBatch, keys: Tensor, values: Tensor) -> None:
        """keys, values [tokens, kv_heads, head_dim] of the context pairs; pair i joins the feature at
        position i with the token at i + 1."""
        self._batch = batch
        self._keys, self._values = keys, values
        self._own_keys: list[Tensor] = []  # per later step [kv, anchors, 1, hd]
        self._own_values: list[Tensor] = []
        self._started = False
        self._hidden = [
            (batch.positions[span.tokens] >= batch.anchor_positions[span.anchors][:, None])[:, None]
            for span in batch.spans
        ]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [anchors, heads, head_dim]; k, v [anchors, kv_heads, head_dim] -> like q."""
        anchors, kv_heads, head_dim = k.shape
        if self._started:  # the first step's own key is the last of its context
            self._own_keys.append(k.transpose(0, 1)[:, :, None])
            self._own_values.append(v.transpose(0, 1)[:, :, None])
        self._started = True
        none = k.new_empty((kv_heads, anchors, 0, head_dim))
        own_keys = torch.cat((none, *self._own_keys), dim=2)  # [kv, anchors, steps, hd]
        own_values = torch.cat((none, *self._own_values), dim=2)
        rows = q.view(anchors, kv_heads, -1, head_dim).transpose(0, 1) * head_dim**-0.5
        outs = []
        for span, hidden in zip(self._batch.spans, self._hidden, strict=True):
            at = span.anchors
            context = self._keys[span.tokens].transpose(0, 1), self._values[span.tokens].transpose(0, 1)
            outs.append(
                attend_with_context(rows[:, at], own_keys[:, at], own_values[:, at], *context, hidden)
            )
        return torch.cat(outs, dim=1).transpose(0, 1).reshape(q.shape)
