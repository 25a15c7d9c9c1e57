"""Tiny random Gemma 3 and 4 text decoders of `transformers`, with every feature switched on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

VOCAB = 96
WINDOW = 8
SLIDING, FULL = "sliding_attention", "full_attention"
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "max_position_embeddings": 256,
    "attn_implementation": "eager",
}
_GEMMA4 = {
    "global_head_dim": 32,
    "layer_types": [SLIDING, FULL, SLIDING, FULL],
    "num_hidden_layers": 4,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
}


def gemma4(**changes: Any) -> PreTrainedModel:
    return _randomised(Gemma4ForCausalLM(Gemma4TextConfig(**(_SIZES | _GEMMA4 | changes))))


def gemma4_small(**changes: Any) -> PreTrainedModel:
    """As E2B and E4B: layers that share keys and values, inputs to every layer, wide MLPs."""
    return gemma4(
        num_hidden_layers=6,
        layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCAB,
        **changes,
    )


def gemma4_large(**changes: Any) -> PreTrainedModel:
    """As 12B and 31B: full-attention layers without a value projection and with fewer heads."""
    return gemma4(attention_k_eq_v=True, num_global_key_value_heads=1, **changes)


def gemma3(**changes: Any) -> PreTrainedModel:
    fields = {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "query_pre_attn_scalar": 24,
        "rope_parameters": {
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    }
    return _randomised(Gemma3ForCausalLM(Gemma3TextConfig(**(_SIZES | fields | changes))))


GEMMAS = {
    "gemma4": gemma4,
    "gemma4 small": gemma4_small,
    "gemma4 large": gemma4_large,
    "gemma4 bias": lambda: gemma4(attention_bias=True, tie_word_embeddings=False),
    "gemma3": gemma3,
}


def _randomised(model: PreTrainedModel) -> Any:
    generator = torch.Generator().manual_seed(0)
    scalars = [value for name, value in model.named_buffers() if name.endswith("layer_scalar")]
    with torch.no_grad():
        for value in (*model.parameters(), *scalars):
            # Norms too: ones would hide a norm applied twice, or to the wrong tensor.
            drawn = torch.rand(value.shape, generator=generator)
            value.copy_(drawn + 0.5 if value.dim() == 1 else (drawn - 0.5) * 0.4)
    return model.eval()
