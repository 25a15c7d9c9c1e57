"""A drafter whose passes all fail, or never end, ends, so that whatever supervises it starts another one."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem
from dspark_core.errors import DraftUnavailableError, DSparkError, InvalidRequestError
from services.common.channels import open_channel
from services.drafter import servicer, wiring
from services.verifier.clients import RemoteDraftSource
from tests.integration.drafting.test_draft_source import connected, drafter_server, item
from tests.support.polling import eventually
from tests.support.ports import free_ports

GEOMETRY = DraftGeometry(
    fingerprint="tiny", block_size=4, feature_size=64, vocab_size=512, context_window=None
)
OUR_FAULT = RuntimeError("CUDA error: device-side assert triggered")
THEIR_FAULT = InvalidRequestError("features are of a wrong shape", field="features")


class Failing:
    """An engine whose passes end as they are told to, one after the other; then they draft nothing."""

    num_sequences = 0
    geometry = GEOMETRY

    def __init__(self, ends: Sequence[Exception | None]) -> None:
        self.ends = list(ends)

    def prepare(self) -> None: ...

    def release(self, sequence_ids: Sequence[str]) -> None: ...

    def propose(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        end = self.ends.pop(0) if self.ends else None
        if end is not None:
            raise end
        return [DraftBlock(one.sequence_id) for one in items]


class Hanging(Failing):
    """Its passes end when the gate opens."""

    def __init__(self, gate: threading.Event) -> None:
        super().__init__([])
        self.gate = gate

    def propose(self, items: Sequence[DraftItem]) -> list[DraftBlock]:
        self.gate.wait(timeout=60)
        return super().propose(items)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opens at the latest when the test is over, or its thread would hold up the end of all tests."""
    one = threading.Event()
    yield one
    one.set()


async def served(monkeypatch: pytest.MonkeyPatch, engine: Failing, done: Callable[[], bool]) -> None:
    """Runs a drafter and has it draft until it ends, or is `done`."""
    monkeypatch.setattr(wiring, "build_drafter", lambda options: engine)
    (port,) = free_ports(1)
    environ = {
        "DSPARK_HOST": "127.0.0.1",
        "DSPARK_PORT": str(port),
        "DSPARK_METRICS_PORT": "off",
        "DSPARK_DRAIN_SECONDS": "1",
    }
    drafter = asyncio.create_task(wiring.run(environ))
    async with asyncio.timeout(30), open_channel(f"127.0.0.1:{port}") as channel:
        source = RemoteDraftSource(channel, GEOMETRY)
        source.start()
        while not drafter.done() and not done():
            with contextlib.suppress(DraftUnavailableError):
                await asyncio.wrap_future(source.propose([item("a", 0, 5)]))
            await asyncio.sleep(0.01)
        await source.close()
        if not drafter.done():
            drafter.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drafter


async def test_three_failed_passes_in_a_row_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Failing([OUR_FAULT, OUR_FAULT, None, OUR_FAULT, OUR_FAULT, OUR_FAULT])
    with pytest.raises(DSparkError, match="the drafter is broken: the last 3 passes failed"):
        await served(monkeypatch, engine, lambda: False)
    assert not engine.ends


async def test_what_verifiers_send_wrongly_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Failing([THEIR_FAULT] * 4)
    await served(monkeypatch, engine, lambda: not engine.ends)


async def test_a_pass_that_never_ends_ends_it(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    """It is left behind: a process waits for it no more than verifiers do."""
    monkeypatch.setattr(servicer, "STALL_SECONDS", 0.5)
    with pytest.raises(DSparkError, match="the drafter is broken: a pass has not ended for"):
        await served(monkeypatch, Hanging(gate), lambda: False)
    assert not gate.is_set()


async def test_what_waits_behind_it_is_freed_with_its_stream(gate: threading.Event) -> None:
    def held() -> list[str]:
        items = [one for one in gc.get_objects() if type(one) is DraftItem]
        # The drafter's, who puts the stream before the name.
        return [one.sequence_id for one in items if "/waiting-" in one.sequence_id]

    engine: Any = Hanging(gate)
    async with (
        drafter_server(engine) as server,
        connected(server.port, engine, stall_seconds=0.2) as source,
    ):
        for number in range(4):
            await eventually(lambda: source.connected)
            with pytest.raises(DraftUnavailableError, match="the drafter's stream ended"):
                await asyncio.wrap_future(source.propose([item(f"waiting-{number}", 0, 5)]))
        await eventually(lambda: held() == ["0/waiting-0"])  # the one that hangs
