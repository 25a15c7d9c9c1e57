"""Typed reads of environment variables for the `from_env` of frozen configs.

An empty value counts as unset, because Compose and Helm pass unset options that way. Every error
is a `ConfigError` that names the variable and its value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from typing import Any

from dspark_core.errors import ConfigError
from services.common.addresses import address_of

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


class Env:
    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def optional_text(self, name: str) -> str | None:
        return self._values.get(name, "").strip() or None

    def text(self, name: str, default: str | None = None) -> str:
        """Without a default the variable is required."""
        value = self.optional_text(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(f"{name} must be set")
        return default

    def optional_address(self, name: str, *, several: bool = False) -> str | None:
        """`host:port`, or with `several` a comma-separated list of them. Without a port, gRPC would try 443
        forever.

        A host may be an IPv6 address without brackets, which a pod template cannot add.
        """
        text = self.optional_text(name)
        addresses = []
        for address in (text or "").split(",") if several else [text or ""]:
            host, _, port = address.strip().rpartition(":")
            known = host and "," not in host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
            if address.strip() and not known:
                kind = "host:port, or several with commas between" if several else "host:port"
                raise ConfigError(f"{name} must be {kind}, got {text!r}")
            addresses.append(address_of(host, int(port)) if _is_ipv6(host) else address)
        return None if text is None else ",".join(addresses)

    def address(self, name: str, default: str, *, several: bool = False) -> str:
        return self.optional_address(name, several=several) or default

    def choice(self, name: str, default: str, allowed: Sequence[str]) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.optional_text(name)
        if value is None:
            return default
        if value.lower() in _TRUE:
            return True
        if value.lower() in _FALSE:
            return False
        raise ConfigError(f"{name} must be true or false, got {value!r}")

    def optional_integer(
        self, name: str, *, minimum: int | None = None, maximum: int | None = None
    ) -> int | None:
        text = self.optional_text(name)
        if text is None:
            return None
        try:
            value = int(text)
        except ValueError:
            raise ConfigError(f"{name} must be an integer, got {text!r}") from None
        _check_range(name, value, minimum, maximum)
        return value

    def integer(
        self, name: str, default: int, *, minimum: int | None = None, maximum: int | None = None
    ) -> int:
        value = self.optional_integer(name, minimum=minimum, maximum=maximum)
        return default if value is None else value

    def number(
        self,
        name: str,
        default: float,
        *,
        above: float | None = None,
        minimum: float | None = None,
        maximum: float | None = None,
    ) -> float:
        text = self.optional_text(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"{name} must be a number, got {text!r}") from None
        if not math.isfinite(value):
            raise ConfigError(f"{name} must be finite, got {text!r}")
        if above is not None and value <= above:
            raise ConfigError(f"{name} must be > {above}, got {value}")
        _check_range(name, value, minimum, maximum)
        return value

    def json_object(self, name: str) -> dict[str, Any]:
        return json_object(name, self.text(name, "{}"))


def json_object(name: str, text: str) -> dict[str, Any]:
    """Raises ConfigError unless the text is a JSON object."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{name} must be a JSON object, got {text!r:.80}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} must be a JSON object, got {text!r:.80}")
    return values


def _is_ipv6(host: str) -> bool:
    try:
        return ip_address(host).version == 6
    except ValueError:
        return False


def _check_range(name: str, value: float, minimum: float | None, maximum: float | None) -> None:
    if minimum is not None and value < minimum:
        raise ConfigError(f"{name} must be >= {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} must be <= {maximum}, got {value}")
