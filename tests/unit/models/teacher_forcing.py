"""What a drafter says of blocks whose tokens are given, all positions at once: the definition that drawing
and training are held to."""

from __future__ import annotations

from torch import Tensor

from dspark_core.models.dspark import DSparkDrafter


def teacher_forced(
    drafter: DSparkDrafter, hidden: Tensor, previous_ids: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Logits [requests, block, draft vocab] and confidence logits [requests, block] when the
    token before position k is `previous_ids[:, k]` (the anchor first)."""
    logits, head = drafter.base_logits(hidden), drafter.markov_head
    if head is not None:
        logits = logits + head.markov_w2(head.block_latents(head.embed(previous_ids), hidden))
    return logits, drafter.confidence_logits(hidden, previous_ids)
