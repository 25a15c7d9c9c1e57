"""A lower bound on a text's token count, to refuse oversized text before encoding it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from dspark_core.tokenization.token_bytes import ByteLevelBytes, byte_alphabet, token_bytes

_NFC_SHORTENS = 4
"""Bound on the factor by which NFC shortens a text: U+1FBE, U+0308 and U+0341 (7 bytes) become U+0390 (2)."""
_KEEPING = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
"""Split behaviours that keep the delimiters; the others lose text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestTokens:
    """Lower bound on a text's tokens, computed in a hundredth of the time that encoding takes."""

    longest_token_bytes: int
    """Maximum number of bytes of text per token."""
    unknown_bytes: bytes = b""
    """Bytes that may occur in a text any number of times without a token."""

    def of(self, text: str) -> int:
        known = len(text.encode().translate(None, self.unknown_bytes))
        return -(-known // self.longest_token_bytes)


def fewest_tokens(backend: tokenizers.Tokenizer) -> FewestTokens | None:
    """None: texts may shrink without bound. Relies only on steps known to keep the text, as otherwise texts
    that fit might be refused."""
    shortens, added = _shortening(_state(backend.normalizer)), backend.get_added_tokens_decoder().values()
    if shortens is None or backend.truncation is not None or not _keeps_all(_state(backend.pre_tokenizer)):
        return None
    if any(token.lstrip or token.rstrip for token in added):  # they absorb adjacent spaces
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    byte_level = isinstance(token_bytes(backend), ByteLevelBytes)
    unknown = _unknown_bytes(backend, vocabulary, byte_level=byte_level)
    if unknown is None or (unknown and shortens > 1):
        return None
    # In a byte alphabet each byte is one character; elsewhere the text itself may contain space marks.
    own = (len(token if byte_level else token.encode()) for token in vocabulary)
    longest = max(1, *own, *(len(token.content.encode()) for token in added))
    return FewestTokens(longest_token_bytes=shortens * longest, unknown_bytes=unknown)


def _unknown_bytes(
    backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int], *, byte_level: bool
) -> bytes | None:
    """Bytes that are dropped or merged into one unknown token; None: cannot be determined."""
    if not isinstance(backend.model, tokenizers.models.BPE):
        return None
    if byte_level:
        if '"ByteLevel"' not in json.dumps(_state(backend.pre_tokenizer)):
            return None
        return bytes(byte for byte, character in byte_alphabet().items() if character not in vocabulary)
    whole = backend.model.byte_fallback and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    return b"" if whole else None


def _state(
    part: tokenizers.normalizers.Normalizer | tokenizers.pre_tokenizers.PreTokenizer | None,
) -> Mapping[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _shortening(normalizer: Mapping[str, Any] | None) -> int | None:
    """The factor by which texts may shrink, in bytes; None: unbounded."""
    match normalizer:
        case None | {"type": "Prepend"}:
            return 1
        case {"type": "NFC"}:
            return _NFC_SHORTENS
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
            return 1 if len(old.encode()) <= len(new.encode()) else None
        case {"type": "Sequence", "normalizers": [*steps]}:
            factor = 1
            for step in steps:
                each = _shortening(step)
                if each is None:
                    return None
                factor *= each
            return factor
    return None


def _keeps_all(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    match pre_tokenizer:
        case None | {"type": "ByteLevel" | "Metaspace" | "Digits"}:
            return True
        case {"type": "Split", "behavior": str(behavior)}:
            return behavior in _KEEPING
        case {"type": "Sequence", "pretokenizers": [*steps]}:
            return all(_keeps_all(step) for step in steps)
    return False
