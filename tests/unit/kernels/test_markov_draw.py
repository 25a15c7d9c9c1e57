"""The native Markov loop against the operators it stands for, position by position."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dspark_core.algorithms.coupling import sample_coupled_sparse
from dspark_core.algorithms.sampling import SamplingRows, draw_tokens, target_probabilities
from dspark_core.kernels.draft import DraftMode, DraftRowStruct, DrawnBlocks, MarkovDraw
from dspark_core.kernels.library import Format, Kernels
from dspark_core.kernels.matrix import NativeMatrix
from dspark_core.records import MAX_SEED, SamplingParams

TARGET_VOCAB, RANK, BLOCK = 6000, 8, 5
PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=0.2, top_p=0.9),
    SamplingParams(temperature=2.0, top_k=7, top_p=0.8),
    SamplingParams(temperature=0.7, min_p=0.1),
    SamplingParams(temperature=1e-30),
    SamplingParams(top_p=0.01),
)


class Case:
    """A head, base logits and, unless the vocabulary is whole, the target ids of its entries."""

    def __init__(self, kernels: Kernels, vocab: int, dtype: torch.dtype, rows: int) -> None:
        generator = torch.Generator().manual_seed(vocab)
        self.w1 = torch.randn(TARGET_VOCAB, RANK, generator=generator).to(dtype)
        w2 = torch.randn(vocab, RANK, generator=generator)
        kind = Format.FLOAT32 if dtype is torch.float32 else Format.BFLOAT16
        matrix = NativeMatrix(kernels, w2, kind)
        self.w2 = matrix.dequantize()
        self.ids = torch.randperm(TARGET_VOCAB, generator=generator)[:vocab]
        self.base = torch.randn(rows, BLOCK, vocab, generator=generator) * 3
        self.anchors = torch.randint(0, TARGET_VOCAB, (rows,), generator=generator)
        self.uniforms = torch.rand(rows, BLOCK, dtype=torch.float64, generator=generator)
        self.hidden = torch.zeros(rows, BLOCK, 4, dtype=dtype)  # not looked at where logits are given
        self._draw = MarkovDraw(kernels, self.w1, matrix, self.ids)

    def draw(self, rows: Sequence[DraftRowStruct], *, only: slice = slice(None)) -> DrawnBlocks:
        logits, anchors = self.base[only].clone(), self.anchors[only]
        return self._draw(self.hidden[only], anchors, rows, self.uniforms[only], 64, logits=logits)

    def logits(self, position: int, previous: torch.Tensor) -> torch.Tensor:
        return self.base[:, position] + self.w1[previous].float() @ self.w2.T


def row(params: SamplingParams, mode: DraftMode, position: int = 9) -> DraftRowStruct:
    return DraftRowStruct(
        params.top_p, params.seed or 0, position, params.temperature, params.min_p, params.top_k, mode
    )


# Narrower than the proposal, than a vector, with a remainder, and wide.
@pytest.mark.parametrize("vocab", [3, 13, 70, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_rows_take_the_most_likely_token(kernels: Kernels, vocab: int, dtype: torch.dtype) -> None:
    case = Case(kernels, vocab, dtype, rows=14)
    greedy = [row(SamplingParams(temperature=0.0), DraftMode.GREEDY)] * 14
    drawn = case.draw(greedy)
    assert drawn.proposal_ids is None
    previous = case.anchors
    for position in range(BLOCK):
        logits = case.logits(position, previous)
        previous = drawn.token_ids[:, position]
        chosen = (case.ids == previous[:, None]).int().argmax(dim=-1, keepdim=True)
        # Sums of another order may swap what is equal but for rounding.
        torch.testing.assert_close(logits.gather(1, chosen)[:, 0], logits.amax(dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("vocab", [3, 70, 1000, 5000])
@pytest.mark.parametrize("mode", [DraftMode.UNIFORM, DraftMode.COUPLED])
def test_sampled_rows_draw_from_what_they_declare(kernels: Kernels, vocab: int, mode: DraftMode) -> None:
    case, params = Case(kernels, vocab, torch.float32, rows=2 * len(PARAMS)), PARAMS * 2
    seeds = torch.tensor([MAX_SEED - index for index in range(len(params))])
    rows = [row(p, mode) for p in params]
    for one, seed in zip(rows, seeds.tolist(), strict=True):
        one.seed = seed
    drawn = case.draw(rows)
    assert drawn.proposal_ids is not None
    assert drawn.proposal_probs is not None
    previous = case.anchors
    for position in range(BLOCK):
        ids, probs = drawn.proposal_ids[:, position], drawn.proposal_probs[:, position]
        top = case.logits(position, previous).topk(min(64, vocab), dim=-1)
        expected = target_probabilities(top.values, SamplingRows.from_params(params))
        assert ids.sort(dim=-1).values.tolist() == case.ids[top.indices].sort(dim=-1).values.tolist()
        torch.testing.assert_close(probs, expected, rtol=1e-3, atol=1e-5)
        previous = drawn.token_ids[:, position]
        if mode is DraftMode.UNIFORM:
            column = draw_tokens(probs, case.uniforms[:, position])
            assert previous.tolist() == ids.gather(1, column[:, None])[:, 0].tolist()
        else:
            places = torch.full_like(seeds, 9 + position)
            assert previous.tolist() == sample_coupled_sparse(ids, probs, seeds, places).tolist()


def test_a_row_does_not_depend_on_its_batch(kernels: Kernels) -> None:
    case = Case(kernels, 1000, torch.bfloat16, rows=15)
    rows = [row(PARAMS[index % len(PARAMS)], DraftMode(index % 3)) for index in range(15)]
    together = case.draw(rows)
    for index in range(15):
        one = slice(index, index + 1)
        alone = case.draw(rows[one], only=one)
        assert torch.equal(alone.token_ids[0], together.token_ids[index])


def test_equal_logits_fill_a_proposal_once_each(kernels: Kernels) -> None:
    case = Case(kernels, 1000, torch.float32, rows=1)
    zeros = NativeMatrix(kernels, torch.zeros(1000, RANK), Format.FLOAT32)
    flat = MarkovDraw(kernels, case.w1, zeros, None)
    drawn = flat(
        torch.zeros(1, 1, 4),
        case.anchors,
        [row(PARAMS[0], DraftMode.UNIFORM)],
        case.uniforms,
        64,
        logits=torch.zeros(1, 1, 1000),
    )
    assert drawn.proposal_ids is not None
    assert len(set(drawn.proposal_ids.flatten().tolist())) == 64
    assert drawn.proposal_probs is not None
    assert drawn.proposal_probs.flatten().tolist() == pytest.approx([1 / 64] * 64)


def test_rows_that_do_not_fit_the_logits_are_refused(kernels: Kernels) -> None:
    case = Case(kernels, 70, torch.float32, rows=2)
    with pytest.raises(ValueError, match="1 rows and 2 anchors"):
        case.draw([row(PARAMS[0], DraftMode.GREEDY)])


# A whole number of vectors, with a remainder, and less than one.
@pytest.mark.parametrize("size", [32, 42, 6])
@pytest.mark.parametrize("sees_tokens", [True, False])
def test_head_and_confidences_are_the_operators(kernels: Kernels, size: int, sees_tokens: bool) -> None:
    rows, vocab = 3, 200
    case = Case(kernels, vocab, torch.float32, rows)
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randn(rows, BLOCK, size, generator=generator)
    head = torch.randn(vocab, size, generator=generator)
    weights = torch.randn(size + (RANK if sees_tokens else 0) + 1, generator=generator)
    draw = MarkovDraw(
        kernels,
        case.w1,
        NativeMatrix(kernels, case.w2, Format.FLOAT32),
        case.ids,
        head=NativeMatrix(kernels, head, Format.FLOAT32),
        confidence=weights,
    )
    case.base = hidden @ head.T
    drawn = draw(
        hidden,
        case.anchors,
        [row(SamplingParams(temperature=0.0), DraftMode.GREEDY)] * rows,
        case.uniforms,
        64,
    )
    assert drawn.confidence_logits is not None
    previous = case.anchors
    for position in range(BLOCK):
        seen = hidden[:, position]
        if sees_tokens:
            seen = torch.cat((seen, case.w1[previous]), dim=-1)
        expected = seen @ weights[:-1] + weights[-1]
        torch.testing.assert_close(drawn.confidence_logits[:, position], expected, rtol=1e-4, atol=1e-4)
        chosen = case.ids[case.logits(position, previous).argmax(dim=-1)]
        previous = drawn.token_ids[:, position]
        assert previous.tolist() == chosen.tolist()


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    case = Case(kernels, 70, torch.float32, rows=1)
    rows = [row(PARAMS[0], DraftMode.GREEDY)]
    w2 = NativeMatrix(kernels, case.w2, Format.FLOAT32)
    with pytest.raises(ValueError, match="no head for hidden states of 4 values"):
        MarkovDraw(kernels, case.w1, w2, None)(case.hidden, case.anchors, rows, case.uniforms, 64)
    with pytest.raises(ValueError, match=r"must be torch\.float32, got torch\.bfloat16"):
        MarkovDraw(kernels, case.w1, w2, None)(case.hidden.bfloat16(), case.anchors, rows, case.uniforms, 64)
    odd = MarkovDraw(kernels, case.w1, w2, None, confidence=torch.zeros(7))
    with pytest.raises(ValueError, match="7 confidence weights"):
        odd(case.hidden, case.anchors, rows, case.uniforms, 64, logits=case.base.clone())
