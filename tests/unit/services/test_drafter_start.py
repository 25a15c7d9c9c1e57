"""What a drafter does before it says that it is ready."""

from __future__ import annotations

import asyncio

from services.drafter import main


class Engine:
    def __init__(self, done: list[str]) -> None:
        self._done = done

    def prepare(self) -> None:
        self._done.append("prepared")


def test_passes_are_prepared_before_the_port_opens(monkeypatch) -> None:
    done: list[str] = []

    async def serve(server, **_) -> None:
        done.append("serving")

    monkeypatch.setattr(main, "build_drafter", lambda options: Engine(done))
    monkeypatch.setattr(main, "serve", serve)
    asyncio.run(main.run({"DSPARK_PORT": "0", "DSPARK_METRICS_PORT": "0"}))
    assert done == ["prepared", "serving"]
