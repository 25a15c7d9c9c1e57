"""Reads `config.json` of Gemma 3 and 4 text decoders, and writes it for drafters of their kind."""

from __future__ import annotations

from collections.abc import Mapping

from dspark_core.models.config import DecoderConfig, Family
from dspark_core.models.gemma_config import AttentionKind, GemmaConfig, LayerType
from dspark_core.models.metadata import Metadata, naming_file
from dspark_core.models.rope_layouts import refuse_another_theta, refuse_disagreement, rope_type

_ACTIVATION = "gelu_pytorch_tanh"
_ROPE_TYPES = ("default", "linear", "proportional")
_DEFAULT_THETA = {LayerType.SLIDING: 10_000.0, LayerType.FULL: 1_000_000.0}
_DEFAULT_GLOBAL_HEAD_DIM = 512
_OVERRIDES = ("head_dim", "num_key_value_heads")

_GEMMA3_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072,
}
"""Defaults for fields that published files omit."""


def gemma_decoder_config(metadata: Metadata, family: Family) -> DecoderConfig:
    """Raises CheckpointError for a missing or invalid field, or an unsupported feature."""
    gemma4 = family is Family.GEMMA4
    if not gemma4:
        given = {field: value for field, value in metadata.values.items() if value is not None}
        metadata = Metadata(metadata.origin, {**_GEMMA3_DEFAULTS, **given})
    _refuse_unsupported(metadata)
    layer_types = _layer_types(metadata, gemma4)
    num_layers = len(layer_types)
    kinds = _kinds(metadata, layer_types, gemma4)
    vocab_size = metadata.integer("vocab_size")
    cap = metadata.get("final_logit_softcapping")
    with naming_file(metadata.origin):
        gemma = GemmaConfig(
            layer_types=layer_types,
            sliding=kinds[LayerType.SLIDING],
            full=kinds[LayerType.FULL],
            attention_scale=1.0 if gemma4 else metadata.number("query_pre_attn_scalar") ** -0.5,
            shifted_norms=not gemma4,
            value_norm=gemma4,
            layer_scalar=gemma4,
            final_logit_softcap=None if cap is None else metadata.number("final_logit_softcapping"),
            num_kv_shared_layers=metadata.natural("num_kv_shared_layers", 0) if gemma4 else 0,
            wide_shared_mlp=gemma4 and metadata.flag("use_double_wide_mlp", False),
            **_per_layer_inputs(metadata, gemma4, vocab_size),
        )
        return DecoderConfig(
            family=family,
            vocab_size=vocab_size,
            hidden_size=metadata.integer("hidden_size"),
            intermediate_size=metadata.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=metadata.integer("num_attention_heads"),
            num_kv_heads=gemma.full.num_kv_heads,
            head_dim=gemma.full.head_dim,
            rms_norm_eps=metadata.number("rms_norm_eps", 1e-6),
            rope_theta=gemma.full.rope_theta,
            max_context_tokens=metadata.integer("max_position_embeddings"),
            tie_word_embeddings=metadata.flag("tie_word_embeddings", True),
            qk_norm=True,
            attention_bias=metadata.flag("attention_bias", False),
            gemma=gemma,
        )


def gemma_fields(config: DecoderConfig, gemma: GemmaConfig) -> dict[str, object]:
    """Inverse for a drafter's layers: the fields that differ from the common ones of all families."""
    fields: dict[str, object] = {
        "model_type": f"{config.family.value}_text",
        "hidden_activation": _ACTIVATION,
        "layer_types": [kind.value for kind in gemma.layer_types],
        "num_key_value_heads": gemma.sliding.num_kv_heads,
        "head_dim": gemma.sliding.head_dim,
        "sliding_window": gemma.sliding.window,
        "final_logit_softcapping": gemma.final_logit_softcap,
        "rope_parameters": {
            LayerType.SLIDING.value: _rope_fields(gemma.sliding),
            LayerType.FULL.value: _rope_fields(gemma.full),
        },
    }
    if config.family is Family.GEMMA3:
        return fields | {"query_pre_attn_scalar": gemma.attention_scale**-2}
    return fields | {
        "attention_k_eq_v": gemma.full.values_are_keys,
        "global_head_dim": gemma.full.head_dim,
        "num_global_key_value_heads": gemma.full.num_kv_heads,
        "num_kv_shared_layers": gemma.num_kv_shared_layers,
        "use_double_wide_mlp": gemma.wide_shared_mlp,
        "hidden_size_per_layer_input": gemma.per_layer_input_size,
        "enable_moe_block": False,
    }


