"""The code paths for GPUs give the same results as those for CPUs, without reading values back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms import coupling, rejection, sampling
from dspark_core.algorithms.rejection import accept_rejection, longest_equal_prefix, residual_weights
from dspark_core.algorithms.sampling import SamplingRows, TargetLaws, sorted_thresholds
from dspark_core.records import SamplingParams
from tests.support.pretend_cuda import ReadBackError, TwoDevicesError, on_gpu, pretend_cuda, read

VOCAB = 300


def weights_of(rows, seed=0, spread=3.0):
    logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    logits = (logits * 4).round() / 4  # makes ties common
    return (logits - logits.amax(dim=-1, keepdim=True)).exp()


@settings(max_examples=100)
@given(
    st.integers(0, 1000),
    st.lists(st.tuples(st.integers(0, VOCAB + 5), st.floats(0.01, 1.0)), min_size=1, max_size=5),
)
def test_one_sort_gives_the_thresholds_of_both_truncations(seed, params):
    top_k = torch.tensor([k for k, _ in params])
    top_p = torch.tensor([p for _, p in params], dtype=torch.float64)
    weights = weights_of(len(params), seed)
    expected = weights.clone()
    sampling._truncate(expected, sampling._top_k_thresholds(expected, top_k))
    sampling._truncate(expected, sampling._top_p_thresholds(expected, top_p))
    actual = weights * (weights >= sorted_thresholds(weights, top_k, top_p).unsqueeze(-1))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("possible", [VOCAB, 3])
def test_evaluating_all_noise_draws_the_same_tokens(possible):
    probs = weights_of(64)
    probs[:, possible:] = 0.0
    seeds, positions = torch.arange(64) * 977, torch.arange(64) + 5
    assert torch.equal(
        coupling.sample_coupled_whole(probs, seeds, positions),
        coupling.sample_coupled(probs, seeds, positions),
    )


def test_the_law_after_a_rejection_is_the_same_for_all_rows_at_once():
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([2, 0, 3, 1])
    p = weights_of(4)
    p /= p.sum(dim=-1, keepdim=True)
    q_ids = torch.rand(6, VOCAB, generator=generator).argsort(dim=-1)[:, :8]
    q_probs = torch.rand(6, 8, generator=generator).softmax(dim=-1)
    for accepted in ([0, 0, 1, 0], [2, 0, 3, 1], [1, 0, 2, 1]):
        stopped = torch.tensor(accepted)
        laws = _Rows(p)
        expected = rejection._next_token_weights(laws, q_ids, q_probs, lengths, stopped)
        assert torch.equal(residual_weights(p, q_ids, q_probs, lengths, stopped), expected)


def test_without_any_draft_the_law_is_the_targets():
    p = weights_of(2)
    none = torch.zeros((0, 1))
    assert residual_weights(p, none.long(), none, torch.tensor([0, 0]), torch.tensor([0, 0])) is p


class _Rows:
    """Target distributions that return the same rows for any request."""

    def __init__(self, probabilities):
        self._probabilities = probabilities

    def of_rows(self, index):
        return self._probabilities.clone()


def test_acceptance_on_a_gpu_reads_nothing_back_and_decides_the_same():
    params = [SamplingParams(temperature=0.7, top_p=0.9), SamplingParams(top_k=40, min_p=0.01)]
    repeats = [3, 2]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, VOCAB, generator=generator)
    q_ids = torch.rand(3, VOCAB, generator=generator).argsort(dim=-1)[:, :8]
    q_probs = torch.rand(3, 8, generator=generator).softmax(dim=-1)
    ids, lengths = q_ids[:, 0], torch.tensor([2, 1])
    seeds = torch.arange(5)

    def decide(logits, q_ids, q_probs, ids, lengths, seeds):
        laws = TargetLaws(logits, SamplingRows.from_params(params, repeats, logits.device))
        drawing = torch.Generator().manual_seed(1)
        kept = accept_rejection(laws, ids, q_ids, q_probs, lengths, drawing)
        equal = longest_equal_prefix(logits.argmax(dim=-1), ids, lengths)
        coupled = coupling.sample_coupled(laws.of_rows(seeds), seeds, seeds)
        return kept.accepted, kept.next_token_ids, equal.accepted, equal.next_token_ids, coupled

    inputs = (logits, q_ids, q_probs, ids, lengths, seeds)
    expected = decide(*inputs)
    with pretend_cuda():
        decided = decide(*map(on_gpu, inputs))
        assert all(one.is_cuda for one in decided)
    assert [read(one).tolist() for one in decided] == [one.tolist() for one in expected]


def test_a_value_read_back_would_be_noticed():
    weights, top_k = on_gpu(weights_of(2)), on_gpu(torch.tensor([3, 0]))
    with pretend_cuda(), pytest.raises(ReadBackError, match="nonzero"):
        sampling._top_k_thresholds(weights, top_k)
    with pretend_cuda(), pytest.raises(ReadBackError, match="__int__"):
        int(top_k.max())


def test_tensors_of_two_devices_would_be_noticed():
    with pretend_cuda(), pytest.raises(TwoDevicesError):
        on_gpu(weights_of(2)) + weights_of(2)
