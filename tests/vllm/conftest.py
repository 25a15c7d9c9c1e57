"""vLLM computing the target. Needs an environment with vLLM (docs/vllm.md); run there with:

VLLM_CPU_OMP_THREADS_BIND='0|1' python -m pytest -m slow tests/vllm
"""

import os
from pathlib import Path

import pytest

pytest.importorskip("vllm")

os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0|1" if (os.cpu_count() or 1) > 1 else "0")


@pytest.fixture(scope="session")
def target_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of a head size that vLLM's kernels know."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=192,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.3,
    )
    model = Qwen3ForCausalLM(config)
    directory = tmp_path_factory.mktemp("qwen3")
    model.save_pretrained(directory)
    return directory
