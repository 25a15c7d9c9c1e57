"""Prices a second of a shared drafter's time, in tokens.

Verifiers that share a drafter queue behind each other, and none sees what its drafts cost the
others. So each gets a price, and drafts for the set of requests that maximises

    (tokens - price * drafter seconds) / round seconds

so the verifiers that gain least per drafter second stop first. Prices are found by greedy filling: each
verifier's token rate as a function of its drafter use is made concave, and the steepest pieces of all
verifiers are taken first while they fit. The fill level of the drafter is itself chosen to maximise the
tokens committed in all rounds, queueing included. Only past rounds are used, so nothing is biased.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_core.algorithms.drafting_choice import drafting_order
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats

FILLINGS = tuple(step / 20 for step in range(1, 20, 2))
"""Candidate fill levels: the maximum share of the drafter's time to hand out."""
MARGIN = 0.05
"""Minimum relative distance of a verifier's price from the one at which its choice would change: its own
estimates differ slightly from those used for pricing."""
STICKINESS = 0.15
"""A verifier that drafts already keeps its place unless another gains this much more: switching is costly."""
REGULARITY = (0.05, 2.0)
"""Bounds on measured over modelled queueing: rounds of equal length fall into step and hardly queue."""
LEEWAY = 0.1
"""Relative excess of a verifier's demand over its share that is tolerated."""
FRESH_SECONDS = 2.0
HALF_LIFE_SECONDS = 2.0
"""A price is valid for FRESH_SECONDS, then halves every HALF_LIFE_SECONDS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftDemand:
    """What one verifier would ask of the drafter, and the benefit."""

    gains: Floats
    """[requests] tokens per round beyond the bonus token if the request is drafted for."""
    verified: Floats
    """[requests] draft tokens verified in that case."""
    round_time: RoundTimeModel
    """`draft` is the drafter's own time; `network_seconds` excludes queueing."""
    context_tokens: int = 0
    queue_seconds: float = 0.0
    """Recent wait of its drafts behind others', which it plans with."""
    drafting: bool = False
    """Whether it currently drafts."""
    used: float = 0.0
    """Share of the drafter's time it used recently."""


@dataclass(frozen=True, slots=True)
class DraftPrices:
    price: float
    """Tokens per second of drafter time at which demand meets capacity; 0: capacity suffices for all."""
    of: tuple[float, ...]
    """Per verifier: a price near `price` at which it chooses what was handed out to it."""
    load: float
    """Resulting utilisation of the drafter."""
    tokens_per_second: float
    """Expected total over all verifiers."""


@dataclass(frozen=True, slots=True)
class _Curve:
    """A verifier's rounds by number of requests drafted for, best first: [requests + 1] each, no queueing."""

    tokens: Floats
    seconds: Floats
    drafter_seconds: Floats
    drafting: bool

    @classmethod
    def of(cls, demand: DraftDemand) -> _Curve:
        count = len(demand.gains)
        if count == 0:
            return cls(np.zeros(1), np.ones(1), np.zeros(1), demand.drafting)
        order, times = drafting_order(demand.gains, demand.verified), demand.round_time
        batch = count + np.concatenate(([0.0], np.cumsum(demand.verified[order])))
        drafter_seconds = times.draft.table(np.arange(count + 1, dtype=np.float64))
        drafter_seconds[0] = 0.0
        return cls(
            count + np.concatenate(([0.0], np.cumsum(demand.gains[order]))),
            times.verify.table(count, batch, demand.context_tokens)
            + times.overhead_table(count)
            + times.loop.seconds(count),
            drafter_seconds,
            demand.drafting,
        )

    def offer(self, wait_seconds: float) -> _Offer:
        """Concave hull of rate over load if each draft waits `wait_seconds` in the queue."""
        seconds = self.seconds + wait_seconds
        seconds[0] -= wait_seconds
        rates, loads = self.tokens / seconds, self.drafter_seconds / seconds
        corners = [0]
        while True:
            more = loads - loads[corners[-1]]
            slopes = np.divide(rates - rates[corners[-1]], more, out=np.full(len(more), -1.0), where=more > 0)
            steepest = int(slopes.argmax())
            if slopes[steepest] <= 0.0:
                break
            corners.append(steepest)
        return _Offer(loads[corners], rates[corners], self.drafting)


@dataclass(frozen=True, slots=True)
class _Offer:
    """Corners of one verifier's concave rate over load, starting at (0, plain rate)."""

    loads: Floats
    rates: Floats
    drafting: bool

    @property
    def slopes(self) -> Floats:
        slopes: Floats = np.diff(self.rates) / np.diff(self.loads)
        return slopes


