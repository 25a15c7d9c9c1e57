"""Arguments shared by the commands that load a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dspark_core.engine.building import DTYPES, ENGINES, NATIVE, WEIGHTS
from services.cli.template_arguments import add_template_argument
from services.common.env import json_object
from services.embedded.options import StackOptions


def add_stack_arguments(parser: argparse.ArgumentParser, *, template: bool = True) -> None:
    """`template`: False if the command renders no chat or already has --chat-template-kwargs."""
    defaults = StackOptions()
    group = parser.add_argument_group("model")
    group.add_argument(
        "--target-model", default=defaults.target_model, help="name, GGUF file or HF directory"
    )
    group.add_argument(
        "--drafter", default=defaults.drafter, help="zoo name or checkpoint directory; 'none': no draft model"
    )
    group.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=defaults.lookup,
        help="drafts also from what a request's own text repeats, and from --ngrams",
    )
    group.add_argument(
        "--ngrams",
        default=defaults.ngrams,
        metavar="TABLE",
        help="of the target's own words, to draft from: a file of `dspark data ngrams`, a zoo name, auto "
        "(what is shipped for the target, the default) or none",
    )
    if template:
        add_template_argument(group)
    group.add_argument("--dtype", default=defaults.dtype, choices=tuple(DTYPES))
    group.add_argument(
        "--device",
        default=defaults.device,
        metavar="DEVICE",
        help="auto, cpu, cuda or cuda:N (default: auto, which is cuda where there is one)",
    )
    group.add_argument(
        "--weights",
        default=defaults.weights,
        choices=WEIGHTS,
        help="of the target: as the checkpoint has them (default), the same but multiplied with activations "
        "rounded to 8 bits (stored-a8, faster but inexact), expanded to --dtype, or, inexactly, int8",
    )
    group.add_argument("--kv-cache-mb", type=int, default=defaults.kv_cache_mb, help="memory for KV pages")
    group.add_argument(
        "--threads", type=int, default=None, help="math threads per engine (default: all cores)"
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that run the target but do not need its weights in this process."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        default=NATIVE,
        choices=ENGINES,
        help="what computes the target: this project's kernels, or vLLM where it is installed "
        f"(default {NATIVE})",
    )
    group.add_argument(
        "--vllm-arguments",
        default="{}",
        metavar="JSON",
        help="more of vLLM's engine arguments, e.g. '{\"tensor_parallel_size\": 2}'",
    )


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = StackOptions()
    group = parser.add_argument_group("round trace")
    group.add_argument(
        "--trace", type=Path, default=None, metavar="FILE", help="write rounds as JSON lines, for replay"
    )
    group.add_argument(
        "--trace-sample",
        type=float,
        default=defaults.trace_sample,
        help=f"share of the rounds to trace (default {defaults.trace_sample})",
    )
    group.add_argument(
        "--trace-max-mb",
        type=int,
        default=defaults.trace_max_mb,
        help=f"size at which a new file is begun; four are kept (default {defaults.trace_max_mb})",
    )


def stack_options(arguments: argparse.Namespace, **overrides: object) -> StackOptions:
    fields = {
        "target_model": arguments.target_model,
        "drafter": None if arguments.drafter == "none" else arguments.drafter,
        "lookup": arguments.lookup,
        "ngrams": arguments.ngrams,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "weights": arguments.weights,
        "kv_cache_mb": arguments.kv_cache_mb,
        "threads": arguments.threads,
        **overrides,
    }
    if "engine" in arguments:
        fields["target_engine"] = arguments.engine
        fields["vllm_arguments"] = json_object("--vllm-arguments", arguments.vllm_arguments)
    return StackOptions(**fields)
