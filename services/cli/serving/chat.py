"""Chat with a running gateway. Each answer is followed by its speed and accepted length."""

from __future__ import annotations

import argparse
import contextlib
import readline  # noqa: F401 - gives `input` history and line editing
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape

from dspark_core.errors import DSparkError
from services.cli.serving.answer_writer import AnswerWriter
from services.cli.serving.asking import DEFAULT_URL, add_key_argument, add_sampling_arguments, sampling_fields
from services.cli.serving.client import GatewayClient
from services.cli.serving.report import AnswerMeter

HELP = "/reset starts a new conversation, /quit or Ctrl-D ends"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("chat", help="chat with a running gateway", description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL, help="address of the gateway (default: %(default)s)")
    add_key_argument(parser)
    parser.add_argument("--system", default=None, metavar="TEXT", help="system message")
    add_sampling_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    fields = sampling_fields(arguments)
    console = Console()
    client = GatewayClient(arguments.url, api_key=arguments.api_key)
    opening = [{"role": "system", "content": arguments.system}] if arguments.system else []
    with contextlib.closing(client):
        model = client.model()
        console.print(f"[bold]{model}[/bold] at {arguments.url}. {HELP}.")
        messages = list(opening)
        while True:
            try:
                text = input(_prompt(console)).strip()
            except (EOFError, KeyboardInterrupt):
                console.print()
                return 0
            if text == "/quit":
                return 0
            if text == "/reset":
                messages = list(opening)
            elif text.startswith("/"):
                console.print(f"[yellow]unknown command {escape(text)}:[/yellow] {HELP}")
            elif text:
                messages.append({"role": "user", "content": text})
                answer = _answer(console, client, messages, {"model": model, **fields})
                if answer is None:
                    messages.pop()
                else:
                    messages.append({"role": "assistant", "content": answer})


def _prompt(console: Console) -> str:
    """Colour codes stand between marks that keep readline from counting their width."""
    return "\001\033[1;36m\002you>\001\033[0m\002 " if console.color_system else "you> "


def _answer(
    console: Console, client: GatewayClient, messages: list[dict[str, str]], options: dict[str, Any]
) -> str | None:
    """Streams one answer to the terminal; None if it failed or was interrupted."""
    meter = AnswerMeter()
    parts: list[str] = []
    writer = AnswerWriter(sys.stdout, sys.stdout)
    try:
        for piece in client.chat(messages, **options):
            meter.add(piece)
            parts.append(piece.text)
            writer.write(piece)
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted[/yellow]")
        return None
    except DSparkError as error:
        console.print(f"\n[red]{escape(str(error))}[/red]")
        return None
    console.print(f"\n[dim]{meter.line()}[/dim]")
    return "".join(parts)
