"""The drafter's own laws: append-only context, sequential heads, reduced vocabularies."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from dspark_core.models.config import MarkovHeadType
from dspark_core.models.dspark import DSparkDrafter, greedy_sampler
from tests.unit.models.dspark_golden import OneBlock
from tests.unit.models.dspark_tiny import tiny_config, tiny_drafter
from tests.unit.models.teacher_forcing import teacher_forced


def _taps(drafter: DSparkDrafter, tokens: int) -> Tensor:
    return torch.randn(tokens, drafter.config.tap_size, generator=torch.Generator().manual_seed(3))


def _hidden(drafter: DSparkDrafter, context_tokens: int, anchor_id: int = 7) -> Tensor:
    features = drafter.project(_taps(drafter, context_tokens))
    context = drafter.context_keys_values(features, torch.arange(context_tokens))
    return drafter.block_hidden(torch.tensor([anchor_id]), torch.tensor([context_tokens]), OneBlock(context))


def test_context_may_be_appended_in_pieces() -> None:
    drafter = tiny_drafter(tiny_config())
    features = drafter.project(_taps(drafter, 9))
    whole = drafter.context_keys_values(features, torch.arange(9))
    pieces = [
        drafter.context_keys_values(features[at], torch.arange(9)[at])
        for at in (slice(0, 4), slice(4, 5), slice(5, 9))
    ]
    for layer, (keys, values) in enumerate(whole):
        torch.testing.assert_close(torch.cat([piece[layer][0] for piece in pieces]), keys)
        torch.testing.assert_close(torch.cat([piece[layer][1] for piece in pieces]), values)


def test_every_block_position_sees_the_anchor_and_the_context() -> None:
    drafter = tiny_drafter(tiny_config())
    base = _hidden(drafter, 6)
    other_anchor, other_context = _hidden(drafter, 6, anchor_id=8), _hidden(drafter, 7)
    assert bool(((base - other_anchor).abs().amax(dim=-1) > 1e-4).all())
    assert bool(((base - other_context).abs().amax(dim=-1) > 1e-4).all())


def test_a_block_may_reach_past_the_context_limit() -> None:
    drafter = tiny_drafter(tiny_config())
    last = drafter.config.backbone.max_context_tokens - 1
    assert _hidden(drafter, last).shape == (1, 5, 16)


@pytest.mark.parametrize("kind", list(MarkovHeadType))
@pytest.mark.parametrize("with_markov", [True, False])
def test_drawing_step_by_step_equals_teacher_forcing_on_the_drawn_tokens(
    kind: MarkovHeadType, with_markov: bool
) -> None:
    drafter = tiny_drafter(tiny_config(markov_head_type=kind, confidence_head_with_markov=with_markov))
    anchors = torch.tensor([3, 11, 40])
    hidden = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(5))
    seen: list[Tensor] = []

    def sampler(position: int, logits: Tensor) -> Tensor:
        assert position == len(seen)
        seen.append(logits)
        return (logits.argmax(dim=-1) + position) % logits.shape[-1]  # not greedy: any tokens will do

    drawn = drafter.draw(anchors, hidden, sampler)
    previous = torch.cat((anchors[:, None], drawn.token_ids[:, :-1]), dim=1)
    logits, confidence = teacher_forced(drafter, hidden, previous)
    torch.testing.assert_close(torch.stack(seen, dim=1), logits)
    assert confidence is not None
    assert drawn.confidence_logits is not None
    torch.testing.assert_close(drawn.confidence_logits, confidence)


@pytest.mark.parametrize(
    ("kind", "depends"),
    [(MarkovHeadType.VANILLA, False), (MarkovHeadType.GATED, False), (MarkovHeadType.RNN, True)],
)
def test_only_the_recurrent_head_remembers_older_tokens(kind: MarkovHeadType, depends: bool) -> None:
    drafter = tiny_drafter(tiny_config(markov_head_type=kind))
    hidden = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(5))
    one, _ = teacher_forced(drafter, hidden, torch.tensor([[1, 2, 3, 4, 5]]))
    two, _ = teacher_forced(drafter, hidden, torch.tensor([[9, 2, 3, 4, 5]]))
    assert bool(((one[:, 1:] - two[:, 1:]).abs() > 1e-4).any()) is depends
    assert bool(((one[:, 0] - two[:, 0]).abs() > 1e-4).any())


@pytest.mark.parametrize("kind", list(MarkovHeadType))
def test_a_reduced_vocabulary_draws_like_the_full_one_restricted(kind: MarkovHeadType) -> None:
    ids = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47])
    full = tiny_drafter(tiny_config(markov_head_type=kind))
    config = dataclasses.replace(full.config, draft_vocab_size=len(ids))
    reduced = DSparkDrafter(config, full.embed_tokens, full.lm_head[ids], ids)
    state = full.state_dict() | {"draft_vocab_ids": ids}
    state["markov_head.markov_w2.weight"] = state["markov_head.markov_w2.weight"][ids]
    reduced.load_state_dict(state)
    forbidden = torch.ones(50, dtype=torch.bool).index_fill(0, ids, False)

    def restricted(position: int, logits: Tensor) -> Tensor:
        return logits.masked_fill(forbidden, float("-inf")).argmax(dim=-1)

    anchors = torch.tensor([1, 30])
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(9))
    expected = full.draw(anchors, hidden, restricted)
    found = reduced.draw(anchors, hidden, greedy_sampler)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    torch.testing.assert_close(found.confidence_logits, expected.confidence_logits)


def test_dflash_draws_every_position_from_the_base_logits() -> None:
    config = tiny_config(markov_rank=0, confidence_head=False, confidence_head_with_markov=False)
    drafter = tiny_drafter(config)
    hidden = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(9))
    drawn = drafter.draw(torch.tensor([1, 2]), hidden, greedy_sampler)
    assert drawn.confidence_logits is None
    assert drawn.token_ids.tolist() == drafter.base_logits(hidden).argmax(dim=-1).tolist()
