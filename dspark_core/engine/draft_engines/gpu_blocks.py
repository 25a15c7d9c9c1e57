"""The engine of DSpark drafters on a GPU: new context, backbone, Markov loop and confidences in one pass.

A pass consists of some hundred small kernels; with CUDA graphs, recorded per batch size, it is one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from dspark_core.algorithms.calibration import ConfidenceScaling
from dspark_core.algorithms.coupling import sample_coupled_sparse
from dspark_core.algorithms.sampling import draw_tokens, greedy_tokens, target_probabilities
from dspark_core.algorithms.transfer import to_device
from dspark_core.engine.devices import device_of
from dspark_core.engine.draft_engines.base import (
    Appended,
    ContextDraftEngine,
    EngineArguments,
    read_together,
)
from dspark_core.engine.draft_engines.confidences import Confidences
from dspark_core.engine.draft_engines.draft_context import ContextTensors
from dspark_core.engine.draft_engines.draft_inputs import DraftInputs, DraftShape, fixed_values, pack_draft
from dspark_core.engine.draft_engines.draft_sampling import PROPOSAL_TOKENS
from dspark_core.engine.gpu.attention import RaggedAttention, RaggedRuns
from dspark_core.engine.gpu.recorded import Outputs, RecordedPasses
from dspark_core.engine.gpu.settings import GpuSettings
from dspark_core.engine.protocols import DraftBlock, DraftItem, SparseDistribution
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.records import Verification


def computes(drafter: DSparkDrafter) -> bool:
    """Whether this engine supports the drafter. Not MoE: the host would have to know each expert's tokens."""
    return drafter.config.moe is None


