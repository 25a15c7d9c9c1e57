"""Prices each drafter's time from the round reports of the verifiers that share it."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dspark_core.algorithms.draft_price import DraftDemand, DraftPrices, draft_prices
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.cluster.limits import MOST_VERIFIERS
from dspark_core.records import RoundReport

_log = logging.getLogger(__name__)

RATE = 0.15
"""Weight of the newest drafted round in a request's expected yield."""
WAY_RATE = 0.01
"""Rate at which the smallest transport time seen is forgotten."""
TRUST_MEMORY = 0.95
TRUST_PRIOR = 2.0
"""As in a verifier's own policy: expected tokens are corrected by the ratio of accepted to expected ones."""
REPRICE_SECONDS = 0.25
"""Shortest interval between price updates."""
REPRICE_SHARE = 0.05
"""Largest share of the scheduler's time that price updates may take."""
FORGET_SECONDS = 5.0
"""A verifier without reports for this long counts as demanding nothing."""
OnPrice = Callable[[str, float | None], None]


@dataclass(slots=True)
class _Yield:
    gain: float
    verified: float

    def learn(self, gain: float, verified: float) -> None:
        self.gain += RATE * (gain - self.gain)
        self.verified += RATE * (verified - self.verified)


@dataclass(slots=True)
class _Member:
    """What the market knows about one verifier."""

    drafter_id: str = ""
    requests: tuple[str, ...] = ()
    """Sequence ids of its newest round, or of each cohort's newest round where two take turns."""
    newest: tuple[str, ...] = ()
    """Sequence ids of its newest round alone."""
    yields: dict[str, _Yield] = field(default_factory=dict)
    mean: _Yield | None = None
    accepted: float = 0.0
    promised: float = 0.0
    way_seconds: float | None = None
    context_tokens: int = 0
    drafting: bool = False
    used: float = 0.0
    model: RoundTimeModel | None = None
    seen_at: float = 0.0
    price: float = 0.0

    def learn(self, report: RoundReport) -> None:
        for request in report.requests:
            if not request.drafted:
                continue
            promised = sum(request.survival[: request.verify_length])
            self.accepted = TRUST_MEMORY * self.accepted + request.accepted
            self.promised = TRUST_MEMORY * self.promised + promised
            trusted = promised * (self.accepted + TRUST_PRIOR) / (self.promised + TRUST_PRIOR)
            verified = float(request.verify_length)
            if self.mean is None:
                self.mean = _Yield(trusted, verified)
            self.mean.learn(trusted, verified)
            known = self.yields.setdefault(request.sequence_id, _Yield(self.mean.gain, self.mean.verified))
            known.learn(trusted, verified)
        newest = tuple(request.sequence_id for request in report.requests)
        others = [name for name in self.newest if name not in newest] if report.cohorts > 1 else []
        self.newest, self.requests = newest, (*newest, *others)
        self.yields = {name: self.yields[name] for name in self.requests if name in self.yields}
        self.context_tokens = report.cohorts * report.context_tokens
        self.drafting = any(request.drafted for request in report.requests)
        seconds = report.draft_wait_seconds + report.step_seconds + report.loop_seconds
        used = report.draft_compute_seconds / max(seconds, 1e-9)
        self.used += RATE * (used - self.used)
        if self.drafting and report.draft_compute_seconds > 0:
            way = max(report.draft_seconds - report.draft_compute_seconds, 0.0)
            known_way = way if self.way_seconds is None else self.way_seconds
            self.way_seconds = min(way, known_way + WAY_RATE * (way - known_way))

    def demand(self) -> DraftDemand | None:
        """None while too little is known."""
        if self.model is None or self.mean is None or not self.requests:
            return None
        known = [self.yields.get(name, self.mean) for name in self.requests]
        way = self.way_seconds or 0.0
        return DraftDemand(
            gains=np.array([one.gain for one in known]),
            verified=np.array([one.verified for one in known]),
            round_time=replace(self.model, network_seconds=way),
            context_tokens=self.context_tokens,
            queue_seconds=max(self.model.network_seconds - way, 0.0),
            drafting=self.drafting,
            used=self.used,
        )


class DraftMarket:
    """Calls `on_price` with each drafter's new price, or None once no verifier demands the drafter."""

    def __init__(self, clock: Callable[[], float], on_price: OnPrice = lambda drafter, price: None) -> None:
        self._clock = clock
        self._on_price = on_price
        self._members: OrderedDict[str, _Member] = OrderedDict()
        self._due_at = clock()
        self._priced: set[str] = set()
        self._unpriceable: set[str] = set()

    def observe(self, report: RoundReport, model: RoundTimeModel | None) -> None:
        """Learns from a round report; `model` holds the verifier's times, this round included. In a round
        without drafts the verifier is assumed to keep its drafter."""
        member = self._members.setdefault(report.replica_id, _Member())
        self._members.move_to_end(report.replica_id)
        if len(self._members) > MOST_VERIFIERS:
            self._members.popitem(last=False)
        member.drafter_id = report.drafter_id or member.drafter_id
        member.model, member.seen_at = model, self._clock()
        member.learn(report)

    def forget(self, replica_id: str) -> None:
        """Drops what is known: the id now belongs to another verifier."""
        self._members.pop(replica_id, None)

    def price(self, replica_id: str) -> float:
        """The verifier's price in tokens per second of drafter time; 0 if nobody competes for it."""
        member = self._members.get(replica_id)
        if member is None or not member.drafter_id:
            return 0.0
        self.refresh()
        return member.price

    def refresh(self) -> None:
        """Updates prices if due. Must also be called while nobody asks for a price, so that the prices of
        drafters that vanished together with their verifiers are dropped."""
        now = self._clock()
        if now >= self._due_at:
            try:
                self._reprice(now)
            finally:
                spent = self._clock() - now
                self._due_at = now + max(REPRICE_SECONDS, spent / REPRICE_SHARE)

    def _reprice(self, now: float) -> None:
        markets: defaultdict[str, list[tuple[_Member, DraftDemand]]] = defaultdict(list)
        for member in self._members.values():
            member.price = 0.0
            demand = member.demand() if now - member.seen_at < FORGET_SECONDS else None
            if member.drafter_id and demand is not None:
                markets[member.drafter_id].append((member, demand))
        for drafter_id in self._priced - markets.keys():
            self._on_price(drafter_id, None)
        self._priced = set(markets)
        for drafter_id, sharing in markets.items():
            found = self._prices_of(drafter_id, [demand for _, demand in sharing])
            for (member, _), price in zip(sharing, found.of, strict=True):
                member.price = price
            self._on_price(drafter_id, found.price)
        self._unpriceable &= self._priced

    def _prices_of(self, drafter_id: str, demands: Sequence[DraftDemand]) -> DraftPrices:
        """All 0 if that fails: one verifier's reports must not end the streams of those that share its
        drafter, nor keep other drafters from their prices."""
        try:
            found = draft_prices(demands)
            problem = "" if all(map(math.isfinite, (found.price, *found.of))) else "they are not finite"
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if not problem:
            self._unpriceable.discard(drafter_id)
            return found
        if drafter_id not in self._unpriceable:
            self._unpriceable.add(drafter_id)
            _log.warning("no prices for drafter %s: %s", drafter_id, problem)
        return DraftPrices(0.0, (0.0,) * len(demands), 0.0, 0.0)
