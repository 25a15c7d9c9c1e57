"""Checks that ports are free before a model is loaded in vain."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from dspark_core.errors import ConfigError
from services.common.addresses import address_of, family_of


def require_free(host: str, ports: Sequence[int]) -> None:
    """Raises ConfigError naming host and port. Port 0 stands for any free port."""
    for port in filter(None, ports):
        with socket.socket(family_of(host), socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError as error:
                raise ConfigError(f"cannot listen on {address_of(host, port)}: {error}") from error
