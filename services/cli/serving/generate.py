"""Answer one prompt and exit.

With --url, a running gateway answers; without it, the model is loaded into this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Mapping

from rich.console import Console

from dspark_core.errors import ConfigError
from services.cli.arguments import add_stack_arguments, stack_options
from services.cli.exits import leave_at_once
from services.cli.serving.answer_writer import AnswerWriter
from services.cli.serving.asking import add_key_argument, add_sampling_arguments, sampling_fields
from services.cli.serving.client import GatewayClient, check_key, check_text
from services.cli.serving.report import AnswerMeter
from services.common.exits import EXIT_INTERRUPTED
from services.embedded.stack import EmbeddedStack


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("generate", help="answer one prompt", description=__doc__)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="user message; '-' reads it from standard input"
    )
    parser.add_argument("--url", default=None, help="gateway to ask (default: load the model here)")
    add_key_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="print the answer only, without statistics")
    add_sampling_arguments(parser)
    add_stack_arguments(parser, template=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    fields = sampling_fields(arguments)  # raises before the model is loaded
    check_key(arguments.api_key)
    if arguments.url:
        _refuse_model_flags(arguments)
    prompt = _prompt(arguments.prompt)
    if arguments.url:
        _print_answer(arguments.url, prompt, fields, arguments)
    else:
        logging.basicConfig(level=logging.WARNING)
        asyncio.run(_generate_here(prompt, fields, arguments))
    return 0


def _refuse_model_flags(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for a flag that only a model loaded here would heed."""
    parser = argparse.ArgumentParser()
    add_stack_arguments(parser, template=False)
    for name, default in vars(parser.parse_args([])).items():
        if (value := getattr(arguments, name)) != default:
            flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
            raise ConfigError(f"{flag} cannot be used with --url: the gateway there has loaded its model")


def _prompt(argument: str) -> str:
    """Raises ConfigError."""
    try:
        prompt = sys.stdin.read() if argument == "-" else argument
    except UnicodeDecodeError as error:  # does not happen where Python keeps such bytes (surrogateescape)
        raise ConfigError(f"--prompt must be UTF-8, but standard input is not: {error}") from None
    check_text("--prompt", prompt)
    return prompt


async def _generate_here(prompt: str, fields: Mapping[str, object], arguments: argparse.Namespace) -> None:
    stack = EmbeddedStack(stack_options(arguments, http_port=0, grpc_port=0))
    if (task := asyncio.current_task()) is not None:
        # asyncio.run's own handler does not wake a loop that is about to wait when the signal comes.
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    try:
        with _loading(arguments):
            await stack.start()
        await asyncio.to_thread(_print_answer, stack.url, prompt, fields, arguments)
    except asyncio.CancelledError:
        # Ctrl-C. The thread that loads or answers would run to its end.
        leave_at_once(EXIT_INTERRUPTED)
    finally:
        await stack.stop()


def _loading(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """A status line while the model loads, if standard error is a terminal."""
    console = Console(stderr=True)
    if arguments.quiet or not console.is_terminal:
        return contextlib.nullcontext()
    return console.status(f"Loading {arguments.target_model} and measuring its step rate ...")


def _print_answer(url: str, prompt: str, fields: Mapping[str, object], arguments: argparse.Namespace) -> None:
    meter = AnswerMeter()
    writer = AnswerWriter(sys.stdout, None if arguments.quiet else sys.stderr)
    with contextlib.closing(GatewayClient(url, api_key=arguments.api_key)) as client:
        for piece in client.chat([{"role": "user", "content": prompt}], **fields):
            meter.add(piece)
            writer.write(piece)
    writer.end_thought()
    sys.stdout.write("\n")
    if not arguments.quiet:
        print(f"[{meter.line()}]", file=sys.stderr)
