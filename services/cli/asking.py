"""Arguments of commands that ask a gateway. No torch: `dspark chat` starts at once."""

from __future__ import annotations

import argparse
import os

DEFAULT_URL = "http://127.0.0.1:8000"


def add_key_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        default=os.environ.get("DSPARK_API_KEY"),
        help="for a gateway that asks for one (default: the environment's DSPARK_API_KEY)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, default=256)
    group.add_argument("--temperature", type=float, default=None, help="0: greedy; default: the model's own")
    group.add_argument("--top-p", type=float, default=None)
    group.add_argument("--seed", type=int, default=None, help="makes the answer reproducible")
    group.add_argument("--no-speculation", action="store_true", help="plain decoding, for comparison")


def sampling_fields(arguments: argparse.Namespace) -> dict[str, object]:
    return {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "speculation": {"enabled": False} if arguments.no_speculation else None,
    }
