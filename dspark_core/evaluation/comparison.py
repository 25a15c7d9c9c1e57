"""Compares the accepted lengths of several evaluations, with gains over the first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dspark_core.errors import ConfigError
from dspark_core.evaluation.report import FORMAT

PROTOCOL = ("max_tokens", "temperature", "top_p", "top_k", "verification", "limit", "target_model")
"""Arguments that must agree for accepted lengths to be comparable."""
ADDED_SINCE = {"chat_template_kwargs": "{}"}
"""Further such arguments, with the values that older results imply."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalResult:
    """The parts of an evaluation result that a comparison needs."""

    label: str
    accepted_lengths: dict[str, float | None]
    """By prompt set."""
    arguments: dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSet:
    name: str
    accepted_lengths: tuple[float | None, ...]
    """Per result; None where it has no value for this set."""
    gains: tuple[float | None, ...]
    """Relative to the first result: 0.2 means 20 % longer. None where either is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    labels: tuple[str, ...]
    sets: tuple[ComparedSet, ...]
    macro: ComparedSet | None
    """Mean over the sets that all results share; None if there are none."""
    macro_sets: int
    differing_arguments: tuple[str, ...]
    """Names from `PROTOCOL` and `ADDED_SINCE` whose values differ between results."""


def read_results(paths: Sequence[Path]) -> tuple[EvalResult, ...]:
    """Labels are file names, or full paths where file names collide.

    Raises:
        ConfigError: names a file that cannot be read or is not a result of `dspark eval`.
    """
    stems = [path.stem for path in paths]
    return tuple(
        _read_result(path, label=path.stem if stems.count(path.stem) == 1 else str(path)) for path in paths
    )


def _read_result(path: Path, label: str) -> EvalResult:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"result {path} cannot be read: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path} is not a result of dspark eval: format must be {FORMAT!r}, got {found!r}")
    try:
        lengths = {one["name"]: one["acceptance"]["accepted_length"] for one in document["sets"]}
        return EvalResult(label=label, accepted_lengths=lengths, arguments=dict(document["arguments"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"result {path} is incomplete: {error!r}") from error


def compare(results: Sequence[EvalResult]) -> Comparison:
    """results: at least one; sets are in order of first appearance."""
    names = list(dict.fromkeys(name for result in results for name in result.accepted_lengths))
    sets = tuple(_compared(name, [result.accepted_lengths.get(name) for result in results]) for name in names)
    shared = [one for one in sets if None not in one.accepted_lengths]
    macro = None
    if shared:
        columns = zip(*(one.accepted_lengths for one in shared), strict=True)
        macro = _compared(
            "macro mean", [fmean(value for value in column if value is not None) for column in columns]
        )
    return Comparison(
        labels=tuple(result.label for result in results),
        sets=sets,
        macro=macro,
        macro_sets=len(shared),
        differing_arguments=tuple(
            name
            for name in (*PROTOCOL, *ADDED_SINCE)
            if any(_differs(result, results[0], name) for result in results)
        ),
    )


def _compared(name: str, lengths: Sequence[float | None]) -> ComparedSet:
    base = lengths[0]
    gains = tuple(None if length is None or not base else length / base - 1.0 for length in lengths)
    return ComparedSet(name=name, accepted_lengths=tuple(lengths), gains=gains)


def _differs(result: EvalResult, base: EvalResult, name: str) -> bool:
    default = ADDED_SINCE.get(name)
    return result.arguments.get(name, default) != base.arguments.get(name, default)
