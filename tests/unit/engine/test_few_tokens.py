"""The code paths for few tokens agree with those for many."""

from __future__ import annotations

import pytest
import torch

from dspark_core.algorithms import sampling
from dspark_core.engine.target import batch
from dspark_core.engine.target.batch import Run, build_batch, slots_of
from dspark_core.engine.verdicts.greedy_draw import greedy_tokens
from dspark_core.kernels.library import native_kernels
from dspark_core.models.dspark import FeatureProjection
from dspark_core.models.packing import pack_linears
from tests.unit.models.dspark_tiny import tiny_config

RUNS = [
    Run([7], 0, [3], 1),
    Run([5, 6, 9], 15, [2, 9, 4], 3),
    Run(list(range(8)), 30, [8, 1, 6, 11], 1),
    Run([4], 47, (5, 7, 10), 0),
]


@pytest.mark.parametrize("runs", [RUNS[:1], RUNS[1:2], RUNS])
def test_a_small_batch_is_laid_out_as_a_large_one(runs: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    small = build_batch(runs, page_tokens=16)
    monkeypatch.setattr(batch, "FEW_TOKENS", 0)
    large = build_batch(runs, page_tokens=16)
    for name in ("token_ids", "positions", "slots", "logit_rows", "run_table", "pages"):
        one, other = getattr(small, name), getattr(large, name)
        assert one.dtype is other.dtype, name
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("start", "end"), [(0, 1), (5, 9), (14, 30), (31, 31)])
def test_slots_are_those_of_the_pages(start: int, end: int, monkeypatch: pytest.MonkeyPatch) -> None:
    few = slots_of([4, 2, 7], start, end, 16)
    monkeypatch.setattr(batch, "FEW_TOKENS", -1)
    assert torch.equal(few, slots_of([4, 2, 7], start, end, 16))


@pytest.mark.parametrize("vocab", [3, 16, 49152])
def test_the_most_likely_token_is_the_lowest_of_equals(vocab: int) -> None:
    logits = torch.randn(9, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[3] = 1.5
    logits[4, vocab // 2 :] = 9.0
    logits[5] = float("-inf")
    assert torch.equal(greedy_tokens(logits), sampling.greedy_tokens(logits))
    assert torch.equal(greedy_tokens(logits[:, : vocab - 1]), sampling.greedy_tokens(logits[:, : vocab - 1]))


@pytest.mark.skipif(native_kernels() is None, reason="no native kernels on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_features_are_those_of_operators(dtype: torch.dtype) -> None:
    config = tiny_config()
    plain = FeatureProjection(config).to(dtype)
    plain.hidden_norm.weight.copy_(torch.rand(plain.hidden_norm.weight.shape) + 0.5)
    taps = torch.randn(5, config.tap_size).to(dtype)
    expected = plain.float()(taps.float())
    packed = FeatureProjection(config).to(dtype)
    packed.load_state_dict(plain.state_dict())
    pack_linears(packed)
    found = packed(taps)
    assert found.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
