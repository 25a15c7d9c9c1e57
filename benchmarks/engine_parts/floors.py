"""Measures the machine's bytes and operations per second, and derives the floor of a step from them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dspark_core.kernels.memory import huge_zeros
from dspark_core.models.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    bytes_per_second: float
    """Rate of reading memory that is not in any cache."""
    operations_per_second: float
    """Rate of a large matrix product by PyTorch, in the engine's dtype or, if faster, in float32: without
    bfloat16 instructions, bfloat16 takes a hundred times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Minimum work of a step."""

    weight_bytes: int
    cache_bytes: int
    operations: int

    def floor_seconds(self, machine: Machine) -> float:
        reading = (self.weight_bytes + self.cache_bytes) / machine.bytes_per_second
        return max(reading, self.operations / machine.operations_per_second)


def measure_machine(dtype: torch.dtype, *, repeats: int = 7) -> Machine:
    # Far larger than any cache, and on huge pages like the weights: without, reading is 20 to 33 % slower.
    memory = huge_zeros(384 * 2**20).view(torch.float32).fill_(1.0)
    reading = _best(lambda: memory.sum(), repeats)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    pairs = [(a.to(kind), b.to(kind)) for kind in {dtype, torch.float32}]
    product = min(_best(partial(torch.matmul, *pair), repeats) for pair in pairs)
    return Machine(bytes_per_second=memory.numel() * 4 / reading, operations_per_second=2 * 1024**3 / product)


def work_of_step(
    config: DecoderConfig, weight_bytes: int, *, tokens: int, logit_rows: int, context_tokens: int, item: int
) -> Work:
    """`context_tokens`: positions attended to, summed over requests; `item`: bytes per cached value."""
    size = config.head_dim * (config.num_heads + 2 * config.num_kv_heads)
    per_layer = config.hidden_size * (
        size + config.num_heads * config.head_dim + 3 * config.intermediate_size
    )
    head = config.vocab_size * config.hidden_size
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * item * context_tokens
    return Work(
        weight_bytes=weight_bytes,
        cache_bytes=cache,
        operations=2 * (config.num_layers * per_layer * tokens + head * logit_rows),
    )


def _best(action: Callable[[], object], repeats: int) -> float:
    action()
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        best = min(best, time.perf_counter() - started)
    return best
