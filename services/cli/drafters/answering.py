"""From prompt files to answers; shared by `dspark eval` and `dspark calibrate`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dspark_core.errors import ConfigError
from dspark_core.evaluation.prompt_sets import PromptSet, find_prompt_files, read_prompt_set
from dspark_core.evaluation.runner import EvalPrompt, EvalRun, EvalRunner, EvalSettings
from dspark_core.tokenization.tokenizer import Tokenizer
from services.cli.temperature_arguments import add_temperature_arguments


def add_answer_arguments(group: argparse._ArgumentGroup, defaults: EvalSettings) -> None:
    group.add_argument(
        "--max-tokens",
        type=int,
        default=defaults.max_tokens,
        metavar="N",
        help="tokens per answer (default: %(default)s)",
    )
    add_temperature_arguments(group, temperature=defaults.temperature, top_p=defaults.top_p)
    group.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        metavar="N",
        help="seed of all sampling (default: %(default)s)",
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=defaults.concurrency,
        metavar="N",
        help="answers generated together (default: %(default)s)",
    )


def read_sets(arguments: argparse.Namespace) -> list[PromptSet]:
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit must be >= 1, got {arguments.limit}")
    return [read_prompt_set(path, arguments.limit) for path in find_prompt_files(arguments.prompts)]


def encode_prompts(sets: Sequence[PromptSet], tokenizer: Tokenizer) -> list[EvalPrompt]:
    """Renders each row as a chat for the model to continue."""
    return [
        EvalPrompt(
            set_name=one.name,
            row=row,
            token_ids=tokenizer.encode_chat(asked.chat()),
        )
        for one in sets
        for row, asked in enumerate(one.rows)
    ]


def run_with_progress(runner: EvalRunner, prompts: Sequence[EvalPrompt]) -> EvalRun:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("answers", total=len(prompts))
        return runner.run(prompts, on_ended=lambda _: progress.advance(task))
