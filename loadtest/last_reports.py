"""Waits, when a run ends, for what locust's worker processes have not yet reported.

Locust's master waits half a second. On a busy machine that is too little, and up to three seconds of chats
would be missing from the verdict.
"""

from __future__ import annotations

from typing import Any

import gevent
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

LAST_REPORT = "last report"
WAIT_SECONDS = 10.0
_POLL_SECONDS = 0.05


def answer_for_last_report(runner: WorkerRunner) -> None:
    """On request, end this worker's users and report, to locust and to the load test, what they did."""

    def report(environment: Environment, msg: Any) -> None:  # noqa: ANN401
        runner.stop()
        data: dict[str, Any] = {}
        fire = environment.events.report_to_master.fire
        fire(client_id=runner.client_id, data=data)  # type: ignore[no-untyped-call]
        runner.send_message("stats", data)
        runner.send_message(LAST_REPORT)  # after the report, as messages keep their order

    runner.register_message(LAST_REPORT, report)


def wait_for_last_reports(runner: MasterRunner) -> None:
    """From now on, a run ends once every worker has reported, or left, or `WAIT_SECONDS` have passed."""
    reported: set[str] = set()
    runner.register_message(LAST_REPORT, lambda environment, msg: reported.add(msg.node_id))

    def wait(environment: Environment, **_: object) -> None:
        reported.clear()
        runner.send_message(LAST_REPORT)
        with gevent.Timeout(WAIT_SECONDS, False):
            while not reported.issuperset(_connected(runner)):
                gevent.sleep(_POLL_SECONDS)

    runner.environment.events.test_stop.add_listener(wait)  # type: ignore[no-untyped-call]


def _connected(runner: MasterRunner) -> set[str]:
    clients = runner.clients
    return {worker.id for worker in (*clients.ready, *clients.spawning, *clients.running)}
