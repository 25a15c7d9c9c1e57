"""A drafter's append-only context keys and values, for many sequences at different positions.

Only features of committed tokens arrive, so nothing is rolled back. Keys are stored rotated to absolute
positions, so a sliding window can be a ring: the order of its entries does not matter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.caches.block_manager import BlockManager
from dspark_core.models.config import DecoderConfig


@dataclass(slots=True)
class _Held:
    """Positions [start, end) of one sequence."""

    start: int
    end: int
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive positions in consecutive slots of a sequence's own pages."""

    position: int  # of the first
    slot: int  # of the first, counted from the beginning of the sequence's first page
    count: int


@dataclass(frozen=True, slots=True)
class ContextView:
    """Context slots of a batch of blocks, padded to a rectangle."""

    slots: Tensor  # [requests, context]
    visible: Tensor  # [requests, context] bool

    def to(self, device: torch.device) -> ContextView:
        return ContextView(to_device(self.slots, device), to_device(self.visible, device))


class DraftContext:
    """Pages by sequence. If they run out, the least recently used sequence is forgotten: the verifier can
    re-prime it from its own feature pages."""

    def __init__(self, *, num_pages: int, page_tokens: int, window: int | None, room: int = 0) -> None:
        """`room`: additional slots after each sequence's context, for the block being drafted."""
        self.num_pages, self.page_tokens = num_pages, page_tokens
        self._manager = BlockManager(num_pages, page_tokens)
        self._window = window
        self._room = room
        self._held: OrderedDict[str, _Held] = OrderedDict()  # least recently used first

    @property
    def num_sequences(self) -> int:
        return len(self._held)

    def reserve(self, sequence_id: str, start: int, end: int, *, in_use: Collection[str]) -> bool:
        """Reserves slots for new positions [start, end) of a sequence, allocating pages as needed.

        A start that does not continue the held context replaces it. Returns False, and forgets the sequence,
        if its context would be incomplete or no page can be freed. `in_use` sequences are never evicted.
        """
        held = self._held.get(sequence_id)
        if held is None or start != held.end:
            if not self._complete_alone(start, end):
                self.forget(sequence_id)
                return False
            pages = held.pages if held else []
            held = self._held[sequence_id] = _Held(start, start, pages)
        self._held.move_to_end(sequence_id)
        if not self._grow(held, end, in_use):
            self.forget(sequence_id)
            return False
        held.end = end
        return True

    def slots(self, sequence_id: str, start: int, end: int) -> Tensor:
        """Slots of held positions [start, end) among all pages."""
        return self._slots(self._held[sequence_id], range(start, end))

    def spans(self, start: int, end: int) -> list[Span]:
        """Held positions [start, end), at most a window of them, split where the ring wraps."""
        window = end if self._window is None else self._window
        spans = []
        while start < end:
            slot = start % window
            count = min(end - start, window - slot)
            spans.append(Span(start, slot, count))
            start += count
        return spans

    def pages(self, sequence_id: str) -> Sequence[int]:
        return self._held[sequence_id].pages

    def num_visible(self, sequence_id: str) -> int:
        """Number of positions a block sees. They occupy the sequence's first slots."""
        held = self._held[sequence_id]
        return held.end - self._first_visible(held)

    def view(self, sequence_ids: Sequence[str]) -> ContextView:
        """All held context of each sequence, or its last `window` positions."""
        held = [self._held[sequence_id] for sequence_id in sequence_ids]
        spans = [range(self._first_visible(h), h.end) for h in held]
        width = max((len(span) for span in spans), default=0)
        slots = torch.zeros((len(held), width), dtype=torch.long)
        for row, (one, span) in enumerate(zip(held, spans, strict=True)):
            slots[row, : len(span)] = self._slots(one, span)
        lengths = torch.tensor([len(span) for span in spans])
        return ContextView(slots, torch.arange(width) < lengths[:, None])

    def forget(self, sequence_id: str) -> None:
        held = self._held.pop(sequence_id, None)
        if held is not None:
            self._manager.release(held.pages)

    def _complete_alone(self, start: int, end: int) -> bool:
        """Whether [start, end) alone is a context from which a block can be drafted."""
        return start == 0 or (self._window is not None and end - start >= self._window)

    def _first_visible(self, held: _Held) -> int:
        return held.start if self._window is None else max(held.start, held.end - self._window)

    def _grow(self, held: _Held, end: int, in_use: Collection[str]) -> bool:
        positions = end if self._window is None else min(end, self._window)
        missing = self._manager.pages_for(positions + self._room) - len(held.pages)
        while missing > self._manager.available_pages:
            victim = next((s for s in self._held if s not in in_use), None)
            if victim is None:
                return False
            self.forget(victim)
        if missing > 0:
            held.pages.extend(self._manager.allocate(missing) or ())
        return True

    def _slots(self, held: _Held, positions: range) -> Tensor:
        index = torch.arange(positions.start, positions.stop)
        if self._window is not None:
            index = index % self._window
        size = self._manager.page_tokens
        return torch.tensor(held.pages, dtype=torch.long)[index // size] * size + index % size


class ContextTensors:
    """Keys and values of a `DraftContext` for PyTorch's operators."""

    def __init__(
        self, config: DecoderConfig, context: DraftContext, dtype: torch.dtype, device: torch.device
    ) -> None:
        slots = context.num_pages * context.page_tokens
        shape = (config.num_layers, slots, config.num_kv_heads, config.head_dim)
        self.device = device
        # [layers, slots, kv_heads, head_dim]
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, slots: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """slots [rows]; `pairs`: keys and values of each layer [rows, kv_heads, head_dim]."""
        for layer, (keys, values) in enumerate(pairs):
            self.keys[layer].index_copy_(0, slots, keys)
            self.values[layer].index_copy_(0, slots, values)
