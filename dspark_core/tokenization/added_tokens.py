"""Added tokens that a checkpoint declares beside `tokenizer.json`, added as `transformers` adds them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from dspark_core.errors import CheckpointError

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def tokens_by_id(origin: str, decoder: object) -> Iterator[tuple[int, AddedToken]]:
    """`decoder`: `added_tokens_decoder` of `tokenizer_config.json`, in the file `origin`."""
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{origin}: added_tokens_decoder must be an object, got {decoder!r}")
    for token_id, fields in decoder.items():
        match fields:
            case {"content": str(text)} if token_id.isdecimal():
                flags = {flag: fields[flag] for flag in _FLAGS if isinstance(fields.get(flag), bool)}
                yield int(token_id), AddedToken(text, **flags)
            case _:
                raise CheckpointError(
                    f"{origin}: added_tokens_decoder: {token_id!r} must be an id with an object that has "
                    f"content, got {fields!r}"
                )


def tokens_by_text(
    origin: str, ids: Mapping[str, Any], special: Collection[str]
) -> Iterator[tuple[int, AddedToken]]:
    """`ids`: the content of `added_tokens.json`, in the file `origin`; `special`: texts of special tokens."""
    for text, token_id in ids.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise CheckpointError(f"{origin}: {text!r} must have a token id, got {token_id!r}")
        yield token_id, AddedToken(text, special=text in special, normalized=text not in special)


def add_missing(
    backend: tokenizers.Tokenizer, origin: str, declared: Iterator[tuple[int, AddedToken]]
) -> None:
    """Texts that the tokenizer knows keep their ids. Raises CheckpointError, naming the file `origin`, for a
    new one whose id is not the next."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(declared, key=lambda pair: pair[0]):
        if token.content in added:
            continue
        known = backend.token_to_id(token.content) is not None
        size = backend.get_vocab_size()
        backend.add_tokens([token])
        if not known and backend.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{origin}: token {token.content!r} is not in tokenizer.json, and its id {token_id} does not "
                f"continue the {size} tokens there"
            )
