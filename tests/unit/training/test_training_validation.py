"""Validation in training counts the rounds of the real engines."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dspark_core.engine.caches.kv_cache import PagedCache
from dspark_core.errors import ConfigError
from dspark_core.models.loading import load_target
from dspark_core.training.speculative_validation import SpeculativeValidator, ValidationSettings
from tests.unit.models.dspark_golden import GOLDEN, STOP_TOKEN, golden


@pytest.mark.parametrize("concurrency", [1, 2])
@pytest.mark.parametrize("name", ["dspark_vanilla", "eagle3"])
def test_accepted_length_is_that_of_the_reference_rounds(name: str, concurrency: int) -> None:
    cases = golden(name)["generation"]
    target = load_target(str(GOLDEN / "qwen3_tiny_target"), torch.float32)
    target = dataclasses.replace(target, config=dataclasses.replace(target.config, max_context_tokens=200))
    # The reference counts its 24 tokens without the one of prefill.
    settings = ValidationSettings(
        max_tokens=25, concurrency=concurrency, dtype="float32", kv_cache_bytes=2**22
    )
    prompts = [tuple(case["prompt"]) for case in cases]
    report = SpeculativeValidator(target, prompts, (STOP_TOKEN,), settings)(GOLDEN / name)
    lengths = [length for case in cases for length in case["acceptance_lengths"]]
    assert report.rounds == len(lengths)
    assert report.accepted_length == pytest.approx(sum(lengths) / len(lengths))


def test_prompts_that_leave_no_room_are_refused_before_training() -> None:
    target = load_target(str(GOLDEN / "qwen3_tiny_target"), torch.float32, pack=False)
    room = target.config.max_context_tokens
    with pytest.raises(ConfigError, match=f"validation prompt 1 has {room} tokens"):
        SpeculativeValidator(target, [(5,), (5,) * room], (), ValidationSettings(max_tokens=8))
    # Of 60 pages one is not for prompts: 944 tokens, nine of which the answer takes.
    long = dataclasses.replace(target, config=dataclasses.replace(target.config, max_context_tokens=4096))
    page_bytes = PagedCache.bytes_per_page(long.config, 16, long.config.hidden_size, torch.float32)
    cache = ValidationSettings(max_tokens=8, dtype="float32", kv_cache_bytes=60 * page_bytes)
    SpeculativeValidator(long, [(5,) * 935], (), cache)
    with pytest.raises(ConfigError, match=r"936 tokens; .* room for 935: .* 4096 tokens, the cache .* 944"):
        SpeculativeValidator(long, [(5,) * 936], (), cache)
    with pytest.raises(ConfigError, match="at least one prompt"):
        SpeculativeValidator(target, [], (), ValidationSettings())
