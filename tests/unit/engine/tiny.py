"""A tiny random target, its naive greedy decoding, and scripted drafters for engine tests."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.gpu.settings import GpuSettings
from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem, DraftReply, SparseDistribution
from dspark_core.engine.rounds.loop import BatchLimits, RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.target.context_features import ContextProjection
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.errors import DraftUnavailableError
from dspark_core.models.config import DecoderConfig, Family
from dspark_core.models.decoder import Decoder
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions, Verification

VOCAB = 61
CONFIG = DecoderConfig(
    family=Family.QWEN3,
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_context_tokens=256,
    qk_norm=True,
)
TAPS = (0, 2)


def tiny_decoder(seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(CONFIG).eval()
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)  # large enough for a varied argmax
    return decoder


def tiny_projection() -> ContextProjection:
    torch.manual_seed(1)
    return ContextProjection(
        project=nn.Linear(len(TAPS) * CONFIG.hidden_size, 6, bias=False),
        target_layer_ids=TAPS,
        feature_size=6,
    )


def tiny_engine(
    decoder: Decoder | None = None,
    *,
    num_pages: int = 64,
    page_tokens: int = 4,
    projection: ContextProjection | None = None,
    gpu: GpuSettings | None = None,
) -> TargetEngine:
    return TargetEngine.of_decoder(
        decoder or tiny_decoder(),
        CONFIG,
        num_pages=num_pages,
        page_tokens=page_tokens,
        projection=projection or tiny_projection(),
        gpu=gpu,
    )


def causal_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: one whole sequence without a cache."""
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


@torch.inference_mode()
def naive_logits(decoder: Decoder, token_ids: Sequence[int]) -> Tensor:
    """[tokens, vocab]"""
    ids = torch.tensor(token_ids)
    return decoder.logits(decoder(ids, torch.arange(len(ids)), causal_attend, ()).hidden)


def naive_greedy(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(naive_logits(decoder, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


class ScriptedDrafts:
    """A `DraftSource` that drafts known continuations, with errors at a given rate.

    Keeps the features it was sent and, like a real drafter, fails if a context would have a hole.
    """

    def __init__(
        self,
        continuations: dict[str, list[int]] | None = None,
        *,
        prompt_lengths: dict[str, int] | None = None,
        block_size: int = 4,
        error_rate: float = 0.3,
        window: int | None = None,
        confidences: bool = True,
        apart: bool = False,
    ) -> None:
        """`apart`: drafts on its own thread, in the order of the requests."""
        self.continuations = continuations or {}
        self.prompt_lengths = prompt_lengths or {}
        self.error_rate = error_rate
        self.confidences = confidences
        self.random = random.Random(0)
        self.features: dict[str, dict[int, Tensor]] = {}
        self.items: list[DraftItem] = []
        self.released: list[str] = []
        self.fail = False
        self._worker = ThreadPoolExecutor(1) if apart else None
        self._generation = 0
        self._geometry = DraftGeometry(
            fingerprint="scripted",
            block_size=block_size,
            feature_size=6,
            vocab_size=VOCAB,
            context_window=window,
        )

    @property
    def geometry(self) -> DraftGeometry:
        return self._geometry

    @property
    def apart(self) -> bool:
        return self._worker is not None

    @property
    def connected(self) -> bool:
        return True

    @property
    def generation(self) -> int:
        return self._generation

    def lose_state(self) -> None:
        if self._worker is not None:
            self._worker.submit(self._lose_state).result()  # between drafts, not during one
        else:
            self._lose_state()

    def _lose_state(self) -> None:
        self.features.clear()
        self._generation += 1

    def release(self, sequence_ids: Sequence[str]) -> None:
        self.released.extend(sequence_ids)

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        future: Future[DraftReply] = Future()
        if self.fail:
            future.set_exception(DraftUnavailableError("scripted failure"))
            return future
        self.items.extend(items)
        if self._worker is not None:
            return self._worker.submit(self._blocks, items, self._generation)
        future.set_result(DraftReply([self._block(item) for item in items]))
        return future

    def _blocks(self, items: Sequence[DraftItem], generation: int) -> DraftReply:
        if generation != self._generation:  # the context they continue is lost
            return DraftReply([DraftBlock(item.sequence_id, needs_context=True) for item in items])
        return DraftReply([self._block(item) for item in items])

    def _block(self, item: DraftItem) -> DraftBlock:
        held = self.features.setdefault(item.sequence_id, {})
        for offset, row in enumerate(item.features):
            held[item.features_start + offset] = row.clone()
        window = self._geometry.context_window or item.anchor_position
        needed = range(max(0, item.anchor_position - window), item.anchor_position)
        assert all(position in held for position in needed), "the context has a hole"
        known = self.continuations.get(item.sequence_id, [])
        done = item.anchor_position + 1 - self.prompt_lengths.get(item.sequence_id, 0)
        block = [
            known[done + k]
            if done + k < len(known) and self.random.random() >= self.error_rate
            else self.random.randrange(VOCAB)
            for k in range(self._geometry.block_size)
        ]
        distribution = None
        if item.verification is Verification.REJECTION and not item.sampling.greedy:
            # Really drawn from a uniform proposal over the vocabulary.
            block = [self.random.randrange(VOCAB) for _ in block]
            distribution = SparseDistribution(
                token_ids=torch.arange(VOCAB).repeat(len(block), 1),
                probabilities=torch.full((len(block), VOCAB), 1.0 / VOCAB),
            )
        confidences = tuple(0.8 for _ in block) if self.confidences else ()
        return DraftBlock(item.sequence_id, tuple(block), confidences, distribution)


def make_loop(
    engine: TargetEngine | None = None,
    drafts: ScriptedDrafts | None = None,
    planner: object | None = None,
    clock: Callable[[], float] = time.perf_counter,
    cohorts: int | None = None,
    **limits: int,
) -> RoundLoop:
    engine = engine or tiny_engine()
    drafting = Drafting(drafts, engine, deadline_seconds=30.0, clock=clock) if drafts else None
    return RoundLoop(
        engine,
        planner or FullPlanSource(),  # type: ignore[arg-type]
        drafting=drafting,
        cohorts=cohorts,
        limits=BatchLimits(**limits) if limits else None,
        generator=torch.Generator().manual_seed(0),
        clock=clock,
    )


def request(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int | None = 12,
    *,
    sampling: SamplingParams | None = None,
    speculation: SpeculationOptions | None = None,
    stop: tuple[int, ...] = (),
) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        max_tokens=max_tokens,
        sampling=sampling or SamplingParams(temperature=0.0),
        speculation=speculation or SpeculationOptions(),
        stop_token_ids=stop,
    )


def run(loop: RoundLoop, requests: Sequence[GenerateRequest], max_rounds: int = 2000) -> dict[str, list[int]]:
    """Submits all requests and steps until done; returns the generated tokens by request."""
    for one in requests:
        loop.submit(one)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    for _ in range(max_rounds):
        if not loop.has_work:
            return tokens
        for output in loop.step():
            tokens[output.request_id].extend(output.chunk.token_ids)
    raise AssertionError(f"not finished after {max_rounds} rounds")


def prompts(count: int, *, seed: int = 0, longest: int = 30) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(VOCAB) for _ in range(source.randint(1, longest))] for _ in range(count)]
