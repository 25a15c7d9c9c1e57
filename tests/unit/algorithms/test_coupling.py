import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.coupling import (
    exponential_noise,
    sample_coupled,
    sample_coupled_sparse,
)
from dspark_core.records import MAX_SEED
from tests.unit.algorithms.laws import counts_of, follows, pair_counts

LAW = torch.tensor([0.4, 0.05, 0.0, 0.25, 0.1, 0.2])
DRAWS = 400_000

WORD = 2**64
KEYS = st.tuples(st.integers(0, MAX_SEED), st.integers(0, 2**31), st.integers(0, 2**18))


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def reference_noise(seed, position, token):
    """The documented hash, computed with Python's unbounded integers."""
    weyl = 0x9E3779B97F4A7C15
    key = mix((mix((seed + weyl) % WORD) + (position + 1) * weyl) % WORD)
    bits = mix((key + token * weyl) % WORD)
    return -math.log(((bits >> 12) + 0.5) / 2**52)


def gumbel_max(probs, seeds, positions, token_ids):
    """The draw by the definition of the Gumbel-max trick, from the noise of every token."""
    return (probs.log() - exponential_noise(seeds, positions, token_ids).log()).argmax(-1)


def softmax_rows(rows, vocab, seed, spread=2.0):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread).softmax(-1)


@given(KEYS)
def test_noise_is_the_documented_function_of_its_key(key):
    seed, position, token = key
    actual = exponential_noise(torch.tensor([seed]), torch.tensor([position]), torch.tensor([token]))
    assert actual.item() == pytest.approx(reference_noise(*key), rel=1e-13)


def test_noise_never_changes_between_versions():
    """A request's output depends on its seed alone: changing these values would break every user's seeds."""
    actual = exponential_noise(torch.tensor([0, 1234]), torch.tensor([0, 77]), torch.tensor([0, 1, 49151]))
    expected = [
        [0.34886890445421276, 1.975374108645118, 0.49090719275110156],
        [2.6827028444376055, 0.3364303336362944, 0.37399601891996],
    ]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0.0)


def test_noise_of_a_key_does_not_depend_on_the_shape_it_is_asked_in():
    seeds, positions = torch.tensor([5, 5, 9]), torch.tensor([0, 1, 0])
    whole = exponential_noise(seeds, positions, torch.arange(1000))
    for row in range(3):
        for start, count in [(0, 1), (3, 7), (501, 64), (999, 1)]:
            ids = torch.arange(start, start + count)
            part = exponential_noise(seeds[row : row + 1], positions[row : row + 1], ids)
            assert torch.equal(part[0], whole[row, start : start + count])
    ids = torch.tensor([[3, 1], [0, 999], [7, 7]])
    assert torch.equal(exponential_noise(seeds, positions, ids), whole.gather(1, ids))


def test_noise_is_finite_and_standard():
    noise = exponential_noise(torch.arange(200), torch.zeros(200, dtype=torch.long), torch.arange(5000))
    assert torch.isfinite(noise).all()
    assert (noise > 0).all()
    cells = (-noise).exp().mul(64).long().clamp(max=63)
    assert follows(counts_of(cells.flatten(), 64), torch.full((64,), 1 / 64))


def test_noise_of_different_keys_is_uncorrelated():
    """Checks neighbouring seeds, positions and tokens, where a weak hash would show."""
    noise = torch.stack(
        [exponential_noise(torch.full((300,), s), torch.arange(300), torch.arange(300)) for s in range(3)]
    )
    for a, b in [
        (noise[0], noise[1]),
        (noise[0, 1:], noise[0, :-1]),
        (noise[0, :, 1:], noise[0, :, :-1]),
        (noise[0, 1:, :-1], noise[0, :-1, 1:]),
        (noise[1, 1:, :], noise[0, :-1, :]),
        (noise[0], noise[0].T),
    ]:
        pairs = torch.stack([a.flatten(), b.flatten()])
        assert abs(torch.corrcoef(pairs)[0, 1].item()) < 5 / math.sqrt(pairs.shape[1])


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_samples_follow_the_law(vary):
    many, one = torch.arange(DRAWS), torch.full((DRAWS,), 42)
    seeds, positions = (many, one) if vary == "seed" else (one, many)
    assert follows(counts_of(sample_coupled(LAW.expand(DRAWS, -1), seeds, positions), 6), LAW)


