"""The `dspark` command and its subcommands, one module each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dspark_core.errors import ConfigError, DSparkError
from services.cli import (
    calibrate,
    chat,
    data,
    doctor,
    evaluate,
    generate,
    profile,
    replay,
    simulate,
    train,
    up,
)

EXIT_FAILURE = 1
EXIT_CONFIG = 2
COMMANDS = (up, chat, generate, evaluate, calibrate, data, train, profile, replay, simulate, doctor)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dspark",
        description="Serve large language models with DSpark speculative decoding.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: failed while running; 2: wrong arguments or configuration."""
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"dspark: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except DSparkError as error:
        print(f"dspark: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except BrokenPipeError:
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
