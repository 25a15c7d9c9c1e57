"""`dspark data features` computes the features drafters are trained on; `dspark data check` verifies them."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from dspark_core.errors import ConfigError
from dspark_core.models.loading import LoadedTarget
from dspark_core.training.data.conversations import AnswerFile
from dspark_core.training.data.feature_cache import (
    DEFAULT_PACK_TOKENS,
    DEFAULT_SHARD_TOKENS,
    CachePlan,
    bytes_per_token,
    fill_cache,
    free_on_disk,
    gigabytes,
    plan_cache,
    require_space,
)
from dspark_core.training.manifest import check_shards, read_manifest
from dspark_core.training.origin import FeatureOrigin, default_tap_layers, describe_target
from dspark_core.training.sources import MIN_ANSWER_TOKENS
from services.cli.data.arguments import (
    TokenProgress,
    add_layers_argument,
    add_target_arguments,
    load_target_of,
    load_tokenizer_of,
    require_answers_of,
    set_threads,
)
from services.cli.output_files import require_directory

EXIT_DAMAGED = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "features",
        help="compute the target's hidden states over answers",
        description="Run the target over answers and store its tapped and final hidden states in shards. "
        "Run the same command again to continue after an interruption.",
    )
    parser.add_argument(
        "--answers",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file written by `dspark data regenerate`",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the shards")
    add_layers_argument(parser)
    parser.add_argument(
        "--max-length",
        type=int,
        default=None,
        metavar="N",
        help="leave out longer conversations, in tokens (default: the target's context)",
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help="tokens per shard (default: %(default)s)",
    )
    parser.add_argument(
        "--pack-tokens",
        type=int,
        default=DEFAULT_PACK_TOKENS,
        metavar="N",
        help="tokens per target pass (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print sizes only and write nothing")
    add_target_arguments(parser, kv_cache=False)
    parser.set_defaults(run=run)


def add_check_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="verify the checksums of shards",
        description="Read all shards and verify their checksums. The exit status is 1 if one is damaged.",
    )
    parser.add_argument("directory", type=Path, help="output directory of `dspark data features`")
    parser.set_defaults(run=run_check)


def run(arguments: argparse.Namespace) -> int:
    for name, value in (("pack-tokens", arguments.pack_tokens), ("max-length", arguments.max_length)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be >= 1, got {value}")
    require_directory(arguments.out)
    set_threads(arguments)
    target = load_target_of(arguments)
    origin = _origin(arguments, target)
    require_answers_of(target, arguments.answers)
    limit = target.config.max_context_tokens
    if arguments.max_length is not None:
        limit = min(limit, arguments.max_length)
    answers = AnswerFile(arguments.answers, max_tokens=limit, min_answer_tokens=MIN_ANSWER_TOKENS)
    plan = plan_cache(arguments.out, answers, origin, arguments.shard_tokens)
    _describe(plan, answers)
    require_space(plan)
    if arguments.dry_run:
        return 0
    total = sum(shard.tokens for shard in plan.shards)
    with TokenProgress("features", total, total - plan.missing_tokens) as progress:
        fill_cache(
            plan,
            answers,
            target.decoder,
            pack_tokens=arguments.pack_tokens,
            on_tokens=lambda count: progress.add(items=count, tokens=count),
        )
        rate = progress.tokens_per_second
    Console().print(f"{len(plan.shards)} shards in {arguments.out}, {rate:,.0f} tokens/s", soft_wrap=True)
    return 0


def run_check(arguments: argparse.Namespace) -> int:
    console = Console()
    damaged = total = 0
    for _, fault in check_shards(arguments.directory):
        total += 1
        if fault is not None:
            damaged += 1
            console.print(f"[red]{fault.path} {fault.problem}[/red]", soft_wrap=True)
    manifest = read_manifest(arguments.directory)
    planned = manifest.planned_shards if manifest else total
    console.print(f"{total - damaged} of {planned} shards are intact", soft_wrap=True)
    if total < planned:
        console.print(f"{planned - total} are not written yet: run the command that writes them again")
    if damaged:
        console.print("delete damaged shards and run the command that wrote them again; it keeps the others")
    return EXIT_DAMAGED if damaged else 0


def _origin(arguments: argparse.Namespace, target: LoadedTarget) -> FeatureOrigin:
    layers = arguments.layers or default_tap_layers(target.config.num_layers)
    if len(set(layers)) < len(layers):
        raise ConfigError(f"--layers must differ, got {' '.join(map(str, layers))}")
    return describe_target(target, arguments.dtype, layers, load_tokenizer_of(arguments).chat_template)


def _describe(plan: CachePlan, answers: AnswerFile) -> None:
    origin = plan.manifest.origin
    left_out = f"{answers.too_long} too long, {answers.too_short} with too short an answer"
    lines = [
        f"{len(answers)} conversations, {sum(answers.lengths):,} tokens (left out: {left_out})",
        f"tap layers {' '.join(map(str, origin.tap_layers))}: {bytes_per_token(origin):,} bytes per token, "
        f"{gigabytes(plan.total_bytes)} in {len(plan.shards)} shards",
        f"to do: {plan.missing_tokens:,} tokens, {gigabytes(plan.missing_bytes)} in "
        f"{len(plan.missing)} shards; {gigabytes(free_on_disk(plan.directory))} free",
    ]
    Console().print("\n".join(lines), soft_wrap=True, highlight=False)