def _refuse_unsupported(metadata: Metadata) -> None:
    if metadata.get("hidden_activation") not in (None, _ACTIVATION):
        raise metadata.error("hidden_activation", f"is not supported; supported: {_ACTIVATION!r}")
    if metadata.flag("enable_moe_block", False):
        raise metadata.error("enable_moe_block", "is not supported: expert layers are not computed")
    if metadata.get("attn_logit_softcapping") is not None:
        raise metadata.error("attn_logit_softcapping", "is not supported")
    # "vision" concerns image tokens, which a text decoder does not have.
    if metadata.get("use_bidirectional_attention") not in (None, False, "vision"):
        raise metadata.error("use_bidirectional_attention", "is not supported: decoding is causal")


def _layer_types(metadata: Metadata, gemma4: bool) -> tuple[LayerType, ...]:
    num_layers = metadata.integer("num_hidden_layers")
    names = metadata.get("layer_types")
    if names is None:
        # Every n-th layer uses full attention; in Gemma 4 the last one always does.
        period = metadata.integer("sliding_window_pattern", 6)
        full = {i for i in range(num_layers) if (i + 1) % period == 0 or (gemma4 and i == num_layers - 1)}
        return tuple(LayerType.FULL if i in full else LayerType.SLIDING for i in range(num_layers))
    known = [kind.value for kind in LayerType]
    if not isinstance(names, list) or len(names) != num_layers or any(name not in known for name in names):
        raise metadata.error("layer_types", f"must name num_hidden_layers={num_layers} layers of {known}")
    if gemma4 and names[-1] != LayerType.FULL.value:
        raise metadata.error("layer_types", f"must end with {LayerType.FULL.value!r}")
    return tuple(LayerType(name) for name in names)


def _kinds(
    metadata: Metadata, layer_types: tuple[LayerType, ...], gemma4: bool
) -> dict[LayerType, AttentionKind]:
    kv_heads, head_dim = metadata.integer("num_key_value_heads"), metadata.integer("head_dim")
    values_are_keys = gemma4 and metadata.flag("attention_k_eq_v", False)
    full_kv_heads, full_head_dim = kv_heads, head_dim
    if gemma4:
        full = _full_overrides(metadata, layer_types, values_are_keys)
        full_kv_heads = full.integer("num_key_value_heads", kv_heads)
        full_head_dim = full.integer("head_dim", head_dim)
    theta, factor, fraction = _rope(metadata, LayerType.SLIDING, gemma4)
    sliding = AttentionKind(
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=theta,
        rope_factor=factor,
        rotated_fraction=fraction,
        window=metadata.integer("sliding_window"),
    )
    theta, factor, fraction = _rope(metadata, LayerType.FULL, gemma4)
    full_kind = AttentionKind(
        num_kv_heads=full_kv_heads,
        head_dim=full_head_dim,
        rope_theta=theta,
        rope_factor=factor,
        rotated_fraction=fraction,
        values_are_keys=values_are_keys,
    )
    return {LayerType.SLIDING: sliding, LayerType.FULL: full_kind}


def _full_overrides(
    metadata: Metadata, layer_types: tuple[LayerType, ...], values_are_keys: bool
) -> Metadata:
    """`head_dim` and `num_key_value_heads` of the full-attention layers, in either layout of the file."""
    per_layer = metadata.get("per_layer_config")
    if per_layer is None:
        values: dict[str, object] = {
            "head_dim": metadata.integer("global_head_dim", _DEFAULT_GLOBAL_HEAD_DIM)
        }
        if values_are_keys:  # elsewhere the field has no effect
            values["num_key_value_heads"] = metadata.get("num_global_key_value_heads")
        return Metadata(metadata.origin, values)
    full = [str(i) for i, kind in enumerate(layer_types) if kind is LayerType.FULL]
    rows = [per_layer.get(i, {}) for i in full] if isinstance(per_layer, Mapping) else []
    plain = all(isinstance(row, dict) and row == rows[0] and set(row) <= set(_OVERRIDES) for row in rows)
    if not isinstance(per_layer, Mapping) or not plain or not set(per_layer) <= set(full):
        raise metadata.error(
            "per_layer_config",
            f"is not supported; supported: the same {' and '.join(_OVERRIDES)} for all full_attention layers",
        )
    return Metadata(f"{metadata.origin}: per_layer_config", rows[0] if rows else {})


