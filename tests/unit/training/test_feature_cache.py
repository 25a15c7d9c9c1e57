"""Packed passes, the cache they fill, and the stream that goes without one."""

from __future__ import annotations

import threading
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.errors import ConfigError
from dspark_core.training.data.conversations import AnswerFile, Conversation
from dspark_core.training.data.feature_cache import CachePlan, fill_cache, plan_cache, require_space
from dspark_core.training.data.prefill import compute_packed, plan_packs
from dspark_core.training.features import FeatureSequence
from dspark_core.training.manifest import check_shards
from dspark_core.training.sources import CachedSource, SequenceSource, sequence_plan
from dspark_core.training.stream import FeatureStream
from tests.unit.models.dspark_golden import golden_target
from tests.unit.training.answer_files import golden_origin, write_answers
from tests.unit.training.training_sequences import GOLDEN_LAYERS, compute_features

SHARD_TOKENS = 30


def planned(tmp_path: Path, count: int = 9) -> tuple[CachePlan, AnswerFile]:
    answers = AnswerFile(write_answers(tmp_path / "answers.jsonl", count))
    return plan_cache(tmp_path / "cache", answers, golden_origin(), SHARD_TOKENS), answers


def stream(answers: AnswerFile, **options: int) -> FeatureStream:
    return FeatureStream(golden_target().decoder, answers, golden_origin(), **options)


def assert_same(left: FeatureSequence, right: FeatureSequence) -> None:
    assert left.answer_start == right.answer_start
    for name in ("token_ids", "taps", "final", "log_normalizers"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 20))
def test_packs_keep_the_order_and_the_bound(lengths: list[int], limit: int) -> None:
    packs = list(plan_packs(lengths, limit))
    assert [index for pack in packs for index in pack] == list(range(len(lengths)))
    assert all(len(pack) == 1 or sum(lengths[index] for index in pack) <= limit for pack in packs)
    neighbours = pairwise(packs)
    assert all(sum(lengths[i] for i in pack) + lengths[after[0]] > limit for pack, after in neighbours)


def test_a_packed_pass_sees_what_single_passes_see(tmp_path: Path) -> None:
    answers = AnswerFile(write_answers(tmp_path / "answers.jsonl"))
    decoder, conversations = golden_target().decoder, answers.get(range(len(answers)))
    for packed, one in zip(compute_packed(decoder, conversations, GOLDEN_LAYERS), conversations, strict=True):
        alone = compute_features(decoder, one, GOLDEN_LAYERS)
        for name in ("taps", "final", "log_normalizers"):
            torch.testing.assert_close(getattr(packed, name), getattr(alone, name))
        assert not packed.taps.is_inference(), "a trainer saves it for its backward pass"


def test_tokens_of_another_target_are_refused() -> None:
    with pytest.raises(ConfigError, match="token id 999999 is outside the target's vocabulary of"):
        compute_features(golden_target().decoder, Conversation((1,), (999999,)), GOLDEN_LAYERS)


def test_a_cache_holds_every_answer_and_says_how_big_it_gets(tmp_path: Path) -> None:
    plan, answers = planned(tmp_path)
    assert len(plan.shards) > 2
    told: list[int] = []
    manifest = fill_cache(plan, answers, golden_target().decoder, pack_tokens=24, on_tokens=told.append)
    assert manifest.complete
    assert sum(told) == plan.missing_tokens == sum(answers.lengths)
    written = sum(entry.bytes for entry in manifest.shards.values())
    assert written == pytest.approx(plan.total_bytes, rel=0.02)
    assert all(fault is None for _, fault in check_shards(plan.directory))
    source = CachedSource.open([plan.directory])
    [everything] = source.batches([range(len(source))])
    found = [(s.token_ids.tolist(), s.answer_start) for s in everything]
    rows = answers.get(range(len(answers)))
    assert found == [([*row.prompt_ids, *row.answer_ids], len(row.prompt_ids)) for row in rows]


def test_an_interrupted_cache_is_completed_with_the_same_bytes(tmp_path: Path) -> None:
    whole, answers = planned(tmp_path)
    decoder = golden_target().decoder
    expected = fill_cache(whole, answers, decoder)

    broken = plan_cache(tmp_path / "broken", answers, golden_origin(), SHARD_TOKENS)

    def stop_in_the_second_shard(_: int) -> None:
        if (broken.directory / "features-000000.safetensors").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill_cache(broken, answers, decoder, pack_tokens=20, on_tokens=stop_in_the_second_shard)
    (broken.directory / "features-000001.partial").write_bytes(b"half")
    again = plan_cache(broken.directory, answers, golden_origin(), SHARD_TOKENS)
    assert 0 < len(again.missing) < len(again.shards)
    kept = {name: (again.directory / name).stat().st_mtime_ns for name in again.manifest.shards}
    resumed = fill_cache(again, answers, decoder, pack_tokens=20)
    assert resumed.shards.keys() == expected.shards.keys()
    assert kept == {name: (again.directory / name).stat().st_mtime_ns for name in kept}
    uninterrupted = plan_cache(tmp_path / "third", answers, golden_origin(), SHARD_TOKENS)
    assert resumed == fill_cache(uninterrupted, answers, decoder, pack_tokens=20)
    assert not list(broken.directory.glob("*.partial"))


