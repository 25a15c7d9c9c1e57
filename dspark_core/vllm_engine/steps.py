"""Describes passes to vLLM's workers, and tracks which sequences they know from the pass before.

Workers keep a row per request and expect only changes to it, whereas runs always state
everything: token ids, first position, page table. The tracker computes the difference. A sequence
that is not in a pass is forgotten, so its end need not be announced.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.engine.target.batch import Run


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One run, as the change to its worker row."""

    key: str
    fresh: bool
    """Whether it is unknown to the workers: `pages` are then all of its pages, otherwise those to append."""
    start: int
    token_ids: list[int]
    """Tokens at positions [start, start + len): an anchor, or a prompt chunk."""
    draft_ids: list[int]
    """The draft tokens after them, to be verified."""
    pages: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + len(self.draft_ids)


@dataclass(frozen=True, slots=True)
class WorkerStep:
    sequences: list[SequenceStep]
    ended: list[str]
    """Keys of sequences that workers can forget."""
    logit_rows: list[int]
    """Per sequence, how many of its last 1 + drafts rows need logits: all, one or none."""
    taps: bool
    """Whether tapped hidden states are needed."""
    shared: bool
    """Whether results go through shared buffers, because the workers are separate processes."""


@dataclass(slots=True)
class _Known:
    key: str
    begin: int
    """First position from which the row may be rewritten."""
    end: int
    """Positions before it are computed, counting the pass that is being described."""
    pages: list[int]


class SequenceTracker:
    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._count = itertools.count()

    def step(self, runs: Sequence[Run], *, taps: bool, shared: bool = False) -> WorkerStep:
        """Runs without a `sequence_id` count as new in every pass."""
        known: dict[str, _Known] = {}
        sequences, ended = [], []
        for index, run in enumerate(runs):
            name = run.sequence_id or f"run {index}"
            before = self._known.pop(name, None) if run.sequence_id else None
            if before is not None and not _goes_on(before, run):
                ended.append(before.key)
                before = None
            step, known[name] = self._one(run, before)
            sequences.append(step)
        ended += [one.key for one in self._known.values()]
        self._known = known
        return WorkerStep(sequences, ended, [run.logit_rows for run in runs], taps, shared)

    def forget(self) -> None:
        """Makes all sequences new after a failed pass, when the workers' state is unknown."""
        for one in self._known.values():
            one.begin = one.end + 1

    def _one(self, run: Run, before: _Known | None) -> tuple[SequenceStep, _Known]:
        drafts = max(run.logit_rows - 1, 0)
        kept = len(run.token_ids) - drafts
        end = run.start + len(run.token_ids)
        if before is None:
            key, begin, new_pages = f"{next(self._count)}", run.start + kept, list(run.pages)
        else:
            key, begin, new_pages = before.key, before.begin, list(run.pages[len(before.pages) :])
        step = SequenceStep(
            key=key,
            fresh=before is None,
            start=run.start,
            token_ids=list(run.token_ids[:kept]),
            draft_ids=list(run.token_ids[kept:]),
            pages=new_pages,
        )
        return step, _Known(key, begin, end, list(run.pages))


def _goes_on(before: _Known, run: Run) -> bool:
    """Whether the run continues what the workers hold: at or after the row's `begin`, without a gap, and in
    the same pages."""
    return before.begin <= run.start <= before.end and list(run.pages[: len(before.pages)]) == before.pages
