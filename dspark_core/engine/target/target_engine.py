"""The target engine: one forward pass over a ragged batch against a paged cache, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.caches.kv_cache import PagedFeatures
from dspark_core.engine.devices import device_of
from dspark_core.engine.gpu.settings import GpuSettings
from dspark_core.engine.target.batch import Run, build_batch, slots_of
from dspark_core.engine.target.context_features import ContextFeatures, ContextProjection
from dspark_core.engine.target.gpu_passes import GpuPasses
from dspark_core.engine.target.passes import DecoderPasses, NativePasses, TapWriter, TorchPasses
from dspark_core.models.config import DecoderConfig
from dspark_core.models.decoder import Decoder
from dspark_core.models.native_decoder import native_decoder

FeatureSpan = tuple[Sequence[int], int, int]
"""(a sequence's page table, start, end): its positions [start, end)."""


class TargetEngine:
    """Runs the target model and stores context features. Does not manage which sequence uses which page."""

    def __init__(
        self,
        passes_of: Callable[[TapWriter | None], DecoderPasses],
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        device: torch.device,
        num_pages: int,
        page_tokens: int = 16,
        projection: ContextProjection | None = None,
        max_context_tokens: int | None = None,
        features_at_once: bool = False,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`passes_of` returns the implementation, which owns keys and values, given where taps go.

        `features_at_once`: project taps within the pass, because the next pass may overwrite them.
        `on_close` shuts the implementation down, if it holds more than memory.
        """
        self.config = config
        self.page_tokens = page_tokens
        self.num_pages = num_pages
        self.max_context_tokens = longest_context(config, num_pages, page_tokens, max_context_tokens)
        """Longest possible sequence, limited by the model, the whole cache and the configuration."""
        self.device = device
        """Where it computes; its logits and features are there, too."""
        self._dtype = dtype
        self._features: ContextFeatures | None = None
        taps: TapWriter | None = None
        if projection is not None:
            paged = PagedFeatures(
                num_pages=num_pages,
                page_tokens=page_tokens,
                size=projection.feature_size,
                dtype=dtype,
                device=device,
            )
            self._features = ContextFeatures(projection, paged, at_once=features_at_once)
            taps = TapWriter(projection.target_layer_ids, self._features.write)
        self._passes = passes_of(taps)
        self._on_close = on_close

    @classmethod
    def of_decoder(
        cls,
        decoder: Decoder,
        config: DecoderConfig,
        *,
        num_pages: int,
        page_tokens: int = 16,
        projection: ContextProjection | None = None,
        max_context_tokens: int | None = None,
        gpu: GpuSettings | None = None,
    ) -> TargetEngine:
        """Uses our own kernels if they support the decoder, otherwise PyTorch's operators.

        `gpu`: our kernels on the decoder's GPU; None: native CPU kernels or PyTorch's operators.
        """

        def passes_of(taps: TapWriter | None) -> DecoderPasses:
            if gpu is not None:
                return GpuPasses(
                    decoder,
                    gpu,
                    num_pages=num_pages,
                    page_tokens=page_tokens,
                    max_context_tokens=longest_context(config, num_pages, page_tokens, max_context_tokens),
                    taps=taps,
                )
            native = native_decoder(decoder)
            if native is not None:
                return NativePasses(native, num_pages=num_pages, page_tokens=page_tokens, taps=taps)
            return TorchPasses(decoder, num_pages=num_pages, page_tokens=page_tokens, taps=taps)

        return cls(
            passes_of,
            config,
            dtype=next(decoder.parameters()).dtype,
            device=device_of(decoder),
            num_pages=num_pages,
            page_tokens=page_tokens,
            projection=projection,
            max_context_tokens=max_context_tokens,
            features_at_once=gpu is not None,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def native(self) -> bool:
        """Whether the whole decoder runs in our native CPU kernels."""
        return isinstance(self._passes, NativePasses)

    @property
    def computed_by(self) -> str:
        """Describes for people what computes the target, and on which device."""
        return self._passes.computed_by

    def prepare(self, requests: int) -> None:
        """On a GPU, compiles and records what steps of up to `requests` sequences need, so that neither
        serving nor profiling has to wait for it. No pass may run meanwhile."""
        if isinstance(self._passes, GpuPasses):
            self._passes.prepare(requests)

    def close(self) -> None:
        """No pass may follow."""
        self._on_close()

    @torch.inference_mode()
    def forward(self, runs: Sequence[Run]) -> Tensor:
        """Computes the runs and stores their keys, values and features.

        Returns float32 logits [sum of logit_rows, vocab] in the order of the runs, on the engine's device;
        the next pass may overwrite them.
        """
        return self._passes.forward(runs, build_batch(runs, page_tokens=self.page_tokens))

    def read_features(self, pages: Sequence[int], start: int, end: int) -> Tensor:
        """Context features of positions [start, end): [end - start, feature_size]; feature_size is 0 without
        a projection."""
        return self.read_features_of([(pages, start, end)])[0]

    @torch.inference_mode()
    def read_features_of(self, spans: Sequence[FeatureSpan]) -> list[Tensor]:
        """The same for many sequences in one read, on the engine's device."""
        if self._features is None:
            return [torch.zeros((end - start, 0), dtype=self._dtype) for _, start, end in spans]
        slots = [slots_of(pages, start, end, self.page_tokens) for pages, start, end in spans]
        if len(slots) == 1:
            return [self._features.read(to_device(slots[0], self.device))]
        rows = self._features.read(to_device(torch.cat(slots), self.device))
        return list(torch.split(rows, [len(one) for one in slots]))


def longest_context(config: DecoderConfig, num_pages: int, page_tokens: int, limit: int | None) -> int:
    """Tokens of the longest sequence that a cache of `num_pages` can hold; page 0 is not for sequences."""
    return min(config.max_context_tokens, (num_pages - 1) * page_tokens, limit or 2**62)
