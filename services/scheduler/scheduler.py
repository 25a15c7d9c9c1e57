"""The scheduler itself: registration, routing and plans, on records and without a network.

It implements `services.common.protocols.SchedulerApi`: the embedded default uses it in process, the
servicer serves it over gRPC. Its state is in memory; the registry is a copy that survives restarts and
is shared with other schedulers. No call waits for a registry that is known to be down.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable

from prometheus_client import CollectorRegistry

from dspark_core.cluster.fleet import Fleet
from dspark_core.cluster.planning.calibration import CalibrationState, Traffic, examine
from dspark_core.errors import InvalidRequestError, NotLeaderError
from dspark_core.records import AssignRequest, Replica, Role, RoundReport, VerifyPlan
from services.common.lifecycle import end
from services.scheduler.admission import FloorAdmission
from services.scheduler.leadership.election import Election, LeaderLock, Leadership, SoleLeader
from services.scheduler.mailbox import Mailbox
from services.scheduler.metrics import SchedulerMetrics
from services.scheduler.registry_sync import RegistrySync
from services.scheduler.storage.documents import DocumentStore, MemoryDocumentStore, SavedDocuments
from services.scheduler.storage.registry import MemoryRegistry, Registry

_log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
"""How often a verifier gets a heartbeat while its reports give nothing to plan."""
HEARTBEAT = VerifyPlan(based_on_round=0, draft_token_capacity=0)


class Scheduler:
    def __init__(
        self,
        *,
        lease_seconds: float = 10.0,
        registry: Registry | None = None,
        sync_seconds: float = 1.0,
        max_waiting: int = 256,
        lock: LeaderLock | None = None,
        renew_seconds: float = 0.5,
        curves: DocumentStore | None = None,
        calibrations: DocumentStore | None = None,
        maintain_seconds: float = 5.0,
        metrics: CollectorRegistry | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._metrics = SchedulerMetrics(metrics or CollectorRegistry())
        self._fleet = Fleet(lease_seconds, clock, self._show_price)
        self._saved = (
            SavedDocuments(self._fleet.curves, curves or MemoryDocumentStore(), "step times"),
            SavedDocuments(self._fleet.calibration, calibrations or MemoryDocumentStore(), "calibrations"),
        )
        self._maintain_seconds = maintain_seconds
        self._maintaining: asyncio.Task[None] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._sync = RegistrySync(
            registry or MemoryRegistry(clock),
            self._fleet.state,
            self._metrics,
            lease_seconds=lease_seconds,
            interval_seconds=sync_seconds,
            on_back=self._forget_saved,
        )
        self._admission = FloorAdmission(
            self._fleet.assign,
            self._metrics,
            within_reach=self._fleet.within_reach,
            max_waiting=max_waiting,
            clock=clock,
        )
        self._election = Election(
            lock or SoleLeader(), renew_seconds=renew_seconds, on_change=self._leadership_changed
        )
        self._mailboxes: set[Mailbox[tuple[RoundReport, float]]] = set()
        self._newest_streams: dict[str, object] = {}
        """By replica: one that reconnects may open a stream before the end of its last one is noticed."""
        self._draining = False

    def weights_problem(self) -> str | None:
        """Names models whose verifiers serve different weights; None: there are none."""
        return self._sync.weights_problem

    async def start(self) -> None:
        """Loads the registry's replicas and the stored documents, or starts empty if they are unavailable.
        Raises ConfigError if this scheduler is not permitted to take the lock."""
        await self._sync.start()
        await self._election.start()
        self._metrics.set_leading(self._election.now.leading)
        await asyncio.wait({self._loading or self._begin_loading()})
        self._maintaining = asyncio.create_task(self._maintain(), name="maintain")

    async def until_refused(self) -> None:
        """Raises ConfigError if the lock was out of reach at the start, and then refuses this scheduler."""
        await self._election.until_refused()

    async def drain(self) -> None:
        """Ends the Coordinate streams; verifiers then plan locally."""
        self._draining = True
        for mailbox in self._mailboxes:
            mailbox.close()

    async def close(self) -> None:
        await self.drain()
        if self._maintaining is not None:
            await end(self._maintaining)
            if self._election.now.leading:
                await self._save()
        await self._election.stop()
        if self._loading is not None:
            await end(self._loading)
        for saved in self._saved:
            await saved.close()
        await self._sync.stop()

    async def register(self, replica: Replica) -> float:
        self._election.require_leading()
        self._fleet.register(replica)
        self._admission.pump_soon()
        await self._sync.put(replica)
        return self._lease_seconds

    async def deregister(self, replica_id: str) -> None:
        self._election.require_leading()
        self._fleet.deregister(replica_id)
        self._admission.pump_soon()
        await self._sync.remove(replica_id)

    async def list_replicas(self, role: Role | None = None) -> tuple[Replica, ...]:
        """Of the leader only: a standby knows no replicas, or those that the registry had when it was up."""
        self._election.require_leading()
        return self._fleet.state.replicas(role)

    async def assign(self, request: AssignRequest) -> Replica:
        self._election.require_leading()
        chosen = await self._admission.admit(request)
        _log.debug("request %s -> %s", request.request_id, chosen.replica_id)
        return chosen

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncGenerator[VerifyPlan, None]:
        """Learns from every report, but plans only from the newest pending one. While there is nothing to
        plan from, heartbeats (plans with based_on_round 0) show that reports arrive."""
        self._election.require_leading()
        mailbox: Mailbox[tuple[RoundReport, float]] = Mailbox()
        self._mailboxes.add(mailbox)
        if self._draining:
            mailbox.close()
        reader = asyncio.create_task(self._read(reports, mailbox))
        curve_is_due, spoken_at = True, self._clock()
        try:
            while (item := await mailbox.take()) is not None:
                report, received_at = item
                plan = self._plan(report)
                if plan is None:
                    if self._clock() - spoken_at >= HEARTBEAT_SECONDS:
                        spoken_at = self._clock()
                        yield dataclasses.replace(
                            HEARTBEAT,
                            term=self._election.now.term,
                            draft_price=self._fleet.market.price(report.replica_id),
                        )
                    continue
                spoken_at = self._clock()
                self._metrics.reports.labels("planned").inc()
                self._metrics.capacity.observe(plan.draft_token_capacity)
                self._metrics.report_lag.observe(self._clock() - received_at)
                curve = self._fleet.planner(report.replica_id).missing_curve() if curve_is_due else ()
                curve_is_due = curve_is_due and not curve  # a replica of its kind may be profiled later
                yield dataclasses.replace(
                    plan,
                    term=self._election.now.term,
                    curve=curve,
                    draft_price=self._fleet.market.price(report.replica_id),
                )
            if reader.done():
                reader.result()  # an invalid report ends the stream with its error
        finally:
            self._mailboxes.discard(mailbox)
            await end(reader)

    def _plan(self, report: RoundReport) -> VerifyPlan | None:
        """None if there is nothing to plan from, for example in a report that carries only the load."""
        if report.round == 0:
            return None
        plan = self._fleet.plan(report.replica_id)
        if plan is None:
            self._metrics.reports.labels("unplannable").inc()
        return plan

    async def listen(self, reports: AsyncIterable[RoundReport]) -> None:
        """Learns from a verifier that plans locally; returns when its reports end."""
        await self._read(reports, None)

    async def _maintain(self) -> None:
        """Periodically refits confidences, refreshes draft prices, looks at speed floors and stores what was
        learned."""
        while not self._draining:
            await asyncio.sleep(self._maintain_seconds)
            for step in (self.examine_calibration, self._refresh_prices, self.examine_floors, self._save):
                if not self._election.now.leading:
                    break
                try:
                    await step()
                except Exception:
                    # A failing step must end neither this task nor the other steps: nothing would be
                    # stored for the next leader.
                    _log.exception("unexpected error in maintenance")

    async def examine_calibration(self) -> None:
        """Refits the confidences of models with enough new rounds, off the event loop."""
        book = self._fleet.calibration
        for traffic, state in book.outlived().items():
            _log.info("trying the drafter's own confidences of %s again", traffic.model)
            self._show_calibration(traffic, state)
        for traffic, rounds in book.due():
            try:
                state = await asyncio.to_thread(examine, rounds)
            except Exception:
                _log.exception("confidences of %s could not be examined", traffic.model)
                continue
            before = book.states().get(traffic)
            book.learned(traffic, state)
            self._show_calibration(traffic, state)
            if state.drifted and not (before and before.drifted):
                _log.warning(
                    "confidences of %s do not fit its traffic at temperature %s: calibration error %.3f, "
                    "rescaled %.3f",
                    traffic.model,
                    traffic.band,
                    state.error,
                    state.scaled_error,
                )

    async def examine_floors(self) -> None:
        """Shows how many requests speed floors allow. Others have their turn after each verifier."""
        requests = 0
        for verifier in self._fleet.state.replicas(Role.VERIFIER):
            requests += self._fleet.floor_concurrency(verifier) or 0
            await asyncio.sleep(0)
        if self._election.now.leading:
            self._metrics.set_floor_concurrency(requests)

    def _begin_loading(self) -> asyncio.Task[None]:
        """Loads in a task of its own: waiting for a hanging store would let the leader lock expire."""
        self._loading = asyncio.create_task(self._load(), name="load")
        return self._loading

    async def _load(self) -> None:
        """Loads what earlier leaders learned."""
        try:
            for saved in self._saved:
                await saved.load()
        except Exception:
            _log.exception("unexpected error while loading what earlier leaders learned")
        for traffic, state in self._fleet.calibration.states().items():
            self._show_calibration(traffic, state)

    def _show_calibration(self, traffic: Traffic, state: CalibrationState) -> None:
        if self._election.now.leading:  # leadership may have ended meanwhile
            self._metrics.calibration.show(traffic, state)

    def _show_price(self, drafter: str, price: float | None) -> None:
        if self._election.now.leading:
            self._metrics.set_draft_price(drafter, price)

    async def _refresh_prices(self) -> None:
        self._fleet.market.refresh()

    def _forget_saved(self) -> None:
        for saved in self._saved:
            saved.forget()

    async def _save(self) -> None:
        for saved in self._saved:
            await saved.save(self._election.now.term)

    async def _leadership_changed(self, now: Leadership) -> None:
        self._metrics.set_leading(now.leading)
        if self._loading is not None:
            await end(self._loading)
        if now.leading:
            self._begin_loading()
        else:
            # Their clients then look for the new leader.
            for mailbox in self._mailboxes:
                mailbox.close()
            self._admission.fail(
                NotLeaderError("this scheduler leads no more", leader_address=now.leader_address)
            )

    async def _read(
        self, reports: AsyncIterable[RoundReport], mailbox: Mailbox[tuple[RoundReport, float]] | None
    ) -> None:
        """Learns from every report and puts those to plan from into `mailbox`."""
        replica_id: str | None = None
        stream = object()
        try:
            async for report in reports:
                if replica_id is None:
                    replica_id = report.replica_id
                    self._newest_streams[replica_id] = stream
                    self._fleet.planner(replica_id).begin_stream()
                elif report.replica_id != replica_id:
                    raise InvalidRequestError(
                        f"replica_id must stay {replica_id!r} within a stream, got {report.replica_id!r}",
                        field="replica_id",
                    )
                planned = self._fleet.observe(report)
                self._admission.pump_soon()
                await self._renew(replica_id)
                if report.round == 0:
                    if mailbox is not None and mailbox.empty:
                        mailbox.put((report, self._clock()))
                elif not planned:
                    self._metrics.reports.labels("stale").inc()
                elif mailbox is None:
                    self._metrics.reports.labels("heard").inc()
                elif mailbox.put((report, self._clock())):
                    self._metrics.reports.labels("superseded").inc()
        finally:
            if replica_id is not None and self._newest_streams.get(replica_id) is stream:
                del self._newest_streams[replica_id]
                if not self._draining:
                    self._fleet.loads.disconnected(replica_id)
            if mailbox is not None:
                mailbox.close()

    async def _renew(self, replica_id: str) -> None:
        """Renews the registry's copy of a lease, when due, on behalf of a verifier that reports. Its own
        renewals may be refused for long while waiting requests use up the server's concurrent calls."""
        if (due := self._fleet.state.due_for_registry(replica_id)) is not None:
            await self._sync.renew(due)
