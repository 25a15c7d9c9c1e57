"""Check that this installation works, and suggest fixes where it does not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shutil
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dspark_core.errors import DSparkError
from services.cli.arguments import add_stack_arguments, stack_options
from services.cli.serving.free_memory import free_memory
from services.embedded.options import StackOptions


class Outcome(Enum):
    OK = "ok"
    NOTE = "note"
    FAILED = "failed"


COLOURS = {Outcome.OK: "green", Outcome.NOTE: "yellow", Outcome.FAILED: "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    outcome: Outcome
    text: str


Check = Callable[[StackOptions], Finding]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="check this installation", description=__doc__)
    add_stack_arguments(parser, template=False)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Returns 1 if a check failed; notes do not count."""
    options = stack_options(arguments)
    findings = {name: _guarded(check, options) for name, check in CHECKS.items()}
    _show(findings)
    return int(any(finding.outcome is Outcome.FAILED for finding in findings.values()))


def _show(findings: Mapping[str, Finding]) -> None:
    """A table on a terminal, else one line per finding. Paths and commands are never cut short."""
    console = Console()
    if not console.is_terminal:
        for name, finding in findings.items():
            print(f"{name:<16}{finding.outcome.value:<8}{finding.text}")
        return
    table = Table("check", "", Column("finding", overflow="fold"), title="dspark doctor")
    for name, finding in findings.items():
        table.add_row(name, Text(finding.outcome.value, COLOURS[finding.outcome]), Text(finding.text))
    console.print(table)


def _guarded(check: Check, options: StackOptions) -> Finding:
    try:
        return check(options)
    except (DSparkError, OSError, ImportError) as error:
        return Finding(Outcome.FAILED, str(error))


def _python(_: StackOptions) -> Finding:
    return Finding(Outcome.OK, f"{platform.python_version()} on {platform.machine()}")


