"""The verifiers of a cluster: learns from their reports, chooses who serves a request, and plans rounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from dspark_core.cluster.limits import MOST_VERIFIERS
from dspark_core.cluster.planning.calibration import CalibrationBook
from dspark_core.cluster.planning.curves import CurveBook
from dspark_core.cluster.planning.draft_market import DraftMarket, OnPrice
from dspark_core.cluster.planning.pace import PREFILL_TOKENS, VerifierPace
from dspark_core.cluster.planning.planner import VerifierPlanner
from dspark_core.cluster.replicas.loads import LoadBook
from dspark_core.cluster.replicas.prefixes import PrefixTable
from dspark_core.cluster.replicas.routing import Candidate, choose, reach_of
from dspark_core.cluster.replicas.state import ClusterState
from dspark_core.errors import InvalidRequestError, NoVerifierError, UnavailableError
from dspark_core.records import AssignRequest, Replica, ReplicaKind, Role, RoundReport, VerifyPlan

IMPOSSIBLE = 2.0
"""A floor above this multiple of a lone request's speed is refused, not queued: slightly better acceptance
will not reach it. The speed is taken without current slowdowns: they end, which would go unnoticed while
nobody is admitted."""


class Fleet:
    def __init__(
        self,
        lease_seconds: float,
        clock: Callable[[], float],
        on_price: OnPrice = lambda drafter, price: None,
    ) -> None:
        self.curves = CurveBook()
        self.calibration = CalibrationBook()
        self.market = DraftMarket(clock, on_price)
        self._kinds: dict[str, ReplicaKind] = {}
        self.state = ClusterState(lease_seconds, clock)
        self.loads = LoadBook(clock)
        self.prefixes = PrefixTable()
        self._planners: OrderedDict[str, VerifierPlanner] = OrderedDict()

    def register(self, replica: Replica) -> None:
        self.state.register(replica)
        self.loads.registered(replica)

    def deregister(self, replica_id: str) -> None:
        """Forgets its load and what its cache holds. What was learned is kept for a process that takes its
        place, and everything is if only a lease runs out: the replica may come back as it was. Unknown ids
        are ignored."""
        self.state.deregister(replica_id)
        self._forget_process(replica_id)

    def planner(self, replica_id: str) -> VerifierPlanner:
        planner = self._planners.setdefault(replica_id, VerifierPlanner(replica_id))
        self._planners.move_to_end(replica_id)
        if len(self._planners) > MOST_VERIFIERS:
            self._forget_learned(next(iter(self._planners)))
        return planner

    def observe(self, report: RoundReport) -> bool:
        """Learns from a report; returns False if there is nothing in it to plan from."""
        if report.kind is not None:
            self._update_kind(report.replica_id, report.kind)
        self.state.extend_lease(report.replica_id)
        if report.load is not None:
            self.loads.update(report.replica_id, report.load)
        planner = self.planner(report.replica_id)
        pace = planner.pace
        kind = report.kind
        pace.adopt(report.profile, begins=kind is not None)
        if kind is None and not pace.measured:  # another replica of its kind may have been profiled since
            kind = self._kinds.get(report.replica_id)
        if kind is not None:
            self.curves.join(kind, report.replica_id, pace)
        if report.round == 0 or not planner.observe(report):
            return False
        self.loads.record_round(report.replica_id)
        self.market.observe(report, pace.model)
        self.calibration.observe(self.model_of(report.replica_id), report.replica_id, report.requests)
        return True

    def plan(self, replica_id: str) -> VerifyPlan | None:
        """A plan from its newest report, with the scalings of its model; None if there is nothing to plan
        from."""
        return self.planner(replica_id).plan(self.calibration.scalings(self.model_of(replica_id)))

    def _update_kind(self, replica_id: str, kind: ReplicaKind) -> None:
        """Forgets the id's previous replica if the kind changed. Ids are addresses, which get reused: a
        different kind means a different replica, about which nothing is known. What became of the previous
        one's drafts is kept: it belongs to its model."""
        before = self._kinds.get(replica_id)
        if before is not None and before != kind:
            self.state.record_replacement(replica_id)
            self._forget_process(replica_id)
            self._forget_learned(replica_id)
        self._kinds[replica_id] = kind

    def _forget_process(self, replica_id: str) -> None:
        """What ended with its process."""
        self.loads.forget(replica_id)
        self.prefixes.forget(replica_id)

    def _forget_learned(self, replica_id: str) -> None:
        """What its rounds told, and the part it has in its kind's step times."""
        self._planners.pop(replica_id, None)
        self.market.forget(replica_id)
        kind = self._kinds.pop(replica_id, None)
        if kind is not None:
            self.curves.leave(kind, replica_id)

    def model_of(self, replica_id: str) -> str:
        """The model a replica reported to serve; empty if it reported none."""
        kind = self._kinds.get(replica_id)
        return kind.model if kind else ""

    def assign(self, request: AssignRequest) -> Replica | None:
        """Picks the verifier with the least expected time for the request; see `routing`.

        Returns None while no verifier can take it without breaking a promised speed floor.

        Raises:
            UnavailableError: No verifier serves the model, or all are excluded or draining; says which.
            InvalidRequestError: The request's own floor is beyond what any verifier gives a lone request.
        """
        candidates = self.candidates(request)
        floor = request.min_tokens_per_second
        if floor:
            _refuse_impossible(floor, candidates)
        holding = [candidate for candidate in candidates if candidate.holds(request.promised_floor)]
        if not holding:
            return None
        chosen = choose(holding, request.prompt_tokens).replica
        self.loads.assigned(chosen.replica_id, request.request_id, request.promised_floor)
        self.prefixes.record(request.prefix_hashes, chosen.replica_id)
        return chosen

    def within_reach(self, request: AssignRequest) -> bool:
        """Whether any verifier of the model could hold the floor promised to the request if it ran alone."""
        floor = request.promised_floor
        verifiers = (one for one in self.state.replicas(Role.VERIFIER) if one.model == request.model)
        return not floor or any(floor <= self._reach(one.replica_id) for one in verifiers)

    def floor_concurrency(self, verifier: Replica) -> int | None:
        """The largest number of requests at which all its speed floors hold; None without floors or curve."""
        return self._candidate(verifier, 0).floor_concurrency()

    def candidates(self, request: AssignRequest) -> list[Candidate]:
        """Verifiers that can take the request. Those with a broken stream or a hanging round are included
        only if there are no others."""
        usable = self._usable(request)
        present = [replica for replica in usable if self._is_present(replica.replica_id)]
        matched = self.prefixes.matched_tokens(request.prefix_hashes)
        return [self._candidate(replica, matched.get(replica.replica_id, 0)) for replica in present or usable]

    def _is_present(self, replica_id: str) -> bool:
        def longest() -> float:
            return self._pace(replica_id).prefill_seconds(PREFILL_TOKENS)

        return not (self.loads.is_lost(replica_id) or self.loads.hangs(replica_id, longest))

    def _candidate(self, replica: Replica, matched_tokens: int) -> Candidate:
        name = replica.replica_id
        pace, idle_seconds = self._pace(name), self.loads.idle_seconds(name)
        return Candidate(
            replica=replica,
            requests=self.loads.requests(replica),
            max_running=self.loads.max_running(name),
            free_kv_fraction=self.loads.free_kv_fraction(replica),
            pace=pace,
            matched_tokens=matched_tokens,
            idle_seconds=idle_seconds,
            highest_floor=self.loads.highest_floor(name, lambda: reach_of(pace, idle_seconds)),
        )

    def _reach(self, replica_id: str) -> float:
        return reach_of(self._pace(replica_id), self.loads.idle_seconds(replica_id))

    def _pace(self, replica_id: str) -> VerifierPace:
        known = self._planners.get(replica_id)
        return known.pace if known else VerifierPace()

    def _usable(self, request: AssignRequest) -> list[Replica]:
        model, exclude, weights = request.model, frozenset(request.exclude_replica_ids), request.weights
        verifiers = self.state.replicas(Role.VERIFIER)
        serving = [replica for replica in verifiers if replica.model == model]
        if not serving:
            models = ", ".join(sorted({replica.model for replica in verifiers})) or "none"
            raise NoVerifierError(f"no verifier serves model {model!r} now (models served: {models})")
        draining = [replica for replica in serving if self.loads.is_draining(replica)]
        others = [replica for replica in serving if weights and replica.weights != weights]
        refused = exclude.union(replica.replica_id for replica in (*draining, *others))
        usable = [replica for replica in serving if replica.replica_id not in refused]
        if not usable:
            other = f", {len(others)} serve other weights than its first tokens came from" if others else ""
            raise UnavailableError(
                f"no verifier of model {model!r} can take a request: of {len(serving)}, {len(draining)} are "
                f"draining and {sum(r.replica_id in exclude for r in serving)} are excluded by the request"
                f"{other}"
            )
        return usable


def _refuse_impossible(floor: float, candidates: Sequence[Candidate]) -> None:
    rates = [candidate.pace.undisturbed_tokens_per_second() for candidate in candidates]
    known = [rate for rate in rates if rate is not None]
    if len(known) == len(rates) and floor > IMPOSSIBLE * max(known):
        raise InvalidRequestError(
            f"min_tokens_per_second must be within reach, got {floor:g}: a single request gets about "
            f"{max(known):.3g} here",
            field="min_tokens_per_second",
        )
