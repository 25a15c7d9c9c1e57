"""Calibrate a drafter's confidences on prompts it was not trained on.

Prompts are JSONL files, or directories of them. Each row has "prompt", "turns" (only the first is asked),
"messages" or "conversations" (used up to the last user message). Every second prompt is held out:
temperatures and biases are fitted on the rest and evaluated on the held-out prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dspark_core.algorithms.calibration import PositionQuality
from dspark_core.engine.building import build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.errors import ConfigError
from dspark_core.evaluation.calibrating import CalibrationStudy, split_prompts, study_calibration
from dspark_core.evaluation.plots import require_matplotlib
from dspark_core.evaluation.prompt_sets import PromptSet
from dspark_core.evaluation.reliability_plot import draw_reliability
from dspark_core.evaluation.runner import EvalRunner, EvalSettings, draft_generator
from dspark_core.model_paths import resolve_model_path
from dspark_core.models.config import DrafterConfig, MtpConfig
from dspark_core.models.drafter_calibration import CALIBRATION_FILE, write_calibration
from dspark_core.models.drafter_config import read_any_config
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.zoo_paths import resolve_drafter_path
from services.cli.arguments import add_stack_arguments, stack_options
from services.cli.drafters.answering import add_answer_arguments, encode_prompts, read_sets, run_with_progress
from services.cli.output_files import require_writable_folder
from services.cli.template_arguments import template_arguments
from services.embedded.options import StackOptions

ENOUGH_ROUNDS = 1000
"""With fewer rounds, the errors in the table are mostly noise."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("calibrate", help="calibrate a drafter's confidences", description=__doc__)
    parser.add_argument("prompts", type=Path, nargs="+", help="JSONL files, or directories of them")
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="rows per file (default: all)")
    parser.add_argument(
        "--write", action="store_true", help=f"write {CALIBRATION_FILE} into the drafter's directory"
    )
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write the calibration to FILE"
    )
    parser.add_argument(
        "--plots", type=Path, default=None, metavar="DIR", help="write a reliability diagram to DIR"
    )
    add_answer_arguments(parser.add_argument_group("generation"), EvalSettings(temperature=0.0))
    add_stack_arguments(parser, lookup=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    settings = EvalSettings(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed,
        concurrency=arguments.concurrency,
    )
    options = stack_options(arguments)
    sets = read_sets(arguments)
    outputs = _outputs(arguments, _drafter_directory(options))
    path = resolve_model_path(options.target_model)
    tokenizer = load_tokenizer(path, template_arguments(arguments))
    study, fingerprint = _study(options, settings, sets, tokenizer)
    console = Console()
    console.print(calibration_table(study))
    console.print(_summary(study))
    for path in outputs:
        try:
            write_calibration(path, study.calibration, fingerprint=fingerprint)
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error}") from error
        console.print(f"written to {path}", soft_wrap=True)
    if arguments.plots is not None:
        console.print(f"written to {draw_reliability(study, arguments.plots)}", soft_wrap=True)
    return 0


def _drafter_directory(options: StackOptions) -> Path:
    """Raises ConfigError unless there is a drafter with a confidence head."""
    if options.drafter is None:
        raise ConfigError("calibrate needs a drafter: --drafter must name one, got 'none'")
    directory = resolve_drafter_path(options.drafter)
    config = read_any_config(directory)
    if isinstance(config, DrafterConfig) and config.confidence_head:
        return directory
    why = "enable_confidence_head is false"
    if not isinstance(config, DrafterConfig):
        why = f"{'MTP-1' if isinstance(config, MtpConfig) else 'Eagle3'} drafters have none"
    raise ConfigError(f"drafter {options.drafter!r} cannot be calibrated: it has no confidence head ({why})")


def _outputs(arguments: argparse.Namespace, directory: Path) -> list[Path]:
    """The files to write. Raises ConfigError here, before the long work, if writing them would fail."""
    if arguments.plots is not None:
        require_matplotlib()
    paths = [directory / CALIBRATION_FILE] if arguments.write else []
    if arguments.out is not None:
        if arguments.out.is_dir():
            raise ConfigError(f"--out must be a file, got the directory {arguments.out}")
        paths.append(arguments.out)
    for folder in [path.parent for path in paths] + ([arguments.plots] if arguments.plots else []):
        require_writable_folder(folder)
    return paths


def _study(
    options: StackOptions, settings: EvalSettings, sets: Sequence[PromptSet], tokenizer: Tokenizer
) -> tuple[CalibrationStudy, str]:
    """Generates all answers. Returns the study and the drafter's fingerprint."""
    fit, held_out = split_prompts(encode_prompts(sets, tokenizer))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    target = build_target(options.engine)
    generator = draft_generator(settings.seed)
    # Temperatures and biases apply to the head's own logits, not on top of an earlier calibration.
    drafter = build_drafter(options.engine, target.loaded, generator=generator, calibrated=False)
    runner = EvalRunner(
        target.engine, LocalDraftSource(drafter), settings, stop_token_ids=tokenizer.stop_token_ids
    )
    done = run_with_progress(runner, [*fit, *held_out])
    if done.too_long:
        Console().print(f"[yellow]{len(done.too_long)} prompts skipped: longer than the context[/yellow]")
    fitting = {prompt.request_id for prompt in fit}
    study = study_calibration(
        [one for one in done.answered if one.prompt.request_id in fitting],
        [one for one in done.answered if one.prompt.request_id not in fitting],
        drafter.geometry.block_size,
    )
    return study, drafter.geometry.fingerprint


def calibration_table(study: CalibrationStudy) -> Table:
    table = Table(title="survival by draft position: before / after calibration")
    for head in (
        "k",
        "T",
        "bias",
        "rounds",
        "ECE %\nfitted",
        "ECE %\nheld out",
        "AUC\nheld out",
        "Brier\nheld out",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    rows = zip(
        study.calibration.scaling.temperatures,
        study.calibration.scaling.biases,
        study.fitted.before,
        study.fitted.after,
        study.held_out.before,
        study.held_out.after,
        strict=True,
    )
    for position, (temperature, bias, fit_before, fit_after, before, after) in enumerate(rows, start=1):
        table.add_row(
            str(position),
            f"{temperature:.2f}",
            f"{bias:+.2f}",
            f"{fit_before.rounds}+{before.rounds}",
            _errors(fit_before, fit_after),
            _errors(before, after),
            f"{_number(before.auc)}/{_number(after.auc)}",
            f"{before.brier:.3f}/{after.brier:.3f}" if before.rounds else "-",
        )
    return table


def _errors(before: PositionQuality, after: PositionQuality) -> str:
    return f"{100 * before.ece:.1f}/{100 * after.ece:.1f}" if before.rounds else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _summary(study: CalibrationStudy) -> str:
    before, after = study.held_out.mean_ece
    text = f"mean ECE on held-out prompts: {100 * before:.2f} % before, {100 * after:.2f} % after"
    fewest = min(study.fitted.before[0].rounds, study.held_out.before[0].rounds)
    if fewest < ENOUGH_ROUNDS:
        text += (
            f"\n[yellow]only {fewest} rounds in the smaller half: more prompts give reliable figures[/yellow]"
        )
    return text
