"""Losses, against the golden terms and against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark_core.models.layers import soft_cap
from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.dropout import drop_spans
from dspark_core.training.losses import OUTSIDE_DRAFT_VOCAB, position_weights
from dspark_core.training.packing import draw_anchors, pack
from dspark_core.training.positions import draw_positions
from dspark_core.training.recipe import LossConfig
from dspark_core.training.vocabulary_loss import VocabularyLoss, VocabularyRows
from tests.unit.models.dspark_golden import golden, golden_drafter
from tests.unit.models.teacher_forcing import teacher_forced
from tests.unit.training.loss_definition import block_losses, target_probabilities
from tests.unit.training.training_sequences import golden_anchors, golden_sequences, random_sequence


@pytest.mark.parametrize("name", ["dspark_vanilla", "dflash"])
def test_training_forward_and_loss_terms_match_the_golden_ones(name: str) -> None:
    expected, drafter = golden(name)["training"], golden_drafter(name)
    batch = pack(golden_sequences(), golden_anchors(), drafter.config.block_size, None)
    head = drafter.markov_head
    with torch.no_grad():
        hidden = packed_hidden(drafter, batch)
        logits, confidence = teacher_forced(drafter, hidden, batch.previous_ids)
        weights = (batch.counted * position_weights(7, decay=4.0)).flatten()
        rows = VocabularyRows(
            target_hidden=batch.target_hidden.flatten(0, 1),
            log_normalizers=batch.log_normalizers.flatten(),
            labels=batch.labels.flatten(),
            cross_entropy_scale=weights,
            distance_scale=weights,
        )
        bias: tuple[Tensor, Tensor] | tuple[()] = ()
        if head is not None:
            latents = head.block_latents(head.embed(batch.previous_ids), hidden)
            bias = (latents.flatten(0, 1), head.markov_w2.weight)
        losses = VocabularyLoss(slice_rows=20)(hidden.flatten(0, 1), drafter.lm_head, rows, *bias)

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
    terms = {"ce": losses.cross_entropy, "l1": losses.distance}
    if confidence is not None:
        terms["confidence"] = F.binary_cross_entropy_with_logits(
            confidence.flatten(), losses.acceptance, reduction="none"
        )
    for key in ("ce", "l1", "confidence"):
        numerator = float((terms[key] * weights).sum()) if key in terms else 0.0
        denominator = float(weights.sum()) if key in terms else 0.0
        assert numerator == pytest.approx(expected["loss_terms"][f"{key}_loss_num"], rel=1e-4)
        assert denominator == pytest.approx(expected["loss_terms"][f"{key}_loss_den"], rel=1e-4)


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


@settings(max_examples=30)
@given(
    rows=st.integers(1, 9),
    slice_rows=st.integers(1, 10),
    with_bias=st.booleans(),
    softcap=st.sampled_from([None, 1.5]),
    seed=st.integers(0, 99),
)
def test_the_fused_loss_and_its_gradients_equal_the_definition(
    rows: int, slice_rows: int, with_bias: bool, softcap: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    vocab, size, rank = 12, 6, 3
    hidden, latent = torch.randn(rows, size, requires_grad=True), torch.randn(rows, rank, requires_grad=True)
    head, bias_weight = torch.randn(vocab, size), torch.randn(vocab, rank, requires_grad=True)
    target_hidden, labels = torch.randn(rows, size), torch.randint(-1, vocab, (rows,))
    normalizers = soft_cap(target_hidden @ head.T, softcap).logsumexp(dim=-1) + 0.2 * torch.rand(rows)
    weights = torch.rand(rows)
    logits = soft_cap(hidden @ head.T, softcap) + (latent @ bias_weight.T if with_bias else 0)
    expected = block_losses(
        logits[None],
        None,
        labels[None],
        target_probabilities(target_hidden, head, normalizers, softcap)[None],
        weights[None],
    )
    trained = (hidden, latent, bias_weight) if with_bias else (hidden,)
    total = 0.3 * expected.cross_entropy.numerator + 0.7 * expected.distance.numerator
    gradients = torch.autograd.grad(total, trained)
    given_rows = VocabularyRows(
        target_hidden=target_hidden,
        log_normalizers=normalizers,
        labels=labels,
        cross_entropy_scale=0.3 * weights * (labels != OUTSIDE_DRAFT_VOCAB),
        distance_scale=0.7 * weights,
    )
    bias = (latent, bias_weight) if with_bias else (None, None)
    found = VocabularyLoss(slice_rows, softcap)(hidden, head, given_rows, *bias)
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.acceptance, expected.acceptance[0])
    for ours, theirs in zip(torch.autograd.grad(2 * found.total, trained), gradients, strict=True):
        torch.testing.assert_close(ours, 2 * theirs, rtol=1e-4, atol=1e-5)


def test_sampled_positions_weigh_the_same_on_average() -> None:
    sequences = [random_sequence(60, 5, seed=i) for i in range(4)]
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    anchors = [
        draw_anchors(sequence, 50, generator)
        for sequence, generator in zip(sequences, generators, strict=True)
    ]
    batch = pack(sequences, anchors, 7, None)
    every = draw_positions(batch, LossConfig(loss_decay=1.5), generators)
    assert every.index.tolist() == batch.counted.flatten().nonzero()[:, 0].tolist()
    exact = torch.zeros(7).index_add(0, every.index % 7, every.weights)
    sampled, rows = torch.zeros(7), 0
    for _ in range(50):
        drawn = draw_positions(batch, LossConfig(loss_decay=1.5, sample_below=0.5), generators)
        assert float(drawn.weights.min()) >= 0.5
        sampled.index_add_(0, drawn.index % 7, drawn.weights / 50)
        rows += len(drawn.index)
    torch.testing.assert_close(sampled, exact, rtol=0.15, atol=0.3)
    assert rows / 50 < 0.5 * len(every.index)


def test_dropout_keeps_the_mean_and_drops_the_rate() -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    spans = [slice(0, 301), slice(301, 1000)]
    found = drop_spans(torch.ones(1000, 7), spans, 0.1, generators)
    assert float((found == 0).float().mean()) == pytest.approx(0.1, abs=0.015)
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    alone = drop_spans(torch.ones(699, 7), [slice(0, 699)], 0.1, [torch.Generator().manual_seed(1)])
    assert torch.equal(alone, found[301:])
