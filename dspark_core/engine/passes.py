"""One target pass over a ragged batch, by our own kernels or by PyTorch's operators.

Either owns its keys and values: their layouts differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from dspark_core.engine.attention import PagedAttention
from dspark_core.engine.batch import AttentionGroup, RaggedBatch, Run, attention_groups
from dspark_core.engine.kv_cache import PagedCache
from dspark_core.models.decoder import Decoder, check_tap_layers
from dspark_core.models.native_stack import NativeBatch, NativeStack


class DecoderPasses(Protocol):
    def forward(
        self, runs: Sequence[Run], batch: RaggedBatch, tap_layers: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Stores the runs' keys and values.

        Returns float32 logits [sum of logit_rows, vocab] and taps [tokens, m * hidden].
        """
        ...


class NativePasses:
    """The whole decoder in one native call; attention reads the cache in place."""

    def __init__(self, decoder: NativeStack, *, num_pages: int, page_tokens: int) -> None:
        self._decoder = decoder
        self._cache = decoder.new_cache(num_pages, page_tokens)

    def forward(
        self, runs: Sequence[Run], batch: RaggedBatch, tap_layers: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        check_tap_layers(tap_layers, self._decoder.config.num_layers)
        native = NativeBatch(batch.token_ids, batch.run_table, batch.pages, batch.logit_rows)
        return self._decoder.forward(native, self._cache, tap_layers)


class TorchPasses:
    """Every operator by PyTorch: any device, any family."""

    def __init__(self, decoder: Decoder, *, num_pages: int, page_tokens: int) -> None:
        self._decoder = decoder
        self._page_tokens = page_tokens
        self._dtype = next(decoder.parameters()).dtype
        self._cache = PagedCache(
            decoder.config, num_pages=num_pages, page_tokens=page_tokens, dtype=self._dtype
        )

    def forward(
        self, runs: Sequence[Run], batch: RaggedBatch, tap_layers: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        groups = partial(self._groups, runs)
        attend = PagedAttention(self._cache, batch.slots, groups)
        output = self._decoder(batch.token_ids, batch.positions, attend, tap_layers)
        # Prefill positions other than the last need no distribution.
        hidden = output.hidden.index_select(0, batch.logit_rows)
        return self._decoder.logits(hidden).float(), output.taps

    def _groups(self, runs: Sequence[Run], window: int | None) -> Sequence[AttentionGroup]:
        return attention_groups(runs, page_tokens=self._page_tokens, dtype=self._dtype, window=window)
