"""Arguments of the commands that query a gateway. No torch here, so that `dspark chat` starts at once."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from dspark_core.errors import ConfigError
from services.cli.temperature_arguments import add_temperature_arguments
from services.cli.template_arguments import add_template_argument, template_arguments
from services.common.env import json_object

DEFAULT_URL = "http://127.0.0.1:8000"


def add_key_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        default=os.environ.get("DSPARK_API_KEY"),
        metavar="KEY",
        help="API key for the gateway, if it requires one (default: $DSPARK_API_KEY)",
    )


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="longest answer, in tokens (default: %(default)s)",
    )
    add_temperature_arguments(group, temperature=None, top_p=None)
    group.add_argument("--seed", type=int, default=None, metavar="N", help="make the answer reproducible")
    for name in ("presence", "frequency", "repetition"):
        group.add_argument(
            f"--{name}-penalty", type=float, default=None, metavar="X", help=f"{name} penalty (docs/api.md)"
        )
    group.add_argument(
        "--schema", type=Path, default=None, metavar="FILE", help="JSON schema that the answer must follow"
    )
    add_template_argument(group)
    group.add_argument("--no-speculation", action="store_true", help="decode without drafts, for comparison")


def sampling_fields(arguments: argparse.Namespace) -> dict[str, object]:
    """Fields of the request body. Raises ConfigError for an unreadable schema file and for numbers that JSON
    cannot represent."""
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty", "repetition_penalty"):
        value = getattr(arguments, name)
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be a finite number, got {value}")
    return {
        "max_tokens": arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
        "presence_penalty": arguments.presence_penalty,
        "frequency_penalty": arguments.frequency_penalty,
        "repetition_penalty": arguments.repetition_penalty,
        "response_format": None if arguments.schema is None else _shape(arguments.schema),
        "chat_template_kwargs": template_arguments(arguments) or None,
        "speculation": {"enabled": False} if arguments.no_speculation else None,
    }


def _shape(path: Path) -> dict[str, object]:
    try:
        schema = json_object(f"--schema {path}", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--schema {path}: {error}") from None
    return {"type": "json_schema", "json_schema": {"name": path.stem, "schema": schema}}
