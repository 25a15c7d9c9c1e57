"""The requests of a round as arrays, and their draft tokens ranked best first.

Tokens are ordered by survival, then position, then by which request was granted fewer tokens
so far, then index. Survival is compared as float32, the precision it is transmitted in; a prefix always
ranks before its extensions.
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


@dataclass(frozen=True)  # no slots, because of the cached properties
class PlanBatch:
    survival: Floats  # [requests, block], non-increasing in a row; negative where there is no token
    floors: Floats  # [requests] tokens per second, 0: none
    granted: Floats  # [requests]
    coupled: Bools  # [requests]
    context_tokens: int
    """Total over all requests."""
    looked_up: int = 0
    """Number of requests whose tokens were looked up and so cost no drafting time."""

    @property
    def requests(self) -> int:
        return len(self.floors)

    @cached_property
    def has_floors(self) -> bool:
        return bool(np.count_nonzero(self.floors))

    @cached_property
    def columns(self) -> Floats:
        """`survival` transposed [block, requests]: numpy is several times slower along short rows."""
        return np.ascontiguousarray(self.survival.T)

    @cached_property
    def by_length(self) -> Floats:
        """Expected committed tokens of each request by verify length, bonus token included
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
    """Ragged rows -> [rows, longest]; each row is cut off at its first rising or invalid value."""
    lengths = set(map(len, rows))
    longest = max(lengths, default=0)
    values: list[float] = []
    for row in rows:
        values += row  # half the time of `chain.from_iterable`
    flat = _floats(values)
    flat += 0.0  # turns -0.0 into 0.0: ranking tells absent tokens by their sign
    if len(lengths) < 2:
        matrix = flat.reshape(len(rows), longest)
        if _falls(flat, longest):
            return matrix
    else:
        matrix = np.full((len(rows), longest), _ABSENT)
        matrix[np.arange(longest) < np.array(list(map(len, rows)))[:, None]] = flat
    return cut_off(matrix)


def cut_off(matrix: Floats) -> Floats:
    """Replaces the first rising or invalid value of each row, and all after it, by -1."""
    lowest: Floats = np.minimum.accumulate(np.minimum(matrix, 1.0), axis=1)  # NaN spreads to the right
    return np.where(lowest >= 0.0, lowest, _ABSENT)


def running_sums(values: Ints | Floats) -> Floats:
    """Prefix sums, starting with 0 -> [len(values) + 1]."""
    sums = np.zeros(len(values) + 1)
    np.add.accumulate(values, out=sums[1:])
    return sums


def accumulated(operation: np.ufunc, rows: Floats | Bools) -> None:
    """`operation.accumulate` along the first axis, in place; three times as fast for few long rows."""
    for before, row in pairwise(rows):
        operation(before, row, out=row)


def _falls(flat: Floats, length: int) -> bool:
    """Whether no row of `length` values needs cutting off, a check four times as fast as the cutting."""
    if not flat.size:
        return True
    falls = flat[1:] <= flat[:-1]  # False with NaN
    falls[length - 1 :: length] = True  # row boundaries
    return bool(falls.all() and flat[::length].max() <= 1.0 and flat.min() >= 0.0)


def _floats(values: Sequence[float]) -> Floats:
    """[len(values)]; packing takes two thirds of the time of `np.fromiter` and half of `np.array`'s."""
    return np.frombuffer(bytearray(struct.pack(f"{len(values)}d", *values)))  # bytearray: writable


@dataclass(frozen=True, slots=True)
class Ranking:
    """Draft tokens of some requests, best first."""

    places: Ints  # [tokens] position * requests + the request's place in `order`
    values: Floats  # [tokens] survival
    order: Ints  # [requests] by tokens granted so far, fewest first
    block: int
    """Maximum number of tokens per request."""

    @property
    def requests(self) -> Ints:
        """The request of each token -> [tokens]."""
        return self.order.take(self.places % len(self.order))

    @property
    def positions(self) -> Ints:
        """The position of each token in its request's block, from 0 -> [tokens]."""
        return self.places // len(self.order)

    def lengths(self, count: int) -> Ints:
        """Number of tokens of each request among the first `count` -> [requests]."""
        whose = self.order.take(self.places[:count] % len(self.order))
        return np.bincount(whose, minlength=len(self.order))

    def first(self, count: int) -> Ranking:
        return Ranking(self.places[:count], self.values[:count], self.order, self.block)

    def beyond(self, used: Ints) -> Ranking:
        """The ranking without the first `used[r]` tokens of each request r."""
        beyond = np.arange(self.block)[:, None] >= used.take(self.order)
        kept = beyond.ravel().take(self.places).nonzero()[0]
        return Ranking(self.places.take(kept), self.values.take(kept), self.order, self.block)


def rank(batch: PlanBatch) -> Ranking:
    """Ranks every draft token of the batch."""
    order = batch.granted.argsort(kind="stable")
    values = batch.columns.take(order, axis=1).ravel()
    # Map to integers that rise as float32 values fall; negative values, absent tokens, come last.
    bits = values.astype(np.float32).view(np.uint32) ^ _FALLING
    # Two passes, by the lower then the upper half: sorts of 16 bits are radix sorts, stable and fast.
    places = bits.astype(np.uint16).argsort(kind="stable")
    places = places.take((bits >> _HALF).astype(np.uint16).take(places).argsort(kind="stable"))
    places = places[: np.count_nonzero(bits <= _FALLING)]
    return Ranking(places, values.take(places), order, batch.survival.shape[1])