class GpuDraftEngine(ContextDraftEngine):
    def __init__(
        self,
        drafter: DSparkDrafter,
        settings: GpuSettings,
        *,
        confidence_scaling: ConfidenceScaling | None = None,
        **arguments: Unpack[EngineArguments],
    ) -> None:
        """`confidence_scaling` corrects the confidence logit of each position; None: used unchanged."""
        config = drafter.config
        super().__init__(
            config,
            dtype=drafter.norm.weight.dtype,
            device=device_of(drafter),
            context_window=config.context_window,
            room=config.block_size,
            **arguments,
        )
        self._drafter = drafter
        self._kernels, self._grid = settings.kernels, settings.grid
        self._block = config.block_size
        self._tile_queries = self._kernels.tile_queries(
            self._block,
            group=config.backbone.num_heads // config.backbone.num_kv_heads,
            head_dim=config.backbone.head_dim,
            value_bytes=self._dtype.itemsize,
        )
        self._windows = [None] * config.backbone.num_layers
        self._tensors = ContextTensors(config.backbone, self._context, self._dtype, self.device)
        self._confidences = Confidences(confidence_scaling, self.device)
        rows = max(self._grid.requests) * (self._block + 1)
        size = config.backbone.hidden_size
        self._features = torch.zeros((rows, size), dtype=self._dtype, device=self.device)
        self._new: tuple[Sequence[Appended], Tensor] | None = None
        self._graphs: RecordedPasses[DraftShape] | None = None
        if settings.recorder is not None:
            largest = self._shape(max(self._grid.requests), greedy=False)
            values = fixed_values(largest) + largest.requests * self._max_pages()
            self._graphs = RecordedPasses(
                settings.recorder, name="draft passes", input_values=values, device=self.device
            )

    def prepare(self) -> None:
        if self._graphs is not None:
            counts = sorted(self._grid.requests, reverse=True)
            shapes = [self._shape(n, greedy=greedy) for n in counts for greedy in (False, True)]
            self._graphs.prepare(shapes, self._compute)

    def _store(self, appended: Sequence[Appended], features: Tensor) -> None:
        # The draft pass that follows also computes their keys and values.
        self._new = appended, features

    def _draft(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        greedy = all(item.sampling.greedy for item in items)
        fitting = [count for count in self._grid.requests if count >= len(items)]
        recorded = self._graphs if fitting else None
        shape = self._shape(fitting[0] if recorded else len(items), greedy=greedy)
        appended = self._take_new(shape.features)
        drawn = None
        if not greedy:
            drawn = torch.rand((len(items), self._block), dtype=torch.float64, generator=self._generator)
        values = pack_draft(items, appended, self._context, shape, drawn)
        if recorded is None:
            outputs = self._compute(to_device(values, self.device), shape)
        else:
            outputs = recorded.run(shape, values, self._compute)
        token_ids, confidences, *proposals = (output[: len(items)] for output in outputs)
        ids, rows = read_together(token_ids, confidences)
        if self._drafter.confidence_head is None:
            rows = [[] for _ in items]
        return self._blocks(items, ids, rows, _distributions(items, proposals))

    def _shape(self, requests: int, *, greedy: bool) -> DraftShape:
        """A shape with room for the context that a verified block and its bonus token add per sequence."""
        return DraftShape(
            requests=requests,
            features=min(requests * (self._block + 1), len(self._features)),
            block=self._block,
            tile_queries=self._tile_queries,
            greedy=greedy,
        )

    def _max_pages(self) -> int:
        """Most pages that one sequence can have."""
        window = self.geometry.context_window
        longest = self._drafter.config.backbone.max_context_tokens if window is None else window
        pages = -(-(longest + self._block) // self._context.page_tokens)
        return min(pages, self._context.num_pages)

    def _take_new(self, room: int) -> Sequence[Appended]:
        """Returns the new context for the coming pass. If it exceeds `room` rows, computes it now instead."""
        new, self._new = self._new, None
        if new is None:
            return ()
        appended, features = new
        if len(features) <= room:
            self._features[: len(features)].copy_(features)
            return appended
        slots = [self._context.slots(one.item.sequence_id, one.start, one.end) for one in appended]
        positions = [torch.arange(one.start, one.end) for one in appended]
        self._append_rows(
            features, to_device(torch.cat(positions), self.device), to_device(torch.cat(slots), self.device)
        )
        return ()

    def _append_rows(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        """Writes keys and values of features [rows, d] at positions [rows] to slots [rows] of every layer."""
        pairs = self._drafter.context_keys_values(features, positions)
        for layer, (keys, values) in enumerate(pairs):
            self._kernels.store(keys, values, self._tensors.keys[layer], self._tensors.values[layer], slots)

    @torch.inference_mode()
    def _compute(self, values: Tensor, shape: DraftShape) -> Outputs:
        """values: as laid out by `pack_draft`. Returns token ids, confidences and, unless all are greedy, the
        proposal distributions: ids and probabilities [requests, block, k]."""
        inputs = DraftInputs.of(values, shape)
        features = self._features[: shape.features]
        self._append_rows(features, inputs.feature_positions, inputs.feature_slots)
        where = RaggedRuns(
            inputs.runs,
            inputs.tiles,
            inputs.pages,
            shape.tile_queries,
            self._context.page_tokens,
            two_way=True,
        )
        keys, kept = self._tensors.keys, self._tensors.values
        attend = RaggedAttention(
            self._kernels, list(keys), list(kept), self._windows, inputs.block_slots, where
        )
        hidden = self._drafter.block_hidden(inputs.anchors, inputs.positions, attend)
        sampler = _MixedSampler(inputs, self._drafter.draft_vocab_ids, greedy=shape.greedy)
        drawn = self._drafter.draw(inputs.anchors, hidden, sampler)
        logits = drawn.confidence_logits
        confidences = torch.zeros_like(inputs.uniforms) if logits is None else self._confidences(logits)
        return drawn.token_ids, confidences, *sampler.proposals()


class _MixedSampler:
    """Computes greedy, coupled and independent draws for every request and then selects, so that the recorded
    computation does not depend on the requests' parameters."""

    def __init__(self, inputs: DraftInputs, token_ids: Tensor | None, *, greedy: bool) -> None:
        """`token_ids` [draft vocab]: the target's id of each draft vocabulary entry; None: the same ids."""
        self._inputs = inputs
        self._token_ids = token_ids
        self._greedy = greedy
        self._rows = inputs.sampling_rows()
        self._drawn_from: list[tuple[Tensor, Tensor]] = []

    def __call__(self, position: int, logits: Tensor) -> Tensor:
        """logits [requests, draft vocab] -> draft vocabulary ids [requests]."""
        likeliest = greedy_tokens(logits)
        if self._greedy:
            return likeliest
        inputs = self._inputs
        top = logits.float().topk(min(PROPOSAL_TOKENS, logits.shape[-1]), dim=-1)
        probabilities = target_probabilities(top.values, self._rows)  # [requests, k]
        token_ids = top.indices if self._token_ids is None else self._token_ids[top.indices]
        self._drawn_from.append((token_ids, probabilities))
        column = draw_tokens(probabilities, inputs.uniforms[:, position])
        # The noise is keyed by the target's token ids, so that drafter and target use the same.
        places = inputs.positions + (1 + position)
        shared = sample_coupled_sparse(token_ids, probabilities, inputs.seeds, places)
        shared_column = (token_ids == shared[:, None]).int().argmax(dim=-1)
        column = torch.where(inputs.coupled > 0, shared_column, column)
        sampled = top.indices.gather(1, column[:, None]).squeeze(1)
        return torch.where(inputs.greedy > 0, likeliest, sampled)

    def proposals(self) -> Outputs:
        if not self._drawn_from:
            return ()
        ids, probabilities = zip(*self._drawn_from, strict=True)
        return torch.stack(ids, dim=1), torch.stack(probabilities, dim=1)


def _distributions(items: Sequence[DraftItem], proposals: Sequence[Tensor]) -> dict[int, SparseDistribution]:
    """Distributions of the items verified by rejection, by item index. Copies, since outputs are reused."""
    if not proposals:
        return {}
    ids, probabilities = (proposal.clone() for proposal in proposals)
    return {
        index: SparseDistribution(token_ids=ids[index], probabilities=probabilities[index])
        for index, item in enumerate(items)
        if not item.sampling.greedy and item.verification is Verification.REJECTION
    }