def _torch(_: StackOptions) -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding(Outcome.FAILED, "not installed: pip install 'dspark[engine]'")
    import torch

    return Finding(Outcome.OK, f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def _device(options: StackOptions) -> Finding:
    from dspark_core.engine.devices import describe_device
    from dspark_core.engine.gpu.settings import missing_for_kernels

    device = options.engine.torch_device
    if device.type == "cpu":
        return Finding(Outcome.OK, f"{options.device}: the CPU")
    free, total = _gpu_memory(options)
    name = describe_device(device)
    text = f"{options.device}: {device}, {name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    missing = missing_for_kernels()
    if missing is not None:
        return Finding(Outcome.NOTE, f"{text}; {missing}: using PyTorch's operators, which are slower")
    return Finding(Outcome.OK, f"{text}, Triton kernels")


def _processor(_: StackOptions) -> Finding:
    flags = _cpu_flags()
    if not flags:
        return Finding(Outcome.NOTE, "cannot read the processor flags; bfloat16 may be slow")
    for flag in ("amx_bf16", "avx512_bf16"):
        if flag in flags:
            return Finding(Outcome.OK, f"bfloat16 arithmetic with {flag}")
    return Finding(Outcome.NOTE, "no bfloat16 instructions: --dtype float32 may be faster")


def _kernels(_: StackOptions) -> Finding:
    from dspark_core.kernels.build import KernelsUnavailableError
    from dspark_core.kernels.library import load_kernels

    try:
        kernels = load_kernels()
    except KernelsUnavailableError as error:
        return Finding(Outcome.NOTE, f"not available, using PyTorch, which is slower: {error}")
    return Finding(Outcome.OK, f"{kernels.instructions}, {kernels.path}")


def _huge_pages(options: StackOptions) -> Finding:
    from dspark_core.kernels.memory import gives_huge_pages

    if options.engine.torch_device.type != "cpu":
        return Finding(Outcome.OK, "not needed, as weights are not on a CPU")
    if gives_huge_pages():
        return Finding(Outcome.OK, "used for weights and KV pages")
    hint = "write madvise to /sys/kernel/mm/transparent_hugepage/enabled"
    return Finding(Outcome.NOTE, f"not available, so reading weights is slower: {hint}")


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return frozenset()
    return frozenset(line.partition(":")[2].split())


def _memory(options: StackOptions) -> Finding:
    if options.engine.torch_device.type == "cuda":
        free, _ = _gpu_memory(options)
    else:
        free = free_memory()
    needed = options.kv_cache_mb * 2**20
    text = f"{free / 2**30:.1f} GiB free, KV pages take {needed / 2**30:.1f} GiB"
    if needed > free:
        return Finding(Outcome.FAILED, f"{text}: lower --kv-cache-mb")
    return Finding(Outcome.OK, text)


def _gpu_memory(options: StackOptions) -> tuple[int, int]:
    """(free, total) in bytes."""
    import torch

    free, total = torch.cuda.mem_get_info(options.engine.torch_device)
    return free, total


def _target(options: StackOptions) -> Finding:
    from dspark_core.models.loading import load_target

    loaded = load_target(options.target_model, options.engine.torch_dtype, options.engine.torch_device)
    config = loaded.config
    layers, vocab = config.num_layers, config.vocab_size
    return Finding(Outcome.OK, f"{loaded.path.name}: {config.family.value}, {layers} layers, {vocab} tokens")


def _tokenizer(options: StackOptions) -> Finding:
    from dspark_core.model_paths import resolve_model_path
    from dspark_core.tokenization.loading import load_tokenizer

    tokenizer = load_tokenizer(resolve_model_path(options.target_model))
    text = "round trip: naïve café 12345 \U0001f642"
    if tokenizer.decode(tokenizer.encode(text)) != text:
        return Finding(Outcome.FAILED, "encoding and decoding a text does not return the same text")
    return Finding(Outcome.OK, f"{options.target_model}: encodes and decodes")


def _drafter(options: StackOptions) -> Finding:
    if options.drafter is None:
        drafts = "drafts come from lookup only" if options.lookup else "plain decoding"
        return Finding(Outcome.NOTE, f"none: {drafts}")
    from dspark_core.engine.building import build_drafter

    geometry = build_drafter(options.engine).geometry
    return Finding(
        Outcome.OK,
        f"{options.drafter}: blocks of {geometry.block_size}, fits the target ({geometry.fingerprint})",
    )


def _ngrams(options: StackOptions) -> Finding:
    if not options.lookup:
        return Finding(Outcome.NOTE, "not used: --no-lookup")
    from dspark_core.engine.drafts.lookup_building import load_table
    from dspark_core.models.loading import load_target
    from dspark_core.zoo_paths import resolve_ngrams_path

    path = resolve_ngrams_path(options.ngrams, options.target_model)
    if path is None:
        return Finding(Outcome.OK, "none: lookup uses only a request's own text")
    loaded = load_target(options.target_model, options.engine.torch_dtype, options.engine.torch_device)
    return Finding(Outcome.OK, f"{path.parent.name}: {load_table(path, loaded).entries:,} contexts")


def _port(options: StackOptions) -> Finding:
    for port in (options.http_port, options.grpc_port):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                text = f"port {port} is in use: pass another --port or --grpc-port to dspark up"
                return Finding(Outcome.NOTE, text)
    return Finding(Outcome.OK, f"{options.http_port} and {options.grpc_port} are free")


def _redis(_: StackOptions) -> Finding:
    url = os.environ.get("REDIS_URL", "")
    if not url:
        return Finding(Outcome.OK, "REDIS_URL is not set: the scheduler keeps its state in memory")
    import redis

    from services.scheduler.storage.redis_store import shown_redis_url

    try:
        redis.Redis.from_url(url, socket_connect_timeout=2, socket_timeout=2).ping()
    except (redis.RedisError, ValueError) as error:
        return Finding(Outcome.FAILED, f"REDIS_URL={shown_redis_url(url)}: {error}")
    return Finding(Outcome.OK, f"{shown_redis_url(url)} answers")


def _disk(_: StackOptions) -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    return Finding(Outcome.OK if free > 1 else Outcome.NOTE, f"{free:.0f} GiB free in this directory")


CHECKS: dict[str, Check] = {
    "python": _python,
    "torch": _torch,
    "device": _device,
    "processor": _processor,
    "native kernels": _kernels,
    "huge pages": _huge_pages,
    "memory": _memory,
    "disk": _disk,
    "target model": _target,
    "tokenizer": _tokenizer,
    "drafter": _drafter,
    "n-grams": _ngrams,
    "ports": _port,
    "redis": _redis,
}
