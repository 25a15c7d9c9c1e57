"""Shared by the `dspark data` commands: loading the target and showing progress."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from dspark_core.engine.building import DTYPES, BuiltTarget, EngineOptions, build_target
from dspark_core.engine.devices import resolve_device
from dspark_core.errors import ConfigError
from dspark_core.model_paths import resolve_model_path
from dspark_core.models.loading import LoadedTarget, load_target
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.training.data.answer_log import read_settings
from services.cli.target_arguments import (
    add_computation_arguments,
    add_kv_cache_argument,
    add_model_argument,
    add_threads_argument,
)
from services.cli.template_arguments import add_template_argument, template_arguments
from services.common.limits import MOST_THREADS

_PLAIN_LINE_SECONDS = 30.0
"""Interval between progress lines when there is no terminal."""


def add_layers_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--layers",
        type=int,
        nargs="+",
        default=None,
        metavar="N",
        help="target layers to tap (default: five, evenly spaced)",
    )


def add_target_arguments(parser: argparse.ArgumentParser, *, kv_cache: bool = True) -> None:
    group = parser.add_argument_group("target")
    add_model_argument(group)
    add_template_argument(group)
    add_computation_arguments(group)
    if kv_cache:
        add_kv_cache_argument(group)
    add_threads_argument(group)


def load_tokenizer_of(arguments: argparse.Namespace) -> Tokenizer:
    return load_tokenizer(resolve_model_path(arguments.target_model), template_arguments(arguments))


def load_target_of(arguments: argparse.Namespace) -> LoadedTarget:
    device = resolve_device(arguments.device)
    return load_target(arguments.target_model, DTYPES[arguments.dtype], device)


def load_engine(
    arguments: argparse.Namespace, kept_layers: Callable[[int], tuple[int, ...]] = lambda _: ()
) -> BuiltTarget:
    """The target without a drafter. `kept_layers`: number of layers -> those whose states are to be kept."""
    set_threads(arguments)
    loaded = load_target_of(arguments)
    options = EngineOptions(
        target_model=arguments.target_model,
        drafter=None,
        dtype=arguments.dtype,
        device=arguments.device,
        kv_cache_bytes=arguments.kv_cache_mb * 2**20,
        kept_layers=kept_layers(loaded.config.num_layers),
    )
    return build_target(options, loaded)


def set_threads(arguments: argparse.Namespace) -> None:
    if arguments.threads is not None:
        if not 1 <= arguments.threads <= MOST_THREADS:
            raise ConfigError(f"--threads must be in [1, {MOST_THREADS}], got {arguments.threads}")
        torch.set_num_threads(arguments.threads)


def require_answers_of(target: LoadedTarget, answers: Path) -> None:
    """Raises ConfigError, naming both fingerprints, if another model wrote the answers."""
    settings = read_settings(answers) or {}
    wrote = settings.get("fingerprint")
    if wrote is not None and wrote != target.fingerprint:
        raise ConfigError(
            f"{answers} was written by target {settings.get('target')} with fingerprint {wrote}; "
            f"{target.path.name} has fingerprint {target.fingerprint}"
        )


@dataclass(slots=True)
class TokenProgress:
    """A progress bar over items, with tokens per second; plain lines if there is no terminal."""

    title: str
    total: int
    done: int = 0
    clock: Callable[[], float] = time.monotonic
    tokens: int = 0
    _started: float = field(init=False)
    _printed_at: float = field(init=False)
    _console: Console = field(init=False)
    _bar: Progress = field(init=False)

    def __post_init__(self) -> None:
        self._started = self._printed_at = self.clock()
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bar.start()
        self._bar.add_task(self.title, total=self.total, completed=self.done, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.clock() - self._started, 1e-9)

    def add(self, *, items: int = 0, tokens: int = 0) -> None:
        self.done += items
        self.tokens += tokens
        rate = f"{self.tokens_per_second:,.0f} tokens/s"
        self._bar.update(self._bar.task_ids[0], completed=self.done, rate=rate)
        now = self.clock()
        if not self._console.is_terminal and now - self._printed_at >= _PLAIN_LINE_SECONDS:
            self._printed_at = now
            self._console.print(f"{self.title}: {self.done} of {self.total}, {rate}", soft_wrap=True)
