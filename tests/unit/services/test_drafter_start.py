"""What a drafter does before it says that it is ready."""

from __future__ import annotations

import asyncio

from services.drafter import wiring


class Engine:
    def __init__(self, done: list[str]) -> None:
        self._done = done

    def prepare(self) -> None:
        self._done.append("prepared")


def test_passes_are_prepared_before_the_port_opens(monkeypatch) -> None:
    done: list[str] = []

    async def serve(server, **_) -> None:
        done.append("serving")

    monkeypatch.setattr(wiring, "build_drafter", lambda options: Engine(done))
    monkeypatch.setattr(wiring, "serve", serve)
    asyncio.run(wiring.run({"DSPARK_PORT": "0", "DSPARK_METRICS_PORT": "0"}))
    assert done == ["prepared", "serving"]


def test_without_a_drafter_it_answers_probes_and_builds_nothing(monkeypatch) -> None:
    """Compose starts it whatever DSPARK_DRAFTER says, and the verifier waits until it is healthy."""
    served: list[dict[str, object]] = []

    async def serve(server, **hooks) -> None:
        served.append(hooks)

    monkeypatch.setattr(wiring, "build_drafter", None)
    monkeypatch.setattr(wiring, "serve", serve)
    environ = {"DSPARK_PORT": "0", "DSPARK_METRICS_PORT": "0", "DSPARK_SCHEDULER_ADDRESS": "127.0.0.1:1"}
    asyncio.run(wiring.run({**environ, "DSPARK_DRAFTER": "none"}))
    assert served == [{}], "it must not register with the scheduler"
