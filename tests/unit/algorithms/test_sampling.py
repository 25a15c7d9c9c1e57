import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.sampling import (
    SamplingRows,
    TargetLaws,
    draw_tokens,
    greedy_tokens,
    sorted_thresholds,
    target_probabilities,
    target_weight_blocks,
)
from dspark_core.records import SamplingParams
from tests.unit.algorithms.laws import counts_of, follows

OFF = SamplingParams()


def reference(logits, params):
    """The distribution of one row, computed by the definitions."""
    top = max(logits)
    scaled = [(value - top) / params.temperature for value in logits]
    kept = set(range(len(logits)))
    if params.top_k:
        kth = sorted(scaled, reverse=True)[min(params.top_k, len(scaled)) - 1]
        kept = {token for token in kept if scaled[token] >= kth}
    if params.top_p < 1.0:
        kept = _nucleus(scaled, kept, params.top_p)
    kept = {token for token in kept if math.exp(scaled[token]) >= params.min_p}
    total = sum(math.exp(scaled[token]) for token in kept)
    return [math.exp(value) / total if token in kept else 0.0 for token, value in enumerate(scaled)]


def _nucleus(scaled, kept, top_p):
    wanted = top_p * sum(math.exp(scaled[token]) for token in kept)
    held = 0.0
    for token in sorted(kept, key=lambda token: -scaled[token]):
        held += math.exp(scaled[token])
        if held >= wanted:
            return {other for other in kept if scaled[other] >= scaled[token]}
    return kept


def probabilities(logits, params):
    return target_probabilities(torch.tensor(logits), SamplingRows.from_params(params))


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.125, 0.5, 1.0, 2.0, 8.0]),
    top_k=st.integers(0, 15),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    min_p=st.one_of(st.just(0.0), st.just(1.0), st.floats(0.001, 0.9)),
)


@st.composite
def batches(draw):
    """Logits on a coarse grid, so that ties are common, with one set of parameters per row."""
    vocab, rows = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    row = st.lists(st.integers(-20, 20).map(lambda n: n / 4), min_size=vocab, max_size=vocab)
    return draw(st.lists(row, min_size=rows, max_size=rows)), [draw(PARAMS) for _ in range(rows)]


