"""Reads an OpenAI event stream: `data: {json}` lines, ended by `data: [DONE]`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator


class StreamError(Exception):
    """The stream is not what the OpenAI API promises, or carries an error event."""


def events(lines: Iterable[str]) -> Iterator[dict[str, object]]:
    """Yields each chunk; raises StreamError if the stream ends without [DONE], so truncation is an error."""
    for line in lines:
        if not line.startswith("data:"):  # blank separators, comments, `event:` fields
            continue
        payload = line.removeprefix("data:").strip()
        if payload == "[DONE]":
            return
        try:
            chunk = json.loads(payload)
        except ValueError as error:
            raise StreamError(f"event is not JSON: {payload[:80]!r}") from error
        if not isinstance(chunk, dict):
            raise StreamError(f"event is not a JSON object: {payload[:80]!r}")
        if "error" in chunk:
            raise StreamError(f"server reported {chunk['error']!r}"[:300])
        yield chunk
    raise StreamError("stream ended without [DONE]")
