"""The draft engine's guarantees for sequences that skip rounds, and its two implementations of drawing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from dspark_core.engine.draft_engines.block_draw import NativeDraw, OperatorDraw, block_draw
from dspark_core.engine.draft_engines.blocks import DraftEngine, LocalDraftSource
from dspark_core.engine.draft_engines.gpu_blocks import GpuDraftEngine
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.protocols import DraftBlock, DraftItem
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import GenerateRequest, SamplingParams, Verification
from tests.support.gpu_parts import CallAgain, plain_gpu
from tests.unit.engine.tiny import ScriptedDrafts, tiny_engine
from tests.unit.models.dspark_tiny import tiny_config, tiny_drafter

WINDOW = 8
FEATURES = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
GREEDY = SamplingParams(temperature=0.0)


def make_engine(window: int | None = WINDOW) -> DraftEngine:
    drafter = tiny_drafter(tiny_config(context_window=window))
    return DraftEngine(drafter, fingerprint="tiny", num_pages=64, page_tokens=4)


def item(start: int, anchor: int, sampling: SamplingParams = GREEDY, name: str = "a") -> DraftItem:
    coupled = sampling.seed is not None
    return DraftItem(
        sequence_id=name,
        anchor_token_id=anchor % 50,
        anchor_position=anchor,
        features_start=start,
        features=FEATURES[start:anchor],
        sampling=sampling,
        verification=Verification.COUPLED if coupled else Verification.REJECTION,
    )


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("skipped", [1, 5, 20])  # less than the window, and more
def test_a_skipped_sequence_catches_up_in_one_item(window: int | None, skipped: int) -> None:
    faithful, skipping = make_engine(window), make_engine(window)
    for engine in (faithful, skipping):
        engine.propose([item(0, 10), item(0, 12, name="b")])
    for anchor in range(11, 11 + skipped):
        faithful.propose([item(anchor - 1, anchor)])
        skipping.propose([item(12, 13, name="b")] if anchor == 11 else [])
    last = 11 + skipped
    (late,), (steady,) = skipping.propose([item(10, last)]), faithful.propose([item(last - 1, last)])
    assert late.token_ids == steady.token_ids
    assert late.confidences == pytest.approx(steady.confidences, rel=1e-4)


@pytest.mark.parametrize("window", [WINDOW, None])
@pytest.mark.parametrize("build", [DraftEngine, GpuDraftEngine])
def test_past_the_drafters_positions_a_sequence_gets_nothing_and_others_do(build, window) -> None:
    config = tiny_config(context_window=window)
    short = dataclasses.replace(config.backbone, max_context_tokens=20)
    drafter = tiny_drafter(dataclasses.replace(config, backbone=short))
    settings = () if build is DraftEngine else (plain_gpu(CallAgain()),)
    engine = build(drafter, *settings, fingerprint="tiny", num_pages=64, page_tokens=4)
    last, other = engine.propose([item(0, 20), item(0, 10, name="b")])
    assert len(last.token_ids) == len(other.token_ids) == 5
    past, other = engine.propose([item(20, 21), item(10, 12, name="b")])
    assert past == DraftBlock("a")  # and no context is requested again
    assert len(other.token_ids) == 5
    assert engine.num_sequences == 1
    assert engine.propose([item(21, 23)]) == [DraftBlock("a")]


def test_a_sequence_left_out_sends_nothing_until_it_is_drafted_for_again() -> None:
    engine, source = tiny_engine(), ScriptedDrafts()
    drafting = Drafting(source, engine, deadline_seconds=1.0)
    sequences = [_running(name) for name in ("left", "kept")]
    drafting.propose(sequences)
    for _ in range(3):
        for sequence in sequences:
            sequence.tokens.append(1)
        drafting.propose(sequences[1:])
    sequences[0].tokens.append(1)
    assert set(drafting.propose(sequences[:1]).blocks) == {"left"}
    sent = [(one.features_start, one.anchor_position) for one in source.items if one.sequence_id == "left"]
    assert sent == [(0, 4), (4, 8)]


def test_nobody_to_draft_for_costs_no_call() -> None:
    source = ScriptedDrafts()
    drafting = Drafting(source, tiny_engine(), deadline_seconds=1.0)
    assert drafting.propose([]).seconds == 0.0
    assert source.items == []


def test_an_empty_batch_is_answered_by_the_engine() -> None:
    source = LocalDraftSource(make_engine())
    assert not source.propose([]).result(timeout=1.0).blocks


def _running(name: str) -> SequenceState:
    request = GenerateRequest(request_id=name, prompt_token_ids=(1, 2, 3, 4, 5))
    return SequenceState(request=request, order=0, noise_seed=0, max_length=40, pages=list(range(1, 11)))


def _draws() -> Iterator[OperatorDraw | NativeDraw]:
    for packed in (False, True):
        drafter = tiny_drafter(tiny_config(markov_rank=4))
        if packed:
            drafter.pack()
        yield block_draw(drafter, torch.Generator().manual_seed(0))


def test_both_ways_of_drawing_agree() -> None:
    operators, native = _draws()
    if not isinstance(native, NativeDraw):
        pytest.skip("no native kernels on this machine")
    assert isinstance(operators, OperatorDraw)
    items = [
        item(0, 10),
        item(0, 11, SamplingParams(seed=5)),
        item(0, 12, SamplingParams(temperature=0.6, top_p=0.9, top_k=20, seed=6)),
        item(0, 13, SamplingParams(temperature=0.0, seed=7)),
    ]
    anchors = torch.tensor([one.anchor_token_id for one in items])
    hidden = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    (expected, none), (found, nothing) = operators(items, anchors, hidden), native(items, anchors, hidden)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    torch.testing.assert_close(found.confidence_logits, expected.confidence_logits)
    assert none == nothing == {}


def test_uncoupled_samples_come_with_their_distributions() -> None:
    for draw in _draws():
        items = [item(0, 10), item(0, 11, SamplingParams()), item(0, 12, SamplingParams(seed=1))]
        drawn, distributions = draw(items, torch.tensor([1, 2, 3]), torch.randn(3, 5, 16))
        assert set(distributions) == {1}
        declared = distributions[1]
        assert declared.probabilities.sum(dim=-1).tolist() == pytest.approx([1.0] * 5)
        possible = (declared.token_ids == drawn.token_ids[1][:, None]) & (declared.probabilities > 0)
        assert possible.any(dim=-1).all()


def test_blocks_carry_names_tokens_and_confidences() -> None:
    (block,) = make_engine().propose([item(0, 10)])
    assert isinstance(block, DraftBlock)
    assert (block.sequence_id, len(block.token_ids), len(block.confidences)) == ("a", 5, 5)
    assert all(0.0 < confidence < 1.0 for confidence in block.confidences)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("most", [1, 3])
def test_no_more_is_drafted_than_is_of_use(most: int, pack: bool) -> None:
    drafter = tiny_drafter(tiny_config())
    if pack:
        drafter.pack()
    engine = DraftEngine(drafter, fingerprint="tiny", num_pages=64, page_tokens=4)
    asked = [
        dataclasses.replace(item(0, 9), most_tokens=1),
        dataclasses.replace(item(0, 12, SamplingParams(), name="b"), most_tokens=most),
    ]
    blocks = engine.propose(asked)
    assert [len(block.token_ids) for block in blocks] == [most, most]
    assert [len(block.confidences) for block in blocks] == [most, most]
    distribution = blocks[1].distribution
    assert distribution is not None
    assert distribution.probabilities.shape[0] == most


def test_asking_for_more_than_a_block_is_asking_for_all_of_it() -> None:
    (block,) = make_engine().propose([dataclasses.replace(item(0, 9), most_tokens=99)])
    assert len(block.token_ids) == tiny_config().block_size


def test_what_rounds_verify_decides_how_much_is_drafted_next() -> None:
    source = ScriptedDrafts()
    drafting = Drafting(source, tiny_engine(), deadline_seconds=1.0)
    sequence = _running("a")
    asked = []
    for verified in (1, 1, 1, 1, 1, 2, 4, 4, 0, 0):
        drafting.propose([sequence])
        asked.append(source.items[-1].most_tokens)
        sequence.learn_useful_draft(drafting.block_size, verified)
        sequence.tokens.append(1)
    assert asked == [4, 3, 2, 2, 2, 2, 4, 4, 4, 3]
