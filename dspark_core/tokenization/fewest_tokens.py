"""A lower bound on the tokens of a text, for refusing what cannot fit before it is encoded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from dspark_core.tokenization.token_bytes import ByteLevelBytes, byte_alphabet, token_bytes

_NFC_SHORTENS = 4
"""No text gets shorter by a larger factor: U+1FBE, U+0308 and U+0341 become U+0390, 7 bytes 2."""
_KEEPING = ("Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous")
"""What may become of the places at which a text is split; where they are removed, text is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FewestTokens:
    """What a text has at least, told in a hundredth of the time that encoding it takes."""

    longest_token_bytes: int
    """No token stands for more of a text."""
    unknown_bytes: bytes = b""
    """Of which there may be any number in a text, and no token."""

    def of(self, text: str) -> int:
        known = len(text.encode().translate(None, self.unknown_bytes))
        return -(-known // self.longest_token_bytes)


def fewest_tokens(backend: tokenizers.Tokenizer) -> FewestTokens | None:
    """None: texts may become shorter without bound. Only what is known to keep a text is counted on, or texts
    that fit would be refused."""
    shortens, added = _shortening(_state(backend.normalizer)), backend.get_added_tokens_decoder().values()
    if shortens is None or backend.truncation is not None or not _keeps_all(_state(backend.pre_tokenizer)):
        return None
    if any(token.lstrip or token.rstrip for token in added):  # they swallow the space around them
        return None
    vocabulary = backend.get_vocab(with_added_tokens=False)
    byte_level = isinstance(token_bytes(backend), ByteLevelBytes)
    unknown = _unknown_bytes(backend, vocabulary, byte_level=byte_level)
    if unknown is None or (unknown and shortens > 1):
        return None
    # In the alphabet of bytes each is one character; elsewhere marks of spaces may be just that in the text.
    own = (len(token if byte_level else token.encode()) for token in vocabulary)
    longest = max(1, *own, *(len(token.content.encode()) for token in added))
    return FewestTokens(longest_token_bytes=shortens * longest, unknown_bytes=unknown)


def _unknown_bytes(
    backend: tokenizers.Tokenizer, vocabulary: Mapping[str, int], *, byte_level: bool
) -> bytes | None:
    """Those that are dropped, or become one unknown token however many they are; None: cannot be said."""
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
    """The factor by which texts may get shorter, in bytes; None: any."""
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
