"""Options about the target model, the same for every command that loads one."""

from __future__ import annotations

import argparse

from dspark_core.engine.building import DTYPES
from services.embedded.options import StackOptions

_DEFAULTS = StackOptions()


def add_model_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--target-model",
        default=_DEFAULTS.target_model,
        metavar="MODEL",
        help="shipped name, GGUF file or Hugging Face directory (default: %(default)s)",
    )


def add_computation_arguments(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--dtype",
        default=_DEFAULTS.dtype,
        choices=tuple(DTYPES),
        help="data type of the computation (default: %(default)s)",
    )
    group.add_argument(
        "--device",
        default=_DEFAULTS.device,
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N; auto uses CUDA if available (default: %(default)s)",
    )


def add_kv_cache_argument(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--kv-cache-mb",
        type=int,
        default=_DEFAULTS.kv_cache_mb,
        metavar="N",
        help="memory for KV pages, in MiB (default: %(default)s)",
    )


def add_threads_argument(group: argparse._ActionsContainer, what: str = "math threads") -> None:
    group.add_argument("--threads", type=int, default=None, metavar="N", help=f"{what} (default: all cores)")
