"""RoPE scaling in `config.json`: `rope_parameters` or, in older files, `rope_scaling`.

Reads it for Llama and Qwen3 and writes it for their drafters; Gemma has separate settings per kind of layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from dspark_core.models.metadata import Metadata
from dspark_core.models.rope_scaling import (
    AnyRopeScaling,
    LinearScaling,
    RopeScaling,
    YarnScaling,
    yarn_attention_factor,
)

_ORIGINAL = "original_max_position_embeddings"
_STRETCHED = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", _ORIGINAL)
_KNOWN = {
    "linear": _STRETCHED,
    "yarn": (
        *_STRETCHED,
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "beta_fast",
        "beta_slow",
        "truncate",
        "finetuned",  # records how the weights were made; has no effect
    ),
}
"""Fields whose effect is known; an unknown one might change every logit."""
_PLAIN = ("rope_type", "type", "rope_theta", "partial_rotary_factor", _ORIGINAL)
"""Fields that may stand beside the type `default`, or without a type."""


def refuse_disagreement(metadata: Metadata, parameters: Mapping[str, object]) -> None:
    """Refuses a file whose `rope_scaling` contradicts `parameters`, the matching part of `rope_parameters`.

    Model cards tell users to add `rope_scaling` for long contexts; next to the newer field one of the two
    would be ignored silently. Raises CheckpointError.
    """
    scaling = metadata.get("rope_scaling")
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise metadata.error("rope_scaling", "must be an object")
    read = {"rope_type": "default"} | _named_alike(parameters)
    if not _named_alike(scaling).items() <= read.items():
        raise metadata.error("rope_scaling", "does not agree with rope_parameters: leave one of them out")


def rope_type(rope: Metadata) -> tuple[str, object]:
    """The type's field and value; None: `default`, under which fields that would scale are refused."""
    type_field = "rope_type" if rope.get("rope_type") is not None else "type"
    kind = rope.get(type_field)
    if rope.get("type") not in (None, kind):
        raise rope.error("type", f"does not agree with rope_type={kind!r}: leave one of them out")
    if kind not in (None, "default"):
        return type_field, kind
    for field, value in rope.values.items():
        if value is not None and field not in _PLAIN and not (field == "factor" and value == 1):
            raise rope.error(
                field, "has no effect without a rope_type that scales: leave it out, or name one"
            )
    return type_field, None


def refuse_another_theta(metadata: Metadata, field: str, rope: Mapping[str, object], place: str) -> None:
    """Refuses a `field` beside the RoPE settings that contradicts the theta in them, at `place`."""
    theta, own = metadata.get(field), rope.get("rope_theta")
    if None not in (theta, own) and theta != own:
        raise metadata.error(field, f"does not agree with {place}: leave one of them out")


def read_rope_scaling(rope: Metadata, metadata: Metadata) -> AnyRopeScaling | None:
    """`rope`: the settings in either layout; `metadata`: the enclosing file. Raises CheckpointError and
    ConfigError."""
    type_field, kind = rope_type(rope)
    if kind is None:
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise rope.error(type_field, "is not supported; supported: 'default', 'linear', 'llama3', 'yarn'")
    known = _KNOWN.get(str(kind), rope.values)
    for field, value in rope.values.items():
        if value is not None and field not in known:
            raise rope.error(field, f"is not supported where {type_field} is {kind!r}")
    outer = metadata.get(_ORIGINAL) is not None  # takes precedence, as in `transformers`
    original = (metadata if outer else rope).integer(_ORIGINAL, metadata.integer("max_position_embeddings"))
    factor = rope.number("factor")
    if kind == "linear":
        return LinearScaling(factor=factor, original_max_positions=original)
    if kind == "yarn":
        return _read_yarn(rope, factor, original)
    return RopeScaling(
        factor=factor,
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_positions=original,
    )


def rope_parameters(theta: float, scaling: AnyRopeScaling | None) -> dict[str, object]:
    """Inverse of `read_rope_scaling`, in the newer layout."""
    fields: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    if scaling is None:
        return fields
    fields |= {"factor": scaling.factor, _ORIGINAL: scaling.original_max_positions}
    match scaling:
        case RopeScaling():
            return fields | {
                "rope_type": "llama3",
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        case LinearScaling():
            return fields | {"rope_type": "linear"}
        case YarnScaling():
            return fields | {
                "rope_type": "yarn",
                "attention_factor": scaling.attention_factor,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }


def _read_yarn(rope: Metadata, factor: float, original: int) -> YarnScaling:
    """Uses the defaults of `transformers`, which ignores either of the two `mscale` fields alone."""
    scales = ("mscale", "mscale_all_dim")
    given = [rope.number(field) for field in scales if rope.get(field) is not None]
    attention = yarn_attention_factor(factor, *(given if len(given) == len(scales) else ()))
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=rope.number("attention_factor", attention),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _named_alike(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields with the type under its newer name."""
    return {"rope_type" if name == "type" else name: value for name, value in fields.items()}
