"""Builds a trainer and a run from a validated configuration."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspark_core.errors import ConfigError
from dspark_core.evaluation.prompt_sets import find_prompt_files, read_prompt_set
from dspark_core.model_paths import resolve_model_path
from dspark_core.models.config import MarkovHeadType
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.models.moe_config import MoeConfig
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.training.data.conversations import AnswerFile
from dspark_core.training.data.feature_cache import free_on_disk, gigabytes
from dspark_core.training.initial import choose_draft_vocab
from dspark_core.training.objectives.registry import algorithm
from dspark_core.training.origin import default_tap_layers, describe_target, require_target
from dspark_core.training.recipe import DrafterRecipe, LossConfig
from dspark_core.training.run import BEST, CHECKPOINTS, NEWEST, RunSettings, TrainingRun
from dspark_core.training.sources import MIN_ANSWER_TOKENS, CachedSource, SequenceSource
from dspark_core.training.speculative_validation import SpeculativeValidator, ValidationSettings
from dspark_core.training.start import SavedStart
from dspark_core.training.stream import FeatureStream
from dspark_core.training.trainer import Trainer
from dspark_core.training.trainer_config import TrainerConfig
from dspark_core.training.workers import Workers, own_device
from dspark_core.zoo_paths import resolve_drafter_path
from services.cli.data.arguments import require_answers_of
from services.cli.drafters.train_config import TrainConfig
from services.cli.drafters.train_output import VOCAB, has_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    config: TrainConfig
    target: LoadedTarget
    source: SequenceSource
    trainer: Trainer
    tap_layers: tuple[int, ...]
    draft_vocab_ids: Tensor | None
    """None: the whole vocabulary."""

    def meaning(self) -> dict[str, object]:
        """Properties of the weights that files determine, not the configuration."""
        ids = self.draft_vocab_ids
        digest = None if ids is None else hashlib.sha256(repr(ids.tolist()).encode()).hexdigest()[:16]
        vocab = None if ids is None else f"{len(ids)} tokens, {digest}"
        return {
            "target.model": f"weights {self.target.fingerprint}",
            "drafter.tap_layers": list(self.tap_layers),
            "drafter.draft_vocab": vocab,
        }


def build_setup(config: TrainConfig, workers: Workers, *, resume: bool = False) -> Setup:
    """Loads the target and opens the data; writes nothing. `resume`: reuses the run's draft vocabulary."""
    chosen = algorithm(config.drafter.algorithm)  # raises before the long work
    losses = loss_config(config, chosen.losses)
    torch.manual_seed(config.optimisation.seed)
    device = own_device(config.optimisation.device)
    target = load_target(config.target.model, torch.bfloat16, pack=False)
    source = _open_source(config, target, device)
    recipe = drafter_recipe(config, source, target)
    start = _saved_start(config, target)
    if start is None:
        draft_vocab_ids = _draft_vocab(config, source, target, resume=resume)
    else:
        draft_vocab_ids = start.draft_vocab_ids(config.drafter.draft_vocab)
    objective = chosen.build(recipe, losses, target, draft_vocab_ids)
    if start is not None:
        start.copy_to(objective.module)
    steps = config.optimisation.steps or math.ceil(
        (config.optimisation.epochs or 1) * len(source) / config.optimisation.sequences
    )
    trainer = Trainer(
        objective,
        trainer_config(config, steps),
        source,
        workers=workers,
        device=device,
    )
    if (config.data.stream is not None and device.type == "cpu") or config.validation.prompts:
        target.decoder.pack()  # only now: the drafter was initialized from the unpacked layers
    return Setup(
        config=config,
        target=target,
        source=source,
        trainer=trainer,
        tap_layers=recipe.target_layer_ids,
        draft_vocab_ids=draft_vocab_ids,
    )


