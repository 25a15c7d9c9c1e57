"""Turns a stream of token ids into text without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable


class IncrementalDetokenizer:
    """Text of the tokens so far, in pieces; the pieces joined equal decoding everything at once.

    A character whose bytes are spread over several tokens is held back until it is complete. Bytes
    that can never become one are shown as U+FFFD. Cost is linear in the new tokens alone.
    """

    def __init__(self, bytes_of: Callable[[int], bytes], *, strip_leading_space: bool = False) -> None:
        """bytes_of: the bytes a token id stands for, empty for those that are not shown."""
        self._bytes_of = bytes_of
        self._strip = strip_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text these tokens complete; may be empty."""
        return self._shown(self._decoder.decode(b"".join(map(self._bytes_of, token_ids))))

    def flush(self) -> str:
        """What is still held back, once no token follows: an incomplete character as U+FFFD."""
        return self._shown(self._decoder.decode(b"", True))

    def _shown(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
