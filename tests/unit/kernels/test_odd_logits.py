"""Rows of logits with what is no number or is infinite, as a damaged checkpoint makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspark_core.kernels.coupling import sample_coupled
from dspark_core.kernels.draft import DraftMode, DraftRowStruct, DrawnBlocks, MarkovDraw
from dspark_core.kernels.library import Format, Kernels
from dspark_core.kernels.matrix import NativeMatrix
from dspark_core.kernels.rejection import accept_rejection
from dspark_core.records import SamplingParams

NAN, INF, ROWS = torch.nan, torch.inf, 40
LAWS = [
    SamplingParams(),
    SamplingParams(top_p=0.9),
    SamplingParams(temperature=0.3, top_k=50, top_p=0.5),
    SamplingParams(temperature=2.0, top_k=20),
    SamplingParams(min_p=0.05),
]


def coupled(kernels: Kernels, logits: Tensor, law: SamplingParams) -> list[int]:
    """ROWS draws from `logits` [vocab]."""
    seeds = torch.full((ROWS,), 3)
    rows = logits.expand(ROWS, -1)
    return sample_coupled(kernels, rows, [law] * ROWS, seeds, torch.arange(ROWS)).tolist()


def uniform(kernels: Kernels, logits: Tensor, law: SamplingParams) -> list[int]:
    """The same by rejection sampling without drafts."""
    none, uniforms = torch.zeros((0, 1)), torch.linspace(0, 1 - 2**-53, ROWS, dtype=torch.float64)
    rows, nothing = logits.expand(ROWS, -1), [0] * ROWS
    found = accept_rejection(kernels, rows, [law] * ROWS, [], none.long(), none, nothing, uniforms)
    return [token for _, token in found]


def proposed(kernels: Kernels, logits: Tensor, mode: DraftMode) -> DrawnBlocks:
    """Twenty candidates of one position, from `logits` [vocab]."""
    vocab = len(logits)
    matrix = NativeMatrix(kernels, torch.zeros(vocab, 8), Format.FLOAT32)
    draw = MarkovDraw(kernels, torch.zeros(vocab, 8), matrix, None)
    row = DraftRowStruct(top_p=0.9, seed=1, position=3, temperature=1.0, min_p=0.0, top_k=0, mode=int(mode))
    uniforms = torch.full((1, 1), 0.7, dtype=torch.float64)
    return draw(
        torch.zeros(1, 1, 4), torch.tensor([3]), [row], uniforms, 20, logits=logits[None, None].clone()
    )


# Before and behind the most likely one in its lane, in the remainder, and all but one.
@pytest.mark.parametrize("places", [[7], [300 - 16, 300 + 16], [999], [*range(300), *range(301, 1000)]])
@pytest.mark.parametrize("law", LAWS)
def test_no_number_is_an_impossible_token(kernels: Kernels, law: SamplingParams, places: list[int]) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    logits[300] = 4.0
    damaged, impossible = logits.clone(), logits.clone()
    damaged[places], impossible[places] = NAN, -INF
    assert coupled(kernels, damaged, law) == coupled(kernels, impossible, law)
    assert uniform(kernels, damaged, law) == uniform(kernels, impossible, law)


@pytest.mark.parametrize("vocab", [5, 1000])
@pytest.mark.parametrize(
    "values", [[NAN] * 5, [-INF] * 5, [-INF, NAN, NAN, -INF, NAN], [0, NAN, INF, 1, INF]]
)
@pytest.mark.parametrize("law", LAWS)
def test_without_a_finite_maximum_the_first_of_the_most_likely_is_drawn(
    kernels: Kernels, law: SamplingParams, values: list[float], vocab: int
) -> None:
    logits = torch.tensor(values * (vocab // 5))
    expected = [2 if INF in values else 0] * ROWS
    assert coupled(kernels, logits, law) == expected
    assert uniform(kernels, logits, law) == expected


@pytest.mark.parametrize("mode", [DraftMode.UNIFORM, DraftMode.COUPLED])
@pytest.mark.parametrize("damaged", [1, 18, 250, 990])
def test_candidates_of_drafts_are_numbers_first(kernels: Kernels, mode: DraftMode, damaged: int) -> None:
    generator = torch.Generator().manual_seed(damaged)
    logits = torch.randn(1000, generator=generator)
    # Lanes of the parts whose maxima bound the candidates end in these.
    places = torch.randperm(256, generator=generator)[:damaged]
    places = places // 16 * 48 + 32 + places % 16 if damaged < 256 else torch.arange(damaged)
    with_nan, without = logits.clone(), logits.clone()
    with_nan[places], without[places] = NAN, -INF
    found, expected = proposed(kernels, with_nan, mode), proposed(kernels, without, mode)
    for field in ("token_ids", "proposal_ids", "proposal_probs"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    assert found.proposal_ids is not None
    assert len(set(found.proposal_ids.flatten().tolist()) & set(range(1000))) == 20


@pytest.mark.parametrize("value", [NAN, -INF, INF])
def test_candidates_without_a_finite_maximum_have_a_law(kernels: Kernels, value: float) -> None:
    drawn = proposed(kernels, torch.full((1000,), value), DraftMode.UNIFORM)
    assert drawn.proposal_ids is not None
    assert drawn.proposal_probs is not None
    assert drawn.proposal_ids.flatten().tolist() == list(range(20))
    assert drawn.proposal_probs.flatten().tolist() == [1.0] + [0.0] * 19
    assert drawn.token_ids.tolist() == [[0]]
