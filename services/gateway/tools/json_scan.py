"""Follows one JSON object character by character: its nesting depth, and whether it can still be valid."""

from __future__ import annotations

_OUTSIDE = frozenset('{}[]:," \t\r\n0123456789+-.eEtrufalsn')
"""Characters that JSON has outside of strings."""
MAX_DEPTH = 128


class JsonScan:
    """Detects most of what cannot be JSON early, but not everything: parse the whole as well."""

    def __init__(self) -> None:
        self.depth = 0
        """Open objects and arrays."""
        self._begun = False
        self._in_string = False
        self._escaped = False

    def push(self, character: str) -> bool:
        """False if the character cannot occur here."""
        if self._in_string:
            return self._push_in_string(character)
        if character not in _OUTSIDE or (not self._begun and character not in "{ \t\r\n"):
            return False
        if character == '"':
            self._in_string = True
        elif character in "{[":
            self._begun = True
            self.depth += 1
        elif character in "}]":
            self.depth -= 1
        return self.depth <= MAX_DEPTH

    def _push_in_string(self, character: str) -> bool:
        if self._escaped:
            self._escaped = False
        elif character == "\\":
            self._escaped = True
        elif character == '"':
            self._in_string = False
        return character >= " "
