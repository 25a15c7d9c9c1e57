"""`dspark data ngrams`: builds an n-gram table of the target's answers, to draft without a draft model."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from dspark_core.errors import ConfigError
from dspark_core.models.ngram_file import NgramOrigin, save_ngrams
from dspark_core.training.data.conversations import Conversation, read_conversations
from dspark_core.training.ngrams.building import LEAST_HELD_OUT, NgramOptions, train_table
from services.cli.data.arguments import (
    add_target_arguments,
    load_target_of,
    require_answers_of,
    set_threads,
)
from services.cli.output_files import require_writable


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    defaults = NgramOptions()
    parser = commands.add_parser(
        "ngrams",
        help="build an n-gram table from the target's answers",
        description="Count which token follows which in the target's answers and write an n-gram table. With "
        "`dspark up --ngrams FILE`, verifiers draft from it and from a request's own text, taking for each "
        f"token the likelier of the two. Needs at least {10 * LEAST_HELD_OUT} answers.",
    )
    parser.add_argument(
        "--answers",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSONL files written by `dspark data regenerate`",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--order",
        type=int,
        default=defaults.order,
        metavar="N",
        help="longest context, in tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--min-count",
        type=int,
        default=defaults.min_count,
        metavar="N",
        help="drop contexts of three or more tokens that occur less often (default: %(default)s)",
    )
    add_target_arguments(parser, kv_cache=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    options = NgramOptions(order=arguments.order, min_count=arguments.min_count)
    require_writable(arguments.out)
    set_threads(arguments)
    target = load_target_of(arguments)
    for path in arguments.answers:
        require_answers_of(target, path)
    console, vocab_size = Console(), target.config.vocab_size
    with console.status("reading answers ..."):
        conversations = [one for path in arguments.answers for one in read_conversations(path)]
    _require_vocabulary(conversations, vocab_size)
    tokens = sum(len(one.answer_ids) for one in conversations)
    with console.status(f"counting {tokens:,} tokens ..."):
        trained = train_table(conversations, vocab_size, options)
    origin = NgramOrigin(
        target=target.path.name,
        fingerprint=target.fingerprint,
        vocab_size=vocab_size,
        answer_tokens=tokens,
    )
    save_ngrams(trained.table, origin, arguments.out)
    trial = trained.trial
    console.print(
        f"{trained.table.entries:,} contexts from {tokens:,} answer tokens written to {arguments.out}, "
        f"{arguments.out.stat().st_size / 1e6:.1f} MB\n"
        f"of {trial.tokens:,} held-out tokens, a table of the other answers predicts {trial.table:.1%}, "
        f"repetitions in their own text {trial.match:.1%}, either of the two {trial.either:.1%}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _require_vocabulary(conversations: list[Conversation], vocab_size: int) -> None:
    """Raises ConfigError for token ids beyond the vocabulary: the answers come from another tokenizer."""
    highest = max((max(*one.prompt_ids, *one.answer_ids) for one in conversations), default=0)
    if highest >= vocab_size:
        raise ConfigError(f"--answers contain token {highest}; the target's vocabulary has {vocab_size}")
