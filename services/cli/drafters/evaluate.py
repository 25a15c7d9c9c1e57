"""Measure a drafter's accepted length on benchmark prompts, or compare earlier results.

Prompts are JSONL files, or directories of them. Each row has "prompt", "turns" (only the first is asked),
"messages" or "conversations" (used up to the last user message).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console

from dspark_core.engine.building import build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.lookup_building import build_lookup
from dspark_core.errors import ConfigError
from dspark_core.evaluation.comparison import compare, read_results
from dspark_core.evaluation.environment import describe_environment
from dspark_core.evaluation.plots import draw_plots, require_matplotlib
from dspark_core.evaluation.prompt_sets import PromptSet
from dspark_core.evaluation.report import EvalReport, macro_mean, report_sets
from dspark_core.evaluation.runner import EvalRunner, EvalSettings, draft_generator
from dspark_core.model_paths import resolve_model_path
from dspark_core.records import Verification
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import NGRAMS_AUTO, NO_NGRAMS
from services.cli.arguments import add_stack_arguments, stack_options
from services.cli.drafters.answering import add_answer_arguments, encode_prompts, read_sets, run_with_progress
from services.cli.drafters.eval_tables import (
    comparison_table,
    confidence_table,
    position_table,
    result_table,
    sweep_table,
)
from services.cli.output_files import require_writable, require_writable_folder, write_output
from services.cli.template_arguments import template_arguments
from services.embedded.options import StackOptions

DRAFTER, SERVED, LOOKUP = "drafter", "served", "lookup"
"""Values of --drafts: which drafts are measured."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("eval", help="measure a drafter's accepted length", description=__doc__)
    parser.add_argument("prompts", type=Path, nargs="*", help="JSONL files, or directories of them")
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=None,
        metavar="FILE",
        help="compare results that earlier runs wrote with --out",
    )
    parser.add_argument("--limit", type=int, default=None, metavar="N", help="rows per file (default: all)")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE", help="write the result to FILE as JSON"
    )
    parser.add_argument("--plots", type=Path, default=None, metavar="DIR", help="write plots to DIR as PNG")
    _add_settings(parser)
    add_stack_arguments(parser)
    parser.set_defaults(run=run, lookup=None)  # None: not given


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("protocol")
    defaults = EvalSettings()
    add_answer_arguments(group, defaults)
    group.add_argument(
        "--top-k",
        type=int,
        default=defaults.top_k,
        metavar="K",
        help="sample from the K likeliest tokens; 0 is off (default: %(default)s)",
    )
    group.add_argument(
        "--verification",
        choices=[rule.value for rule in Verification],
        default=defaults.verification.value,
        help="acceptance rule (default: %(default)s)",
    )
    group.add_argument(
        "--drafts",
        choices=[DRAFTER, SERVED, LOOKUP],
        default=DRAFTER,
        help="drafts to measure. drafter: the drafter's own; lookup: those looked up in the request's own "
        "text and --ngrams; served: whichever of the two promises more (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.compare is not None:
        return _compare(arguments)
    return _evaluate(arguments)


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.prompts:
        raise ConfigError(f"--compare takes results only, got the prompt file {arguments.prompts[0]}")
    comparison = compare(read_results(arguments.compare))
    console = Console()
    console.print(comparison_table(comparison))
    if comparison.differing_arguments:
        differing = ", ".join(comparison.differing_arguments)
        console.print(f"[yellow]not directly comparable: measured with different {differing}[/yellow]")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    _resolve_lookup(arguments)
    settings = _settings(arguments)
    if not arguments.prompts:
        raise ConfigError("eval needs prompt files, or --compare with results")
    sets = read_sets(arguments)
    _check_outputs(arguments)
    report = _measure(arguments, settings, sets)
    try:
        _write(report, arguments.out)
    finally:
        _show(report)  # even if writing failed; and only after it, as the pipe may be closed
    if arguments.plots is not None:
        for path in draw_plots(report, arguments.plots):
            print(f"written to {path}")
    return 0


def _settings(arguments: argparse.Namespace) -> EvalSettings:
    return EvalSettings(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        verification=Verification(arguments.verification),
        seed=arguments.seed,
        concurrency=arguments.concurrency,
    )


def _resolve_lookup(arguments: argparse.Namespace) -> None:
    """Fills in the default of --lookup. Raises ConfigError for lookup options that would not be used."""
    unused = ["--lookup"] if arguments.lookup else []
    if arguments.ngrams not in (NGRAMS_AUTO, NO_NGRAMS):
        unused.append(f"--ngrams {arguments.ngrams}")
    if unused and arguments.drafts == DRAFTER:
        raise ConfigError(
            f"{' and '.join(unused)} cannot be used with --drafts {DRAFTER}: "
            f"give --drafts {SERVED} or {LOOKUP}"
        )
    if arguments.lookup is None:
        arguments.lookup = StackOptions().lookup


def _check_outputs(arguments: argparse.Namespace) -> None:
    """Raises ConfigError, before the long work, if writing its results would fail."""
    if arguments.plots is not None:
        require_matplotlib()
    if arguments.out is not None:
        require_writable(arguments.out)
    if arguments.plots is not None:
        require_writable_folder(arguments.plots)


def _measure(arguments: argparse.Namespace, settings: EvalSettings, sets: Sequence[PromptSet]) -> EvalReport:
    options = stack_options(arguments)
    drafts: str = arguments.drafts
    if options.drafter is None and drafts != LOOKUP:
        raise ConfigError("eval measures a drafter: --drafter must name one, got 'none'")
    if not options.lookup and drafts != DRAFTER:
        raise ConfigError(f"--drafts {drafts} cannot be used with --no-lookup")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tokenizer = load_tokenizer(resolve_model_path(options.target_model), template_arguments(arguments))
    prompts = encode_prompts(sets, tokenizer)
    target = build_target(options.engine)
    lookup = None
    if drafts != DRAFTER:
        lookup = build_lookup(options.ngrams, options.target_model, target.facts, always=True)
    drafter = None
    if drafts != LOOKUP:
        drafter = build_drafter(options.engine, target.loaded, generator=draft_generator(settings.seed))
    runner = EvalRunner(
        target.engine,
        None if drafter is None else LocalDraftSource(drafter),
        settings,
        lookup=lookup,
        stop_token_ids=tokenizer.stop_token_ids,
    )
    started = time.perf_counter()
    done = run_with_progress(runner, prompts)
    seconds = time.perf_counter() - started
    reports = report_sets(done, [one.name for one in sets])
    return EvalReport(
        arguments=_argument_values(arguments),
        environment={
            **describe_environment(datetime.now(UTC)),
            "target_fingerprint": target.loaded.fingerprint,
            "drafter_fingerprint": None if drafter is None else drafter.geometry.fingerprint,
        },
        seconds=seconds,
        sets=reports,
        macro=macro_mean(reports),
    )


def _argument_values(arguments: argparse.Namespace) -> dict[str, object]:
    """JSON-serializable values of the arguments."""
    left_out = {"run", "compare"}
    return {name: _plain(value) for name, value in vars(arguments).items() if name not in left_out}


def _plain(value: object) -> object:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _write(report: EvalReport, path: Path | None) -> None:
    if path is not None:
        write_output(path, json.dumps(report.document(), indent=2, allow_nan=False) + "\n")
        print(f"written to {path}")


def _show(report: EvalReport) -> None:
    console = Console()
    console.print(result_table(report))
    console.print(position_table(report))
    if report.macro.sweep:
        console.print(confidence_table(report))
        console.print(sweep_table(report))
    else:
        console.print(f"no confidence figures or threshold sweep: {_why_without_confidence(report)}")
    tokens = sum(one.generated_tokens for one in report.sets)
    console.print(f"{tokens} tokens in {report.seconds:.0f} s")
    skipped = sum(one.too_long_prompts for one in report.sets)
    undrafted = sum(one.acceptance.undrafted_rounds for one in report.sets)
    if undrafted:
        console.print(f"[yellow]{undrafted} rounds without a draft lower all figures[/yellow]")
    if skipped:
        console.print(f"[yellow]{skipped} prompts skipped: longer than the context[/yellow]")


def _why_without_confidence(report: EvalReport) -> str:
    if report.arguments["drafts"] != DRAFTER:
        return "drafts are not the drafter's alone"
    if not any(one.acceptance.verified_tokens for one in report.sets):
        return "no draft was verified"  # e.g. all answers have one token, which prefill yields
    return "no confidence head"
