"""Hosts and ports as URLs and gRPC write them."""

from __future__ import annotations

import socket


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def family_of(host: str) -> socket.AddressFamily:
    """Address family of a socket that listens on `host`."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def reachable_host(host: str) -> str:
    """Host at which this machine reaches a server on `host`; one cannot connect to wildcard addresses."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
