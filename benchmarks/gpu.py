"""GPU performance: step times, shares of the roofline, graphs against launches, attention, draft passes.

    python -m benchmarks.gpu                      # under four minutes, nothing to download
    python -m benchmarks.gpu --models qwen3-4b --seconds 60

Models of two well-known shapes are created on the device with random weights; SmolLM2 and its drafter are
measured too if their package is installed. Parts that do not fit the time or the device's memory are skipped
and listed; results are written to disk after each part.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engine_parts.floors import Machine
from benchmarks.engine_parts.steps import Shape
from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.gpu_parts.attention import attention_row
from benchmarks.gpu_parts.models import (
    BLOCK,
    SHAPES,
    decoder_bytes,
    drafter_config,
    engine_of,
    random_decoder,
    random_drafter,
)
from benchmarks.gpu_parts.served import served_rows
from benchmarks.gpu_parts.steps import Row, draft_row, kv_tokens, step_row
from benchmarks.gpu_parts.timing import machine_rates
from dspark_core.engine.building import DTYPES, PAGE_TOKENS
from dspark_core.engine.caches.kv_cache import PagedCache
from dspark_core.engine.devices import describe_device, resolve_device
from dspark_core.engine.draft_engines.base import ContextDraftEngine
from dspark_core.engine.draft_engines.blocks import DraftEngine
from dspark_core.engine.draft_engines.gpu_blocks import GpuDraftEngine
from dspark_core.engine.gpu.settings import GpuSettings, gpu_settings
from dspark_core.errors import ConfigError
from dspark_core.models.decoder import Decoder
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.records import SamplingParams

STEPS = (
    *(Shape(requests, tokens, 512) for requests in (1, 4, 16, 32, 64) for tokens in (1, 4, 8)),
    *(Shape(requests, 8, 4096) for requests in (1, 8)),
    Shape(1, 256, 512),
)
ATTENTION = (
    Shape(1, 1, 4096),
    Shape(1, 8, 4096),
    Shape(32, 1, 1024),
    Shape(32, 8, 1024),
    Shape(1, 512, 2048),
)
DRAFTS = (1, 4, 16, 32, 64)
DRAFT_CONTEXT = 512
DRAFT_TOKENS = 64 * 1024
SERVED_BYTES = 2 * 2**30
"""Memory needed by SmolLM2 with its drafter and both caches."""
SPARE_BYTES = 2 * 2**30
"""Memory left free for graphs, logits and libraries."""


def main() -> int:
    arguments = _parser().parse_args()
    try:
        device = resolve_device(arguments.device)
        _settings(device)
    except ConfigError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    bench = Bench(arguments, device, lambda: _settings(device))
    bench.run()
    bench.save()
    bench.tell()
    return 0


def _settings(device: torch.device) -> GpuSettings:
    settings = gpu_settings(device, block_size=BLOCK)
    if settings is None:
        raise ConfigError(f"a CUDA device and triton are needed, got device {device}")
    return settings


class Bench:
    """Measures one part after another until the time is up."""

    def __init__(
        self, arguments: argparse.Namespace, device: torch.device, settings: Callable[[], GpuSettings]
    ) -> None:
        """`settings` creates the settings of one engine, so that its graphs are freed with it."""
        self._arguments = arguments
        self._device, self._settings = device, settings
        self._launched = replace(settings(), recorder=None)
        self._dtype = DTYPES[arguments.dtype]
        self._until = time.monotonic() + arguments.seconds
        self._console = Console(width=150)
        self.results: dict[str, list[Row]] = {}
        self.left_out: list[str] = []

    def run(self) -> None:
        reading, products = machine_rates(self._device, self._dtype, megabytes=2048, size=8192)
        self._machine = Machine(bytes_per_second=reading, operations_per_second=products)
        rates = f"{reading / 1e9:.0f} GB/s read, {products / 1e12:.0f} TFLOP/s of a product"
        self._console.print(f"{describe_device(self._device)}: {rates}, torch {torch.__version__}")
        for name in self._arguments.models:
            self._model(name)
            self._free()
        if self._in_time("smollm2") and self._fits("smollm2", SERVED_BYTES):
            self._show("smollm2", served_rows(str(self._device)))

    def _model(self, name: str) -> None:
        config = SHAPES[name]
        draft = drafter_config(config).backbone
        page = PagedCache.bytes_per_page(config, PAGE_TOKENS, config.hidden_size, self._dtype)
        draft_page = PagedCache.bytes_per_page(draft, PAGE_TOKENS, 0, self._dtype)
        weights = decoder_bytes(config, self._dtype) + decoder_bytes(draft, self._dtype)
        if not self._fits(name, weights):
            return
        decoder = random_decoder(config, self._dtype, self._device)
        drafter = random_drafter(decoder)
        if self._fits(f"{name} steps", 2 * page * kv_tokens(STEPS, PAGE_TOKENS) // PAGE_TOKENS):
            self._steps(name, decoder, drafter)
        self._free()
        if self._fits(f"{name} drafts", 3 * draft_page * DRAFT_TOKENS // PAGE_TOKENS):
            self._drafts(name, drafter)
        self._free()
        if name == self._arguments.models[0]:
            self._attention(decoder)

    def save(self) -> None:
        document = {
            "arguments": describe_arguments(self._arguments),
            "environment": {**describe_machine(), "gpu": describe_device(self._device)},
            "gigabytes_per_second": self._machine.bytes_per_second / 1e9,
            "teraflops": self._machine.operations_per_second / 1e12,
            "results": self.results,
            "left_out": self.left_out,
        }
        path: Path = self._arguments.out
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")

    def tell(self) -> None:
        left_out = ", ".join(self.left_out) or "nothing"
        self._console.print(f"written to {self._arguments.out}; left out: {left_out}")

    def _steps(self, name: str, decoder: Decoder, drafter: DSparkDrafter) -> None:
        room = kv_tokens(STEPS, PAGE_TOKENS)
        engines = {
            way: engine_of(decoder, drafter, gpu, kv_tokens=room)
            for way, gpu in (("graph", self._settings()), ("launched", self._launched))
        }
        rows = []
        for shape in STEPS:
            if self._in_time(f"{name} step {shape} after {shape.context}"):
                repeats = self._arguments.repeats
                rows.append(step_row(engines, decoder, shape, self._machine, repeats=repeats))
        self._show(f"{name} steps", rows)

    def _drafts(self, name: str, drafter: DSparkDrafter) -> None:
        pages = DRAFT_TOKENS // 16
        engines: dict[str, ContextDraftEngine] = {
            way: GpuDraftEngine(drafter, settings, fingerprint=name, num_pages=pages, page_tokens=16)
            for way, settings in (("graph", self._settings()), ("launched", self._launched))
        }
        engines["operators"] = DraftEngine(drafter, fingerprint=name, num_pages=pages, page_tokens=16)
        rows = []
        for temperature in (0.0, 0.8):
            sampling = SamplingParams(temperature=temperature)
            for requests in DRAFTS:
                if self._in_time(f"{name} draft {requests} at {temperature}"):
                    repeats = self._arguments.repeats
                    rows.append(draft_row(engines, requests, DRAFT_CONTEXT, sampling, repeats=repeats))
        self._show(f"{name} drafts", rows)

    def _attention(self, decoder: Decoder) -> None:
        from dspark_core.cuda.paged_attention import TritonKernels
        from dspark_core.cuda.tiles import Tuning

        variants = {
            "ours": TritonKernels.on(self._device),
            "rows32": TritonKernels.on(self._device, Tuning(max_rows=32)),
            "rows128": TritonKernels.on(self._device, Tuning(max_rows=128)),
            "few": TritonKernels.on(self._device, Tuning(programs_wanted=128)),
            "many": TritonKernels.on(self._device, Tuning(programs_wanted=2048)),
            "small": TritonKernels.on(self._device, Tuning(stage_bytes=1 << 13, stages=3)),
        }
        rows = []
        for shape in ATTENTION:
            if self._in_time(f"attention {shape} after {shape.context}"):
                row = attention_row(
                    decoder.config,
                    variants,
                    shape,
                    self._dtype,
                    self._device,
                    repeats=self._arguments.repeats,
                )
                rows.append(row)
        self._show("attention of one layer", rows)

    def _in_time(self, part: str) -> bool:
        if time.monotonic() < self._until:
            return True
        self.left_out.append(part)
        return False

    def _fits(self, part: str, needed: int) -> bool:
        needed += SPARE_BYTES
        free, _ = torch.cuda.mem_get_info(self._device)
        if needed <= free:
            return True
        self.left_out.append(f"{part} ({needed / 1e9:.1f} GB, {free / 1e9:.1f} are free)")
        return False

    @staticmethod
    def _free() -> None:
        """Release unreferenced memory, including cycles, so that the driver reports it as free."""
        gc.collect()
        torch.cuda.empty_cache()

    def _show(self, title: str, rows: list[Row]) -> None:
        if not rows:
            return
        self.results[title] = rows
        self.save()
        table = Table(title=title)
        for name in rows[0]:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(
                *(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values())
            )
        self._console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16", choices=tuple(DTYPES))
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=tuple(SHAPES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=210.0, help="start no part after this time (default: 210)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
