"""Native laws of target rows, draws from them and rejection sampling, against the PyTorch reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dspark_core.algorithms import rejection
from dspark_core.algorithms.rejection import draw_uniforms
from dspark_core.algorithms.sampling import SamplingRows, TargetLaws, target_probabilities, target_weights
from dspark_core.kernels.library import Kernels
from dspark_core.kernels.rejection import accept_rejection
from dspark_core.records import SamplingParams

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 20, 64, 500, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-9]),
    min_p=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
)


def drawn(kernels: Kernels, logits: Tensor, params: SamplingParams, uniforms: Tensor) -> Tensor:
    """One token of the row `logits` [vocab] for each of the uniforms."""
    count, none = len(uniforms), torch.zeros((0, 1))
    found = accept_rejection(
        kernels, logits.expand(count, -1), [params] * count, [], none.long(), none, [0] * count, uniforms
    )
    assert {accepted for accepted, _ in found} == {0}
    return torch.tensor([token for _, token in found])


# Vocabularies below, at and beyond a vector, and beyond a block of sums.
@settings(max_examples=150)
@given(
    params=PARAMS,
    vocab=st.sampled_from([1, 5, 16, 50, 1024, 1025, 4001]),
    spread=st.sampled_from([0.0, 0.5, 2.0, 12.0]),
    rounded=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_draws_invert_the_cumulative_sum_of_the_law(
    kernels: Kernels, params: SamplingParams, vocab: int, spread: float, rounded: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab, generator=generator) * spread
    if rounded:  # many ties, as bfloat16 logits have
        logits = logits.bfloat16().float()
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    uniforms = torch.cat((ends, torch.rand(60, generator=generator, dtype=torch.float64)))
    tokens = drawn(kernels, logits, params, uniforms)
    probabilities = target_probabilities(logits[None], SamplingRows.from_params([params]))[0].double()
    assert (probabilities[tokens] > 0).all()
    after = probabilities.cumsum(0) / probabilities.sum()
    before = after - probabilities
    slack = 2e-6  # of float32 exponentials
    assert (uniforms >= before[tokens] - slack).all()
    assert (uniforms <= after[tokens] + slack).all()


def test_impossible_logits_are_never_drawn(kernels: Kernels) -> None:
    logits = torch.full((3000,), -torch.inf)
    logits[[7, 1030, 2999]] = torch.tensor([1.0, 1.0, 1.0])
    tokens = drawn(kernels, logits, SamplingParams(), torch.linspace(0, 1 - 2**-53, 300, dtype=torch.float64))
    assert tokens.bincount(minlength=3000)[[7, 1030, 2999]].tolist() == pytest.approx([100] * 3, abs=1)


def rounds(
    generator: torch.Generator, vocab: int, lengths: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, and drafts drawn from laws near the target's, some of which cannot be right."""
    drafts, candidates = sum(lengths), 6
    logits = torch.randn(drafts + len(lengths), vocab, generator=generator) * 2
    request = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    own = logits[torch.arange(drafts) + request]
    q = torch.softmax(own + torch.randn(own.shape, generator=generator), dim=-1).topk(candidates, dim=-1)
    probabilities = q.values / q.values.sum(dim=-1, keepdim=True)
    probabilities[::5, -1] = 0.0  # padding
    probabilities /= probabilities.sum(dim=-1, keepdim=True)
    chosen = torch.multinomial(probabilities, 1, generator=generator)
    return logits, q.indices.gather(1, chosen).squeeze(1), q.indices, probabilities


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=0.6, top_k=40, top_p=0.9)])
def test_verdicts_are_the_references(kernels: Kernels, params: SamplingParams) -> None:
    generator = torch.Generator().manual_seed(3)
    lengths = [0, 3, 1, 0, 7, 2] * 60
    logits, ids, q_ids, q_probs = rounds(generator, 97, lengths)
    laws = [params] * len(lengths)
    expected = rejection.accept_rejection(
        TargetLaws(logits, SamplingRows.from_params(laws, [1 + length for length in lengths])),
        ids,
        q_ids,
        q_probs,
        torch.tensor(lengths),
        torch.Generator().manual_seed(4),
    )
    uniforms = draw_uniforms(logits, torch.Generator().manual_seed(4))
    found = accept_rejection(kernels, logits, laws, ids.tolist(), q_ids, q_probs, lengths, uniforms)
    assert found == list(zip(expected.accepted.tolist(), expected.next_token_ids.tolist(), strict=True))
    assert 0 < int(expected.accepted.sum()) < len(ids)  # both ways were taken


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_draft_as_likely_as_the_target_has_it_always_stands(kernels: Kernels, uniform: float) -> None:
    q_ids, q_probs = torch.arange(4)[None], torch.full((1, 4), 0.25)
    uniforms = torch.full((2,), uniform, dtype=torch.float64)
    laws = [SamplingParams()]
    [(accepted, _)] = accept_rejection(kernels, torch.zeros(2, 4), laws, [2], q_ids, q_probs, [1], uniforms)
    assert accepted == 1


def test_a_rejected_draft_of_all_mass_is_replaced_by_another(kernels: Kernels) -> None:
    logits = torch.tensor([[0.0, 0.0, -200.0], [0.0, 0.0, 0.0]])  # the draft is impossible
    q_ids, q_probs = torch.tensor([[2, 0]]), torch.tensor([[1.0, 0.0]])
    uniforms = torch.tensor([0.0, 0.75], dtype=torch.float64)
    found = accept_rejection(kernels, logits, [SamplingParams()], [2], q_ids, q_probs, [1], uniforms)
    assert found == [(0, 1)]


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    none, uniforms, laws = torch.zeros((0, 1)), torch.zeros(2, dtype=torch.float64), [SamplingParams()]
    with pytest.raises(ValueError, match="2 rows, 2 uniforms and 1 laws do not fit 1 requests with 0 drafts"):
        accept_rejection(kernels, torch.zeros(2, 4), laws, [], none.long(), none, [0], uniforms)
    with pytest.raises(ValueError, match="q of"):
        accept_rejection(kernels, torch.zeros(2, 4), laws, [3], none.long(), none, [1], uniforms)
    with pytest.raises(ValueError, match="bfloat16"):
        accept_rejection(
            kernels, torch.zeros(1, 4).bfloat16(), laws, [], none.long(), none, [0], uniforms[1:]
        )


def test_the_heaviest_weighs_one_whatever_the_temperature() -> None:
    """What both versions rely on when they compare weights with min-p."""
    weights = target_weights(
        torch.tensor([[-3.0, 5.0, 1.0]]), SamplingRows.from_params([SamplingParams(min_p=0.1)])
    )
    assert weights.max() == 1.0
