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
        self._characters = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """The text these tokens complete; may be empty."""
        return self._shown(self._decoder.decode(b"".join(map(self._bytes_of, token_ids))))

    def flush(self) -> str:
        """What is still held back, once no token follows: an incomplete character as U+FFFD."""
        return self._shown(self._decoder.decode(b"", True))

    def place(self, token_id: int) -> int:
        """Where in the text this token will begin if it is pushed next, in characters.

        That is the place of the character that its first byte belongs to: all tokens of one that is spread
        over several have the place where it begins.
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
    """Whether the byte is the next of an incomplete character; if not, that one will be U+FFFD."""
    try:
        codecs.utf_8_decode(held_back + first, "strict", False)
    except UnicodeDecodeError:
        return False
    return True
