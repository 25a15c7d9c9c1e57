"""Target passes on a GPU: ragged paged attention, and one CUDA graph per size of a decoding batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.batch import RaggedBatch, Run
from dspark_core.engine.buckets import Bucket
from dspark_core.engine.devices import device_of
from dspark_core.engine.gpu_attention import RaggedAttention, RaggedRuns
from dspark_core.engine.gpu_settings import GpuSettings
from dspark_core.engine.kv_cache import PagedCache
from dspark_core.engine.passes import TapWriter, computed_on, tapped_layers
from dspark_core.engine.recorded import Outputs, RecordedPasses
from dspark_core.engine.step_inputs import StepInputs, StepShape, exact_shape, filled_shape, pack_step
from dspark_core.models.decoder import Decoder, check_tap_layers


class GpuPasses:
    """`DecoderPasses` for any family. Batches that no bucket holds are computed launch by launch."""

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
        self._decoder = decoder
        self._kernels = settings.kernels
        self._grid = settings.grid
        self._taps = taps
        self._page_tokens = page_tokens
        self._device = device_of(decoder)
        self._group = max(
            config.num_heads // config.attention_kind(layer).num_kv_heads
            for layer in range(config.num_cached_layers)
        )
        self._cache = PagedCache(
            config,
            num_pages=num_pages,
            page_tokens=page_tokens,
            dtype=next(decoder.parameters()).dtype,
            device=self._device,
        )
        self._graphs: RecordedPasses[StepShape] | None = None
        if settings.recorder is not None:
            pages = -(-max_context_tokens // page_tokens)
            values = max(self._shape(b).fixed_values + b.requests * pages for b in self._grid.all())
            self._graphs = RecordedPasses(
                self._compute, settings.recorder, input_values=values, device=self._device
            )

    @property
    def records(self) -> bool:
        """Whether decoding batches are recorded and replayed."""
        return self._graphs is not None

    @property
    def computed_by(self) -> str:
        way = "Triton kernels in CUDA graphs" if self.records else "Triton kernels"
        return computed_on(way, self._device)

    def forward(self, runs: Sequence[Run], batch: RaggedBatch) -> Tensor:
        longest = max(len(run.token_ids) for run in runs)
        bucket = None if self._graphs is None else self._grid.choose(len(runs), batch.num_tokens, longest)
        if bucket is None or self._graphs is None:
            shape = exact_shape(batch, self._kernels.tile_queries(longest, self._group))
            return self._compute(to_device(pack_step(batch, shape), self._device), shape)[0]
        shape = self._shape(bucket)
        return self._graphs.run(shape, pack_step(batch, shape))[0][: len(batch.logit_rows)]

    def _shape(self, bucket: Bucket) -> StepShape:
        """Tiles are cut for runs of the bucket's mean length."""
        mean = -(-bucket.tokens // bucket.requests)
        queries = self._kernels.tile_queries(mean, self._group)
        return filled_shape(bucket.requests, bucket.tokens, queries)

    @torch.inference_mode()
    def _compute(self, values: Tensor, shape: StepShape) -> Outputs:
        """Of values as `pack_step` lays them out: the logits."""
        inputs = StepInputs.of(values, shape)
        where = RaggedRuns(inputs.runs, inputs.tiles, inputs.pages, shape.tile_queries, self._page_tokens)
        cache = self._cache
        attend = RaggedAttention(self._kernels, cache.keys, cache.values, cache.windows, inputs.slots, where)
        output = self._decoder(inputs.token_ids, inputs.positions, attend, tapped_layers(self._taps))
        if self._taps is not None:
            self._taps.write(inputs.slots, output.taps)
        hidden = output.hidden.index_select(0, inputs.logit_rows)
        return (self._decoder.logits(hidden).float(),)
