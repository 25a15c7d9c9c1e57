"""The whole stack with the demo model in float32, started once per pytest worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from services.embedded.options import StackOptions
from services.embedded.stack import EmbeddedStack
from services.gateway.config import GatewayConfig

OPTIONS = StackOptions(
    http_port=0,
    grpc_port=0,
    dtype="float32",
    kv_cache_mb=512,
    drain_seconds=5.0,
    admission_wait_seconds=0.5,
)


class Background:
    """An event loop on its own thread, so that tests may block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Any], seconds: float = 300) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="session")
def stack() -> Iterator[EmbeddedStack]:
    """The embedded stack: all four services in this process, with real HTTP and gRPC ports."""
    with running_stack() as one:
        yield one


@contextmanager
def running_stack(gateway: GatewayConfig | None = None) -> Iterator[EmbeddedStack]:
    torch.set_num_threads(1)
    background = Background()
    one = EmbeddedStack(OPTIONS, gateway)
    background.run(one.start())
    yield one
    background.run(one.stop())
    background.close()