@settings(max_examples=200)
@given(batches())
def test_every_row_agrees_with_the_definitions(batch):
    logits, params = batch
    expected = torch.tensor([reference(row, p) for row, p in zip(logits, params, strict=True)])
    actual = probabilities(logits, params)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(actual > 0, expected > 0)
    assert (actual.gather(1, torch.tensor(logits).argmax(-1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("top_k", [0, 700])
def test_nuclei_of_every_size_agree_with_the_definitions(spread, top_k):
    logits = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * spread
    params = SamplingParams(top_p=0.9, top_k=top_k)
    actual = target_probabilities(logits[None], SamplingRows.from_params([params]))[0]
    expected = torch.tensor(reference(logits.double().tolist(), params))
    # At the edge of a wide nucleus, one token more or less depends on rounding.
    assert abs(int((actual > 0).sum()) - int((expected > 0).sum())) <= 1
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=2e-4)


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(6, 3000, generator=torch.Generator().manual_seed(2)) * 3
    params = [
        OFF,
        SamplingParams(top_p=0.99, temperature=2.0),
        SamplingParams(top_k=5),
        SamplingParams(top_k=900, top_p=0.3),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=3, top_p=0.5, min_p=0.1, temperature=0.3),
    ]
    together = target_probabilities(logits, SamplingRows.from_params(params))
    for index, alone in enumerate(params):
        row = target_probabilities(logits[index : index + 1], SamplingRows.from_params([alone]))
        assert torch.equal(row[0], together[index])


def test_equal_logits_stay_or_go_together():
    actual = probabilities([[1.0, 3.0, 1.0, 1.0, 0.0]], [SamplingParams(top_k=2)])
    assert (actual[0] > 0).tolist() == [True, True, True, True, False]
    assert actual[0, 0] == actual[0, 2] == actual[0, 3]


@pytest.mark.parametrize("temperature", [1e-30, 100.0])
def test_extreme_temperatures_and_logits_stay_finite(temperature):
    logits = [[-math.inf, 5e4, -5e4, 5e4 - 1]]
    actual = probabilities(logits, [SamplingParams(temperature=temperature)])
    assert torch.isfinite(actual).all()
    assert actual.sum().item() == pytest.approx(1.0)
    assert actual[0, 0] == 0


def test_bfloat16_logits_give_float32_probabilities():
    actual = target_probabilities(torch.zeros(1, 4, dtype=torch.bfloat16), SamplingRows.from_params([OFF]))
    assert actual.dtype is torch.float32
    assert actual.tolist() == [[0.25] * 4]


def test_parameters_repeat_for_the_rows_of_a_request():
    rows = SamplingRows.from_params([SamplingParams(top_k=7), SamplingParams(top_p=0.5)], repeats=[2, 1])
    assert rows.top_k.tolist() == [7, 7, 0]
    assert rows.top_p.tolist() == [1.0, 1.0, 0.5]
    assert (rows.any_top_k, rows.any_top_p, rows.any_min_p) == (True, True, False)


def test_parameters_that_apply_to_no_row_cost_nothing():
    rows = SamplingRows.from_params([SamplingParams(top_k=7), OFF], repeats=[0, 1])
    assert not rows.any_top_k


def test_repeats_must_match_the_parameters():
    with pytest.raises(ValueError, match="shorter"):
        SamplingRows.from_params([OFF, OFF], repeats=[1])


def test_greedy_takes_the_lowest_of_equal_tokens():
    assert greedy_tokens(torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]


def test_draws_follow_the_weights():
    weights = torch.tensor([0.0, 3.0, 1.0, 0.0, 4.0, 0.5, 0.0])
    uniforms = torch.rand(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    drawn = draw_tokens(weights.expand(len(uniforms), -1), uniforms)
    assert follows(counts_of(drawn, 7), weights / weights.sum())


WEIGHT = st.just(0.0) | st.floats(2.0**-100, 1.0, width=32)


@given(st.lists(WEIGHT, min_size=1, max_size=8).filter(any))
def test_an_impossible_token_is_never_drawn(weights):
    # Rounding decides at cell boundaries; the worst case is a uniform rounded up to 1.
    edges = [sum(weights[:n]) / sum(weights) for n in range(len(weights) + 1)]
    uniforms = torch.tensor([min(edge, 1.0) for edge in edges], dtype=torch.float64)
    drawn = draw_tokens(torch.tensor([weights] * len(edges)), uniforms)
    assert all(weights[token] > 0 for token in drawn.tolist())


def test_what_is_practically_impossible_is_never_drawn():
    """A subnormal weight would slow everything down and change nothing."""
    actual = probabilities([[0.0, -80.0, -90.0, -200.0]], [OFF])
    assert (actual[0] > 0).tolist() == [True, True, False, False]


@settings(max_examples=50)
@given(batches())
def test_laws_evaluated_where_asked_are_the_laws(batch):
    logits, params = torch.tensor(batch[0]), SamplingRows.from_params(batch[1])
    whole = target_probabilities(logits, params)
    laws = TargetLaws(logits, params)
    tokens = torch.arange(len(logits)) % logits.shape[1]
    torch.testing.assert_close(
        laws.of_tokens(torch.arange(len(tokens)), tokens).float(), whole.gather(1, tokens[:, None])[:, 0]
    )
    backwards = torch.arange(len(logits)).flip(0)
    torch.testing.assert_close(laws.of_rows(backwards), whole[backwards])  # plain rows use another exp


@pytest.mark.parametrize(
    "alone",
    [{"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}],
    ids=lambda one: next(iter(one)),
)
def test_each_setting_alone_changes_the_law(alone):
    logits, params = (
        torch.tensor([[2.0, 1.0, 0.0, -1.0]]),
        SamplingRows.from_params([SamplingParams(**alone)]),
    )
    laws, expected = (
        TargetLaws(logits, params),
        torch.tensor([reference(logits[0].tolist(), SamplingParams(**alone))]),
    )
    assert not torch.allclose(expected, logits.softmax(-1))
    first = torch.zeros(4, dtype=torch.long)
    torch.testing.assert_close(laws.of_tokens(first, torch.arange(4)).float(), expected[0])
    torch.testing.assert_close(laws.of_rows(first[:1]), expected)


@pytest.mark.parametrize("params", [OFF, SamplingParams(temperature=0.7, min_p=0.001)])
def test_laws_of_many_rows_are_of_their_own_tokens(params):
    logits = torch.randn(11, 50_000, generator=torch.Generator().manual_seed(5)) * 3
    rows, tokens = SamplingRows.from_params([params] * 11), logits.topk(11).indices.diagonal()
    found = TargetLaws(logits, rows).of_tokens(torch.arange(11), tokens).float()
    torch.testing.assert_close(found, target_probabilities(logits, rows).gather(1, tokens[:, None])[:, 0])


def test_thresholds_of_a_row_without_truncation_keep_the_lightest_token():
    weights = torch.tensor([[1.0, 1e-30], [1.0, 1e-30]])
    kept = sorted_thresholds(weights, torch.tensor([0, 0]), torch.tensor([1.0, 0.9], dtype=torch.float64))
    assert kept.tolist() == [0.0, 1.0]


def test_a_uniform_at_an_edge_draws_the_token_that_begins_there():
    weights, uniforms = torch.tensor([[0.0, 1.0, 3.0]] * 2), torch.tensor([0.0, 0.25], dtype=torch.float64)
    assert draw_tokens(weights, uniforms).tolist() == [1, 2]


def test_blocks_of_rows_hold_what_the_whole_does():
    logits = torch.randn(11, 50_000, generator=torch.Generator().manual_seed(4)) * 3
    params = SamplingRows.from_params([SamplingParams(temperature=0.7, top_p=0.8), OFF], repeats=[5, 6])
    blocks = list(target_weight_blocks(logits, params))
    assert len(blocks) > 1
    whole = torch.cat([weights for _, weights in blocks])
    assert torch.equal(whole / whole.sum(-1, keepdim=True), target_probabilities(logits, params))