def test_a_disk_that_is_too_small_is_noticed_before(tmp_path: Path) -> None:
    plan, _ = planned(tmp_path)
    require_space(plan, free_bytes=plan.missing_bytes)
    with pytest.raises(ConfigError, match=r"need 0\.\d\d MB in .*cache, where 0\.01 MB are free"):
        require_space(plan, free_bytes=10_000)


def test_a_directory_of_another_cache_is_refused(tmp_path: Path) -> None:
    plan, answers = planned(tmp_path)
    fill_cache(plan, answers, golden_target().decoder)
    changed = AnswerFile(write_answers(tmp_path / "other.jsonl", seed=1))
    with pytest.raises(ConfigError, match=r"another cache \(answers '\w+', not '\w+'"):
        plan_cache(plan.directory, changed, golden_origin(), SHARD_TOKENS)
    (plan.directory / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="shards without a manifest"):
        plan_cache(plan.directory, answers, golden_origin(), SHARD_TOKENS)


def test_other_conversations_of_the_same_answers_are_another_cache(tmp_path: Path) -> None:
    """Left out for their length or shared out differently: also where as many shards come of it."""
    plan, answers = planned(tmp_path)
    fill_cache(plan, answers, golden_target().decoder)
    fewer = AnswerFile(answers.path, max_tokens=max(answers.lengths) - 1)
    assert len(plan_cache(tmp_path / "new", fewer, golden_origin(), SHARD_TOKENS).shards) == len(plan.shards)
    others = [(fewer, SHARD_TOKENS), (answers, SHARD_TOKENS - 2)]
    for chosen, shard_tokens in others:
        with pytest.raises(ConfigError, match=r"another cache \(.*max length and shard tokens"):
            plan_cache(plan.directory, chosen, golden_origin(), shard_tokens)
    assert not plan_cache(plan.directory, answers, golden_origin(), SHARD_TOKENS).missing


def test_long_conversations_and_short_answers_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        '{"prompt_ids": [1, 2], "answer_ids": [3, 4]}\n'
        '{"prompt_ids": [1, 2], "answer_ids": [3, 4, 5]}\n'
        '{"prompt_ids": [1], "answer_ids": [7]}\n'
    )
    answers = AnswerFile(path, max_tokens=4, min_answer_tokens=2)
    assert (len(answers), answers.too_long, answers.too_short) == (1, 1, 1)
    with pytest.raises(ConfigError, match="hold no conversation to use"):
        AnswerFile(path, max_tokens=1)


def test_a_stream_gives_what_a_cache_would(tmp_path: Path) -> None:
    plan, answers = planned(tmp_path)
    # One pass for each shard and for each step: here they hold the same conversations.
    fill_cache(plan, answers, golden_target().decoder)
    sources: list[SequenceSource] = [CachedSource.open([plan.directory]), stream(answers)]
    assert sources[0].origin == sources[1].origin
    assert len(sources[0]) == len(sources[1])
    steps = [list(shard.numbers) for shard in plan.shards]
    for left, right in zip(*(source.batches(steps) for source in sources), strict=True):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)
    counts = [source.token_counts(512) for source in sources]
    assert torch.equal(*counts)


def test_a_resumed_stream_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    answers = AnswerFile(write_answers(tmp_path / "answers.jsonl"))
    whole = list(islice(stream(answers).batches(sequence_plan(len(answers), 4, seed=3)), 7))
    rest = stream(answers, ahead=1).batches(sequence_plan(len(answers), 4, seed=3, start_step=3))
    for left, right in zip(whole[3:], islice(rest, 4), strict=True):
        for one, other in zip(left, right, strict=True):
            assert_same(one, other)


class Counting:
    """Conversations that tell when they are asked for."""

    def __init__(self) -> None:
        self.asked = 0
        self.reached = threading.Event()

    def __len__(self) -> int:
        return 1

    def get(self, numbers: object) -> list[Conversation]:
        self.asked += 1
        if self.asked == 4:
            self.reached.set()
        return [Conversation((1, 2), (3, 4))]


def test_a_stream_works_ahead_but_no_further_than_its_bound() -> None:
    conversations = Counting()
    source = FeatureStream(golden_target().decoder, conversations, golden_origin(), ahead=2)
    batches = source.batches(sequence_plan(1, 1, seed=0))
    next(batches)
    # One was taken, two wait in the queue and one is in the worker's hands.
    assert conversations.reached.wait(timeout=30)
    before = threading.active_count()
    batches.close()
    assert conversations.asked == 4
    assert threading.active_count() == before - 1


def test_an_error_of_the_worker_reaches_the_trainer() -> None:
    source = FeatureStream(golden_target().decoder, _Broken(), golden_origin())
    with pytest.raises(ConfigError, match="this row is broken"):
        list(source.batches([[0]]))
    with pytest.raises(ConfigError, match="ahead must be >= 1, got 0"):
        FeatureStream(golden_target().decoder, _Broken(), golden_origin(), ahead=0)


class _Broken(Counting):
    def get(self, numbers: object) -> list[Conversation]:
        raise ConfigError("this row is broken")
