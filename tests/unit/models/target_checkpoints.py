"""Tiny random targets, their twins in other formats, and attention simple enough to trust."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = LINEAR_ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 32}
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}


def llama(**changes: Any) -> LlamaForCausalLM:
    return _randomised(LlamaForCausalLM, LlamaConfig(**(SIZES | changes)))


def qwen3(**changes: Any) -> Qwen3ForCausalLM:
    # A head size that is not hidden_size / num_attention_heads, as the family allows.
    return _randomised(Qwen3ForCausalLM, Qwen3Config(**(SIZES | {"head_dim": 32} | changes)))


def _randomised(model_class: Callable[[Any], Any], config: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms too: ones would hide a norm applied twice, or to the wrong tensor.
            parameter.copy_(torch.rand_like(parameter) + 0.5 if parameter.dim() == 1 else parameter * 5)
    return model


def save_hf(model: PreTrainedModel, directory: Path, **options: Any) -> Path:
    model.save_pretrained(directory, **options)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    """Changes fields of a JSON file; `...` removes one."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))


class CausalAttend:
    """Plain attention over sequences that lie one after the other, growing call by call."""

    def __init__(self, sequences: int = 1) -> None:
        self.lengths = [0] * sequences
        self._cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts, start = [], 0
        for sequence, length in enumerate(self.lengths):
            rows = slice(start, start + length)
            parts.append(self._attend((layer, sequence), q[rows], k[rows], v[rows]))
            start += length
        return torch.cat(parts)

    def _attend(self, place: tuple[int, int], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if place in self._cache:
            old_k, old_v = self._cache[place]
            k, v = torch.cat((old_k, k)), torch.cat((old_v, v))
        self._cache[place] = k, v
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        hidden = torch.ones(q.shape[0], k.shape[0], dtype=torch.bool).triu(k.shape[0] - q.shape[0] + 1)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("hqk,khd->qhd", weights, v)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors as llama.cpp's converter names and orders them."""
    config, tensors = model.config, {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, kind = name.rsplit(".", 1)
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stored = f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"
        else:
            stored = f"{_GGUF_NAMES[stem]}.{kind}"
        values = tensor.numpy()
        if config.model_type == "llama" and "q_proj" in stem:
            values = _interleave(values, config.num_attention_heads)
        if config.model_type == "llama" and "k_proj" in stem:
            values = _interleave(values, config.num_key_value_heads)
        tensors[stored] = values
    return tensors


def _interleave(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to rotated pairs side by side."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def write_gguf(
    path: Path,
    config: Any,
    tensors: dict[str, np.ndarray],
    *,
    matrices: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str | None = None,
    extra: Sequence[Callable[[gguf.GGUFWriter], None]] = (),
) -> Path:
    writer = gguf.GGUFWriter(path, architecture or config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_token_list(["token"] * config.vocab_size)
    for add in extra:
        add(writer)
    for name, values in tensors.items():
        if values.ndim == 2:
            writer.add_tensor(name, quantize(values, matrices), raw_dtype=matrices)
        else:
            writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised_twin(model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    """Gives the model the values its matrices have after quantisation; blocks lie along rows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), kind), kind)))
