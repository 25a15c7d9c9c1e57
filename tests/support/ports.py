"""Free ports for processes that must be given a fixed one."""

from __future__ import annotations

import itertools
import os
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

WORKERS = 8


def free_ports(count: int) -> list[int]:
    """From below the ephemeral range, so that nobody is assigned one of them before it is used."""
    ports: list[int] = []
    while len(ports) < count:
        port = next(_own_ports())
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.append(port)
    return ports


@cache
def _own_ports() -> Iterator[int]:
    """Each once before one comes again, and none of another pytest worker's: what they start may take seconds
    to listen."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(20_000 + worker % WORKERS, 32_000, WORKERS)
    first = random.SystemRandom().randrange(len(ports))
    return itertools.cycle([*ports[first:], *ports[:first]])
