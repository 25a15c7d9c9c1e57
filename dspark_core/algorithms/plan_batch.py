"""The requests of a round as arrays, and their draft tokens best first.

Best first is: by weighted survival, then position, then the request that was granted fewer tokens
before, then index. Ranks compare survival as float32, the precision it travels in; a prefix always
comes before what it is a prefix of.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.step_surface import Floats
from dspark_core.records import DraftOrigin

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_ABSENT = -1.0
_LOOKUP = DraftOrigin.LOOKUP
_LARGEST_FLOAT32 = np.int64(0x7FFFFFFF)


@dataclass(frozen=True, slots=True)
class PlanBatch:
    survival: Floats  # [requests, block], never rising in a row; negative where there is no token
    weights: Floats  # [requests]
    floors: Floats  # [requests] tokens per second, 0: none
    granted: Floats  # [requests]
    coupled: Bools  # [requests]
    context_tokens: int
    """Of all requests together."""
    looked_up: int = 0
    """How many requests' tokens cost no drafting time."""

    @property
    def requests(self) -> int:
        return len(self.weights)

    @classmethod
    def of(cls, requests: Sequence[PlanRequest]) -> PlanBatch:
        floors = [r.floor_tokens_per_second for r in requests]
        return cls(
            survival=survival_matrix([r.survival for r in requests]),
            weights=_floats([r.weight for r in requests]),
            floors=_floats([floor or 0.0 for floor in floors]) if any(floors) else np.zeros(len(floors)),
            granted=_floats([r.granted for r in requests]),
            coupled=np.frombuffer(bytearray([r.coupled for r in requests]), dtype=np.bool_),
            context_tokens=sum([r.context_tokens for r in requests]),
            looked_up=sum(map(bool, [r.survival for r in requests if r.origin is _LOOKUP])),
        )

    @classmethod
    def of_survival(cls, survival: Sequence[Sequence[float]]) -> PlanBatch:
        """Requests of equal standing, without floors, that may not look ahead."""
        count = len(survival)
        return cls(
            survival=survival_matrix(survival),
            weights=np.ones(count),
            floors=np.zeros(count),
            granted=np.zeros(count),
            coupled=np.zeros(count, dtype=np.bool_),
            context_tokens=0,
        )


def survival_matrix(rows: Sequence[Sequence[float]]) -> Floats:
    """Ragged rows -> [rows, longest]; rising or impossible values are cut off where they begin."""
    lengths = list(map(len, rows))
    longest = max(lengths, default=0)
    flat = _floats([*chain.from_iterable(rows)])
    if min(lengths, default=0) == longest:
        matrix = flat.reshape(len(rows), longest)
        if _falls(matrix):
            return matrix
    else:
        matrix = np.full((len(rows), longest), _ABSENT)
        matrix[np.arange(longest) < np.array(lengths)[:, None]] = flat
    lowest: Floats = np.minimum.accumulate(np.minimum(matrix, 1.0), axis=1)  # NaN spreads to the right
    return np.where(lowest >= 0.0, lowest, _ABSENT)


def _falls(matrix: Floats) -> bool:
    """Whether nothing has to be cut off, which is told in a third of the time that cutting takes."""
    if not matrix.size:
        return True
    inside = matrix[:, 0].max() <= 1.0 and matrix[:, -1].min() >= 0.0  # False with NaN, as below
    return bool(inside and (matrix[:, 1:] <= matrix[:, :-1]).all())


def _floats(values: Sequence[float]) -> Floats:
    """[len(values)]; packed, which takes two thirds of the time of `np.fromiter` and half of `np.array`'s."""
    return np.frombuffer(bytearray(struct.pack(f"{len(values)}d", *values)))  # which may be written to


@dataclass(frozen=True, slots=True)
class Ranking:
    """Draft tokens of some requests, best first."""

    requests: Ints  # [tokens]
    values: Floats  # [tokens] weighted survival

    def lengths(self, count: int, total: int) -> Ints:
        """Tokens of each of `total` requests among the first `count`."""
        return np.bincount(self.requests[:count], minlength=total)

    def positions(self, total: int) -> Ints:
        """Of each token among those of its own request, of `total` requests, from 0 on."""
        order = np.argsort(self.requests, kind="stable")  # by request, best first within each
        counts = np.bincount(self.requests, minlength=total)
        starts = np.cumsum(counts) - counts
        position = np.empty(len(order), dtype=np.int64)
        position[order] = np.arange(len(order)) - np.repeat(starts, counts)
        return position


def rank(batch: PlanBatch, only: Bools | None = None, used: Ints | None = None) -> Ranking:
    """Every draft token of the batch, or of the requests in `only` [requests], but for the first `used[r]` of
    each request r."""
    requests, block = batch.survival.shape
    if requests == 0 or block == 0:
        return Ranking(np.empty(0, dtype=np.int64), np.empty(0))
    order = np.argsort(batch.granted, kind="stable")
    rows = batch.survival[order]
    values = (rows * batch.weights[order, None]).T.ravel()  # position by position
    valid = rows.T.ravel() >= 0.0
    if only is not None:
        valid &= np.tile(only[order], block)
    if used is not None:
        valid &= (np.arange(block)[:, None] >= used[order]).ravel()
    # One integer per token: sorting integers is several times faster than a stable sort of floats.
    bits = values.astype(np.float32).view(np.int32).astype(np.int64)
    keys = ((_LARGEST_FLOAT32 - bits) << 32) | np.arange(len(values))
    if not valid.all():
        keys = keys[valid]
    keys.sort()
    index = keys & np.int64(0xFFFFFFFF)
    return Ranking(order[index % requests], values[index])