def build_run(setup: Setup) -> TrainingRun:
    """With validation, if the configuration has prompts. Raises ConfigError if the disk is too small."""
    config = setup.config
    validate = build_validator(setup)
    if setup.trainer.workers.is_first:  # only it writes, and it may clear the directory before others look
        require_disk(setup)
    settings = RunSettings(
        output=config.output.directory,
        checkpoint_every=config.output.checkpoint_every,
        keep=config.output.keep,
        log_every=config.output.log_every,
        validate_every=config.validation.every,
        patience=config.validation.patience,
    )
    return TrainingRun(
        setup.trainer,
        settings,
        validate=validate,
        validates=bool(config.validation.prompts),
        yardstick=validate.yardstick if validate else "",
        drafter=setup.meaning(),
    )


def build_validator(setup: Setup) -> SpeculativeValidator | None:
    """None without prompts, and on all workers but the first. Raises ConfigError if they cannot be read."""
    if setup.config.validation.prompts and setup.trainer.workers.is_first:
        return _validator(setup.config, setup.target)
    return None


def require_disk(setup: Setup) -> None:
    """Raises ConfigError, with both figures, if checkpoints and exports would not fit."""
    needed, free = disk_bytes(setup), free_bytes(setup.config.output.directory)
    if needed > free:
        raise ConfigError(
            f"output.directory {setup.config.output.directory}: the run needs {gigabytes(needed)} "
            f"(output.keep={setup.config.output.keep} checkpoints and exports), {gigabytes(free)} are free"
        )


def disk_bytes(setup: Setup) -> int:
    """Counts one checkpoint and one export more than are kept: the old one is deleted only after the new one
    is complete."""
    exports = 3 * setup.trainer.parameters * (2 if setup.config.optimisation.bf16 else 4)
    return (setup.config.output.keep + 1) * setup.trainer.state_bytes + exports


def free_bytes(output: Path) -> int:
    """Space for a run in this directory. What an earlier run left there counts as free: the new run replaces
    it or continues with it."""
    held = (path for name in (CHECKPOINTS, NEWEST, BEST) for path in (output / name).rglob("*"))
    return free_on_disk(output) + sum(path.stat().st_size for path in held if path.is_file())


def loss_config(config: TrainConfig, defaults: LossConfig) -> LossConfig:
    given = config.optimisation.losses
    values: dict[str, Any] = {
        "cross_entropy_weight": given.cross_entropy,
        "distance_weight": given.distance,
        "confidence_weight": given.confidence,
        "loss_decay": given.decay,
        "sample_below": given.sample_below,
        "anchors_per_sequence": given.anchors,
        "tap_dropout": given.tap_dropout,
        "hidden_dropout": given.hidden_dropout,
    }
    return replace(defaults, **{name: value for name, value in values.items() if value is not None})


def trainer_config(config: TrainConfig, steps: int) -> TrainerConfig:
    given = config.optimisation
    return TrainerConfig(
        steps=steps,
        sequences_per_step=given.sequences,
        learning_rate=given.learning_rate,
        matrix_learning_rate=given.matrix_learning_rate,
        warmup_fraction=given.warmup,
        decay_fraction=given.decay,
        clip_norm=given.clip,
        ema_decay=given.ema,
        bf16=given.bf16,
        seed=given.seed,
    )


def drafter_recipe(config: TrainConfig, source: SequenceSource, target: LoadedTarget) -> DrafterRecipe:
    given = config.drafter
    taps = given.tap_layers or (source.origin.tap_layers if source.origin else None)
    recipe = DrafterRecipe(
        algorithm=given.algorithm,
        target_layer_ids=tuple(taps or default_tap_layers(target.config.num_layers)),
        num_layers=given.layers,
        source_layers=tuple(given.source_layers),
        block_size=given.block_size,
        mask_token_id=given.mask_token,
        markov_rank=given.markov_rank,
        markov_head_type=MarkovHeadType(given.markov_head),
        confidence_head=given.confidence_head,
        context_window=given.window,
        draft_vocab_size=given.draft_vocab,
        moe=None if given.moe is None else MoeConfig(**given.moe.model_dump()),
    )
    if given.mask_token >= target.config.vocab_size:
        raise ConfigError(
            f"drafter.mask_token must be below the target's vocab_size {target.config.vocab_size}, "
            f"got {given.mask_token}"
        )
    _require_taps(recipe, source, target)
    return recipe


