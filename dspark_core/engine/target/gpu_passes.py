"""Target passes on a GPU: ragged paged attention, and one CUDA graph per size of decoding batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.caches.kv_cache import PagedCache
from dspark_core.engine.devices import device_of
from dspark_core.engine.gpu.attention import RaggedAttention, RaggedRuns
from dspark_core.engine.gpu.buckets import Bucket
from dspark_core.engine.gpu.logits import FloatLogits
from dspark_core.engine.gpu.recorded import PREPARE_SECONDS, Outputs, RecordedPasses
from dspark_core.engine.gpu.settings import GpuSettings
from dspark_core.engine.gpu.shared_rows import SharedRows
from dspark_core.engine.target.batch import RaggedBatch, Run
from dspark_core.engine.target.passes import TapWriter, computed_on, tapped_layers
from dspark_core.engine.target.step_inputs import StepInputs, StepShape, exact_shape, filled_shape, pack_step
from dspark_core.models.decoder import Decoder, check_tap_layers

_log = logging.getLogger(__name__)


class GpuPasses:
    """`DecoderPasses` for any model family. Batches that fit no bucket are computed launch by launch."""

    def __init__(
        self,
        decoder: Decoder,
        settings: GpuSettings,
        *,
        num_pages: int,
        page_tokens: int,
        max_context_tokens: int,
        taps: TapWriter | None = None,
    ) -> None:
        config = decoder.config
        check_tap_layers(tapped_layers(taps), config.num_layers)
        self._decoder, self._head = decoder, FloatLogits(decoder)
        self._kernels = settings.kernels
        self._grid = settings.grid
        self._taps = taps
        self._page_tokens = page_tokens
        self._device = device_of(decoder)
        kinds = (config.attention_kind(layer) for layer in range(config.num_cached_layers))
        self._heads = {(config.num_heads // kind.num_kv_heads, kind.head_dim) for kind in kinds}
        """(query heads per key/value head, head_dim) of each kind of layer."""
        self._dtype = next(decoder.parameters()).dtype
        self._cache = PagedCache(
            config,
            num_pages=num_pages,
            page_tokens=page_tokens,
            dtype=self._dtype,
            device=self._device,
        )
        self._logits = SharedRows(config.vocab_size, self._device)
        self._graphs: RecordedPasses[StepShape] | None = None
        if settings.recorder is not None:
            pages = -(-max_context_tokens // page_tokens)
            values = max(self._shape(b).fixed_values + b.requests * pages for b in self._grid.all())
            self._graphs = RecordedPasses(
                settings.recorder, name="target steps", input_values=values, device=self._device
            )

    @property
    def records(self) -> bool:
        """Whether decoding batches are recorded and replayed."""
        return self._graphs is not None

    @property
    def computed_by(self) -> str:
        way = "Triton kernels in CUDA graphs" if self.records else "Triton kernels"
        return computed_on(way, self._device)

    def prepare(self, requests: int) -> None:
        """Compiles and records ahead what batches of up to `requests` sequences need."""
        started = time.monotonic()
        try:
            self._compile(min(requests, max(self._grid.requests)), until=started + PREPARE_SECONDS)
        except RuntimeError as error:  # lack of memory takes many forms
            _log.warning("cannot compile kernels for the largest steps ahead: %s", error)
        if self._graphs is not None:
            shapes = [self._shape(bucket) for bucket in self._grid.holding(requests)]
            left = started + PREPARE_SECONDS - time.monotonic()
            self._graphs.prepare(shapes, self._compute_shared, seconds=left)

    def forward(self, runs: Sequence[Run], batch: RaggedBatch) -> Tensor:
        longest = max(len(run.token_ids) for run in runs)
        bucket = None if self._graphs is None else self._grid.choose(len(runs), batch.num_tokens, longest)
        if bucket is None or self._graphs is None:
            shape = exact_shape(batch, self._tile_queries(longest))
            hidden = self._compute(to_device(pack_step(batch, shape), self._device), shape)
            return self._head(hidden)
        shape = self._shape(bucket)
        return self._graphs.run(shape, pack_step(batch, shape), self._compute_shared)[0][
            : len(batch.logit_rows)
        ]

    def _shape(self, bucket: Bucket) -> StepShape:
        """Chooses the tile size for runs of the bucket's mean length."""
        mean = -(-bucket.tokens // bucket.requests)
        return filled_shape(bucket.requests, bucket.tokens, self._tile_queries(mean))

    def _tile_queries(self, longest_run: int) -> int:
        """The smallest over all kinds of layers, which share the same tiles."""
        value_bytes = self._dtype.itemsize
        return min(
            self._kernels.tile_queries(longest_run, group=group, head_dim=head_dim, value_bytes=value_bytes)
            for group, head_dim in self._heads
        )

    def _compile(self, requests: int, *, until: float) -> None:
        """Compiles kernels for each tile size, also for batches without a graph: once for few tiles, whose
        contexts are split among programs, and once for many.

        With all-zero inputs nothing is attended to, and writes go to the page that no sequence owns.
        """
        started, most = time.monotonic(), self._grid.max_tokens
        longest = (1 << n for n in range(most.bit_length()))
        for queries in sorted({self._tile_queries(each) for each in longest}):
            for runs, tokens in ((1, queries), (requests, most)):
                if time.monotonic() >= until:
                    return
                shape = replace(filled_shape(runs, tokens, queries), rows=1)
                values = torch.zeros(shape.fixed_values + 1, dtype=torch.int64, device=self._device)
                self._compute(values, shape)
        _log.info("compiled kernels for target steps in %.1f s", time.monotonic() - started)

    @torch.inference_mode()
    def _compute_shared(self, values: Tensor, shape: StepShape) -> Outputs:
        """Computes the logits in memory shared by all recorded steps."""
        hidden = self._compute(values, shape)
        return (self._head(hidden, self._logits.first(shape.rows)),)

    @torch.inference_mode()
    def _compute(self, values: Tensor, shape: StepShape) -> Tensor:
        """values: as laid out by `pack_step`. Returns the hidden states of the rows that need logits."""
        inputs = StepInputs.of(values, shape)
        where = RaggedRuns(inputs.runs, inputs.tiles, inputs.pages, shape.tile_queries, self._page_tokens)
        cache = self._cache
        attend = RaggedAttention(self._kernels, cache.keys, cache.values, cache.windows, inputs.slots, where)
        output = self._decoder(inputs.token_ids, inputs.positions, attend, tapped_layers(self._taps))
        if self._taps is not None:
            self._taps.write(inputs.slots, output.taps)
        hidden: Tensor = output.hidden.index_select(0, inputs.logit_rows)
        return hidden
