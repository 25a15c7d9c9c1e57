"""Rejection sampling commits tokens with the target's distribution, whatever the scheduler plans.

The statistical tests have power: the same check rejects biased distributions and biased rules.
"""

import pytest
import torch

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import capacity_of
from dspark_core.algorithms.prefix_scheduler import survival_from_confidence
from dspark_core.algorithms.rejection import accept_rejection
from dspark_core.algorithms.sampling import draw_tokens
from tests.unit.algorithms.described_plan import plan
from tests.unit.algorithms.laws import counts_of, follows, pair_counts
from tests.unit.algorithms.planning_cases import times

VOCAB = 6
PAIRS = 400_000  # rounds; `follows` asserts that they suffice


def requests(*survival, floor=None):
    return [PlanRequest(survival=row, floor_tokens_per_second=floor) for row in survival]


class Chain:
    """A target whose next token depends on the last one, and a sparse drafter for it."""

    def __init__(self, generator):
        self.generator = generator
        self.p1 = self._law(VOCAB)  # [vocab]
        self.p2 = self._law(VOCAB, VOCAB)  # after each first token
        self.p3 = self._law(VOCAB, VOCAB)  # after each second token
        self.p2[:, 4] = 0.0  # as if removed by top-k
        self.p2 /= self.p2.sum(-1, keepdim=True)
        self.q1_ids = torch.tensor([5, 0, 2])
        self.q1 = torch.tensor([0.3, 0.45, 0.25])
        self.q2_ids = torch.tensor([1, 4, 3, 0])  # 4 can be proposed, never accepted
        self.q2 = self._law(VOCAB, 4)

    def _law(self, *shape):
        return torch.randn(*shape, generator=self.generator).mul(1.2).softmax(-1)

    def uniforms(self, count):
        return torch.rand(count, dtype=torch.float64, generator=self.generator)

    def joint_law(self):
        return (self.p1[:, None] * self.p2).flatten()

    def draft(self, requests):
        """Draws two draft tokens for each request: [requests, 2]."""
        first = self.q1_ids[draw_tokens(self.q1.expand(requests, -1), self.uniforms(requests))]
        second = self.q2_ids[draw_tokens(self.q2[first], self.uniforms(requests))]
        return torch.stack([first, second], dim=1)

    def verify(self, drafts, lengths):
        """One round: the target's rows, and accepted length and next token of each request."""
        requests = len(drafts)
        rows = torch.stack([self.p1.expand(requests, -1), self.p2[drafts[:, 0]], self.p3[drafts[:, 1]]], 1)
        q_ids = torch.stack([torch.cat([self.q1_ids, self.q1_ids[:1]]), self.q2_ids])  # padded to k = 4
        q1 = torch.cat([self.q1, torch.zeros(1)]).expand(requests, -1)
        q_probs = torch.stack([q1, self.q2[drafts[:, 0]]], 1)
        verified = torch.arange(2) < lengths[:, None]
        target = rows[torch.arange(3) <= lengths[:, None]]
        return target, accept_rejection(
            target,
            drafts[verified],
            q_ids.expand(requests, 2, 4)[verified],
            q_probs[verified],
            lengths,
            self.generator,
        )

    def first_two(self, drafts, accepted, next_tokens):
        """The first two committed tokens; a round that committed only one is followed by a plain step."""
        first = torch.where(accepted >= 1, drafts[:, 0], next_tokens)
        plain = draw_tokens(self.p2[first], self.uniforms(len(first)))
        second = torch.where(accepted == 1, next_tokens, torch.where(accepted == 2, drafts[:, 1], plain))
        return first, second


def competing_lengths(drafts):
    """Algorithm 1 over pairs of requests, whose second confidences depend on their first draft tokens.

    drafts [pairs, 2 requests, 2] -> lengths [pairs, 2]. There are few distinct cases, each planned once.
    """
    steps = times(1.2, 1.4, 1.6, 1.8, 2.0, 2.2)
    left = [survival_from_confidence([0.8, c]) for c in (0.95, 0.2, 0.7, 0.5, 0.9, 0.05)]
    right = [survival_from_confidence([0.38, c]) for c in (0.95, 0.05, 0.99, 0.5, 0.7, 0.2)]
    table = torch.tensor([[plan(requests(a, b), steps).lengths for b in right] for a in left])
    return table[drafts[:, 0, 0], drafts[:, 1, 0]]


@pytest.fixture(scope="module")
def round_outcome():
    chain = Chain(torch.Generator().manual_seed(11))
    drafts = chain.draft(2 * PAIRS)
    lengths = competing_lengths(drafts.view(PAIRS, 2, 2)).flatten()
    target, outcome = chain.verify(drafts, lengths)
    return chain, drafts, lengths, target, outcome


def test_the_rounds_exercise_every_length_and_outcome(round_outcome):
    _, _, lengths, _, outcome = round_outcome
    assert set(lengths.tolist()) == {0, 1, 2}
    assert {(length, taken) for length in range(3) for taken in range(length + 1)} == set(
        zip(lengths.tolist(), outcome.accepted.tolist(), strict=True)
    )


