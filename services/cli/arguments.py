"""Arguments shared by the commands that load a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dspark_core.engine.building import ENGINES, NATIVE, WEIGHTS
from dspark_core.zoo_paths import NO_DRAFTER
from services.cli.target_arguments import (
    add_computation_arguments,
    add_kv_cache_argument,
    add_model_argument,
    add_threads_argument,
)
from services.cli.template_arguments import add_template_argument
from services.common.env import json_object
from services.embedded.options import StackOptions


def add_stack_arguments(
    parser: argparse.ArgumentParser, *, template: bool = True, lookup: bool = True
) -> None:
    """`template`: False if the command renders no chat or already has --chat-template-kwargs;
    `lookup`: False if it never looks drafts up."""
    defaults = StackOptions()
    group = parser.add_argument_group("model")
    add_model_argument(group)
    group.add_argument(
        "--drafter",
        default=defaults.drafter,
        help="zoo name or checkpoint directory, or 'none' for no draft model (default: %(default)s)",
    )
    if lookup:
        _add_lookup_arguments(group, defaults)
    if template:
        add_template_argument(group)
    add_computation_arguments(group)
    group.add_argument(
        "--weights",
        default=defaults.weights,
        choices=WEIGHTS,
        help="format of the target's weights. stored: as in the checkpoint; full: expanded to --dtype; "
        "stored-a8: as stored, with activations rounded to 8 bits, faster but inexact; int8: rounded to 8 "
        "bits, inexact (default: %(default)s)",
    )
    add_kv_cache_argument(group)
    add_threads_argument(group, "math threads per engine")


def _add_lookup_arguments(group: argparse._ActionsContainer, defaults: StackOptions) -> None:
    group.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=defaults.lookup,
        help="also draft from repetitions in a request's own text and from --ngrams (default: on)",
    )
    group.add_argument(
        "--ngrams",
        default=defaults.ngrams,
        metavar="TABLE",
        help="n-gram table to draft from: a file written by `dspark data ngrams`, a zoo name, 'auto' (the "
        "table shipped for the target, if any) or 'none' (default: %(default)s)",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """For commands that run the target but do not need its weights in this process."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--engine",
        default=NATIVE,
        choices=ENGINES,
        help="what computes the target: native (DSpark's own engine) or vllm, if installed "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--vllm-arguments",
        default="{}",
        metavar="JSON",
        help="extra vLLM engine arguments, e.g. '{\"tensor_parallel_size\": 2}'",
    )


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = StackOptions()
    group = parser.add_argument_group("round trace")
    group.add_argument(
        "--trace",
        type=Path,
        default=None,
        metavar="FILE",
        help="write a sample of the rounds to FILE as JSON lines, for `dspark replay`",
    )
    group.add_argument(
        "--trace-sample",
        type=float,
        default=defaults.trace_sample,
        metavar="SHARE",
        help="share of rounds to trace (default: %(default)s)",
    )
    group.add_argument(
        "--trace-max-mb",
        type=int,
        default=defaults.trace_max_mb,
        metavar="N",
        help="size in MiB at which a new file is started; four are kept (default: %(default)s)",
    )


def stack_options(arguments: argparse.Namespace, **overrides: object) -> StackOptions:
    fields = {
        "target_model": arguments.target_model,
        "drafter": None if arguments.drafter == NO_DRAFTER else arguments.drafter,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "weights": arguments.weights,
        "kv_cache_mb": arguments.kv_cache_mb,
        "threads": arguments.threads,
    }
    if "lookup" in arguments:
        fields["lookup"], fields["ngrams"] = arguments.lookup, arguments.ngrams
    if "engine" in arguments:
        fields["target_engine"] = arguments.engine
        fields["vllm_arguments"] = json_object("--vllm-arguments", arguments.vllm_arguments)
    return StackOptions(**{**fields, **overrides})
