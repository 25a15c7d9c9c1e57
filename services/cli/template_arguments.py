"""The --chat-template-kwargs option of several commands. No torch here, so `dspark chat` starts at once."""

from __future__ import annotations

import argparse
from typing import Any

from services.common.env import json_object


def add_template_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--chat-template-kwargs",
        default="{}",
        metavar="JSON",
        help="extra variables for the chat template, e.g. '{\"enable_thinking\": false}'",
    )


def template_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises ConfigError naming the flag."""
    return json_object("--chat-template-kwargs", arguments.chat_template_kwargs)
