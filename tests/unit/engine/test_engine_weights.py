"""Which weights an engine can be configured with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspark_core.engine.building import EngineOptions
from dspark_core.errors import ConfigError
from dspark_core.models.loading import load_target
from dspark_core.models.packing import WeightChoice
from tests.support.tiny_target import write_tiny_target
from tests.unit.models.target_checkpoints import llama, save_hf


def options(**fields: object) -> EngineOptions:
    return EngineOptions(target_model="any", drafter=None, **fields)  # type: ignore[arg-type]


def test_approximate_weights_are_never_the_default() -> None:
    assert options().weights == "stored"


def test_unknown_weights_are_named_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match="weights must be one of stored, full, stored-a8, int8, got 'int3'"):
        options(weights="int3")


@pytest.mark.parametrize("fields", [{"dtype": "float32"}, {"native": False}])
@pytest.mark.parametrize("weights", ["int8", "stored-a8"])
def test_approximations_are_refused_where_they_would_be_ignored(
    weights: str, fields: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=f"weights {weights} need the native kernels and dtype bfloat16"):
        options(weights=weights, **fields)


def test_rounded_activations_are_refused_where_nothing_is_stored_quantised(tmp_path: Path) -> None:
    target = write_tiny_target(tmp_path / "target")
    with pytest.raises(ConfigError, match="stored-a8 are for quantised files"):
        load_target(str(target), torch.bfloat16, weights=WeightChoice.STORED_A8)


def test_int8_is_refused_where_no_matrix_takes_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 60, "intermediate_size": 100, "head_dim": 10, "num_attention_heads": 6}
    target = save_hf(llama(**sizes), tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"int8 need inputs in multiples of 32: no matrix of .*odd has"):
        load_target(str(target), torch.bfloat16, weights=WeightChoice.INT8)
    some = save_hf(llama(**sizes | {"intermediate_size": 96}), tmp_path / "some")
    full = load_target(str(some), torch.bfloat16, weights=WeightChoice.FULL).decoder
    rounded = load_target(str(some), torch.bfloat16, weights=WeightChoice.INT8).decoder
    assert rounded.packed_bytes < full.packed_bytes
