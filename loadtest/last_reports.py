"""Waits, when a run ends, for what locust's worker processes have not yet reported.

Locust's master waits half a second at its end, and not at all for a run that the web interface stops. Up to
three seconds of chats would be missing from the verdict.
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
    """Once this worker's users have ended, report to locust and to the load test what they did. End them on
    request."""

    def report(environment: Environment, **_: object) -> None:
        data: dict[str, Any] = {}
        fire = environment.events.report_to_master.fire
        fire(client_id=runner.client_id, data=data)  # type: ignore[no-untyped-call]
        runner.send_message("stats", data)
        runner.send_message(LAST_REPORT)  # after the report, as messages keep their order

    def stop(environment: Environment, msg: Any) -> None:  # noqa: ANN401
        runner.stop()
        report(environment)  # again, if that has ended users

    # A worker leaves the master's list when it has stopped, that is, after its report.
    runner.environment.events.test_stop.add_listener(report)  # type: ignore[no-untyped-call]
    runner.register_message(LAST_REPORT, stop)


def wait_for_last_reports(runner: MasterRunner) -> None:
    """From now on, a run ends once every worker has reported, or left, or `WAIT_SECONDS` have passed."""
    reported: set[str] = set()
    runner.register_message(LAST_REPORT, lambda environment, msg: reported.add(msg.node_id))

    def forget(environment: Environment, **_: object) -> None:
        reported.clear()

    def wait(environment: Environment, **_: object) -> None:
        runner.send_message(LAST_REPORT)
        with gevent.Timeout(WAIT_SECONDS, False):
            while not reported.issuperset(_connected(runner)):
                gevent.sleep(_POLL_SECONDS)

    runner.environment.events.test_stopping.add_listener(forget)  # type: ignore[no-untyped-call]
    runner.environment.events.test_stop.add_listener(wait)  # type: ignore[no-untyped-call]


def _connected(runner: MasterRunner) -> set[str]:
    clients = runner.clients
    return {worker.id for worker in (*clients.ready, *clients.spawning, *clients.running)}
