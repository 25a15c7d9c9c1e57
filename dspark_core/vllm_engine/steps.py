"""What vLLM's workers are told of one pass, and who is known to them from the pass before.

Workers keep a row for every request they serve and expect to hear only what is new about it. Our runs say
everything anew: token ids, first position, page table. The tracker tells the one from the other. A sequence
that is not in a pass is forgotten, so that nobody has to say when one has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_core.engine.batch import Run


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One run, as its worker row has to change for it."""

    key: str
    fresh: bool
    """Unknown to the workers: `pages` are all of its pages; else those to append."""
    start: int
    token_ids: list[int]
    """Of positions [start, start + len): an anchor, or a chunk of a prompt."""
    draft_ids: list[int]
    """Behind them, to be verified."""
    pages: list[int]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + len(self.draft_ids)


@dataclass(frozen=True, slots=True)
class WorkerStep:
    sequences: list[SequenceStep]
    ended: list[str]
    """Keys that workers may forget."""
    logit_rows: list[int]
    """Of each sequence, how many of its last 1 + drafts rows are wanted: all, one or none."""
    taps: bool
    """Whether the tapped states are wanted."""
    shared: bool
    """Whether results go through shared buffers: the workers are other processes."""


@dataclass(slots=True)
class _Known:
    key: str
    begin: int
    """First position at which the row may be written again."""
    end: int
    """Positions before it were computed or are computed by the pass that is told of them."""
    pages: list[int]


class SequenceTracker:
    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._count = itertools.count()

    def step(self, runs: Sequence[Run], *, taps: bool, shared: bool = False) -> WorkerStep:
        """Runs without a `sequence_id` are strangers in every pass."""
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
        """After a pass that failed, when nobody knows what the workers still hold: all are told anew."""
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
    """Whether the run continues what the workers hold: behind their row's beginning, without a gap, and in
    the same pages."""
    return before.begin <= run.start <= before.end and list(run.pages[: len(before.pages)]) == before.pages
