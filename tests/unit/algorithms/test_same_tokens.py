"""Greedy and coupled decoding commit the same tokens with any drafts, verify lengths and batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.algorithms.coupling import sample_coupled
from dspark_core.algorithms.rejection import longest_equal_prefix
from dspark_core.algorithms.sampling import greedy_tokens
from dspark_core.records import MAX_SEED

VOCAB = 5


class Model:
    """A target whose distribution is a pure function of the last two tokens and the position."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self._laws = torch.randn(VOCAB * VOCAB * 3, VOCAB, generator=generator).mul(2).softmax(-1)

    def rows(self, tokens, start):
        """Distributions of the tokens at positions start, ..., len(tokens)."""
        keys = [(tokens[i - 2] * VOCAB + tokens[i - 1]) * 3 + i % 3 for i in range(start, len(tokens) + 1)]
        return self._laws[keys]


def greedy(probs, seeds, positions):
    return greedy_tokens(probs)


def plain_decoding(model, sample, prompt, seed, count):
    tokens = list(prompt)
    for _ in range(count):
        row = model.rows(tokens, len(tokens))
        tokens.append(int(sample(row, torch.tensor([seed]), torch.tensor([len(tokens)]))))
    return tokens[len(prompt) :]


def speculative_decoding(model, sample, prompts, seeds, count, draft):
    """Decodes all sequences in one ragged batch, with drafts from `draft(sequence, tokens so far)`."""
    sequences = [list(prompt) for prompt in prompts]
    while any(len(s) - len(p) < count for s, p in zip(sequences, prompts, strict=True)):
        drafts = [draft(index, tokens) for index, tokens in enumerate(sequences)]
        lengths = torch.tensor([len(block) for block in drafts])
        rows = [model.rows(s + block, len(s)) for s, block in zip(sequences, drafts, strict=True)]
        positions = [torch.arange(len(r)) + len(s) for r, s in zip(rows, sequences, strict=True)]
        own = sample(
            torch.cat(rows), torch.tensor(seeds).repeat_interleave(lengths + 1), torch.cat(positions)
        )
        flat = torch.tensor([token for block in drafts for token in block], dtype=torch.long)
        outcome = longest_equal_prefix(own, flat, lengths)
        for index, tokens in enumerate(sequences):
            tokens += drafts[index][: int(outcome.accepted[index])]
            tokens.append(int(outcome.next_token_ids[index]))
    return [s[len(p) : len(p) + count] for s, p in zip(sequences, prompts, strict=True)]


@pytest.mark.parametrize("sample", [sample_coupled, greedy])
@settings(max_examples=60)
@given(
    model_seed=st.integers(0, 1000),
    seeds=st.lists(st.integers(0, MAX_SEED), min_size=1, max_size=4),
    data=st.data(),
)
def test_output_is_the_same_with_any_drafts_or_none(sample, model_seed, seeds, data):
    """Drafts may be right, wrong from any position on, or absent; sequences share the batch."""
    model, count = Model(model_seed), 12
    prompts = [(index % VOCAB, 1) for index in range(len(seeds))]
    truths = [plain_decoding(model, sample, p, s, count + 8) for p, s in zip(prompts, seeds, strict=True)]

    def draft(index, tokens):
        done, length = len(tokens) - 2, data.draw(st.integers(0, 4))
        block = truths[index][done : done + length]
        right = data.draw(st.integers(0, length))
        return block[:right] + [data.draw(st.integers(0, VOCAB - 1)) for _ in block[right:]]

    outputs = speculative_decoding(model, sample, prompts, seeds, count, draft)
    assert outputs == [truth[:count] for truth in truths]
