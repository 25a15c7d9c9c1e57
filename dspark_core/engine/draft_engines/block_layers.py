"""Runs a DSpark drafter's layers over the contexts of many sequences.

With PyTorch's operators, which are the reference, or in one native call per pass. Each owns its keys and
values, whose layouts differ. `DraftContext` manages which positions are held in which pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.devices import device_of
from dspark_core.engine.draft_engines.base import Appended
from dspark_core.engine.draft_engines.draft_context import ContextTensors, ContextView, DraftContext
from dspark_core.engine.protocols import DraftItem
from dspark_core.models.config import DrafterConfig
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.native_stack import NativeBatch, NativeStack

_Run = tuple[int, int, int, int]  # as in `NativeBatch`
_NO_ROWS = torch.empty(0, dtype=torch.long)


def block_room(drafter: DSparkDrafter) -> int:
    """Slots after a sequence's context that `block_layers` needs."""
    return 0 if drafter.native_layers is None else drafter.config.block_size


def block_layers(drafter: DSparkDrafter, context: DraftContext) -> NativeLayers | TorchLayers:
    """The fastest implementation available; the native one needs a drafter packed by native kernels."""
    if drafter.native_layers is None:
        return TorchLayers(drafter, context, drafter.norm.weight.dtype)
    return NativeLayers(drafter.native_layers, drafter.config, context)


class NativeLayers:
    """A block's keys and values are stored after its context, in room that the context leaves."""

    def __init__(self, stack: NativeStack, config: DrafterConfig, context: DraftContext) -> None:
        self._stack = stack
        self._config = config
        self._context = context
        self._cache = stack.new_cache(context.num_pages, context.page_tokens)

    def append(self, appended: Sequence[Appended], features: Tensor) -> None:
        """features [rows, d], those of `appended` in order."""
        runs: list[_Run] = []
        slots: list[int] = []
        pages: list[int] = []
        row = 0
        for one in appended:
            for span in self._context.spans(one.start, one.end):
                runs.append((row, span.count, span.position, len(pages)))
                slots.append(span.slot)
                row += span.count
            pages.extend(self._context.pages(one.item.sequence_id))
        self._stack.append(features.contiguous(), _batch(_NO_ROWS, runs, slots, pages), self._cache)

    def hidden(self, items: Sequence[DraftItem], block: int) -> Tensor:
        """Normed hidden states [requests, block, d].

        `block` positions, at most the drafter's block size.
        """
        masks = [self._config.mask_token_id] * (block - 1)
        ids = torch.tensor([token for item in items for token in (item.anchor_token_id, *masks)])
        runs: list[_Run] = []
        slots: list[int] = []
        pages: list[int] = []
        for index, item in enumerate(items):
            runs.append((index * block, block, item.anchor_position, len(pages)))
            slots.append(self._context.num_visible(item.sequence_id))
            pages.extend(self._context.pages(item.sequence_id))
        batch = _batch(ids, runs, slots, pages)
        _, hidden = self._stack.forward(batch, self._cache, (self._stack.config.num_layers,))
        return hidden.view(len(items), block, -1)


def _batch(token_ids: Tensor, runs: list[_Run], slots: list[int], pages: list[int]) -> NativeBatch:
    return NativeBatch(
        token_ids,
        torch.tensor(runs, dtype=torch.int32),
        torch.tensor(pages, dtype=torch.int32),
        _NO_ROWS,
        slots=torch.tensor(slots, dtype=torch.int32),
        two_way=True,
    )


class TorchLayers:
    """For any kind of layer on any device."""

    def __init__(self, drafter: DSparkDrafter, context: DraftContext, dtype: torch.dtype) -> None:
        backbone = drafter.config.backbone
        self._drafter = drafter
        self._context = context
        self._device = device_of(drafter)
        self._tensors = ContextTensors(backbone, context, dtype, self._device)
        self._kv_groups = backbone.num_heads // backbone.num_kv_heads

    def append(self, appended: Sequence[Appended], features: Tensor) -> None:
        """features [rows, d], those of `appended` in order."""
        slots = [self._context.slots(one.item.sequence_id, one.start, one.end) for one in appended]
        positions = torch.cat([torch.arange(one.start, one.end) for one in appended])
        pairs = self._drafter.context_keys_values(features, to_device(positions, self._device))
        self._tensors.write(to_device(torch.cat(slots), self._device), pairs)

    def hidden(self, items: Sequence[DraftItem], block: int) -> Tensor:
        """Normed hidden states [requests, block, d]."""
        anchors = to_device(torch.tensor([item.anchor_token_id for item in items]), self._device)
        positions = to_device(torch.tensor([item.anchor_position for item in items]), self._device)
        view = self._context.view([item.sequence_id for item in items]).to(self._device)
        attend = BlockAttention(self._tensors, view, block, self._kv_groups)
        return self._drafter.block_hidden(anchors, positions, attend, block)


class BlockAttention:
    """`Attend` for draft blocks: each sees its own context and, bidirectionally, itself."""

    def __init__(self, context: ContextTensors, view: ContextView, block_size: int, kv_groups: int) -> None:
        self._context = context
        self._slots = view.slots.flatten()
        self._requests, self._width = view.slots.shape
        self._block = block_size
        self._kv_groups = kv_groups
        shape = (self._requests, 1, 1, self._width + block_size)
        bias = torch.zeros(shape, dtype=context.keys.dtype, device=context.device)
        bias[..., : self._width].masked_fill_(~view.visible[:, None, None], float("-inf"))
        self._bias = bias.expand(-1, 1, kv_groups * block_size, -1)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [requests * block, heads, head_dim]; k, v [requests * block, kv_heads, head_dim] -> like q."""
        kv_heads, head_dim = k.shape[-2:]
        keys = self._with_context(self._context.keys[layer], k)
        values = self._with_context(self._context.values[layer], v)
        # Fold the query heads that share a key/value head into the query axis.
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
