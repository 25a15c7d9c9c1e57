"""Reads and writes a drafter's `config.json` in DeepSpec's format: the target's text configuration with
the drafter's own layer count, plus the drafter's fields. No tensors here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dspark_core.models.config import (
    AnyDrafterConfig,
    AutoregressiveConfig,
    DecoderConfig,
    DrafterConfig,
    Eagle3Config,
    Family,
    MarkovHeadType,
    MtpConfig,
)
from dspark_core.models.gemma_config import LayerType
from dspark_core.models.gemma_hf import gemma_fields
from dspark_core.models.hf import decoder_config, read_json
from dspark_core.models.metadata import Metadata
from dspark_core.models.moe_config import moe_fields, parse_moe
from dspark_core.models.rope_layouts import rope_parameters

CONFIG_FILE = "config.json"
_ARCHITECTURES = {
    "Qwen3DSparkModel": Family.QWEN3,
    "LlamaDSparkModel": Family.LLAMA,
    "Gemma4DSparkModel": Family.GEMMA4,
    "Gemma3DSparkModel": Family.GEMMA3,
}
_EAGLE3_ARCHITECTURES = {
    "Qwen3Eagle3Model": Family.QWEN3,
    "LlamaEagle3Model": Family.LLAMA,
    "Gemma4Eagle3Model": Family.GEMMA4,
    "Gemma3Eagle3Model": Family.GEMMA3,
}
_MTP_ARCHITECTURES = {
    "Qwen3MTPModel": Family.QWEN3,
    "LlamaMTPModel": Family.LLAMA,
    "Gemma4MTPModel": Family.GEMMA4,
    "Gemma3MTPModel": Family.GEMMA3,
}


def read_drafter_config(directory: Path) -> DrafterConfig:
    """Raises CheckpointError naming the file, the field and its value."""
    return parse_drafter_config(_read(directory))


def read_eagle3_config(directory: Path) -> Eagle3Config:
    """Raises CheckpointError naming the file, the field and its value."""
    return parse_eagle3_config(_read(directory))


def read_mtp_config(directory: Path) -> MtpConfig:
    """Raises CheckpointError naming the file, the field and its value."""
    return parse_mtp_config(_read(directory))


def read_any_config(directory: Path) -> AnyDrafterConfig:
    """Reads the configuration of any kind of drafter. Raises CheckpointError."""
    metadata = _read(directory)
    supported = _ARCHITECTURES | _EAGLE3_ARCHITECTURES | _MTP_ARCHITECTURES
    architecture = _architecture(metadata, supported, "a supported drafter")
    if architecture in _EAGLE3_ARCHITECTURES:
        return parse_eagle3_config(metadata)
    if architecture in _MTP_ARCHITECTURES:
        return parse_mtp_config(metadata)
    return parse_drafter_config(metadata)


def parse_eagle3_config(metadata: Metadata) -> Eagle3Config:
    """Raises CheckpointError, also for more than one layer."""
    config = Eagle3Config(
        backbone=_single_layer(metadata, _EAGLE3_ARCHITECTURES, "an Eagle3 drafter"),
        num_target_layers=metadata.integer("num_target_layers"),
        target_layer_ids=layer_ids(metadata),
        block_size=metadata.integer("ttt_length"),
        draft_vocab_size=_optional(metadata, "draft_vocab_size"),
    )
    _check_draft_vocab(metadata, config)
    return config


def parse_mtp_config(metadata: Metadata) -> MtpConfig:
    """Raises CheckpointError, also for more than one module."""
    backbone = _single_layer(metadata, _MTP_ARCHITECTURES, "an MTP drafter")
    if metadata.integer("num_nextn_predict_layers", 1) != 1:
        raise metadata.error("num_nextn_predict_layers", "must be 1: one module drafts one token")
    config = MtpConfig(
        backbone=backbone,
        num_target_layers=metadata.integer("num_target_layers"),
        draft_vocab_size=_optional(metadata, "draft_vocab_size"),
    )
    tapped = metadata.get("target_layer_ids")
    if tapped is not None and tapped != list(config.target_layer_ids):
        raise metadata.error(
            "target_layer_ids",
            f"must be {list(config.target_layer_ids)}, the target's final hidden state, in an MTP drafter",
        )
    _check_draft_vocab(metadata, config)
    return config


def parse_drafter_config(metadata: Metadata) -> DrafterConfig:
    architecture = _architecture(metadata, _ARCHITECTURES, "a DSpark drafter")
    backbone = _backbone(metadata, _ARCHITECTURES[architecture])
    rank = _natural(metadata, "markov_rank")
    confidence = metadata.flag("enable_confidence_head", False)
    with_markov = confidence and metadata.flag("confidence_head_with_markov", False)
    if with_markov and rank == 0:
        raise metadata.error("confidence_head_with_markov", "needs markov_rank > 0")
    config = DrafterConfig(
        backbone=backbone,
        num_target_layers=metadata.integer("num_target_layers"),
        target_layer_ids=layer_ids(metadata),
        block_size=metadata.integer("block_size"),
        mask_token_id=_natural(metadata, "mask_token_id", required=True),
        markov_rank=rank,
        markov_head_type=_head_type(metadata),
        confidence_head=confidence,
        confidence_head_with_markov=with_markov,
        context_window=_optional(metadata, "context_window"),
        draft_vocab_size=_optional(metadata, "draft_vocab_size"),
        moe=parse_moe(metadata),
    )
    _check_ranges(metadata, config)
    return config


def drafter_fields(config: DrafterConfig) -> dict[str, object]:
    """Inverse of `parse_drafter_config`: the fields of `config.json`."""
    fields: dict[str, object] = {
        "architectures": [_name_of(config.backbone.family, _ARCHITECTURES)],
        **_backbone_fields(config.backbone),
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type.value,
        "enable_confidence_head": config.confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
    }
    if config.context_window is not None:
        fields["context_window"] = config.context_window
    if config.draft_vocab_size is not None:
        fields["draft_vocab_size"] = config.draft_vocab_size
    if config.moe is not None:
        fields |= moe_fields(config.moe)
    return fields


def eagle3_fields(config: Eagle3Config) -> dict[str, object]:
    """Inverse of `parse_eagle3_config`: the fields of `config.json`."""
    return {
        "architectures": [_name_of(config.backbone.family, _EAGLE3_ARCHITECTURES)],
        **_autoregressive_fields(config),
        "draft_num_hidden_layers": 1,
        "ttt_length": config.block_size,
    }


def mtp_fields(config: MtpConfig) -> dict[str, object]:
    """Inverse of `parse_mtp_config`: the fields of `config.json`."""
    return {
        "architectures": [_name_of(config.backbone.family, _MTP_ARCHITECTURES)],
        **_autoregressive_fields(config),
        "num_nextn_predict_layers": 1,
    }


def _autoregressive_fields(config: AutoregressiveConfig) -> dict[str, object]:
    fields: dict[str, object] = {
        **_backbone_fields(config.backbone),
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.target_layer_ids),
    }
    if config.draft_vocab_size is not None:
        fields["draft_vocab_size"] = config.draft_vocab_size
    return fields


def _name_of(family: Family, architectures: Mapping[str, Family]) -> str:
    return next(name for name, built in architectures.items() if built is family)


def _backbone(metadata: Metadata, family: Family) -> DecoderConfig:
    """Draft layers are uniform; Gemma features that would make them differ are refused."""
    backbone = decoder_config(metadata, family)
    if backbone.gemma is not None:
        if any(kind is not LayerType.FULL for kind in backbone.gemma.layer_types):
            raise metadata.error("layer_types", "must be 'full_attention' throughout in a drafter")
        for field in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
            if metadata.get(field) not in (None, 0):
                raise metadata.error(field, "must be 0 in a drafter")
    return backbone


def _single_layer(metadata: Metadata, architectures: Mapping[str, Family], kind: str) -> DecoderConfig:
    backbone = _backbone(metadata, architectures[_architecture(metadata, architectures, kind)])
    if backbone.num_layers != 1:
        # The context of a second layer would depend on the first layer's attention.
        raise metadata.error("num_hidden_layers", f"must be 1 in {kind}")
    return backbone


def _backbone_fields(config: DecoderConfig) -> dict[str, object]:
    fields: dict[str, object] = {
        "model_type": config.family.value,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_context_tokens,
        "rope_parameters": rope_parameters(config.rope_theta, config.rope_scaling),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
    }
    return fields if config.gemma is None else fields | gemma_fields(config, config.gemma)


def _read(directory: Path) -> Metadata:
    path = directory / CONFIG_FILE
    return Metadata(str(path), read_json(path))


def _architecture(metadata: Metadata, supported: Mapping[str, Family], kind: str) -> str:
    names = metadata.get("architectures")
    if isinstance(names, list) and len(names) == 1 and names[0] in supported:
        return str(names[0])
    raise metadata.error("architectures", f"is not {kind}; supported: {sorted(supported)}")


def _head_type(metadata: Metadata) -> MarkovHeadType:
    value = metadata.get("markov_head_type")
    if value is None:
        return MarkovHeadType.VANILLA
    try:
        return MarkovHeadType(value)
    except ValueError:
        kinds = [kind.value for kind in MarkovHeadType]
        raise metadata.error("markov_head_type", f"must be one of {kinds}") from None


def layer_ids(metadata: Metadata) -> tuple[int, ...]:
    """`target_layer_ids`, checked against `num_target_layers`."""
    value = metadata.get("target_layer_ids")
    if not (isinstance(value, list) and value and all(type(layer) is int for layer in value)):
        raise metadata.error("target_layer_ids", "must be a non-empty list of integers")
    layers = metadata.integer("num_target_layers")
    if not all(-1 <= layer < layers for layer in value):
        raise metadata.error("target_layer_ids", f"must be in [-1, num_target_layers={layers})")
    return tuple(value)


def _natural(metadata: Metadata, field: str, *, required: bool = False) -> int:
    value = metadata.get(field)
    if value is None and not required:
        return 0
    if type(value) is not int or value < 0:
        raise metadata.error(field, "must be an integer >= 0")
    return value


def _optional(metadata: Metadata, field: str) -> int | None:
    return None if metadata.get(field) is None else metadata.integer(field)


def _check_ranges(metadata: Metadata, config: DrafterConfig) -> None:
    vocab = config.backbone.vocab_size
    if config.mask_token_id >= vocab:
        raise metadata.error("mask_token_id", f"must be below vocab_size={vocab}")
    _check_draft_vocab(metadata, config)


def _check_draft_vocab(metadata: Metadata, config: AnyDrafterConfig) -> None:
    vocab = config.backbone.vocab_size
    if config.draft_vocab_size is not None and config.draft_vocab_size > vocab:
        raise metadata.error("draft_vocab_size", f"must be at most vocab_size={vocab}")
