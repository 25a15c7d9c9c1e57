"""A byte-level tokenizer for the tiny target's small vocabulary: most tokens are characters of JSON."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END = 60
_CHARACTERS = '{}[]":,.-Ġ' + string.digits + string.ascii_lowercase + "_!?XYZ"
_MERGES = [("a", "b"), ("n", "a"), ("m", "e"), ("na", "me"), ('"', ":"), ("t", "r"), ("u", "e"), ("tr", "ue")]


def tiny_tokenizer() -> Tokenizer:
    """61 tokens, the last of which is the end token."""
    vocabulary = {character: index for index, character in enumerate(_CHARACTERS)}
    for pair in _MERGES:
        vocabulary["".join(pair)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    while tokenizer.get_vocab_size() < END:
        tokenizer.add_tokens([f"<unused{tokenizer.get_vocab_size()}>"])
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer
