"""Target passes over ragged batches, with our native CPU kernels or with PyTorch's operators.

Each implementation owns its keys and values, whose layouts differ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dspark_core.engine.caches.kv_cache import PagedCache
from dspark_core.engine.devices import describe_device, device_of
from dspark_core.engine.target.attention import PagedAttention
from dspark_core.engine.target.batch import AttentionGroup, RaggedBatch, Run, attention_groups
from dspark_core.kernels.library import native_kernels
from dspark_core.models.decoder import Decoder, check_tap_layers
from dspark_core.models.native_stack import NativeBatch, NativeStack


@dataclass(frozen=True, slots=True)
class TapWriter:
    """Where the hidden states go that a drafter is conditioned on."""

    layers: tuple[int, ...]
    write: Callable[[Tensor, Tensor], None]
    """(slots [tokens], taps [tokens, m * hidden]); both on the passes' device."""


def tapped_layers(taps: TapWriter | None) -> tuple[int, ...]:
    return () if taps is None else taps.layers


def computed_on(way: str, device: torch.device) -> str:
    """`way`, with the device unless it is the CPU."""
    return way if device.type == "cpu" else f"{way} on {describe_device(device)}"


class DecoderPasses(Protocol):
    @property
    def computed_by(self) -> str:
        """A description for people; also part of the key of step times."""
        ...

    def forward(self, runs: Sequence[Run], batch: RaggedBatch) -> Tensor:
        """Computes the runs, stores their keys and values and passes on their taps.

        Returns float32 logits [sum of logit_rows, vocab] on the passes' device, valid until the next pass.
        """
        ...


class NativePasses:
    """The whole decoder in one native call; attention reads the cache in place."""

    def __init__(
        self, decoder: NativeStack, *, num_pages: int, page_tokens: int, taps: TapWriter | None = None
    ) -> None:
        check_tap_layers(tapped_layers(taps), decoder.config.num_layers)
        self._decoder = decoder
        self._taps = taps
        self._cache = decoder.new_cache(num_pages, page_tokens)

    @property
    def computed_by(self) -> str:
        kernels = native_kernels()
        return "native kernels" if kernels is None else f"native kernels ({kernels.instructions})"

    def forward(self, runs: Sequence[Run], batch: RaggedBatch) -> Tensor:
        native = NativeBatch(batch.token_ids, batch.run_table, batch.pages, batch.logit_rows)
        logits, taps = self._decoder.forward(native, self._cache, tapped_layers(self._taps))
        if self._taps is not None:
            self._taps.write(batch.slots, taps)
        return logits


class TorchPasses:
    """With PyTorch's operators, for any device and model family."""

    def __init__(
        self, decoder: Decoder, *, num_pages: int, page_tokens: int, taps: TapWriter | None = None
    ) -> None:
        check_tap_layers(tapped_layers(taps), decoder.config.num_layers)
        self._decoder = decoder
        self._taps = taps
        self._page_tokens = page_tokens
        self._device = device_of(decoder)
        self._dtype = next(decoder.parameters()).dtype
        self._cache = PagedCache(
            decoder.config,
            num_pages=num_pages,
            page_tokens=page_tokens,
            dtype=self._dtype,
            device=self._device,
        )

    @property
    def computed_by(self) -> str:
        return computed_on("PyTorch operators", self._device)

    def forward(self, runs: Sequence[Run], batch: RaggedBatch) -> Tensor:
        batch = batch.to(self._device)
        attend = PagedAttention(self._cache, batch.slots, partial(self._groups, runs))
        output = self._decoder(batch.token_ids, batch.positions, attend, tapped_layers(self._taps))
        if self._taps is not None:
            self._taps.write(batch.slots, output.taps)
        # Most prefill positions need no logits.
        hidden = output.hidden.index_select(0, batch.logit_rows)
        return self._decoder.logits(hidden).float()

    def _groups(self, runs: Sequence[Run], window: int | None) -> Sequence[AttentionGroup]:
        groups = attention_groups(runs, page_tokens=self._page_tokens, dtype=self._dtype, window=window)
        return [group.to(self._device) for group in groups]
