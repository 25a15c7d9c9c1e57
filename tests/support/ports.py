"""Ports for processes that have to be told theirs."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_ports(count: int) -> list[int]:
    """None that the system gives to whoever asks for any: tests beside this one do, before these are used."""
    ports: dict[int, None] = {}
    while len(ports) < count:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports[port] = None
    return [*ports]
