"""Collect training prompts from files, a Hugging Face dataset or the target itself."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console

from dspark_core.errors import ConfigError
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.training.data.generation import DEFAULT_CONCURRENCY, BatchGenerator
from dspark_core.training.data.hub import read_dataset, require_datasets
from dspark_core.training.data.magpie import (
    Synthesiser,
    SynthesisSettings,
    TurnJournal,
    begun_chunk_turns,
    synthesise,
)
from dspark_core.training.data.prompt_filters import RUN_WORDS, Exclusions, LengthLimits, PromptFilter
from dspark_core.training.data.prompts import Prompt, read_prompts
from services.cli.data.arguments import (
    TokenProgress,
    add_target_arguments,
    load_engine,
    load_tokenizer_of,
)
from services.cli.output_files import require_writable
from services.cli.temperature_arguments import add_temperature_arguments

JOURNAL_SUFFIX = ".turns.jsonl"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("prompts", help="collect training prompts", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSONL file to write")
    parser.add_argument(
        "--limit",
        type=int,
        default=None,
        metavar="N",
        help="rows to take from each file or dataset (default: all)",
    )
    _add_sources(parser)
    _add_synthesis(parser)
    _add_filters(parser)
    add_target_arguments(parser)
    parser.set_defaults(run=run)


def _add_sources(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sources (at least one is required)")
    group.add_argument(
        "files",
        type=Path,
        nargs="*",
        help="JSONL files with `prompt`, `turns`, `messages` or `conversations` in each row; `domain` and "
        "`source` are kept",
    )
    group.add_argument(
        "--dataset", default=None, metavar="NAME", help="Hugging Face dataset, by name or local directory"
    )
    group.add_argument("--subset", default=None, metavar="NAME", help="configuration of the dataset")
    group.add_argument(
        "--split", default="train", metavar="NAME", help="split of the dataset (default: %(default)s)"
    )
    group.add_argument("--column", default=None, metavar="NAME", help="column that holds the prompt text")
    group.add_argument(
        "--synthesise",
        type=int,
        default=0,
        metavar="N",
        help="have the target write N user turns itself (default: %(default)s)",
    )


def _add_synthesis(parser: argparse.ArgumentParser) -> None:
    group, defaults = parser.add_argument_group("sampling with --synthesise"), SynthesisSettings()
    add_temperature_arguments(group, temperature=defaults.temperature, top_p=defaults.top_p)
    group.add_argument(
        "--seed", type=int, default=defaults.seed, metavar="N", help="sampling seed (default: %(default)s)"
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help="turns generated together (default: %(default)s)",
    )


def _add_filters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("filters")
    limits = LengthLimits()
    group.add_argument(
        "--min-tokens",
        type=int,
        default=limits.min_tokens,
        metavar="N",
        help="drop shorter prompts (default: %(default)s)",
    )
    group.add_argument(
        "--max-tokens",
        type=int,
        default=limits.max_tokens,
        metavar="N",
        help="drop longer prompts (default: %(default)s)",
    )
    group.add_argument(
        "--exclude",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=f"drop prompts that share {RUN_WORDS} consecutive words with these files, such as benchmarks",
    )


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    tokenizer = load_tokenizer_of(arguments)
    exclusions = Exclusions(p.text for path in arguments.exclude for p in read_prompts(path))
    chosen = PromptFilter(
        count_tokens=lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
        limits=LengthLimits(min_tokens=arguments.min_tokens, max_tokens=arguments.max_tokens),
        exclusions=exclusions,
    )
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.writelines(prompt.line() for prompt in chosen.keep(_collected(arguments)))
            if arguments.synthesise:
                out.writelines(prompt.line() for prompt in _synthesised(arguments, tokenizer, chosen))
        if not chosen.kept:
            raise ConfigError(f"no prompts are left after filtering{_refusals(chosen, '; ')}")
        partial.replace(arguments.out)
    finally:
        partial.unlink(missing_ok=True)
    Console().print(f"{chosen.kept} prompts in {arguments.out}{_refusals(chosen, '; ')}", soft_wrap=True)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not (arguments.files or arguments.dataset or arguments.synthesise):
        raise ConfigError("no source: give files, --dataset NAME or --synthesise N")
    for name in ("synthesise", "limit"):
        value = getattr(arguments, name)
        if value is not None and value < (0 if name == "synthesise" else 1):
            raise ConfigError(f"--{name} must be >= {0 if name == 'synthesise' else 1}, got {value}")
    if arguments.synthesise and arguments.min_tokens >= _turn_tokens(arguments):
        raise ConfigError(
            f"--min-tokens must be below {_turn_tokens(arguments)}, the limit of turns that --synthesise "
            f"writes, got {arguments.min_tokens}"
        )
    if arguments.out.resolve() in [path.resolve() for path in (*arguments.files, *arguments.exclude)]:
        raise ConfigError(f"--out would overwrite {arguments.out}, which is an input")
    if arguments.dataset:
        require_datasets()
    require_writable(arguments.out)


def _collected(arguments: argparse.Namespace) -> Iterator[Prompt]:
    sources: list[Iterable[Prompt]] = [
        itertools.islice(read_prompts(path), arguments.limit) for path in arguments.files
    ]
    if arguments.dataset:
        sources.append(
            read_dataset(
                arguments.dataset,
                subset=arguments.subset,
                split=arguments.split,
                column=arguments.column,
                limit=arguments.limit,
            )
        )
    return itertools.chain.from_iterable(sources)


def _synthesised(
    arguments: argparse.Namespace, tokenizer: Tokenizer, chosen: PromptFilter
) -> Iterator[Prompt]:
    """Yields the requested number of prompts, counted after all filters."""
    path = arguments.out.with_name(arguments.out.name + JOURNAL_SUFFIX)
    first_chunk = max(arguments.concurrency, min(2 * arguments.synthesise, SynthesisSettings().chunk_turns))
    settings = SynthesisSettings(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        max_tokens=_turn_tokens(arguments),
        chunk_turns=begun_chunk_turns(path) or first_chunk,
        seed=arguments.seed,
    )
    built = load_engine(arguments)
    generator = BatchGenerator(built.engine, tokenizer.stop_token_ids, concurrency=arguments.concurrency)
    journal = TurnJournal(path, settings, built.loaded.fingerprint)
    with TokenProgress("synthesising", arguments.synthesise) as progress:
        synthesiser = Synthesiser(
            generator, tokenizer, settings, on_generated=lambda count: progress.add(tokens=count)
        )
        kept = synthesise(synthesiser, journal, chosen)
        for prompt in itertools.islice(kept, arguments.synthesise):
            progress.add(items=1)
            yield prompt


def _turn_tokens(arguments: argparse.Namespace) -> int:
    most: int = arguments.max_tokens
    return min(most, SynthesisSettings().max_tokens)


def _refusals(chosen: PromptFilter, lead: str) -> str:
    reasons: Sequence[str] = [f"{count} {reason.value}" for reason, count in chosen.refused.items()]
    return f"{lead}refused: {', '.join(reasons)}" if reasons else ""
