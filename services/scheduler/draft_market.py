"""Prices of drafters' time, from what the verifiers that share each drafter report of their rounds."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from dspark_core.algorithms.draft_price import DraftDemand, draft_prices
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.records import RoundReport

RATE = 0.15
"""Weight of a request's newest drafted round in what its drafts are thought to bring."""
WAY_RATE = 0.01
"""How fast the least time on the way to the drafter is forgotten."""
TRUST_MEMORY = 0.95
TRUST_PRIOR = 2.0
"""As of a verifier's own policy: promised tokens are corrected by accepted ones."""
REPRICE_SECONDS = 0.25
"""Prices are made anew at most so often,"""
REPRICE_SHARE = 0.05
"""and in no more than this share of the scheduler's time."""
FORGET_SECONDS = 5.0
"""A verifier that reported nothing for so long asks for nothing."""
MAX_VERIFIERS = 1024
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
    """One verifier, as the market knows it."""

    drafter_id: str = ""
    requests: tuple[str, ...] = ()
    """Of its newest round, or of the newest of each cohort where two take turns."""
    newest: tuple[str, ...] = ()
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
        used = report.draft_compute_seconds / max(report.draft_wait_seconds + report.step_seconds, 1e-9)
        self.used += RATE * (used - self.used)
        if self.drafting and report.draft_compute_seconds > 0:
            way = max(report.draft_seconds - report.draft_compute_seconds, 0.0)
            known_way = way if self.way_seconds is None else self.way_seconds
            self.way_seconds = min(way, known_way + WAY_RATE * (way - known_way))

    def demand(self) -> DraftDemand | None:
        """None: too little is known."""
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
    """`on_price` hears of each drafter's price as it is made; None: nobody asks for it any more."""

    def __init__(self, clock: Callable[[], float], on_price: OnPrice = lambda drafter, price: None) -> None:
        self._clock = clock
        self._on_price = on_price
        self._members: OrderedDict[str, _Member] = OrderedDict()
        self._due_at = clock()
        self._priced: set[str] = set()

    def observe(self, report: RoundReport, model: RoundTimeModel | None) -> None:
        """Of a round; `model`: what is known of the verifier's times after it. A round without drafts
        leaves the verifier with the drafter it had."""
        member = self._members.setdefault(report.replica_id, _Member())
        self._members.move_to_end(report.replica_id)
        if len(self._members) > MAX_VERIFIERS:
            self._members.popitem(last=False)
        member.drafter_id = report.drafter_id or member.drafter_id
        member.model, member.seen_at = model, self._clock()
        member.learn(report)

    def forget(self, replica_id: str) -> None:
        """Another verifier has this id now."""
        self._members.pop(replica_id, None)

    def price(self, replica_id: str) -> float:
        """Tokens per second of drafter time; 0 where nobody else wants it."""
        member = self._members.get(replica_id)
        if member is None or not member.drafter_id:
            return 0.0
        self.refresh()
        return member.price

    def refresh(self) -> None:
        """Makes prices anew when they are due; now and then also while nobody asks for one, or those of
        drafters that went away with all who used them would stay."""
        now = self._clock()
        if now >= self._due_at:
            self._reprice(now)
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
            found = draft_prices([demand for _, demand in sharing])
            for (member, _), price in zip(sharing, found.of, strict=True):
                member.price = price
            self._on_price(drafter_id, found.price)
