"""Builds the tokenizer that a GGUF file's metadata describes (byte-level BPE, `gpt2` models)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from dspark_core.errors import CheckpointError
from dspark_core.tokenization.sampling_defaults import read_defaults
from dspark_core.tokenization.tokenizer import TokenizerParts

_SAMPLING = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
}
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

# Words, digits as given by the %s, punctuation and whitespace, as split by Llama 3 and Qwen2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    # Splitting digits first also separates a number from the space before it, as in training.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _words(digits: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_PRE_TOKENIZERS: Mapping[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": _gpt2,
    "gpt-2": _gpt2,
    "smollm": _smollm,
    "llama-bpe": lambda: _words(r"\p{N}{1,3}"),
    "qwen2": lambda: _words(r"\p{N}"),
}


def read_gguf(path: Path) -> TokenizerParts:
    """Raises CheckpointError for an unreadable file or an unsupported tokenizer."""
    metadata = _read_metadata(path)
    try:
        return _parts(metadata)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except KeyError as error:
        raise CheckpointError(f"{path} has no tokenizer: metadata key {error} is missing") from error


def _read_metadata(path: Path) -> dict[str, Any]:
    """The tokenizer's metadata, copied so that the file's memory map can be closed."""
    from gguf import GGUFReader  # slow to import, and not needed for HF directories

    try:
        reader = GGUFReader(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as GGUF: {error}") from error
    wanted = ("tokenizer.", "general.sampling.")
    return {name: field.contents() for name, field in reader.fields.items() if name.startswith(wanted)}


def _parts(metadata: Mapping[str, Any]) -> TokenizerParts:
    model = metadata["tokenizer.ggml.model"]
    if model != "gpt2":
        raise CheckpointError(f"tokenizer.ggml.model {model!r} is not supported, only 'gpt2'")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    special_tokens = dict(_special_tokens(metadata, tokens))
    return TokenizerParts(
        backend=_backend(metadata, tokens),
        special_tokens=special_tokens,
        eos_token_ids=_end_ids(metadata, tokens),
        chat_template=metadata.get("tokenizer.chat_template"),
        defaults=read_defaults(metadata, _SAMPLING),
    )


def _backend(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        known = ", ".join(sorted(_PRE_TOKENIZERS))
        raise CheckpointError(f"tokenizer.ggml.pre {name!r} is not supported, only {known}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3's vocabulary contains whole words that its merges cannot produce.
    try:
        bpe = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=name == "llama-bpe")
    except Exception as error:  # the library raises plain Exception, e.g. for a merge out of vocabulary
        raise CheckpointError(f"tokenizer.ggml.tokens and merges do not fit: {error}") from error
    backend = tokenizers.Tokenizer(bpe)
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[name]()
    backend.decoder = decoders.ByteLevel()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        types = metadata.get("tokenizer.ggml.token_type", ())
        texts = [tokens[index] for index, token_type in enumerate(types) if token_type == kind]
        backend.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts])
    if metadata.get("tokenizer.ggml.add_bos_token", name == "llama-bpe"):
        _prepend(backend, tokens, _token_id(metadata, tokens, "bos"))
    return backend


def _prepend(backend: tokenizers.Tokenizer, tokens: Sequence[str], bos_id: int | None) -> None:
    if bos_id is None:
        raise CheckpointError("tokenizer.ggml.bos_token_id names no token, but texts shall begin with it")
    backend.post_processor = processors.TemplateProcessing(
        single=[tokens[bos_id], "$A"], special_tokens=[(tokens[bos_id], bos_id)]
    )


def _special_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[tuple[str, str]]:
    keys = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: _token_id(metadata, tokens, key) for name, key in keys.items()}
    return [(name, tokens[token_id]) for name, token_id in ids.items() if token_id is not None]


def _end_ids(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[int, ...]:
    found = (_token_id(metadata, tokens, key) for key in ("eos", "eot"))
    return tuple(sorted({token_id for token_id in found if token_id is not None}))


def _token_id(metadata: Mapping[str, Any], tokens: Sequence[str], key: str) -> int | None:
    """None also for an id of no token: some writers say -1, or that as an unsigned number, for "unset"."""
    token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return token_id if token_id in range(len(tokens)) else None
