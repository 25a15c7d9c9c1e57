"""The engine of Eagle3 and MTP-1 drafters: one pass of a single layer per draft token, batched over
sequences.

A context entry pairs the feature of a position with the token after it. Both are committed, so the context is
append-only. Keys and values of draft steps depend on drafts and are discarded after the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.devices import device_of
from dspark_core.engine.draft_engines.base import (
    Appended,
    ContextDraftEngine,
    EngineArguments,
    read_together,
)
from dspark_core.engine.draft_engines.draft_context import ContextTensors, ContextView
from dspark_core.engine.draft_engines.draft_sampling import BlockSampler
from dspark_core.engine.protocols import DraftBlock, DraftItem
from dspark_core.errors import InvalidRequestError
from dspark_core.models.eagle3 import Eagle3Drafter
from dspark_core.models.mtp import MtpDrafter


class AutoregressiveDraftEngine(ContextDraftEngine):
    def __init__(self, drafter: Eagle3Drafter | MtpDrafter, **arguments: Unpack[EngineArguments]) -> None:
        super().__init__(
            drafter.config,
            dtype=drafter.norm.weight.dtype,
            device=device_of(drafter),
            context_window=None,
            **arguments,
        )
        self._drafter = drafter
        backbone = drafter.config.backbone
        self._tensors = ContextTensors(backbone, self._context, self._dtype, self.device)
        self._kv_groups = backbone.num_heads // backbone.num_kv_heads

    def _append(self, items: Sequence[DraftItem]) -> list[bool]:
        # The first step starts from the feature before the anchor. Only its keys and values are stored, so an
        # item without new features has to be primed again.
        complete = super()._append(items)
        return [done and len(item.features) > 0 for done, item in zip(complete, items, strict=True)]

    def _store(self, appended: Sequence[Appended], features: Tensor) -> None:
        following = [
            token for one in appended for token in (*one.item.token_ids, one.item.anchor_token_id)[1:]
        ]
        positions = torch.cat([torch.arange(one.start, one.end) for one in appended])
        slots = [self._context.slots(one.item.sequence_id, one.start, one.end) for one in appended]
        next_ids = to_device(torch.tensor(following), self.device)
        pair = self._drafter.context_keys_values(features, next_ids, to_device(positions, self.device))
        self._tensors.write(to_device(torch.cat(slots), self.device), [pair])

    def _check(self, item: DraftItem) -> None:
        super()._check(item)
        if len(item.token_ids) != len(item.features):
            raise InvalidRequestError(
                f"token_ids of {item.sequence_id!r} must name the token of each of its "
                f"{len(item.features)} features, got {len(item.token_ids)}",
                field="token_ids",
            )
        vocab_size = self.geometry.vocab_size
        unknown = next((token for token in item.token_ids if not 0 <= token < vocab_size), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"token_ids of {item.sequence_id!r} must be in [0, {vocab_size}), got {unknown}",
                field="token_ids",
            )

    def _draft(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        anchors = to_device(torch.tensor([item.anchor_token_id for item in items]), self.device)
        positions = to_device(torch.tensor([item.anchor_position - 1 for item in items]), self.device)
        last = torch.stack([item.features[-1] for item in items])
        features = to_device(last, self.device).to(self._dtype)
        view = self._context.view([item.sequence_id for item in items]).to(self.device)
        attend = StepAttention(self._tensors, view, self.geometry.block_size, self._kv_groups)
        sampler = BlockSampler(
            items, self._generator, token_ids=self._drafter.draft_vocab_ids, device=self.device
        )
        drawn = self._drafter.draw(anchors, features, positions, attend, sampler)
        assert drawn.confidence_logits is not None, "these drafters are their own confidence"
        confidences = torch.sigmoid(drawn.confidence_logits)
        return self._blocks(items, *read_together(drawn.token_ids, confidences), sampler.distributions())


class StepAttention:
    """`Attend` for successive draft steps of one layer: each sees its context and the steps so far."""

    def __init__(self, context: ContextTensors, view: ContextView, steps: int, kv_groups: int) -> None:
        # The first step recomputes the last stored position, so each row sees one stored entry less.
        slots, visible = view.slots[:, :-1], view.visible[:, 1:]
        self._keys = self._gathered(context.keys[0], slots, steps)
        self._values = self._gathered(context.values[0], slots, steps)
        self._kv_groups = kv_groups
        self._end = slots.shape[1]
        shape = (len(slots), 1, 1, self._end + steps)
        bias = torch.zeros(shape, dtype=self._keys.dtype, device=context.device)
        bias[..., : self._end].masked_fill_(~visible[:, None, None], float("-inf"))
        self._bias = bias

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [requests, heads, head_dim]; k, v [requests, kv_heads, head_dim] -> like q."""
        self._keys[:, :, self._end], self._values[:, :, self._end] = k, v
        self._end += 1
        requests, kv_heads, head_dim = k.shape
        # Fold the query heads that share a key/value head into the query axis.
        folded = q.view(requests, kv_heads, self._kv_groups, head_dim)
        bias = self._bias[..., : self._end].expand(-1, 1, self._kv_groups, -1)
        keys, values = self._keys[:, :, : self._end], self._values[:, :, : self._end]
        return F.scaled_dot_product_attention(folded, keys, values, attn_mask=bias).reshape(q.shape)

    @staticmethod
    def _gathered(stored: Tensor, slots: Tensor, steps: int) -> Tensor:
        """stored [slots, kv_heads, head_dim] -> [requests, kv_heads, context + steps, head_dim]."""
        requests, width = slots.shape
        kv_heads, head_dim = stored.shape[1:]
        out = stored.new_empty((requests, kv_heads, width + steps, head_dim))
        held = stored.index_select(0, slots.flatten()).view(requests, width, kv_heads, head_dim)
        out[:, :, :width] = held.transpose(1, 2)
        return out
