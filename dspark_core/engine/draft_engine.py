"""The native drafter engine: batched draft blocks for sequences at different positions."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.engine.draft_context import ContextView, DraftContext
from dspark_core.engine.draft_sampling import BlockSampler
from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem
from dspark_core.errors import InvalidRequestError
from dspark_core.models.dspark import DSparkDrafter


class DraftEngine:
    def __init__(
        self,
        drafter: DSparkDrafter,
        *,
        fingerprint: str,
        num_pages: int,
        page_tokens: int = 16,
        generator: torch.Generator | None = None,
    ) -> None:
        backbone = drafter.config.backbone
        self._drafter = drafter
        self._dtype = drafter.norm.weight.dtype
        self._kv_groups = backbone.num_heads // backbone.num_kv_heads
        self._generator = generator or torch.Generator().manual_seed(torch.seed() % 2**63)
        self.geometry = DraftGeometry(
            fingerprint=fingerprint,
            block_size=drafter.config.block_size,
            feature_size=backbone.hidden_size,
            vocab_size=backbone.vocab_size,
            context_window=drafter.config.context_window,
        )
        self._context = DraftContext(
            backbone,
            num_pages=num_pages,
            page_tokens=page_tokens,
            window=drafter.config.context_window,
            dtype=self._dtype,
        )

    @property
    def num_sequences(self) -> int:
        """Sequences whose context is held."""
        return self._context.num_sequences

    def release(self, sequence_ids: Sequence[str]) -> None:
        for sequence_id in sequence_ids:
            self._context.forget(sequence_id)

    @torch.inference_mode()
    def propose(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        """Appends the items' features and drafts a block for each, in order.

        An item whose context is incomplete, or does not fit, comes back with `needs_context`.
        Raises InvalidRequestError for features of a wrong shape.
        """
        ready = self._append(items)
        drafted = [item for item, is_ready in zip(items, ready, strict=True) if is_ready]
        blocks = iter(self._draft(drafted)) if drafted else iter(())
        return [
            next(blocks) if is_ready else DraftBlock(item.sequence_id, needs_context=True)
            for item, is_ready in zip(items, ready, strict=True)
        ]

    def _append(self, items: Sequence[DraftItem]) -> list[bool]:
        """Stores the new context keys and values of all items at once -> which are complete."""
        in_use = {item.sequence_id for item in items}
        slots: list[Tensor] = []
        features: list[Tensor] = []
        positions: list[Tensor] = []
        ready = []
        for item in items:
            self._check(item)
            start, new = self._last_window(item)
            where = self._context.reserve(item.sequence_id, start, item.anchor_position, in_use=in_use)
            ready.append(where is not None)
            if where is not None:
                slots.append(where)
                features.append(new)
                positions.append(torch.arange(start, item.anchor_position))
        if slots and sum(len(where) for where in slots) > 0:
            pairs = self._drafter.context_keys_values(
                torch.cat(features).to(self._dtype), torch.cat(positions)
            )
            keys, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
            self._context.write(torch.cat(slots), keys, values)
        return ready

    def _last_window(self, item: DraftItem) -> tuple[int, Tensor]:
        """New features a block can still see, and the position of the first."""
        window = self.geometry.context_window
        surplus = 0 if window is None else max(0, len(item.features) - window)
        return item.features_start + surplus, item.features[surplus:]

    def _check(self, item: DraftItem) -> None:
        rows = item.anchor_position - item.features_start
        expected = (rows, self.geometry.feature_size)
        if tuple(item.features.shape) != expected:
            raise InvalidRequestError(
                f"features of {item.sequence_id!r} must be {expected} to end at the anchor "
                f"(position {item.anchor_position}), got {tuple(item.features.shape)}",
                field="features",
            )
        if not 0 <= item.anchor_token_id < self.geometry.vocab_size:
            raise InvalidRequestError(
                f"anchor_token_id must be in [0, {self.geometry.vocab_size}), got {item.anchor_token_id}",
                field="anchor_token_id",
            )

    def _draft(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        anchors = torch.tensor([item.anchor_token_id for item in items])
        anchor_positions = torch.tensor([item.anchor_position for item in items])
        view = self._context.view([item.sequence_id for item in items])
        attend = BlockAttention(self._context, view, self.geometry.block_size, self._kv_groups, self._dtype)
        hidden = self._drafter.block_hidden(anchors, anchor_positions, attend)
        sampler = BlockSampler(items, self._generator, token_ids=self._drafter.draft_vocab_ids)
        drawn = self._drafter.draw(anchors, hidden, sampler)
        distributions = sampler.distributions()
        confidences: list[list[float]] = [[] for _ in items]
        if drawn.confidence_logits is not None:
            confidences = torch.sigmoid(drawn.confidence_logits.float()).tolist()
        return [
            DraftBlock(item.sequence_id, tuple(token_ids), tuple(row), distributions.get(index))
            for index, (item, token_ids, row) in enumerate(
                zip(items, drawn.token_ids.tolist(), confidences, strict=True)
            )
        ]


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

    def __init__(self, engine: DraftEngine) -> None:
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
