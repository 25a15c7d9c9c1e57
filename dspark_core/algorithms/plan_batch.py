"""The requests of a round as arrays, and their draft tokens best first.

Best first is: by survival, then position, then the request that was granted fewer tokens
before, then index. Ranks compare survival as float32, the precision it travels in; a prefix always
comes before what it is a prefix of.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.step_surface import Floats
from dspark_core.records import DraftOrigin

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_ABSENT = -1.0
_LOOKUP = DraftOrigin.LOOKUP
_FALLING = np.uint32(0x7FFFFFFF)
_HALF = np.uint32(16)


@dataclass(frozen=True)  # without slots, for what is worked out once where it is asked for
class PlanBatch:
    survival: Floats  # [requests, block], never rising in a row; negative where there is no token
    floors: Floats  # [requests] tokens per second, 0: none
    granted: Floats  # [requests]
    coupled: Bools  # [requests]
    context_tokens: int
    """Of all requests together."""
    looked_up: int = 0
    """How many requests' tokens cost no drafting time."""

    @property
    def requests(self) -> int:
        return len(self.floors)

    @cached_property
    def has_floors(self) -> bool:
        return bool(np.count_nonzero(self.floors))

    @cached_property
    def columns(self) -> Floats:
        """`survival`, position by position: what is done along short rows takes several times as long
        -> [block, requests]."""
        return np.ascontiguousarray(self.survival.T)

    @cached_property
    def by_length(self) -> Floats:
        """Tokens that a request commits in expectation with each length, the bonus token included
        -> [1 + block, requests]."""
        tokens = np.zeros((1 + self.survival.shape[1], self.requests))
        np.maximum(self.columns, 0.0, out=tokens[1:])
        accumulated(np.add, tokens[1:])
        tokens += 1.0
        return tokens

    @classmethod
    def of(cls, requests: Sequence[PlanRequest]) -> PlanBatch:
        return cls(
            survival=survival_matrix([r.survival for r in requests]),
            floors=_floats([r.floor_tokens_per_second or 0.0 for r in requests]),
            granted=_floats([r.granted for r in requests]),
            coupled=np.frombuffer(bytearray([r.coupled for r in requests]), dtype=np.bool_),
            context_tokens=sum([r.context_tokens for r in requests]),
            looked_up=sum(map(bool, [r.survival for r in requests if r.origin is _LOOKUP])),
        )


def survival_matrix(rows: Sequence[Sequence[float]]) -> Floats:
    """Ragged rows -> [rows, longest]; rising or impossible values are cut off where they begin."""
    lengths = set(map(len, rows))
    longest = max(lengths, default=0)
    values: list[float] = []
    for row in rows:
        values += row  # half the time of `chain.from_iterable`
    flat = _floats(values)
    if len(lengths) < 2:
        matrix = flat.reshape(len(rows), longest)
        if _falls(flat, longest):
            return matrix
    else:
        matrix = np.full((len(rows), longest), _ABSENT)
        matrix[np.arange(longest) < np.array(list(map(len, rows)))[:, None]] = flat
    return cut_off(matrix)


def cut_off(matrix: Floats) -> Floats:
    """Rows without what rises or is impossible, and what is behind it."""
    lowest: Floats = np.minimum.accumulate(np.minimum(matrix, 1.0), axis=1)  # NaN spreads to the right
    return np.where(lowest >= 0.0, lowest, _ABSENT)


def running_sums(values: Ints | Floats) -> Floats:
    """Of none, the first, the first two, ... -> [len(values) + 1]."""
    sums = np.zeros(len(values) + 1)
    np.add.accumulate(values, out=sums[1:])
    return sums


def accumulated(operation: np.ufunc, rows: Floats | Bools) -> None:
    """`operation.accumulate` along the first axis, in place; in a third of its time for few long rows."""
    for before, row in pairwise(rows):
        operation(before, row, out=row)


def _falls(flat: Floats, length: int) -> bool:
    """Whether nothing has to be cut off of rows of so many values, which is told in a quarter of the time
    that cutting takes."""
    if not flat.size:
        return True
    falls = flat[1:] <= flat[:-1]  # False with NaN
    falls[length - 1 :: length] = True  # from a row to the next
    return bool(falls.all() and flat[::length].max() <= 1.0 and flat.min() >= 0.0)


def _floats(values: Sequence[float]) -> Floats:
    """[len(values)]; packed, which takes two thirds of the time of `np.fromiter` and half of `np.array`'s."""
    return np.frombuffer(bytearray(struct.pack(f"{len(values)}d", *values)))  # which may be written to


@dataclass(frozen=True, slots=True)
class Ranking:
    """Draft tokens of some requests, best first."""

    places: Ints  # [tokens] position * requests + the request's place in `order`
    values: Floats  # [tokens] survival
    order: Ints  # [requests] those granted fewer tokens first
    block: int
    """The most tokens of one request."""

    @property
    def requests(self) -> Ints:
        """Whose each token is -> [tokens]."""
        return self.order.take(self.places % len(self.order))

    @property
    def positions(self) -> Ints:
        """Of each token among those of its own request, from 0 on -> [tokens]."""
        return self.places // len(self.order)

    def lengths(self, count: int) -> Ints:
        """Tokens of each request among the first `count` -> [requests]."""
        whose = self.order.take(self.places[:count] % len(self.order))
        return np.bincount(whose, minlength=len(self.order))

    def first(self, count: int) -> Ranking:
        return Ranking(self.places[:count], self.values[:count], self.order, self.block)

    def beyond(self, used: Ints) -> Ranking:
        """Without the first `used[r]` tokens of each request r."""
        beyond = np.arange(self.block)[:, None] >= used.take(self.order)
        kept = beyond.ravel().take(self.places).nonzero()[0]
        return Ranking(self.places.take(kept), self.values.take(kept), self.order, self.block)


def rank(batch: PlanBatch) -> Ranking:
    """Every draft token of the batch."""
    order = batch.granted.argsort(kind="stable")
    values = batch.columns.take(order, axis=1).ravel()
    # As integers that rise as float32 values fall; what is negative, an absent token, comes last.
    bits = values.astype(np.float32).view(np.uint32) ^ _FALLING
    # By the lower halves, then by the upper ones: sorts of 16 bits are radix sorts, stable and fast.
    places = bits.astype(np.uint16).argsort(kind="stable")
    places = places.take((bits >> _HALF).astype(np.uint16).take(places).argsort(kind="stable"))
    places = places[: np.count_nonzero(bits <= _FALLING)]
    return Ranking(places, values.take(places), order, batch.survival.shape[1])
