"""The `dspark` command and its subcommands, grouped by what they are for.

Only the module of the command that is run is imported: most of them load torch, which takes seconds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import os
import sys
from collections.abc import Sequence

from dspark_core.errors import ConfigError, DSparkError
from services.common.exits import EXIT_CONFIG, EXIT_FAILURE, EXIT_INTERRUPTED

COMMANDS = {
    "up": ("serving.up", "run all services on this machine"),
    "chat": ("serving.chat", "chat with a running gateway"),
    "generate": ("serving.generate", "answer one prompt"),
    "eval": ("drafters.evaluate", "measure a drafter's accepted length"),
    "calibrate": ("drafters.calibrate", "calibrate a drafter's confidences"),
    "data": ("data.command", "make training data"),
    "train": ("drafters.train", "train a drafter"),
    "profile": ("clusters.profile", "measure step and draft times"),
    "replay": ("clusters.replay", "plan traced rounds with other planners"),
    "simulate": ("clusters.simulate", "simulate a cluster"),
    "doctor": ("serving.doctor", "check this installation"),
}
"""Command -> (module, one line of help)."""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """A parser with the arguments of `command`; the other commands appear by name only."""
    parser = argparse.ArgumentParser(
        prog="dspark",
        description="Serve large language models with DSpark speculative decoding.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dspark {_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        if name == command:
            importlib.import_module(f"services.cli.{module}").add_parser(commands)
        else:
            commands.add_parser(name, help=what)
    return parser


def _version() -> str:
    try:
        return importlib.metadata.version("dspark")
    except importlib.metadata.PackageNotFoundError:  # a checkout on PYTHONPATH
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 success, 1 failure while running, 2 bad arguments or configuration,
    130 Ctrl-C."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        # The command comes first: `dspark` itself has no options that take a value.
        arguments = build_parser(given[0] if given else None).parse_args(given)
        status = int(arguments.run(arguments))
        sys.stdout.flush()
        return status
    except ConfigError as error:
        print(f"dspark: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except DSparkError as error:
        print(f"dspark: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except OSError as error:  # such as a full disk behind standard output
        if not isinstance(error, BrokenPipeError):
            print(f"dspark: {error}", file=sys.stderr)
        _drop_unwritten()
        return EXIT_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _drop_unwritten() -> None:
    """What standard output does not take would fail again, with a traceback, when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
