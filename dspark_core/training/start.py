"""Starts training from a saved drafter's weights and draft vocabulary instead of fresh ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspark_core.errors import ConfigError
from dspark_core.models.drafter_kinds import AnyDrafter, load_any_drafter
from dspark_core.models.loading import LoadedTarget

_FREE = frozenset({"block_size", "context_window"})
"""Fields that may change, since no weight depends on them."""


class SavedStart:
    def __init__(self, directory: Path, target: LoadedTarget) -> None:
        """Raises CheckpointError when the drafter cannot be read or does not fit the target."""
        self._directory = directory
        self._drafter: AnyDrafter = load_any_drafter(directory, target.decoder, target.config, torch.float32)

    def draft_vocab_ids(self, wanted: int | None) -> Tensor | None:
        """Target token ids of the saved draft vocabulary [n]; None: all. Raises ConfigError when `wanted`
        is given and differs from its size."""
        ids = self._drafter.draft_vocab_ids
        size = self._drafter.config.backbone.vocab_size if ids is None else len(ids)
        if wanted is not None and wanted != size:
            raise ConfigError(
                f"drafter.draft_vocab is {wanted}, drafter.start_from {self._directory} has {size}: "
                "leave draft_vocab out"
            )
        return None if ids is None else ids.clone()

    def copy_to(self, module: nn.Module) -> None:
        """Raises ConfigError, naming what differs, when `module` has another type, geometry or tap layers."""
        saved = self._drafter
        if not isinstance(module, type(saved)):
            raise ConfigError(
                f"drafter.start_from {self._directory} holds a {type(saved).__name__}, "
                f"this run trains a {type(module).__name__}"
            )
        was, now = _flat(saved.config), _flat(module.config)
        for name in sorted(was.keys() | now.keys()):
            if name not in _FREE and was.get(name) != now.get(name):
                raise ConfigError(
                    f"drafter.start_from {self._directory} has {name} {was.get(name)!r}, "
                    f"this run {now.get(name)!r}"
                )
        module.load_state_dict(saved.state_dict())


def _flat(config: Any) -> dict[str, Any]:  # noqa: ANN401 - any dataclass
    """Fields by name; the backbone's are prefixed with `backbone.`."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    backbone = fields.pop("backbone")
    inner = {field.name: getattr(backbone, field.name) for field in dataclasses.fields(backbone)}
    return fields | {f"backbone.{name}": value for name, value in inner.items()}
