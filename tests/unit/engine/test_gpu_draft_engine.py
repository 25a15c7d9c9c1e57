"""The GPU's draft pass, run on a CPU: padded and replayed, it drafts the same blocks as the reference."""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import pytest
import torch

from dspark_core.algorithms.calibration import ConfidenceScaling
from dspark_core.algorithms.sampling import draw_tokens
from dspark_core.engine.draft_engines.blocks import DraftEngine
from dspark_core.engine.draft_engines.gpu_blocks import GpuDraftEngine
from dspark_core.engine.protocols import DraftItem
from dspark_core.models.config import MarkovHeadType
from dspark_core.records import SamplingParams, Verification
from tests.support.gpu_parts import CallAgain, KeepsNothing, generator, plain_gpu
from tests.support.pretend_cuda import move_module, on_gpu, pretend_cuda
from tests.unit.models.dspark_tiny import tiny_config, tiny_drafter

FEATURES = torch.randn(3, 60, 16, generator=generator(3))
GREEDY = SamplingParams(temperature=0.0)
COUPLED = SamplingParams(temperature=0.8, top_k=9, seed=5)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.8)
SCALING = ConfidenceScaling((1.2, 0.8, 1.0, 0.5, 2.0), (0.1, -0.2, 0.0, 0.3, -0.4))


def item(name: int, start: int, anchor: int, sampling: SamplingParams, features=FEATURES) -> DraftItem:
    return DraftItem(
        sequence_id=str(name),
        anchor_token_id=(7 * anchor + name) % 50,
        anchor_position=anchor,
        features_start=start,
        features=features[name, start:anchor],
        sampling=sampling,
        verification=Verification.REJECTION if sampling.seed is None else Verification.COUPLED,
    )


def story(samplings, features=FEATURES):
    """Batches of one to three sequences at different positions, mixing long priming and short steps."""
    source = random.Random(1)
    at = [0, 0, 0]
    for _ in range(9):
        batch = []
        for name in range(3):
            if source.random() < 0.7:
                end = min(50, at[name] + (source.choice([14, 20]) if at[name] == 0 else source.randint(1, 6)))
                if end > at[name]:
                    batch.append(item(name, at[name], end, samplings[name], features))
                    at[name] = end
        if batch:
            yield batch


def pair(config, gpu, draft_vocab_ids=None, seed=0):
    arguments = {"fingerprint": "tiny", "num_pages": 64, "page_tokens": 4}
    scaling = SCALING if config.confidence_head else None
    make = [DraftEngine, lambda d, **kw: GpuDraftEngine(d, gpu, **kw)]
    return [
        one(
            tiny_drafter(config, draft_vocab_ids),
            confidence_scaling=scaling,
            generator=generator(seed),
            **arguments,
        )
        for one in make
    ]


def same(ours, expected):
    for block, other in zip(ours, expected, strict=True):
        assert block.token_ids == other.token_ids
        assert block.confidences == pytest.approx(other.confidences, rel=1e-4)
        assert (block.distribution is None) == (other.distribution is None)


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("head", list(MarkovHeadType))
def test_blocks_are_those_of_plain_operators(recorded, window, head):
    gpu = plain_gpu(CallAgain() if recorded else None)
    reference, ours = pair(tiny_config(context_window=window, markov_head_type=head), gpu)
    for batch in story([GREEDY, COUPLED, GREEDY]):
        same(ours.propose(batch), reference.propose(batch))


def test_a_reduced_vocabulary_and_no_heads_go_the_same_way():
    vocab_ids = torch.arange(1, 49, 3)
    config = tiny_config(
        markov_rank=0,
        confidence_head=False,
        confidence_head_with_markov=False,
        draft_vocab_size=len(vocab_ids),
    )
    reference, ours = pair(config, plain_gpu(CallAgain()), vocab_ids)
    for batch in story([COUPLED, GREEDY, COUPLED]):
        same(ours.propose(batch), reference.propose(batch))


