"""The YAML configuration of `dspark train`: sections, fields and their validation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dspark_core.errors import ConfigError
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.models.moe_config import Balance


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetSection(Section):
    model: str = DEFAULT_MODEL
    """Name, GGUF file or Hugging Face directory."""
    chat_template_kwargs: dict[str, Any] = {}
    """Extra variables for the target's chat template, for validation prompts."""


class DataSection(Section):
    shards: list[Path] = []
    """Directories of `dspark data features`."""
    stream: Path | None = None
    """Answers of `dspark data regenerate`, whose features are computed while training."""
    stream_ahead: int = Field(default=2, ge=1)
    max_length: int | None = Field(default=None, ge=4)
    """Longest streamed conversation, in tokens; longer ones are left out."""

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        if bool(self.shards) == (self.stream is not None):
            raise ValueError("give either shards or stream")
        for name in ("max_length", "stream_ahead"):
            if self.shards and name in self.model_fields_set:
                raise ValueError(f"{name} is for a stream; shards hold what they were made with")
        return self


class MoeSection(Section):
    """Mixture of experts in place of the draft layers' dense MLPs."""

    num_experts: int = Field(ge=1)
    experts_per_token: int = Field(ge=1)
    expert_size: int = Field(ge=1)
    """Intermediate size of one expert."""
    num_shared_experts: int = Field(default=1, ge=0)
    routed_scale: float = Field(default=1.0, gt=0)
    balance: Balance = Balance.BIAS
    balance_weight: float = Field(default=1e-3, gt=0)


class DrafterSection(Section):
    algorithm: str = "dspark"
    start_from: str | None = None
    """Drafter to continue training, a directory or zoo name; None: a new one."""
    layers: int | None = Field(default=None, ge=1)
    """None: one per source layer, or the algorithm's default without source layers."""
    source_layers: list[int] = []
    """Target layers that the draft layers are initialized from; empty: random initialization."""
    tap_layers: list[int] | None = Field(default=None, min_length=1)
    """Target layers whose hidden states the drafter reads; None: those in the data."""
    block_size: int = Field(default=7, ge=1)
    mask_token: int = Field(default=0, ge=0)
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    markov_rank: int = Field(default=64, ge=0)
    confidence_head: bool = True
    window: int | None = Field(default=None, ge=1)
    draft_vocab: int | None = Field(default=None, ge=1)
    always_tokens: list[int] = []
    """Token ids that are in the draft vocabulary however rare they are."""
    moe: MoeSection | None = None

    @field_validator("tap_layers")
    @classmethod
    def _different(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError("layers must differ")
        return layers


class LossSection(Section):
    """Fields that are left out take the algorithm's own values."""

    cross_entropy: float | None = Field(default=None, ge=0)
    distance: float | None = Field(default=None, ge=0)
    confidence: float | None = Field(default=None, ge=0)
    decay: float | None = Field(default=None, gt=0)
    sample_below: float | None = Field(default=None, ge=0, le=1)
    anchors: int | None = Field(default=None, ge=1)
    """Draft blocks per sequence and step."""
    tap_dropout: float = Field(default=0.0, ge=0, lt=1)
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)


class OptimisationSection(Section):
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    sequences: int = Field(default=8, ge=1)
    """Sequences per step, over all workers."""
    learning_rate: float = Field(default=6e-4, gt=0)
    matrix_learning_rate: float | None = Field(default=None, gt=0)
    """Learning rate of Muon, which trains the inner matrices; None: AdamW trains everything."""
    warmup: float = Field(default=0.04, ge=0, le=1)
    """Fraction of the steps."""
    decay: float = Field(default=0.96, ge=0, le=1)
    """Fraction of the steps."""
    clip: float = Field(default=1.0, gt=0)
    ema: float | None = Field(default=None, gt=0, lt=1)
    losses: LossSection = LossSection()
    bf16: bool = True
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_length(self) -> OptimisationSection:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        return self


class ValidationSection(Section):
    prompts: list[Path] = []
    """JSONL files as `dspark eval` reads them; empty: no validation."""
    limit: int | None = Field(default=None, ge=1)
    """Prompts per file."""
    every: int = Field(default=200, ge=1)
    max_tokens: int = Field(default=64, ge=1)
    concurrency: int = Field(default=16, ge=1)
    patience: int | None = Field(default=None, ge=1)


class OutputSection(Section):
    directory: Path
    checkpoint_every: int = Field(default=200, ge=1)
    keep: int = Field(default=2, ge=1)
    log_every: int = Field(default=20, ge=1)
    tensorboard: bool = False


class TrainConfig(Section):
    target: TargetSection = TargetSection()
    data: DataSection
    drafter: DrafterSection = DrafterSection()
    optimisation: OptimisationSection
    validation: ValidationSection = ValidationSection()
    output: OutputSection


def read_config(path: Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads the file and applies overrides `a.b=value`, whose values are YAML. Raises ConfigError naming the
    field."""
    document = _read_yaml(path)
    for override in overrides:
        _apply(document, override)
    try:
        return TrainConfig.model_validate(document)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(one) for one in error.errors())) from error


def _read_yaml(path: Path) -> dict[str, Any]:
    yaml = _yaml()
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must contain sections, got {document!r}")
    return document


def _apply(document: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set must be like optimisation.steps=100, got {override!r}")
    yaml = _yaml()
    *sections, field = name.split(".")
    at = document
    for section in sections:
        inner = at.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {section} is not a section")
        at = inner
    try:
        at[field] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not YAML: {error}") from error


def _explain(error: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails
    location = [str(part) for part in error["loc"]]
    name = ".".join(location) or "the file"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        fields = ", ".join(_fields_of(location[:-1]))
        return f"{name} is not a field, got {error['input']!r}; valid fields here: {fields}"
    if error["type"] == "missing":
        return f"{name} is missing"
    if isinstance(error["input"], dict | Section):
        return f"{name}: {message}"
    return f"{name}: {message}, got {error['input']!r}"


def _fields_of(location: Sequence[str]) -> list[str]:
    model: type[BaseModel] = TrainConfig
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = (annotation, *get_args(annotation))
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return sorted(model.model_fields)


def _yaml() -> Any:  # noqa: ANN401 - a module
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("dspark train needs PyYAML: pip install 'dspark[train]'") from error
    return yaml
