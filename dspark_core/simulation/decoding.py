"""The requests that one verifier decodes, as columns rebuilt whenever requests join or end.

A round reads and writes ten numbers per request. Gathering them from arrays over all requests of the
simulation took longer than planning the round.
"""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.plan_batch import Bools, Ints
from dspark_core.algorithms.step_surface import Floats
from dspark_core.simulation.population import Population

_COLUMNS = 9


class Decoding:
    """Each column is [requests], in the order they joined."""

    ids: Ints
    left: Ints
    """Answer tokens not committed yet."""
    context: Ints
    rounds: Ints
    """Rounds so far."""
    granted: Ints
    """Draft tokens verified so far."""
    floors: Floats

    def __init__(self, people: Population) -> None:
        self._people = people
        self._adopt(np.empty((_COLUMNS, 0), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self) -> Ints:
        """The recorded row that each request is at."""
        rows: Ints = self._first_row + self._place % self._row_count
        return rows

    def commit(self, committed: Ints) -> None:
        self.left -= committed
        self.context += committed

    def advance(self, committed: Ints, lengths: Ints) -> None:
        """Advance one round, which verified `lengths` draft tokens and commits `committed` when it ends."""
        self._place += committed if self._all_by_token else np.where(self._by_token, committed, 1)
        self.rounds += 1
        self.granted += lengths

    def drop_ended(self) -> list[int]:
        """Remove the requests whose answer is complete -> their ids."""
        if np.count_nonzero(self.left) == len(self):
            return []
        ended: list[int] = self.ids[self.left == 0].tolist()
        self._adopt(self._table[:, self.left > 0])
        return ended

    def join(self, fresh: Ints) -> None:
        """Add requests that have finished prefill and have their first token."""
        people = self._people
        joining = np.zeros((_COLUMNS, len(fresh)), dtype=np.int64)
        columns = (
            fresh,
            people.answer_tokens[fresh] - 1,
            people.prompt_tokens[fresh] + 1,
            people.phase[fresh],
            people.first_row[fresh],
            people.rows[fresh],
            people.by_token[fresh],
        )
        joining[: len(columns)] = columns
        self._adopt(np.concatenate((self._table, joining), axis=1))

    def take_last(self, count: int) -> Ints:
        """Remove the newest `count` requests -> their columns."""
        going = self._table[:, -count:].copy()
        self._adopt(self._table[:, :-count].copy())
        return going

    def put(self, columns: Ints) -> None:
        """Add requests that `take_last` removed elsewhere."""
        self._adopt(np.concatenate((self._table, columns), axis=1))

    def _adopt(self, table: Ints) -> None:
        self._table = table
        self.ids, self.left, self.context, self._place, self._first_row, self._row_count = table[:6]
        self.rounds, self.granted = table[7:]
        self._by_token: Bools = table[6] > 0
        self._all_by_token = np.count_nonzero(self._by_token) == len(self.ids)
        self.floors = self._people.floor[self.ids]
