"""CPU time the gateway needs per streamed token.

    python -m benchmarks.gateway [--streams 1 16 64] [--tokens 400] [--repeats 5]

The gateway runs in its own process as `dspark up` builds it, with the scheduler and a scripted verifier that
yields tokens without delay. Clients read event streams from another process. The figure is the CPU time of
the gateway's process per token, including the share for starting and ending requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.gateway_parts.server import serve
from dspark_core.model_paths import DEFAULT_MODEL

READ_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Row:
    streams: int
    microseconds_per_token: float
    """CPU time, median over the repeats."""
    tokens_per_second: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=400, help="tokens per stream")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gateway.json"))
    arguments = parser.parse_args()

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    port = pipe.recv()
    rows = [_measure(pipe, port, count, arguments.tokens, arguments.repeats) for count in arguments.streams]
    pipe.send("end")
    server.join()

    table = Table(title="the gateway, one process")
    for name in ("streams", "us of processor time per token", "tokens/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(str(row.streams), f"{row.microseconds_per_token:.0f}", f"{row.tokens_per_second:.0f}")
    Console().print(table)
    document = {
        "benchmark": "gateway",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "rows": [asdict(row) for row in rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


def _measure(pipe: Connection, port: int, streams: int, tokens: int, repeats: int) -> Row:
    def usage() -> float:
        pipe.send("usage")
        return float(pipe.recv())

    asyncio.run(_read_all(port, streams, tokens))  # warm-up: the first run loads lazily
    costs, rates = [], []
    for _ in range(repeats):
        cost, seconds = _timed(usage, lambda: asyncio.run(_read_all(port, streams, tokens)))
        costs.append(1e6 * cost / (streams * tokens))
        rates.append(streams * tokens / seconds)
    return Row(streams, statistics.median(costs), statistics.median(rates))


def _timed(usage: Callable[[], float], work: Callable[[], object]) -> tuple[float, float]:
    """-> CPU seconds of the server, and wall-clock seconds of `work`."""
    before, started = usage(), time.perf_counter()
    work()
    seconds = time.perf_counter() - started
    return usage() - before, seconds


async def _read_all(port: int, streams: int, tokens: int) -> None:
    await asyncio.gather(*(_read_one(port, tokens) for _ in range(streams)))


async def _read_one(port: int, tokens: int) -> None:
    """Raises RuntimeError when the stream ends early or without [DONE]."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    asked = {"model": DEFAULT_MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    body = json.dumps({**asked, "max_tokens": tokens, "ignore_eos": True}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    read, events = b"", 0
    while piece := await reader.read(READ_BYTES):
        events += piece.count(b"data: ")
        read = (read + piece)[-READ_BYTES:]
    writer.close()
    if b"[DONE]" not in read or events < tokens / 2:
        raise RuntimeError(f"a stream of {tokens} tokens ended after {events} events: {read[-300:]!r}")


if __name__ == "__main__":
    main()
