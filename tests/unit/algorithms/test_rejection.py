import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.rejection import accept_rejection, longest_equal_prefix
from tests.unit.algorithms.laws import counts_of, follows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def one_draft_each(p, draft, q_ids, q_probs, requests=2000):
    """Many requests with the same single draft token; their bonus rows are also p."""
    return accept_rejection(
        torch.tensor(p).expand(2 * requests, -1),
        torch.full((requests,), draft),
        torch.tensor(q_ids).expand(requests, -1),
        torch.tensor(q_probs).expand(requests, -1),
        torch.ones(requests, dtype=torch.long),
        generator(),
    )


def test_a_draft_from_the_targets_own_law_is_always_accepted():
    p = [0.5, 0.3, 0.2]
    for draft in range(3):
        assert one_draft_each(p, draft, [0, 1, 2], p).accepted.eq(1).all()


def test_a_token_the_target_excludes_is_never_accepted_nor_drawn():
    outcome = one_draft_each([0.0, 0.4, 0.6], 0, [0], [1.0])
    assert outcome.accepted.eq(0).all()
    assert outcome.next_token_ids.ne(0).all()


def test_a_token_the_drafter_could_not_have_drawn_is_refused():
    assert one_draft_each([0.5, 0.5], 0, [1, 0], [1.0, 0.0]).accepted.eq(0).all()


def test_a_false_draft_that_leaves_no_residual_is_replaced_from_the_target():
    outcome = one_draft_each([0.0, 0.5, 0.5], 0, [1, 2], [0.5, 0.5])
    assert outcome.accepted.eq(0).all()
    assert set(outcome.next_token_ids.tolist()) == {1, 2}


def test_acceptance_rate_is_the_ratio_of_probabilities():
    outcome = one_draft_each([0.3, 0.7], 0, [0, 1], [0.6, 0.4], requests=200_000)
    assert follows(counts_of(outcome.accepted, 2), torch.tensor([0.5, 0.5]))
    rejected = outcome.next_token_ids[outcome.accepted == 0]
    assert rejected.eq(1).all()  # max(p - q, 0) is zero at the draft token


def test_padding_of_the_sparse_distribution_changes_nothing():
    p, requests = torch.tensor([0.2, 0.5, 0.3]), 1000
    plain = one_draft_each(p.tolist(), 1, [1, 2], [0.7, 0.3], requests)
    padded = one_draft_each(p.tolist(), 1, [1, 0, 2, 0], [0.7, 0.0, 0.3, 0.0], requests)
    assert torch.equal(plain.accepted, padded.accepted)
    assert torch.equal(plain.next_token_ids, padded.next_token_ids)


def test_without_drafts_the_token_is_drawn_from_the_target():
    p, requests = torch.tensor([0.1, 0.0, 0.9]), 300_000
    outcome = accept_rejection(
        p.expand(requests, -1),
        torch.zeros(0, dtype=torch.long),
        torch.zeros((0, 1), dtype=torch.long),
        torch.zeros((0, 1)),
        torch.zeros(requests, dtype=torch.long),
        generator(),
    )
    assert outcome.accepted.eq(0).all()
    assert follows(counts_of(outcome.next_token_ids, 3), p)


def test_requests_of_different_lengths_do_not_mix():
    certain = torch.eye(4)
    # Requests: drafts (1, 2), then bonus 3; no draft, token 0; draft 3 rejected for 2 (bonus row unused).
    outcome = accept_rejection(
        certain[[1, 2, 3, 0, 2, 1]],
        torch.tensor([1, 2, 3]),
        torch.tensor([[1], [2], [3]]),
        torch.ones(3, 1),
        torch.tensor([2, 0, 1]),
        generator(),
    )
    assert outcome.accepted.tolist() == [2, 0, 0]
    assert outcome.next_token_ids.tolist() == [3, 0, 2]


def test_target_probabilities_are_left_as_they_were():
    p = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    before = p.clone()
    accept_rejection(
        p, torch.tensor([1]), torch.tensor([[1]]), torch.ones(1, 1), torch.tensor([1]), generator()
    )
    assert torch.equal(p, before)


def test_rows_that_do_not_fit_the_lengths_are_refused():
    with pytest.raises(ValueError, match="drafts \\+ requests = 1 \\+ 1, got 3"):
        longest_equal_prefix(torch.tensor([1, 2, 3]), torch.tensor([1]), torch.tensor([1]))


BITS = st.lists(st.integers(0, 1), max_size=4)


@given(st.lists(st.tuples(BITS, st.integers(0, 31)), min_size=1, max_size=6))
def test_equal_prefix_agrees_with_a_loop(requests):
    """Each request: its drafts, and the target's own tokens as bits."""
    own = [[(bits >> j) & 1 for j in range(len(drafts) + 1)] for drafts, bits in requests]
    outcome = longest_equal_prefix(
        torch.tensor([token for row in own for token in row]),
        torch.tensor([token for drafts, _ in requests for token in drafts], dtype=torch.long),
        torch.tensor([len(drafts) for drafts, _ in requests]),
    )
    for index, (drafts, _) in enumerate(requests):
        count = 0
        while count < len(drafts) and drafts[count] == own[index][count]:
            count += 1
        assert outcome.accepted[index] == count
        assert outcome.next_token_ids[index] == own[index][count]
