"""The bytes of each token, derived from the tokenizer's own decoder settings.

With known bytes per token, streaming detokenisation is linear: no window of earlier tokens
has to be decoded again to find out what a new one adds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import tokenizers

from dspark_core.errors import CheckpointError

_HEX_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes(Protocol):
    """Contribution of tokens to a byte stream that is UTF-8 as a whole."""

    @property
    def strip_leading_space(self) -> bool:
        """Whether the tokenizer prepends a space to every text, which decoding removes again."""
        ...

    def __call__(self, token: str) -> bytes: ...

    def of_added(self, content: str) -> bytes:
        """Bytes of an added token that is text."""
        ...


class ByteLevelBytes:
    """GPT-2's alphabet: every byte is represented by one printable character."""

    strip_leading_space = False

    def __init__(self) -> None:
        self._bytes = {character: byte for byte, character in byte_alphabet().items()}

    def __call__(self, token: str) -> bytes:
        try:
            return bytes([self._bytes[character] for character in token])
        except KeyError:  # outside the alphabet: an added token, stored as plain text
            return token.encode()

    def of_added(self, content: str) -> bytes:
        return content.encode()


class SentencePieceBytes:
    """Pieces with a visible space mark; `<0x..>` pieces are single bytes."""

    def __init__(
        self, replacements: Sequence[tuple[str, str]], *, byte_fallback: bool, strip_leading_space: bool
    ) -> None:
        self._replacements = tuple(replacements)
        self._byte_fallback = byte_fallback
        self.strip_leading_space = strip_leading_space

    def __call__(self, token: str) -> bytes:
        for old, new in self._replacements:
            token = token.replace(old, new)
        match = _HEX_BYTE.fullmatch(token) if self._byte_fallback else None
        return bytes([int(match[1], 16)]) if match else token.encode()

    def of_added(self, content: str) -> bytes:
        """Treated as an ordinary piece: Gemma's runs of spaces are added tokens."""
        return self(content)


def byte_alphabet() -> dict[int, str]:
    """GPT-2's byte-to-character map: printable Latin-1 maps to itself, the rest to U+0100 and up."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printable = {byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)}
    alphabet = {byte: chr(byte) for byte in sorted(printable)}
    others = (byte for byte in range(256) if byte not in printable)
    alphabet.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return alphabet


def token_bytes(backend: tokenizers.Tokenizer) -> TokenBytes:
    """Derives the byte mapping from a tokenizer's decoder.

    Raises:
        CheckpointError: the decoder cannot be applied token by token.
    """
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else None
    steps = _flatten(state)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return ByteLevelBytes()
    return _sentence_piece(steps)


def _flatten(state: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if state is None:
        return []
    if state["type"] == "Sequence":
        return [step for inner in state["decoders"] for step in _flatten(inner)]
    return [state]


def _sentence_piece(steps: Sequence[Mapping[str, Any]]) -> SentencePieceBytes:
    replacements: list[tuple[str, str]] = []
    byte_fallback = strip = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(mark)}:
                replacements.append((mark, " "))
                strip = step.get("prepend_scheme", "always") != "never"
            case {"type": "ByteFallback"}:
                byte_fallback = True
            case {"type": "Fuse"}:
                pass  # joins the pieces, which callers do anyway
            case {"type": "Strip", "content": " ", "start": 0 | 1, "stop": 0}:
                strip = step["start"] == 1
            case _:
                raise CheckpointError(f"tokenizer decoder step {json.dumps(dict(step))} is not supported")
    if not steps:
        raise CheckpointError("the tokenizer has no decoder: its tokens cannot be turned into text")
    return SentencePieceBytes(replacements, byte_fallback=byte_fallback, strip_leading_space=strip)
