"""Hosts and ports as URLs and gRPC write them."""

from __future__ import annotations

import socket


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bound_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that may listen on `host`. Raises OSError.

    Like gRPC's, 0.0.0.0 and :: are all addresses: of IPv4, and of IPv6 where the machine has it.
    """
    if host == "0.0.0.0" and socket.has_dualstack_ipv6():
        host = "::"
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if host == "::":
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def reachable_host(host: str) -> str:
    """Host at which this machine reaches a server on `host`; one cannot connect to wildcard addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