def draft_prices(demands: Sequence[DraftDemand], fillings: Sequence[float] = FILLINGS) -> DraftPrices:
    """Prices for verifiers that share one drafter. `fillings`, ascending: candidate fill levels."""
    curves = [_Curve.of(demand) for demand in demands]
    if len(demands) < 2:  # no other verifier to queue behind
        offers = [curve.offer(0.0) for curve in curves]
        return _prices(demands, curves, offers, _handed_out(offers, math.inf))
    offers, best, regularity = [], None, _queue_regularity(demands)
    for filling in fillings:
        wait = regularity * _queue_seconds(demands, filling)
        tried = [curve.offer(wait) for curve in curves]
        found = _handed_out(tried, filling)
        if best is None or found.tokens_per_second > best.tokens_per_second:
            offers, best = tried, found
        if found.price == 0.0:
            break  # demand is satisfied: a higher fill level changes nothing
    assert best is not None
    return _prices(demands, curves, offers, best)


def faded(price: float, age_seconds: float) -> float:
    """Decays a price that was not renewed; the verifier's own measured draft wait takes over."""
    late = max(age_seconds - FRESH_SECONDS, 0.0)
    return float(price * 0.5 ** (late / HALF_LIFE_SECONDS))


@dataclass(frozen=True, slots=True)
class _HandedOut:
    taken: tuple[int, ...]
    """Number of pieces taken from each verifier's offer."""
    price: float
    load: float
    tokens_per_second: float


def _handed_out(offers: Sequence[_Offer], capacity: float) -> _HandedOut:
    """Takes the steepest pieces first; the first one that does not fit sets the price."""
    pieces = sorted(
        (-slope * (1.0 + STICKINESS * offer.drafting), which, index)
        for which, offer in enumerate(offers)
        for index, slope in enumerate(offer.slopes.tolist())
    )
    taken, load, price = [0] * len(offers), 0.0, 0.0
    for _, which, index in pieces:
        offer = offers[which]
        more = float(offer.loads[index + 1] - offer.loads[index])
        if load + more > capacity:
            price = float(offer.slopes[index])
            break
        load += more
        taken[which] = index + 1
    total = sum(float(offer.rates[count]) for offer, count in zip(offers, taken, strict=True))
    return _HandedOut(tuple(taken), price, load, total)


def _prices(
    demands: Sequence[DraftDemand], curves: Sequence[_Curve], offers: Sequence[_Offer], found: _HandedOut
) -> DraftPrices:
    of = (0.0,) * len(demands)
    if found.price > 0.0:
        of = tuple(
            _own_price(curve.offer(demand.queue_seconds), float(offer.loads[taken]), found.price)
            for demand, curve, offer, taken in zip(demands, curves, offers, found.taken, strict=True)
        )
    return DraftPrices(found.price, of, found.load, found.tokens_per_second)


def _own_price(offer: _Offer, load: float, price: float) -> float:
    """A price at which the verifier, by its own estimates, asks for `load` or slightly less; as near `price`
    as possible."""
    slopes = offer.slopes
    taken = max(int(np.searchsorted(offer.loads, load * (1.0 + LEEWAY), side="right")) - 1, 0)
    refused = float(slopes[taken]) if taken < len(slopes) else 0.0
    last = float(slopes[taken - 1]) if taken else math.inf
    low, high = refused * (1.0 + MARGIN), last * (1.0 - MARGIN)
    if low > high:
        return math.sqrt(refused * last)
    return min(max(price, low), high)


def _queue_seconds(demands: Sequence[DraftDemand], filling: float) -> float:
    """Mean wait behind other verifiers' drafts at this utilisation: calls of nearly constant length at random
    times, none of them the verifier's own."""
    mean = sum(demand.round_time.draft.seconds(len(demand.gains)) for demand in demands) / len(demands)
    others = filling * (len(demands) - 1) / len(demands)
    return mean * others / (2.0 * (1.0 - others))


def _queue_regularity(demands: Sequence[DraftDemand]) -> float:
    """Measured over modelled queueing at the same utilisation; 1: the drafter was not used."""
    used = sum(demand.used for demand in demands)
    modelled = _queue_seconds(demands, min(used, FILLINGS[-1]))
    if modelled <= 0.0:
        return 1.0
    measured = sum(demand.used * demand.queue_seconds for demand in demands) / used
    return min(max(measured / modelled, REGULARITY[0]), REGULARITY[1])