def _rope(metadata: Metadata, kind: LayerType, gemma4: bool) -> tuple[float, float, float]:
    """Theta, factor and rotated fraction of one kind of layer."""
    rope = _rope_settings(metadata, kind, gemma4)
    type_field, scaled = rope_type(rope)
    if scaled not in (None, *_ROPE_TYPES):
        raise rope.error(type_field, f"is not supported; supported: {', '.join(_ROPE_TYPES)}")
    proportional = scaled == "proportional"
    if scaled == "linear" and rope.get("partial_rotary_factor") not in (None, 1.0):
        raise rope.error("partial_rotary_factor", "is not supported where rope_type is 'linear'")
    return (
        rope.number("rope_theta", _DEFAULT_THETA[kind]),
        rope.number("factor", 1.0) if proportional or scaled == "linear" else 1.0,
        rope.number("partial_rotary_factor", 1.0) if proportional else 1.0,
    )


def _rope_settings(metadata: Metadata, kind: LayerType, gemma4: bool) -> Metadata:
    """RoPE settings of one kind of layer, in the new layout or Gemma 3's old one."""
    full = kind is LayerType.FULL
    parameters, scaling = metadata.get("rope_parameters"), metadata.get("rope_scaling")
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and not isinstance(value, dict):
            raise metadata.error(name, "must be an object")
    # Top-level settings are the fallback for what a kind does not set itself.
    theta_field = "rope_theta" if full or gemma4 else "rope_local_base_freq"
    values: dict[str, object] = {"rope_theta": metadata.get(theta_field)}
    field, own = "rope_scaling", scaling if full else None  # the old layout scales the full layers only
    if isinstance(parameters, dict):
        field, own = f"rope_parameters[{kind.value!r}]", parameters.get(kind.value)
    if own is None and not gemma4:
        own = {}
    if not isinstance(own, dict):
        raise metadata.error("rope_parameters", f"must be an object with one named {kind.value!r}")
    if isinstance(parameters, dict):
        _refuse_other_layers(metadata, parameters)
    if full and parameters is not None:
        refuse_disagreement(metadata, own)
    if full or not gemma4:
        refuse_another_theta(metadata, theta_field, own, field)
    return Metadata(f"{metadata.origin}: {field}", values | own)


def _refuse_other_layers(metadata: Metadata, parameters: Mapping[str, object]) -> None:
    known = [kind.value for kind in LayerType]
    unknown = [name for name, value in parameters.items() if name not in known and value is not None]
    if unknown:
        raise metadata.error("rope_parameters", f"must be by layer type, {known}, but has {unknown[0]!r}")


def _rope_fields(kind: AttentionKind) -> dict[str, object]:
    fields: dict[str, object] = {"rope_type": "default", "rope_theta": kind.rope_theta}
    if kind.rotated_fraction != 1.0:
        fields |= {"rope_type": "proportional", "partial_rotary_factor": kind.rotated_fraction}
    elif kind.rope_factor != 1.0:
        fields |= {"rope_type": "linear"}
    if kind.rope_factor != 1.0:
        fields |= {"factor": kind.rope_factor}
    return fields


def _per_layer_inputs(metadata: Metadata, gemma4: bool, vocab_size: int) -> dict[str, int]:
    if not gemma4:
        return {}
    unified = metadata.get("model_type") == "gemma4_unified_text"
    size = metadata.natural("hidden_size_per_layer_input", *((0,) if unified else ()))
    if size == 0:
        return {}
    rows = metadata.integer("vocab_size_per_layer_input")
    if rows < vocab_size:
        raise metadata.error("vocab_size_per_layer_input", f"must be at least vocab_size={vocab_size}")
    return {"per_layer_input_size": size, "per_layer_vocab_size": rows}
