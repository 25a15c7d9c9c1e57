"""A target that is nothing but its pages: what it says next depends on every token it reads from them.

It fails if it reads a position nobody has written, and computes as fast as Python adds.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from tests.unit.engine.tiny import CONFIG, VOCAB, ScriptedDrafts


class PageEngine(TargetEngine):
    def __init__(self, num_pages: int, page_tokens: int) -> None:
        super().__init__(
            lambda taps: self,  # type: ignore[arg-type, return-value]
            CONFIG,
            dtype=torch.float32,
            device=torch.device("cpu"),
            num_pages=num_pages,
            page_tokens=page_tokens,
        )
        self.written: dict[tuple[int, int], tuple[int, int]] = {}
        """(position, token) by page and place on it."""
        self.fails_next = False
        self.tokens = 0

    def forward(self, runs: Sequence[Run]) -> Tensor:
        pages = [self._written_pages(one) for one in runs]
        for index, one in enumerate(runs):
            others = set().union(*pages[:index], *pages[index + 1 :])
            assert not others & set(one.pages), "a page that another run of the pass writes"
        if self.fails_next:
            # Half of the pass is written, then nothing is told.
            self.fails_next = False
            self._compute(runs[0])
            raise RuntimeError("out of memory")
        self.tokens += sum(len(one.token_ids) for one in runs)
        return torch.stack(rows) if (rows := [row for one in runs for row in self._compute(one)]) else NO_ROWS

    def read_features_of(self, spans: Sequence[tuple[Sequence[int], int, int]]) -> list[Tensor]:
        """A feature is the token it is of, six times."""
        return [
            torch.tensor([[float(self._read(pages, p))] * 6 for p in range(start, end)]).reshape(-1, 6)
            for pages, start, end in spans
        ]

    def _compute(self, one: Run) -> list[Tensor]:
        for position, token_id in enumerate(one.token_ids, one.start):
            page, place = divmod(position, self.page_tokens)
            self.written[one.pages[page], place] = position, token_id
        end, read, rows = one.start + len(one.token_ids), 0, []
        for position in range(end):
            read = hash((read, self._read(one.pages, position)))
            if position >= end - one.logit_rows:
                rows.append(_logits(read))
        return rows

    def _read(self, pages: Sequence[int], position: int) -> int:
        page, place = divmod(position, self.page_tokens)
        found, token_id = self.written[pages[page], place]  # KeyError: never written
        assert found == position, "a page that holds something else"
        return token_id

    def _written_pages(self, one: Run) -> set[int]:
        end = one.start + len(one.token_ids)
        return set(one.pages[one.start // self.page_tokens : -(-end // self.page_tokens)])


NO_ROWS = torch.zeros((0, VOCAB))
_known: dict[int, Tensor] = {}


def _logits(read: int) -> Tensor:
    if read not in _known:
        source = random.Random(read)
        _known[read] = torch.tensor([source.uniform(-4.0, 4.0) for _ in range(VOCAB)])
    return _known[read].clone()


class CheckedDrafts(ScriptedDrafts):
    """Fails if a feature is not that of the token it is said to be of."""

    def _block(self, item):  # type: ignore[no-untyped-def]
        assert item.features[:, 0].tolist() == [float(token_id) for token_id in item.token_ids]
        return super()._block(item)
