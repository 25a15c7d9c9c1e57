"""Make training data for drafters, in steps:

prompts collects prompts, regenerate has the target answer them, features
computes the target's hidden states over the answers (training can also
compute them on the fly), and check verifies these files. ngrams builds an
n-gram table from the answers, for drafting without a draft model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from services.cli.data import features, ngrams, prompts, regenerate
from services.cli.write_errors import write_errors
from services.common.exits import EXIT_INTERRUPTED


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "data",
        help="make training data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(title="steps", required=True, metavar="STEP")
    for add in (
        prompts.add_parser,
        regenerate.add_parser,
        features.add_parser,
        features.add_check_parser,
        ngrams.add_parser,
    ):
        add(steps)
    for step in steps.choices.values():
        step.set_defaults(run=_interruptible(step.get_default("run")))


def _interruptible(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    def guarded(arguments: argparse.Namespace) -> int:
        try:
            with write_errors("run the same command again to continue"):
                return run(arguments)
        except KeyboardInterrupt:
            print("dspark: interrupted; run the same command again to continue", file=sys.stderr)
            return EXIT_INTERRUPTED

    return guarded
