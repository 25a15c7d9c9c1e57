"""Reads a request's JSON body; checks its media type and bounds its size, memory and time."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers

from dspark_core.errors import InvalidRequestError
from services.gateway.http.body_room import BodyPlace, BodyRoom
from services.gateway.http.errors import BodyTooLargeError, MediaTypeError, SlowBodyError, invalid_body

_Body = TypeVar("_Body", bound=BaseModel)

BODY_TIMEOUT_SECONDS = 30.0
MOST_CONTAINERS = 32_768
"""Arrays and objects in a body: while a million of them are read, every other request waits for a second."""
_OF_WEB_PAGES = ("origin", "sec-fetch-site")
"""Headers that browsers set, and pages cannot: with every POST, those of the gateway's own page included."""


async def read_body(
    request: Request, body_type: type[_Body], max_bytes: int, room: BodyRoom, key: str
) -> _Body:
    """key: the name of the key that sends it.

    Raises MediaTypeError, BodyTooLargeError, SlowBodyError, QueueFullError if too many others arrive, or
    InvalidRequestError naming the field.
    """
    _check_type(request.headers)
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise MediaTypeError(f"the body must be sent as it is, got Content-Encoding {encoding!r:.80}")
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(declared, max_bytes)
    with room.place(key) as place:
        return parsed_body(await _received(request, max_bytes, place), body_type)


async def _received(request: Request, max_bytes: int, place: BodyPlace) -> bytearray:
    raw = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            async for piece in request.stream():
                if len(raw) + len(piece) > max_bytes:
                    raise _too_large(f"more than {max_bytes}", max_bytes)
                place.hold(len(raw) + len(piece))
                raw += piece
    except TimeoutError:
        raise SlowBodyError(f"the request body did not arrive within {BODY_TIMEOUT_SECONDS:g} s") from None
    return raw


def parsed_body(raw: bytes | bytearray, body_type: type[_Body]) -> _Body:
    """Raises InvalidRequestError naming the field.

    A thread would not help: pydantic keeps all others from running, too.
    """
    if (containers := _containers(raw)) > MOST_CONTAINERS:
        raise InvalidRequestError(
            f"the request body must hold at most {MOST_CONTAINERS} arrays and objects, got {containers}"
        )
    with _collector_paused():
        try:
            return body_type.model_validate_json(raw)
        except ValidationError as error:
            raise invalid_body(error) from error


def _containers(raw: bytes | bytearray) -> int:
    """Arrays and objects, if they might be too many; else at least as many as there are."""
    brackets = raw.count(b"[") + raw.count(b"{")
    if brackets <= MOST_CONTAINERS:
        return brackets
    # Some are in strings, which are what lies between one quotation mark and the next.
    unescaped = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    characters = np.frombuffer(unescaped, np.uint8)
    in_string = np.bitwise_xor.accumulate((characters == ord('"')).view(np.uint8))
    opening = (characters == ord("[")) | (characters == ord("{"))
    return int(np.count_nonzero(opening & (in_string == 0)))


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Looking for garbage among a body's million lists again and again takes longer than reading them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_type(headers: Headers) -> None:
    """Accepts JSON types, and a missing one unless a web page sends it. Browsers send forms, plain text and
    bodies without a type across origins without a CORS preflight; refusing those keeps foreign web pages from
    using this gateway."""
    content_type = headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type and any(name in headers for name in _OF_WEB_PAGES):
        raise MediaTypeError("web pages must send the content type application/json, got none")
    if media_type and media_type != "application/json" and not media_type.endswith("+json"):
        raise MediaTypeError(f"the content type must be application/json, got {content_type!r:.80}")


def _too_large(size: str, max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request body has {size} bytes, the limit is {max_bytes}")
