"""Turns a stream of token ids into text without ever emitting a partial character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable


class IncrementalDetokenizer:
    """Decodes tokens piece by piece; the concatenated pieces equal decoding everything at once.

    A character whose bytes span several tokens is held back until it is complete. Bytes
    that can never form a character are shown as U+FFFD. The cost is linear in the new tokens.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, strip_leading_space: bool = False) -> None:
        """bytes_of: the bytes of a token id; empty for tokens that are not shown."""
        self._bytes_of = bytes_of
        self._strip = strip_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._characters = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """The text completed by these tokens; may be empty."""
        return self._shown(self._decoder.decode(b"".join(map(self._bytes_of, token_ids))))

    def flush(self) -> str:
        """The text still held back when no more tokens follow: an incomplete character as U+FFFD."""
        return self._shown(self._decoder.decode(b"", True))

    def place(self, token_id: int) -> int:
        """Character offset at which this token would begin if pushed next.

        It is the offset of the character that the token's first byte belongs to; all tokens of a character
        that spans several have the same offset.
        """
        held_back, _ = self._decoder.getstate()
        first = self._bytes_of(token_id)[:1]
        ends_another = bool(held_back and first) and not _goes_on(held_back, first)
        return self._characters + ends_another

    def _shown(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            text = text.removeprefix(" ")
        self._characters += len(text)
        return text


def _goes_on(held_back: bytes, first: bytes) -> bool:
    """Whether the byte continues the incomplete character; if not, that one becomes U+FFFD."""
    try:
        codecs.utf_8_decode(held_back + first, "strict", False)
    except UnicodeDecodeError:
        return False
    return True
