"""Run the gateway, scheduler, drafter and verifier on this machine until Ctrl-C."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn, Protocol

from rich.console import Console

from dspark_core.errors import CheckpointError, ConfigError
from services.cli.arguments import (
    add_engine_arguments,
    add_stack_arguments,
    add_trace_arguments,
    stack_options,
)
from services.cli.exits import leave_at_once
from services.cli.serving.answer_writer import AnswerWriter
from services.cli.serving.client import GatewayClient
from services.cli.serving.report import AnswerMeter
from services.cli.template_arguments import template_arguments
from services.common.addresses import address_of
from services.common.garbage import spare_what_was_loaded
from services.common.lifecycle import finished_before, stop_signals
from services.common.logs import setup_logging
from services.common.process import allow_open_files
from services.common.telemetry import Telemetry
from services.embedded.options import StackOptions
from services.embedded.processes import ProcessStack
from services.embedded.stack import EmbeddedStack
from services.gateway.callers.auth import split_key
from services.gateway.config import REASONING, TOOL_FORMATS, GatewayConfig

DEMO_PROMPT = "Explain in two sentences why the sky is blue."


class Stack(Protocol):
    @property
    def computed_by(self) -> str | None: ...
    async def start(self) -> None: ...
    async def wait(self) -> str: ...
    async def stop(self) -> None: ...
    def kill(self) -> None: ...


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("up", help="run all services on this machine", description=__doc__)
    defaults = StackOptions()
    parser.add_argument("--host", default=defaults.host, help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port",
        type=int,
        default=defaults.http_port,
        metavar="N",
        help="port of the REST API (default: %(default)s)",
    )
    parser.add_argument(
        "--grpc-port",
        type=int,
        default=defaults.grpc_port,
        metavar="N",
        help="port of the gRPC API (default: %(default)s)",
    )
    parser.add_argument(
        "--max-running",
        type=int,
        default=defaults.max_running,
        metavar="N",
        help="most requests in a batch (default: %(default)s)",
    )
    parser.add_argument(
        "--disaggregated", action="store_true", help="run four processes over loopback gRPC instead of one"
    )
    parser.add_argument(
        "--tool-format",
        choices=TOOL_FORMATS,
        help="how the model writes tool calls (default: DSPARK_TOOL_FORMAT, or as its chat template does)",
    )
    parser.add_argument(
        "--reasoning",
        choices=REASONING,
        help="auto: tell a thinking model's thoughts from its answers, as its chat template marks them; "
        "none: they are text (default: DSPARK_REASONING, or auto)",
    )
    parser.add_argument("--demo-request", action="store_true", help="answer a demo request once ready")
    add_trace_arguments(parser)
    add_stack_arguments(parser)
    add_engine_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    setup_logging("dspark", {"DSPARK_LOG_LEVEL": "WARNING", **os.environ})
    allow_open_files()
    flags = {"DSPARK_TOOL_FORMAT": arguments.tool_format, "DSPARK_REASONING": arguments.reasoning}
    asked = {name: value for name, value in flags.items() if value is not None}
    if template_arguments(arguments):
        asked["DSPARK_CHAT_TEMPLATE_KWARGS"] = arguments.chat_template_kwargs
    # With --disaggregated each process reads the environment again by itself.
    gateway = GatewayConfig.from_env({**os.environ, **asked})
    options = stack_options(
        arguments,
        drain_seconds=gateway.grpc.drain_seconds,
        admission_wait_seconds=gateway.limits.admission_wait_seconds,
        host=arguments.host,
        http_port=arguments.port,
        grpc_port=arguments.grpc_port,
        max_running=arguments.max_running,
        trace_file=arguments.trace,
        trace_sample=arguments.trace_sample,
        trace_max_mb=arguments.trace_max_mb,
    )
    stack: Stack
    if arguments.disaggregated:
        stack = ProcessStack(options, asked)
    else:
        stack = EmbeddedStack(options, gateway, Telemetry.from_env("embedded", os.environ))
    demo = functools.partial(_demo, options.url, _a_key(gateway)) if arguments.demo_request else None
    return asyncio.run(_serve(stack, options, demo))


def _a_key(gateway: GatewayConfig) -> str | None:
    if gateway.keys_file:  # may hold nothing but hashes
        return os.environ.get("DSPARK_API_KEY")
    return split_key(gateway.api_keys[0])[0] if gateway.api_keys else None


async def _serve(stack: Stack, options: StackOptions, demo: Callable[[], None] | None) -> int:
    console = Console(stderr=True)
    async with stop_signals() as (stopped, stop_now):
        began, serving, parting = time.monotonic(), False, "stopping"
        try:
            with console.status(f"Loading {options.target_model} and measuring its step rate ..."):
                if not await finished_before(stack.start(), stopped):
                    return 0
            spare_what_was_loaded()
            console.print(f"[green]ready[/green] after {time.monotonic() - began:.0f} s")
            if stack.computed_by:
                console.print(f"  engine       {stack.computed_by}", highlight=False)
            _print_addresses(console, options)
            if demo is not None and not await finished_before(asyncio.to_thread(demo), stopped):
                return 0
            console.print("serving; press Ctrl-C to stop")
            serving, parting = True, "stopping; requests in flight may finish"
            ended = asyncio.ensure_future(stack.wait())
            if await finished_before(ended, stopped):
                console.print(f"[red]{ended.result()}, stopping the others[/red]", highlight=False)
                return 1
            return 0
        except (ConfigError, CheckpointError):
            parting = ""  # the error itself says enough
            raise
        finally:
            if parting:
                console.print(parting)
            drained = await finished_before(stack.stop(), stop_now)
            if not drained or (stopped.is_set() and not serving):
                _leave(stack)


def _leave(stack: Stack) -> NoReturn:
    """Exits without waiting for threads: one may still be loading a model."""
    stack.kill()
    leave_at_once(0)


def _print_addresses(console: Console, options: StackOptions) -> None:
    console.print(f"  page         {options.url}/")
    console.print(f"  OpenAI REST  {options.url}/v1")
    console.print(f"  gRPC         {address_of(options.host, options.grpc_port)}")
    console.print(f"  metrics      {options.url}/metrics")


def _demo(url: str, api_key: str | None) -> None:
    print(f"\n> {DEMO_PROMPT}")
    meter, writer = AnswerMeter(), AnswerWriter(sys.stdout, sys.stdout)
    with contextlib.closing(GatewayClient(url, api_key=api_key)) as client:
        messages = [{"role": "user", "content": DEMO_PROMPT}]
        for piece in client.chat(messages, temperature=0.0, max_tokens=96):
            meter.add(piece)
            writer.write(piece)
    print(f"\n[{meter.line()}]\n", flush=True)
