"""Free ports for processes that must be given a fixed one."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """From below the ephemeral range, so that no parallel test is assigned one of them before it is used."""
    ports: dict[int, None] = {}
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports[port] = None
    return [*ports]
