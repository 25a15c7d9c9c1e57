"""`transformers` on the same weights as our engine: the plain baseline."""

from __future__ import annotations

import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dspark_core.models.loading import load_target
from dspark_core.models.rope_layouts import rope_parameters
from dspark_core.models.weight_layout import weight_layout


def as_transformers(path: str, dtype: torch.dtype) -> LlamaForCausalLM:
    """A LlamaForCausalLM holding the same weights, unfused."""
    target = load_target(path, dtype, pack=False)
    config = target.config
    twin = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=rope_parameters(config.rope_theta, config.rope_scaling),
            max_position_embeddings=config.max_context_tokens,
            tie_word_embeddings=config.tie_word_embeddings,
        )
    )
    parameters = dict(target.decoder.named_parameters())
    state = {}
    for name, parts in weight_layout(config).items():
        start = 0
        for part in parts:
            state[f"model.{part.name}"] = (
                parameters[name][start : start + part.rows].reshape(part.shape).clone()
            )
            start += part.rows
    module: torch.nn.Module = twin  # transformers wraps its methods in its own types
    module.to(dtype).eval()
    missing, unexpected = twin.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"weights do not map: missing {missing}, unexpected {unexpected}")
    twin.tie_weights()
    return twin


def generate(model: LlamaForCausalLM, prompt: tuple[int, ...], max_tokens: int) -> tuple[list[int], float]:
    """-> greedy tokens after the prompt, and seconds."""
    ids = torch.tensor([prompt])
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            min_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist(), time.perf_counter() - started
