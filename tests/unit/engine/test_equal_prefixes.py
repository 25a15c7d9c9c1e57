"""Drafts stand while they equal the target's tokens: on numbers as by operators."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.rejection import longest_equal_prefix
from dspark_core.engine.acceptance import Proposal, equal_prefixes
from dspark_core.engine.protocols import DraftBlock
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import GenerateRequest, SamplingParams

TOKENS = st.integers(0, 2)  # few, so that long prefixes are equal


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[int], list[Proposal]]:
    """The target's tokens, a row for each draft that is verified and one more, and the proposals."""
    samples: list[int] = []
    proposals = []
    for index in range(draw(st.integers(1, 5))):
        drafts = draw(st.lists(TOKENS, max_size=6))
        length = draw(st.integers(0, len(drafts)))
        samples += draw(st.lists(TOKENS, min_size=length + 1, max_size=length + 1))
        request = GenerateRequest(
            request_id=str(index), prompt_token_ids=(1,), sampling=SamplingParams(temperature=0.0)
        )
        sequence = SequenceState(request=request, order=index, noise_seed=0, max_length=64)
        proposals.append(Proposal(sequence, DraftBlock(str(index), tuple(drafts)), length))
    return samples, proposals


@given(rounds())
def test_both_ways_agree(case: tuple[list[int], list[Proposal]]) -> None:
    samples, proposals = case
    found = list(equal_prefixes(samples, proposals))
    drafts = torch.tensor([t for p in proposals for t in p.draft_token_ids], dtype=torch.long)
    lengths = torch.tensor([p.verify_length for p in proposals])
    expected = longest_equal_prefix(torch.tensor(samples), drafts, lengths)
    assert [verdict.accepted for verdict in found] == expected.accepted.tolist()
    assert [verdict.next_token_id for verdict in found] == expected.next_token_ids.tolist()
