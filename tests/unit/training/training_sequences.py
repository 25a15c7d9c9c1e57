"""Feature sequences of the golden fixtures and of random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dspark_core.models.decoder import Decoder
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.data.prefill import compute_packed
from dspark_core.training.features import FeatureSequence
from tests.unit.models.dspark_golden import golden, golden_target, run_target

GOLDEN_LAYERS = (1, 3, 5)


def compute_features(decoder: Decoder, conversation: Conversation, layers: Sequence[int]) -> FeatureSequence:
    """The target's view of one conversation, in a pass of its own."""
    [found] = compute_packed(decoder, [conversation], layers)
    return found


def golden_sequences() -> list[FeatureSequence]:
    """The two training rows, cut where the loss mask ends, as the answer does."""
    rows = golden("dspark_vanilla")["training"]
    sequences = []
    for token_ids, mask in zip(rows["input_ids"], rows["loss_mask"], strict=True):
        end = max(i for i, counted in enumerate(mask) if counted) + 1
        sequences.append(greedy_sequence(token_ids[:end], answer_start=mask.index(1)))
    return sequences


def golden_anchors() -> list[torch.Tensor]:
    rows = golden("dspark_vanilla")["training"]
    return [
        torch.tensor([anchor for anchor, real in zip(anchors, keep, strict=True) if real])
        for anchors, keep in zip(rows["anchors"], rows["keep"], strict=True)
    ]


def greedy_sequence(token_ids: list[int], answer_start: int) -> FeatureSequence:
    output = run_target(token_ids, GOLDEN_LAYERS)
    normalizers = golden_target().decoder.logits(output.hidden).float().logsumexp(dim=-1).detach()
    return FeatureSequence(torch.tensor(token_ids), answer_start, output.taps, output.hidden, normalizers)


def random_sequence(
    tokens: int, answer_start: int, *, taps: int = 8, size: int = 4, seed: int = 0
) -> FeatureSequence:
    generator = torch.Generator().manual_seed(seed)
    return FeatureSequence(
        token_ids=torch.randint(50, (tokens,), generator=generator),
        answer_start=answer_start,
        taps=torch.randn(tokens, taps, generator=generator),
        final=torch.randn(tokens, size, generator=generator),
        log_normalizers=torch.randn(tokens, generator=generator),
    )
