"""`config.json` says how RoPE scales in `rope_parameters` or, in older files, in `rope_scaling`."""

from __future__ import annotations

from collections.abc import Mapping

from dspark_core.models.metadata import Metadata


def refuse_disagreement(metadata: Metadata, parameters: Mapping[str, object]) -> None:
    """`parameters`: those of `rope_parameters` that `rope_scaling` stands for, where a file has both.

    Model cards tell users to add `rope_scaling` for long contexts; beside the newer field it would be
    passed over, or pass it over, without a word. Raises CheckpointError.
    """
    scaling = metadata.get("rope_scaling")
    if scaling is None:
        return
    if not isinstance(scaling, Mapping):
        raise metadata.error("rope_scaling", "must be an object")
    read = {"rope_type": "default"} | _named_alike(parameters)
    if not _named_alike(scaling).items() <= read.items():
        raise metadata.error("rope_scaling", "does not agree with rope_parameters: leave one of them out")


def _named_alike(fields: Mapping[str, object]) -> dict[str, object]:
    """With the type under its newer name."""
    return {"rope_type" if name == "type" else name: value for name, value in fields.items()}
