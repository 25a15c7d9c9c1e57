"""Feature shards hold what the target computes, sequence by sequence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.training.data.conversations import Conversation, read_conversations
from dspark_core.training.features import list_sequences, read_sequence, write_shard
from tests.unit.models.dspark_golden import golden_target, run_target
from tests.unit.training.training_sequences import GOLDEN_LAYERS, compute_features, random_sequence


def test_features_are_the_targets_own_states() -> None:
    conversation = Conversation((5, 9, 200), (7, 31, 450, 2))
    found = compute_features(golden_target().decoder, conversation, GOLDEN_LAYERS)
    expected = run_target([5, 9, 200, 7, 31, 450, 2], GOLDEN_LAYERS)
    assert found.answer_start == 3
    torch.testing.assert_close(found.taps, expected.taps)
    torch.testing.assert_close(found.final, expected.hidden)
    logits = golden_target().decoder.logits(expected.hidden)
    torch.testing.assert_close(found.log_normalizers[2:], logits.logsumexp(dim=-1)[2:].detach())


def test_shards_read_back_sequence_by_sequence(tmp_path: Path) -> None:
    sequences = [random_sequence(length, 2, seed=length) for length in (5, 9, 4, 12)]
    write_shard(tmp_path / "x.safetensors", sequences)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    for ref, sequence in zip(list_sequences(tmp_path / "x.safetensors"), sequences, strict=True):
        found = read_sequence(ref)
        assert found.token_ids.tolist() == sequence.token_ids.tolist()
        assert found.answer_start == sequence.answer_start
        torch.testing.assert_close(found.taps, sequence.taps.to(torch.bfloat16))
        torch.testing.assert_close(found.final, sequence.final.to(torch.bfloat16))
        torch.testing.assert_close(found.log_normalizers, sequence.log_normalizers)


def test_conversations_are_read_and_a_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt_ids": [1, 2], "answer_ids": [3], "id": "x"}\n{"prompt_ids": [1]}\n')
    rows = read_conversations(path)
    assert next(rows) == Conversation((1, 2), (3,))
    with pytest.raises(ConfigError, match=r"data\.jsonl:2"):
        next(rows)


def test_a_file_that_is_no_shard_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors"):
        list_sequences(path)


def test_a_shard_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"shard .*nowhere/x\.safetensors cannot be written"):
        write_shard(tmp_path / "nowhere" / "x.safetensors", [random_sequence(5, 2)])