def test_more_requests_than_any_bucket_holds_are_drafted_without_one():
    recorder = CallAgain()
    reference, ours = pair(tiny_config(), plain_gpu(recorder, requests=(1, 2)))
    for batch in story([GREEDY, COUPLED, GREEDY]):
        replays = recorder.replays
        same(ours.propose(batch), reference.propose(batch))
        assert (recorder.replays == replays) == (len(batch) == 3)


def test_what_was_prepared_drafts_the_same_blocks_and_records_nothing_more():
    recorder = CallAgain()
    reference, ours = pair(tiny_config(), plain_gpu(recorder, requests=(1, 2, 4)))
    ours.prepare()
    assert recorder.records == 2 * 3  # with and without sampling
    for batch in story([GREEDY, COUPLED, GREEDY]):
        same(ours.propose(batch), reference.propose(batch))
    assert recorder.records == 2 * 3
    assert recorder.replays > 0


def test_a_sampled_block_was_drawn_from_what_it_declares():
    _, ours = pair(tiny_config(), plain_gpu(CallAgain()), seed=9)
    drawing = generator(9)
    for batch in story([SAMPLED, SAMPLED, GREEDY]):
        blocks = ours.propose(batch)
        if all(one.sampling.greedy for one in batch):
            continue
        uniforms = torch.rand((len(batch), 5), dtype=torch.float64, generator=drawing)
        for one, block, row in zip(batch, blocks, uniforms, strict=True):
            if one.sampling.greedy:
                assert block.distribution is None
                continue
            law = block.distribution
            torch.testing.assert_close(law.probabilities.sum(dim=-1), torch.ones(5))
            column = draw_tokens(law.probabilities, row)
            assert tuple(law.token_ids.gather(1, column[:, None]).flatten().tolist()) == block.token_ids


def test_an_engine_that_is_let_go_is_freed_at_once():
    _, ours = pair(tiny_config(), plain_gpu(KeepsNothing()))
    ours.prepare()
    ours.propose(next(story([GREEDY, COUPLED, SAMPLED])))
    engine = weakref.ref(ours)
    gc.disable()
    try:
        del ours
        assert engine() is None
    finally:
        gc.enable()


def test_what_a_round_kept_is_not_written_over_by_the_next():
    _, ours = pair(tiny_config(), plain_gpu(CallAgain()))
    batches = list(itertools.islice(story([SAMPLED] * 3), 4))
    kept = [block.distribution for batch in batches[:1] for block in ours.propose(batch)]
    copies = [(law.token_ids.clone(), law.probabilities.clone()) for law in kept]
    for batch in batches[1:]:
        ours.propose(batch)
    for law, (ids, probabilities) in zip(kept, copies, strict=True):
        assert torch.equal(law.token_ids, ids)
        assert torch.equal(law.probabilities, probabilities)


@pytest.mark.parametrize("features_on", ["cpu", "cuda"])
def test_a_draft_on_a_gpu_is_read_once(features_on):
    samplings = [GREEDY, COUPLED, SAMPLED]
    reference, _ = pair(tiny_config(), plain_gpu())
    expected = [reference.propose(batch) for batch in story(samplings)]
    with pretend_cuda() as mode:
        engine = GpuDraftEngine(
            move_module(tiny_drafter(tiny_config())),
            plain_gpu(CallAgain()),
            confidence_scaling=SCALING,
            generator=generator(0),
            fingerprint="tiny",
            num_pages=64,
            page_tokens=4,
        )
        engine.prepare()
        features = on_gpu(FEATURES) if features_on == "cuda" else FEATURES
        for batch, blocks in zip(story(samplings, features), expected, strict=True):
            mode.reads, mode.reads_allowed = 0, 1
            for one, block, other in zip(batch, engine.propose(batch), blocks, strict=True):
                if one.sampling is not SAMPLED:
                    assert block.token_ids == other.token_ids
                else:
                    assert block.distribution.token_ids.is_cuda
