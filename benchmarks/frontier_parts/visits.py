"""Stores finished visits of a concurrency on disk, so that an interrupted run can resume."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.frontier_parts.stack import SliceResult

SAME = ("commit", "processor")
"""Environment fields that must agree for figures to be comparable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    turn: int
    environment: Mapping[str, object]
    """Machine and commit it was measured on."""
    slices: tuple[SliceResult, ...]
    """One slice per method."""

    @property
    def place(self) -> tuple[int, int]:
        """Turn and concurrency."""
        return self.turn, self.slices[0].concurrency


def keep(file: Path, visit: Visit) -> None:
    with file.open("a", encoding="utf-8") as kept:
        kept.write(json.dumps(dataclasses.asdict(visit)) + "\n")


def read_kept(file: Path, environment: Mapping[str, object]) -> list[Visit]:
    """Visits measured by this commit on this processor; a truncated line is dropped and measured again."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = [line for line in text.split("\n")[:-1] if line]
    file.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
    visits = [_visit(line) for line in whole]
    return [one for one in visits if all(one.environment[name] == environment[name] for name in SAME)]


def _visit(line: str) -> Visit:
    row = json.loads(line)
    slices = tuple(SliceResult(**one) for one in row["slices"])
    return Visit(turn=int(row["turn"]), environment=row["environment"], slices=slices)
