"""Checks that ports are free before a model is loaded in vain."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_core.errors import ConfigError
from services.common.addresses import address_of, bound_socket


def require_free(host: str, ports: Sequence[int]) -> None:
    """Raises ConfigError naming host and port. Port 0 stands for any free port."""
    for port in filter(None, ports):
        try:
            bound_socket(host, port).close()
        except OSError as error:
            raise ConfigError(f"cannot listen on {address_of(host, port)}: {error}") from error
