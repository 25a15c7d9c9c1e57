"""The native target engine: one forward over a ragged batch against the paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.engine.batch import Run, build_batch, slots_of
from dspark_core.engine.context_features import ContextFeatures, ContextProjection
from dspark_core.engine.kv_cache import PagedFeatures
from dspark_core.engine.passes import DecoderPasses, NativePasses, TorchPasses
from dspark_core.kernels.library import native_kernels
from dspark_core.models.config import DecoderConfig
from dspark_core.models.decoder import Decoder
from dspark_core.models.native_decoder import native_decoder


class TargetEngine:
    """Runs the target model; owns the cache tensors, not who uses which page."""

    def __init__(
        self,
        decoder: Decoder,
        config: DecoderConfig,
        *,
        num_pages: int,
        page_tokens: int = 16,
        projection: ContextProjection | None = None,
        max_context_tokens: int | None = None,
    ) -> None:
        self.config = config
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        self.max_context_tokens = min(
            config.max_context_tokens, (num_pages - 1) * page_tokens, max_context_tokens or 2**62
        )
        """Longest sequence one request can hold: the model's context or the whole cache."""
        self._projection = projection
        self._dtype = next(decoder.parameters()).dtype
        self._passes = _passes_of(decoder, num_pages, page_tokens)
        self._features: ContextFeatures | None = None
        if projection is not None:
            paged = PagedFeatures(
                num_pages=num_pages,
                page_tokens=page_tokens,
                size=projection.feature_size,
                dtype=self._dtype,
            )
            self._features = ContextFeatures(projection, paged)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def native(self) -> bool:
        """Whether the whole decoder runs in our own kernels."""
        return isinstance(self._passes, NativePasses)

    @property
    def computed_by(self) -> str:
        """For people: our kernels with their instruction set, or PyTorch."""
        kernels = native_kernels() if self.native else None
        return "PyTorch operators" if kernels is None else f"native kernels ({kernels.instructions})"

    @torch.inference_mode()
    def forward(self, runs: Sequence[Run]) -> Tensor:
        """Computes the runs and stores their keys, values and features.

        Returns float32 logits [sum of logit_rows, vocab], in the order of the runs.
        """
        batch = build_batch(runs, page_tokens=self.page_tokens)
        layers = self._projection.target_layer_ids if self._projection else ()
        logits, taps = self._passes.forward(runs, batch, layers)
        if self._features is not None:
            self._features.write(batch.slots, taps)
        return logits

    @torch.inference_mode()
    def read_features(self, pages: Sequence[int], start: int, end: int) -> Tensor:
        """Projected features of positions [start, end) -> [end - start, feature_size]; without a
        projection they have no size."""
        if self._features is None:
            return torch.zeros((end - start, 0), dtype=self._dtype)
        return self._features.read(slots_of(pages, start, end, self.page_tokens))


def _passes_of(decoder: Decoder, num_pages: int, page_tokens: int) -> DecoderPasses:
    native = native_decoder(decoder)
    if native is not None:
        return NativePasses(native, num_pages=num_pages, page_tokens=page_tokens)
    return TorchPasses(decoder, num_pages=num_pages, page_tokens=page_tokens)
