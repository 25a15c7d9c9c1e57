"""What autoregressive drafters require of a draft item; and drafts leave no trace in the context."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from dspark_core.engine.building import EngineOptions, build_drafter
from dspark_core.engine.draft_engines.autoregressive import AutoregressiveDraftEngine
from dspark_core.engine.draft_engines.base import ContextDraftEngine
from dspark_core.engine.protocols import DraftItem
from dspark_core.errors import InvalidRequestError
from dspark_core.records import SamplingParams, Verification

GOLDEN = Path(__file__).parents[2] / "fixtures" / "golden"
TOKENS = torch.randint(512, (60,), generator=torch.Generator().manual_seed(1)).tolist()
FEATURES = torch.randn(60, 64, generator=torch.Generator().manual_seed(2))


def build(dtype: str = "float32") -> ContextDraftEngine:
    return build_drafter(
        EngineOptions(
            target_model=str(GOLDEN / "qwen3_tiny_target"),
            drafter=str(GOLDEN / "eagle3"),
            dtype=dtype,
            kv_cache_bytes=2**22,
        )
    )


@pytest.fixture(scope="module")
def engine() -> ContextDraftEngine:
    return build()


def item(name: str, start: int, end: int, temperature: float = 0.0) -> DraftItem:
    return DraftItem(
        sequence_id=name,
        anchor_token_id=TOKENS[end],
        anchor_position=end,
        features_start=start,
        features=FEATURES[start:end],
        token_ids=tuple(TOKENS[start:end]),
        sampling=SamplingParams(temperature=temperature),
        verification=Verification.REJECTION,
    )


def test_an_eagle3_checkpoint_gets_this_engine_and_has_confidences(engine: ContextDraftEngine) -> None:
    assert isinstance(engine, AutoregressiveDraftEngine)
    (block,) = engine.propose([item("a", 0, 20)])
    assert len(block.token_ids) == len(block.confidences) == 7
    assert all(0 < confidence < 1 for confidence in block.confidences)


def test_drafts_depend_on_the_tokens_of_the_context(engine: ContextDraftEngine) -> None:
    plain = item("plain", 0, 20)
    others = dataclasses.replace(
        plain, sequence_id="others", token_ids=tuple((t + 1) % 512 for t in plain.token_ids)
    )
    first, second = engine.propose([plain, others])
    assert first.token_ids != second.token_ids


def test_the_first_token_is_in_no_pair(engine: ContextDraftEngine) -> None:
    plain = item("first", 0, 20)
    other = dataclasses.replace(plain, sequence_id="other", token_ids=(511, *plain.token_ids[1:]))
    first, second = engine.propose([plain, other])
    assert first.token_ids == second.token_ids


def test_rejected_drafts_leave_the_context_as_it_was(engine: ContextDraftEngine) -> None:
    """Sampled blocks in between must not change what greedy ones are drafted from."""
    (whole,) = engine.propose([item("whole", 0, 50)])
    for start, end in ((0, 10), (10, 11), (11, 19), (19, 20)):
        engine.propose([item("stepped", start, end, temperature=5.0)])
    (stepped,) = engine.propose([item("stepped", 20, 50)])
    assert stepped.token_ids == whole.token_ids


def test_an_item_without_a_feature_is_primed_again(engine: ContextDraftEngine) -> None:
    (whole,) = engine.propose([item("again", 0, 20)])
    (empty,) = engine.propose([item("again", 20, 20)])
    assert empty.needs_context
    (primed,) = engine.propose([item("again", 0, 20)])
    assert primed.token_ids == whole.token_ids


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        ((), "token_ids of 'w' must name the token of each of its 3 features, got 0"),
        ((1, 2, 512), r"token_ids of 'w' must be in \[0, 512\), got 512"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    engine: ContextDraftEngine, token_ids: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        engine.propose([dataclasses.replace(item("w", 0, 3), token_ids=token_ids)])


def test_a_refused_batch_reserves_nothing() -> None:
    engine = build()
    with pytest.raises(InvalidRequestError):
        engine.propose([item("good", 0, 3), dataclasses.replace(item("bad", 0, 3), token_ids=())])
    assert engine.num_sequences == 0


def test_bfloat16_drafts_a_batch() -> None:
    blocks = build("bfloat16").propose([item("x", 0, 3), item("y", 0, 50, temperature=1.0)])
    assert [len(block.token_ids) for block in blocks] == [7, 7]
    assert blocks[0].distribution is None
    assert blocks[1].distribution is not None