@pytest.mark.parametrize("member", [0, 1])
def test_the_first_two_tokens_follow_the_target(round_outcome, member):
    chain, drafts, _, _, outcome = round_outcome
    first, second = chain.first_two(drafts, outcome.accepted, outcome.next_token_ids)
    counts = pair_counts(first[member::2], second[member::2], VOCAB)
    assert follows(counts, chain.joint_law())


def test_a_law_one_per_cent_away_is_told_apart(round_outcome):
    chain, drafts, _, _, outcome = round_outcome
    first, second = chain.first_two(drafts, outcome.accepted, outcome.next_token_ids)
    shifted = chain.joint_law()
    high, low = shifted.topk(2).indices.tolist()
    shifted[high] += 0.01
    shifted[low] -= 0.01
    assert not follows(pair_counts(first[::2], second[::2], VOCAB), shifted)


def test_resampling_without_subtracting_the_draft_law_is_caught(round_outcome):
    chain, drafts, lengths, target, outcome = round_outcome
    rows = (lengths + 1).cumsum(0) - (lengths + 1) + outcome.accepted
    biased = draw_tokens(target[rows], chain.uniforms(len(rows)))
    first, second = chain.first_two(drafts, outcome.accepted, biased)
    assert not follows(pair_counts(first[::2], second[::2], VOCAB), chain.joint_law())


# The paper's appendix A: tokens A = 0 and B = 1, and a step rate with a cliff after one token.
CLIFF = times(1.0, 2.0, 1 / 0.45)
TARGET, DRAFT = torch.tensor([0.7, 0.3]), torch.tensor([0.5, 0.5])
SURVIVAL = {0: [survival_from_confidence([0.8, 0.9])], 1: [survival_from_confidence([0.8, 0.0])]}


def first_token_counts(length_of):
    """Counts of the first committed token; `length_of` maps first draft tokens [rounds] to verify lengths."""
    rounds, generator = 300_000, torch.Generator().manual_seed(5)
    drafts = torch.randint(0, 2, (rounds, 2), generator=generator)
    lengths = length_of(drafts[:, 0])
    verified = torch.arange(2) < lengths[:, None]
    outcome = accept_rejection(
        TARGET.expand(rounds + int(lengths.sum()), -1),
        drafts[verified],
        torch.arange(2).expand(int(lengths.sum()), -1),
        DRAFT.expand(int(lengths.sum()), -1),
        lengths,
        generator,
    )
    return counts_of(torch.where(outcome.accepted >= 1, drafts[:, 0], outcome.next_token_ids), 2)


def by_token(length_for):
    table = torch.tensor([length_for(SURVIVAL[token]) for token in (0, 1)])
    return lambda first: table[first]


@pytest.mark.parametrize("floor", [None, 0.4, 0.95, 5.0])
def test_early_stopping_keeps_the_law_across_the_cliff(floor):
    """Without a floor, with one that holds anyway, one that a token could break, and one that cannot hold."""

    def length_for(survival):
        return plan(requests(*survival, floor=floor), CLIFF).lengths[0]

    assert follows(first_token_counts(by_token(length_for)), TARGET)


def test_a_floor_that_needs_drafts_keeps_the_law():
    """It takes capacity from a likelier request, but a second token only where that may help."""
    flat, likelier = times(*[1.0] * 6), PlanRequest(survival=(0.99, 0.98))

    def length_for(survival):
        return plan([*requests(*survival, floor=1.9), likelier], flat, capacity=2).lengths[0]

    assert [length_for(SURVIVAL[token]) for token in (0, 1)] == [2, 1]
    counts = first_token_counts(by_token(length_for))
    assert follows(counts, TARGET)


def test_searching_past_the_cliff_in_the_same_round_is_caught():
    def anticipate(survival):
        return plan(requests(*survival), CLIFF, capacity=capacity_of(requests(*survival), CLIFF)).lengths[0]

    counts = first_token_counts(by_token(anticipate))
    assert not follows(counts, TARGET)
    assert counts[0].item() / counts.sum().item() == pytest.approx(0.85, abs=0.005)


def test_searching_past_the_cliff_in_an_earlier_round_keeps_the_law():
    capacity = torch.tensor([capacity_of(requests(*SURVIVAL[token]), CLIFF) for token in (0, 1)])
    assert capacity.tolist() == [2, 0]
    table = torch.tensor(
        [
            [plan(requests(*SURVIVAL[now]), CLIFF, capacity=int(k)).lengths[0] for now in (0, 1)]
            for k in capacity
        ]
    )  # [earlier token, this round's token]

    def delayed(first):
        earlier = torch.randint(0, 2, first.shape, generator=torch.Generator().manual_seed(6))
        return table[earlier, first]

    assert follows(first_token_counts(delayed), TARGET)
