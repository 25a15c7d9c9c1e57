"""Recognizes servers on this machine, which HTTP_PROXY must not apply to: a proxy has its own loopback."""

from __future__ import annotations

import ipaddress

import httpx


def is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
