"""Step times of the target engine compared with the machine's limits, and where a round's time goes.

    python -m benchmarks.engine [--threads 1 2] [--kernels native torch] [--weights stored full int8]

The shapes (requests x tokens per request, over a context each) are measured interleaved; the table gives
medians. The floor is the larger of bytes over measured bandwidth and operations over the measured rate of
PyTorch's own matrix product. Logits are computed for every token, as verification needs them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.engine_parts.floors import Machine, measure_machine, work_of_step
from benchmarks.engine_parts.rounds import measure_rounds
from benchmarks.engine_parts.steps import (
    Shape,
    many_requests,
    measure_steps,
    median,
    one_request,
    pages_needed,
)
from benchmarks.environment import describe_arguments, describe_machine
from dspark_core.engine.building import DTYPES, PAGE_TOKENS, EngineOptions, build_target
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.models.config import DecoderConfig
from dspark_core.models.loading import load_target
from dspark_core.models.packing import WeightChoice

Rows = list[dict[str, object]]


def main() -> None:
    arguments = _parser().parse_args()
    console = Console()
    shapes = _shapes(arguments)
    tables: list[dict[str, object]] = []
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        machine = measure_machine(DTYPES[arguments.dtype])
        console.print(
            f"{threads} thread(s): reads {machine.bytes_per_second / 1e9:.1f} GB/s, "
            f"multiplies {machine.operations_per_second / 1e9:.0f} GFLOP/s ({arguments.dtype})"
        )
        for kernels, weights in _variants(arguments):
            rows = _measure(arguments, shapes, machine, kernels, weights, console)
            _print(console, rows, f"{kernels}, {weights}, {threads} thread(s), context {arguments.context}")
            tables.append(
                {
                    "threads": threads,
                    "kernels": kernels,
                    "weights": weights,
                    "machine": asdict(machine),
                    "steps": rows,
                }
            )
    document: dict[str, object] = {
        "benchmark": "engine",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "tables": tables,
    }
    if arguments.rounds:
        document["rounds"] = _rounds(arguments, console)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {arguments.out}")


def _shapes(arguments: argparse.Namespace) -> list[Shape]:
    context = arguments.context
    shapes = one_request(arguments.tokens, context)
    for tokens in arguments.tokens_per_request:
        shapes += many_requests(arguments.requests, tokens, context)
    return list(dict.fromkeys(shapes))


def _variants(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Combinations of kernels and weights; PyTorch's operators only support full weights."""
    variants = [("native", weights) for weights in arguments.weights if "native" in arguments.kernels]
    return variants + ([("torch", "full")] if "torch" in arguments.kernels else [])


def _measure(
    arguments: argparse.Namespace,
    shapes: Sequence[Shape],
    machine: Machine,
    kernels: str,
    weights: str,
    console: Console,
) -> Rows:
    dtype = DTYPES[arguments.dtype]
    with console.status(f"loading {arguments.target_model} ({kernels}, {weights})"):
        loaded = load_target(
            arguments.target_model, dtype, weights=WeightChoice(weights), native=kernels == "native"
        )
    engine = TargetEngine.of_decoder(
        loaded.decoder, loaded.config, num_pages=pages_needed(shapes, PAGE_TOKENS), page_tokens=PAGE_TOKENS
    )
    if engine.native != (kernels == "native"):
        raise SystemExit("no native kernels on this machine: `dspark doctor` says why")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("steps", total=(arguments.repeats + 1) * len(shapes))
        seconds = measure_steps(
            engine, shapes, repeats=arguments.repeats, advance=lambda: progress.advance(task)
        )
    weight_bytes = loaded.decoder.packed_bytes
    return [
        _row(shape, seconds[shape], loaded.config, weight_bytes, machine, dtype.itemsize) for shape in shapes
    ]


def _row(
    shape: Shape,
    seconds: Sequence[float],
    config: DecoderConfig,
    weight_bytes: int,
    machine: Machine,
    item: int,
) -> dict[str, object]:
    tokens = shape.requests * shape.tokens
    work = work_of_step(
        config,
        weight_bytes,
        tokens=tokens,
        logit_rows=tokens,
        context_tokens=shape.requests * (shape.context + shape.tokens),
        item=item,
    )
    taken = median(seconds)
    return {
        "requests": shape.requests,
        "tokens_per_request": shape.tokens,
        "context": shape.context,
        "milliseconds": taken * 1e3,
        "milliseconds_min": min(seconds) * 1e3,
        "floor_milliseconds": work.floor_seconds(machine) * 1e3,
        "share_of_floor": work.floor_seconds(machine) / taken,
        "gflops": work.operations / taken / 1e9,
        "share_of_matmul_rate": work.operations / taken / machine.operations_per_second,
    }


def _print(console: Console, rows: Rows, title: str) -> None:
    table = Table(title=title)
    for name in ("requests x tokens", "ms", "floor ms", "x floor", "GFLOP/s", "of matmul rate"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['requests']} x {row['tokens_per_request']}",
            f"{row['milliseconds']:.2f}",
            f"{row['floor_milliseconds']:.2f}",
            f"{row['milliseconds'] / row['floor_milliseconds']:.2f}",  # type: ignore[operator]
            f"{row['gflops']:.0f}",
            f"{row['share_of_matmul_rate']:.0%}",
        )
    console.print(table)


def _rounds(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    options = EngineOptions(
        target_model=arguments.target_model,
        drafter=None,
        dtype=arguments.dtype,
        kv_cache_bytes=512 * 2**20,
    )
    engine: TargetEngine = build_target(options).engine
    shares = measure_rounds(engine, requests=arguments.rounds, rounds=40)
    table = Table(title=f"a plain round of {arguments.rounds} requests, {torch.get_num_threads()} thread(s)")
    table.add_column("part")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for name, milliseconds in shares.items():
        table.add_row(name, f"{milliseconds:.3f}", f"{milliseconds / shares['round']:.1%}")
    console.print(table)
    return {"requests": arguments.rounds, "threads": torch.get_num_threads(), "milliseconds": shares}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--kernels", nargs="+", default=["native", "torch"], choices=("native", "torch"))
    parser.add_argument(
        "--weights", nargs="+", default=["stored", "full"], choices=[choice.value for choice in WeightChoice]
    )
    parser.add_argument("--context", type=int, default=256, help="context length before the step's tokens")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="*",
        default=[1, 8, 16, 32, 64, 128, 256],
        help="tokens of a single request",
    )
    parser.add_argument("--requests", type=int, nargs="*", default=[8, 16, 32, 64])
    parser.add_argument(
        "--tokens-per-request",
        type=int,
        nargs="*",
        default=[1, 8],
        help="tokens per request, with --requests",
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--rounds", type=int, default=16, help="requests in the round that is broken down; 0: skip it"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine.json"))
    return parser


if __name__ == "__main__":
    main()