@pytest.mark.parametrize(("seed_step", "position_step"), [(0, 1), (1, 0), (1, 1), (1, -1)])
def test_samples_at_different_keys_are_independent(seed_step, position_step):
    seeds, positions = torch.arange(DRAWS) * 3 + 7, torch.full((DRAWS,), 5)
    laws = LAW.expand(DRAWS, -1)
    first = sample_coupled(laws, seeds, positions)
    second = sample_coupled(laws, seeds + seed_step, positions + position_step)
    assert follows(pair_counts(first, second, 6), (LAW[:, None] * LAW).flatten())


def test_every_path_agrees_with_evaluating_all_noise():
    probs = softmax_rows(60, 700, seed=1)
    for row in range(0, 60, 2):  # rows that keep 1, 3, 5, ... tokens, past the number evaluated lazily
        probs[row] *= probs[row] >= probs[row].sort(descending=True).values[2 * row]
    probs = probs / probs.sum(-1, keepdim=True)
    seeds, positions = torch.arange(60) // 3, torch.arange(60) % 3
    expected = gumbel_max(probs, seeds, positions, torch.arange(700))
    assert torch.equal(sample_coupled(probs, seeds, positions), expected)
    ids = torch.arange(700).flip(0).expand(60, -1)
    assert torch.equal(sample_coupled_sparse(ids, probs.flip(1), seeds, positions), expected)


def test_tokens_beyond_the_likely_ones_can_win():
    probs = torch.full((400, 1000), 1e-4)
    probs[:, 500] = 0.9
    seeds, positions = torch.full((400,), 6), torch.arange(400)
    expected = gumbel_max(probs, seeds, positions, torch.arange(1000))
    assert expected.ne(500).sum() > 20
    assert torch.equal(sample_coupled(probs, seeds, positions), expected)


def test_a_large_vocabulary_is_sampled_in_blocks_like_a_small_one():
    probs = softmax_rows(9, 50_000, seed=2)
    seeds, positions = torch.full((9,), 3), torch.arange(9)
    together = sample_coupled(probs, seeds, positions)
    expected = gumbel_max(probs, seeds, positions, torch.arange(50_000))
    assert torch.equal(together, expected)
    for row in range(9):
        alone = sample_coupled(probs[row : row + 1], seeds[row : row + 1], positions[row : row + 1])
        assert alone[0] == together[row]


def test_drafter_and_target_agree_when_their_laws_do():
    probs = softmax_rows(500, 300, seed=4)
    seeds, positions = torch.full((500,), 8), torch.arange(500)
    top = probs.topk(30)
    truncated = torch.zeros_like(probs).scatter(1, top.indices, top.values)
    target = sample_coupled(truncated / truncated.sum(-1, keepdim=True), seeds, positions)
    assert torch.equal(sample_coupled_sparse(top.indices, top.values, seeds, positions), target)


def test_agreement_of_different_laws_is_what_the_coupling_promises():
    """P(equal) = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i), which is at least (1 - D) / (1 + D)."""
    draws = 20_000
    for pair in range(20):
        p, q = softmax_rows(2, 8, seed=100 + pair, spread=0.2 + 0.1 * pair).double()
        distance = (p - q).abs().sum().item() / 2
        exact = sum(1 / torch.maximum(p / p[i], q / q[i]).sum().item() for i in range(8))
        seeds, positions = torch.full((draws,), pair), torch.arange(draws)
        equal = sample_coupled(p.expand(draws, -1), seeds, positions) == sample_coupled(
            q.expand(draws, -1), seeds, positions
        )
        rate, error = equal.double().mean().item(), math.sqrt(0.25 / draws)
        assert rate == pytest.approx(exact, abs=4.5 * error)
        assert rate >= (1 - distance) / (1 + distance) - 4.5 * error


@pytest.mark.parametrize("spread", [0.0, 0.5, 2.0, 8.0, 40.0])
def test_leaving_out_what_cannot_win_changes_no_draw(spread):
    """From flat rows, where thousands of tokens may win, to rows where one token has all the mass."""
    probs = softmax_rows(200, 3000, seed=7, spread=spread)
    seeds, positions = torch.arange(200) % 7, torch.arange(200)
    race = exponential_noise(seeds, positions, torch.arange(3000)) / probs
    assert torch.equal(sample_coupled(probs, seeds, positions), race.argmin(-1))


def test_no_rows_give_no_tokens():
    none = torch.zeros(0, dtype=torch.long)
    assert sample_coupled(torch.zeros(0, 5), none, none).shape == (0,)
