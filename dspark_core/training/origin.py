"""What training features were computed from, and the checks that a drafter fits them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dspark_core.errors import CheckpointError, ConfigError
from dspark_core.models.decoder import check_tap_layers
from dspark_core.models.loading import LoadedTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureOrigin:
    """Stored with cached features; two caches may be mixed only when all fields agree."""

    target: str
    """File or directory name, for display."""
    fingerprint: str
    """`LoadedTarget.fingerprint`: identifies the target's weights."""
    vocab_size: int
    hidden_size: int
    tap_layers: tuple[int, ...]
    """Tapped layers in the order of their states in a row; -1 is the embedding output."""
    dtype: str
    """Compute dtype of the target; rows are always stored in bfloat16."""
    chat_template: str
    """Digest of the template that rendered the conversations; empty: the target has none."""

    def fields(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def parse(cls, fields: object, where: str) -> FeatureOrigin:
        """The inverse of `fields`. Raises CheckpointError naming the field."""
        if not isinstance(fields, dict):
            raise CheckpointError(f"{where}: the features' origin must be an object, got {fields!r}")
        known = {name: fields.get(name) for name in cls.__slots__}
        if missing := [name for name, value in known.items() if value is None]:
            raise CheckpointError(f"{where}: the features' origin has no {', '.join(missing)}")
        try:
            return cls(
                target=str(fields["target"]),
                fingerprint=str(fields["fingerprint"]),
                vocab_size=int(fields["vocab_size"]),
                hidden_size=int(fields["hidden_size"]),
                tap_layers=tuple(int(layer) for layer in fields["tap_layers"]),
                dtype=str(fields["dtype"]),
                chat_template=str(fields["chat_template"]),
            )
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where}: the features' origin is damaged: {error}") from error


def describe_target(
    loaded: LoadedTarget, dtype: str, tap_layers: Sequence[int], chat_template: str | None
) -> FeatureOrigin:
    """Raises ConfigError for a tap layer the target does not have."""
    check_tap_layers(tap_layers, loaded.config.num_layers)
    return FeatureOrigin(
        target=loaded.path.name,
        fingerprint=loaded.fingerprint,
        vocab_size=loaded.config.vocab_size,
        hidden_size=loaded.config.hidden_size,
        tap_layers=tuple(tap_layers),
        dtype=dtype,
        chat_template=template_digest(chat_template),
    )


def default_tap_layers(num_layers: int, count: int = 5) -> tuple[int, ...]:
    """Evenly spaced from the second to the third-last layer: 1, 9, 17, 25, 33 of Qwen3-4B's 36."""
    first = min(1, num_layers - 1)
    last = max(first, num_layers - 3)
    step = (last - first) / max(count - 1, 1)
    return tuple(sorted({first + int(number * step + 0.5) for number in range(count)}))


def template_digest(template: str | None) -> str:
    return hashlib.sha256(template.encode()).hexdigest()[:16] if template else ""


def require_target(origin: FeatureOrigin, *, fingerprint: str, vocab_size: int, where: str) -> None:
    """Raises ConfigError, with both values, when the features come from another target."""
    if origin.vocab_size != vocab_size:
        raise ConfigError(
            f"{where} holds features of a target with vocab_size {origin.vocab_size} "
            f"({origin.target}); this target has vocab_size {vocab_size}"
        )
    if origin.fingerprint != fingerprint:
        raise ConfigError(
            f"{where} holds features of target {origin.target} with fingerprint {origin.fingerprint}; "
            f"this target has fingerprint {fingerprint}"
        )


def tap_columns(have: Sequence[int], want: Sequence[int], hidden_size: int, where: str) -> list[slice]:
    """Columns of a stored row that hold the wanted layers, in the wanted order.

    Raises ConfigError naming both lists when a layer was not tapped.
    """
    if missing := [layer for layer in want if layer not in have]:
        raise ConfigError(
            f"{where} holds tap layers {', '.join(map(str, have))}; the drafter needs "
            f"{', '.join(map(str, want))}: no {', '.join(map(str, missing))}"
        )
    starts = [have.index(layer) * hidden_size for layer in want]
    return [slice(start, start + hidden_size) for start in starts]