def _require_taps(recipe: DrafterRecipe, source: SequenceSource, target: LoadedTarget) -> None:
    """Checks shards whose manifest does not name their origin by the shape of their first sequence. Raises
    ConfigError."""
    if source.origin is not None:
        return
    sequence = next(iter(source.batches([[0]])))[0]
    size, needed = sequence.taps.shape[1], len(recipe.target_layer_ids) * target.config.hidden_size
    if size != needed:
        raise ConfigError(
            f"data.shards hold {size} tapped values per token; drafter.tap_layers "
            f"{list(recipe.target_layer_ids)} of this target need {needed}"
        )


def _open_source(config: TrainConfig, target: LoadedTarget, device: torch.device) -> SequenceSource:
    """`device`: where streamed features are computed. Raises ConfigError, with both values, if the data are
    of another target."""
    taps = config.drafter.tap_layers
    if config.data.stream is not None:
        require_answers_of(target, config.data.stream)
        limit = min(
            config.data.max_length or target.config.max_context_tokens, target.config.max_context_tokens
        )
        answers = AnswerFile(config.data.stream, max_tokens=limit, min_answer_tokens=MIN_ANSWER_TOKENS)
        template = load_tokenizer(resolve_model_path(config.target.model)).chat_template
        layers = taps or default_tap_layers(target.config.num_layers)
        origin = describe_target(target, "bfloat16", layers, template)
        decoder = target.decoder
        if device.type != "cpu":  # a second copy: the first initializes the drafter and validates
            decoder = load_target(config.target.model, torch.bfloat16, device, pack=False).decoder
        return FeatureStream(decoder, answers, origin, ahead=config.data.stream_ahead)
    source = CachedSource.open(config.data.shards, tap_layers=taps)
    if source.origin is not None:
        require_target(
            source.origin,
            fingerprint=target.fingerprint,
            vocab_size=target.config.vocab_size,
            where=", ".join(map(str, config.data.shards)),
        )
    return source


def _draft_vocab(
    config: TrainConfig, source: SequenceSource, target: LoadedTarget, *, resume: bool
) -> Tensor | None:
    """Chosen once per run: data added later must not change what the weights mean."""
    if config.drafter.draft_vocab is None:
        return None
    path = config.output.directory / VOCAB
    # A run without a checkpoint is not resumed, and its vocabulary may have another size.
    if resume and has_run(config.output.directory) and path.exists():
        ids = torch.load(path, weights_only=True)
        assert isinstance(ids, Tensor)
        return ids
    counts = source.token_counts(target.config.vocab_size)
    return choose_draft_vocab(counts, config.drafter.draft_vocab, config.drafter.always_tokens)


def _saved_start(config: TrainConfig, target: LoadedTarget) -> SavedStart | None:
    name = config.drafter.start_from
    if name is None:
        return None
    try:
        return SavedStart(resolve_drafter_path(name), target)
    except ConfigError as error:
        raise ConfigError(f"drafter.start_from: {error}") from error


def _validator(config: TrainConfig, target: LoadedTarget) -> SpeculativeValidator:
    path = resolve_model_path(config.target.model)
    tokenizer = load_tokenizer(path, config.target.chat_template_kwargs)
    if tokenizer.vocab_size > target.config.vocab_size:
        raise ConfigError(
            f"target.model {config.target.model}: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"its weights {target.config.vocab_size}"
        )
    files = find_prompt_files(config.validation.prompts)
    prompts = [
        tokenizer.encode_chat(row.chat())
        for file in files
        for row in read_prompt_set(file, config.validation.limit).rows
    ]
    settings = ValidationSettings(
        max_tokens=config.validation.max_tokens, concurrency=config.validation.concurrency
    )
    return SpeculativeValidator(target, prompts, tokenizer.stop_token_ids, settings)
