"""Packing keeps what blocks can see, and nothing else; attention over a pack is dense attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_core.training.block_attention import packed_hidden
from dspark_core.training.packing import draw_anchors, pack
from tests.unit.models.dspark_golden import OneBlock
from tests.unit.models.dspark_tiny import tiny_config, tiny_drafter
from tests.unit.training.training_sequences import random_sequence


@settings(max_examples=50)
@given(tokens=st.integers(2, 40), start=st.integers(1, 39), count=st.integers(1, 50), seed=st.integers(0, 99))
def test_anchors_are_answer_tokens_followed_by_answer_tokens(
    tokens: int, start: int, count: int, seed: int
) -> None:
    sequence = random_sequence(tokens, min(start, tokens))
    anchors = draw_anchors(sequence, count, torch.Generator().manual_seed(seed)).tolist()
    allowed = range(sequence.answer_start, tokens - 1)
    assert anchors == sorted(set(anchors))
    assert all(anchor in allowed for anchor in anchors)
    assert len(anchors) == min(count, len(allowed))


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(6, 30), min_size=1, max_size=4),
    block=st.integers(1, 7),
    window=st.none() | st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_pack_addresses_the_right_tokens(
    lengths: list[int], block: int, window: int | None, seed: int
) -> None:
    sequences = [random_sequence(length, 3, seed=i) for i, length in enumerate(lengths)]
    generator = torch.Generator().manual_seed(seed)
    anchors = [draw_anchors(sequence, 4, generator) for sequence in sequences]
    batch = pack(sequences, anchors, block, window)
    for sequence, rows, span in zip(sequences, anchors, batch.spans, strict=True):
        positions = batch.positions[span.tokens].tolist()
        first = 0 if window is None else max(0, int(rows[0]) - window)
        assert positions == list(range(first, int(rows[-1])))
        assert batch.taps[span.tokens].tolist() == sequence.taps[positions].tolist()
        assert batch.anchor_positions[span.anchors].tolist() == rows.tolist()
        for row, anchor in zip(range(span.anchors.start, span.anchors.stop), rows.tolist(), strict=True):
            assert int(batch.anchor_ids[row]) == int(sequence.token_ids[anchor])
            for k in range(block):
                inside = anchor + 1 + k < len(sequence)
                assert bool(batch.counted[row, k]) is inside
                if inside:
                    assert int(batch.labels[row, k]) == int(sequence.token_ids[anchor + 1 + k])
                    assert int(batch.previous_ids[row, k]) == int(sequence.token_ids[anchor + k])
                    assert batch.target_hidden[row, k].tolist() == sequence.final[anchor + k].tolist()


def test_sequences_without_anchors_are_left_out() -> None:
    sequences = [random_sequence(8, 3), random_sequence(4, 3)]
    batch = pack(sequences, [torch.tensor([4]), torch.tensor([], dtype=torch.long)], 2, None)
    assert len(batch.spans) == 1
    with pytest.raises(ValueError, match="no anchors"):
        pack(sequences[1:], [torch.tensor([], dtype=torch.long)], 2, None)


@pytest.mark.parametrize("window", [None, 3, 100])
def test_packed_blocks_equal_blocks_drafted_alone(window: int | None) -> None:
    drafter = tiny_drafter(dataclasses.replace(tiny_config(), context_window=window))
    sequences = [random_sequence(20, 2, taps=32, size=16), random_sequence(13, 5, taps=32, size=16, seed=1)]
    anchors = [torch.tensor([2, 9, 10]), torch.tensor([6, 11])]
    hidden = packed_hidden(drafter, pack(sequences, anchors, 5, window))
    alone = []
    for sequence, rows in zip(sequences, anchors, strict=True):
        for anchor in rows.tolist():
            first = 0 if window is None else max(0, anchor - window)
            features = drafter.project(sequence.taps[first:anchor])
            context = drafter.context_keys_values(features, torch.arange(first, anchor))
            ids, position = sequence.token_ids[anchor : anchor + 1], torch.tensor([anchor])
            alone.append(drafter.block_hidden(ids, position, OneBlock(context)))
    torch.testing.assert_close(hidden, torch.cat(alone), rtol=1e-4, atol=1e-5)
