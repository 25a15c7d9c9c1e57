"""Losses, against the golden terms and against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.losses import (
    OUTSIDE_DRAFT_VOCAB,
    block_losses,
    position_weights,
    target_probabilities,
)
from dspark_core.training.packing import pack
from tests.unit.models.dspark_golden import golden, golden_drafter
from tests.unit.training.training_sequences import golden_anchors, golden_sequences


@pytest.mark.parametrize("name", ["dspark_vanilla", "dflash"])
def test_training_forward_and_loss_terms_match_the_golden_ones(name: str) -> None:
    expected, drafter = golden(name)["training"], golden_drafter(name)
    batch = pack(golden_sequences(), golden_anchors(), drafter.config.block_size, None)
    with torch.inference_mode():
        logits, confidence = drafter.teacher_forced(packed_hidden(drafter, batch), batch.previous_ids)
        target = target_probabilities(batch.target_hidden, drafter.lm_head, batch.log_normalizers)
        weights = batch.counted * position_weights(7, decay=4.0)
        losses = block_losses(logits, confidence, batch.labels, target, weights)

    assert logits[2, 3, :16].tolist() == pytest.approx(expected["draft_logits_row"], rel=1e-4, abs=1e-5)
    if expected["conf"] is None:
        assert confidence is None
    else:
        assert confidence is not None
        assert confidence[:6].flatten().tolist() == pytest.approx(
            [value for row in expected["conf"] for value in row], rel=1e-4, abs=1e-5
        )
    kept = torch.tensor(expected["keep"], dtype=torch.bool)
    assert batch.counted.int().tolist() == torch.tensor(expected["eval_mask"])[kept].tolist()
    terms = {"ce": losses.cross_entropy, "l1": losses.distance, "confidence": losses.confidence}
    for key, term in terms.items():
        assert float(term.numerator) == pytest.approx(expected["loss_terms"][f"{key}_loss_num"], rel=1e-4)
        assert float(term.denominator) == pytest.approx(expected["loss_terms"][f"{key}_loss_den"], rel=1e-4)


def _random(seed: int = 0, vocab: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 3, vocab, generator=generator)
    target = torch.softmax(2 * torch.randn(4, 3, vocab, generator=generator), dim=-1)
    labels = torch.randint(vocab, (4, 3), generator=generator)
    weights = torch.rand(4, 3, generator=generator)
    return logits, target, labels, weights


def test_slices_add_up_to_the_whole() -> None:
    logits, target, labels, weights = _random()
    confidence = torch.randn(4, 3)
    whole = block_losses(logits, confidence, labels, target, weights)
    parts = [
        block_losses(logits[at], confidence[at], labels[at], target[at], weights[at])
        for at in (slice(0, 1), slice(1, 4))
    ]
    for name in ("cross_entropy", "distance", "confidence"):
        for side in ("numerator", "denominator"):
            total = sum(getattr(getattr(part, name), side) for part in parts)
            torch.testing.assert_close(total, getattr(getattr(whole, name), side))


def test_a_reduced_vocabulary_measures_the_distance_over_the_full_one() -> None:
    logits, target, labels, weights = _random(vocab=12)
    kept = torch.tensor([0, 2, 3, 5, 8, 9])
    full_logits = torch.full_like(logits, float("-inf"))
    full_logits[..., kept] = logits[..., kept]
    full = (torch.softmax(full_logits, dim=-1) - target).abs().sum(dim=-1)
    reduced = block_losses(logits[..., kept], None, labels * 0, target[..., kept], weights)
    torch.testing.assert_close(reduced.distance.numerator, (full * weights).sum())
    torch.testing.assert_close(reduced.acceptance, 1 - full / 2)


def test_tokens_outside_the_draft_vocabulary_leave_the_cross_entropy_alone() -> None:
    logits, target, labels, weights = _random()
    base = block_losses(logits, None, labels, target, weights)
    labels[1, 2] = OUTSIDE_DRAFT_VOCAB
    found = block_losses(logits, None, labels, target, weights)
    assert float(found.cross_entropy.denominator) == pytest.approx(float(weights.sum() - weights[1, 2]))
    assert float(found.cross_entropy.numerator) < float(base.cross_entropy.numerator)
    torch.testing.assert_close(found.distance.numerator, base.distance.numerator)


def test_a_perfect_drafter_has_no_distance_and_full_acceptance() -> None:
    _, target, labels, weights = _random()
    found = block_losses(target.log(), None, labels, target, weights)
    assert float(found.distance.mean()) == pytest.approx(0.0, abs=1e-5)
    torch.testing.assert_close(found.acceptance, torch.ones(4, 3))
    assert float(found.confidence.mean()) == 0.0


def test_the_confidence_target_gets_no_gradient_into_the_logits() -> None:
    logits, target, labels, weights = _random()
    logits.requires_grad_()
    confidence = torch.zeros(4, 3, requires_grad=True)
    block_losses(logits, confidence, labels, target, weights).confidence.numerator.backward()
    assert logits.grad is None
    assert confidence.grad is not None


def test_later_positions_weigh_less() -> None:
    assert position_weights(3, decay=2.0).tolist() == pytest.approx([1.0, 0.60653, 0.36788], rel=1e-4)
