"""A small client of the gateway's REST API, for the terminal commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from dspark_core.errors import ConfigError, DSparkError, UnavailableError
from dspark_core.tokenization.texts import lone_surrogate
from services.cli.loopback import is_loopback


class GatewayError(DSparkError):
    """The gateway refused a request; the message is its own."""


TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class ChatPiece:
    """Text of one streamed event; the last one carries the speculation statistics."""

    text: str
    reasoning: str = ""
    """Text of the thought before the answer."""
    speculation: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None


class GatewayClient:
    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """Raises ConfigError."""
        self._url = _base(url)
        check_key(api_key)
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A reachable gateway accepts connections quickly; tokens may take long.
        timeout = httpx.Timeout(TIMEOUT_SECONDS, connect=5.0)
        self._http = httpx.Client(headers=headers, timeout=timeout, trust_env=not is_loopback(self._url))

    @property
    def url(self) -> str:
        return self._url

    def close(self) -> None:
        self._http.close()

    def model(self) -> str:
        """The served model. Raises UnavailableError if nothing answers, GatewayError if what answers is not a
        gateway."""
        try:
            response = self._http.get(f"{self._url}/v1/models")
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"no gateway answers at {self._url} ({error}): start one with 'dspark up'"
            ) from error
        _check(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise GatewayError(f"{response.url} lists no model, got {response.text[:200]!r}") from None

    def chat(self, messages: Sequence[dict[str, str]], **options: object) -> Iterator[ChatPiece]:
        """Streams one answer; `options` are further fields of the request body. Raises ConfigError for a
        message that is not valid UTF-8."""
        for message in messages:
            check_text(f"the {message['role']}'s message", message["content"])
        body = {
            "model": options.pop("model", None) or self.model(),
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in options.items() if value is not None},
        }
        try:
            with self._http.stream("POST", f"{self._url}/v1/chat/completions", json=body) as response:
                if not response.is_success:
                    response.read()
                _check(response)
                yield from _pieces(response.iter_lines())
        except httpx.HTTPError as error:
            raise UnavailableError(f"lost the connection to {self._url}: {error}") from error


def check_key(api_key: str | None) -> None:
    """Raises ConfigError for an invalid key, showing only the offending character."""
    unfit = [sign for sign in api_key or "" if not (sign.isascii() and sign.isprintable())]
    if unfit:
        raise ConfigError(f"--api-key (or DSPARK_API_KEY) must be printable ASCII, but contains {unfit[0]!r}")


def check_text(name: str, text: str) -> None:
    """Raises ConfigError for text read from invalid UTF-8, whose bytes Python keeps as lone surrogates."""
    if (half := lone_surrogate(text)) is not None:
        raise ConfigError(f"{name} must be UTF-8, but contains {half}")


def _base(url: str) -> str:
    """Root URL of the gateway; `localhost:8000` and base URLs as OpenAI clients take them are accepted too.
    Raises ConfigError."""
    full = url if "://" in url else f"http://{url}"
    try:
        httpx.URL(full)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{url!r} is not the URL of a gateway: {error}") from error
    return full.rstrip("/").removesuffix("/v1")


def _pieces(lines: Iterator[str]) -> Iterator[ChatPiece]:
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise GatewayError(event["error"]["message"])
        choices = event.get("choices") or [{}]
        delta = choices[0].get("delta", {})
        yield ChatPiece(
            text=delta.get("content") or "",
            reasoning=delta.get("reasoning_content") or "",
            speculation=event.get("speculation"),
            usage=event.get("usage"),
        )


def _check(response: httpx.Response) -> None:
    if response.is_success:
        return
    if response.has_redirect_location:
        address = response.headers["location"]
        raise GatewayError(f"{response.url} redirects ({response.status_code}) to {address}: use that URL")
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    raise GatewayError(f"the gateway answered {response.status_code}: {message}")
