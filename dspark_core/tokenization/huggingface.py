"""Reads the tokenizer of a Hugging Face model directory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from dspark_core.errors import CheckpointError
from dspark_core.tokenization.added_tokens import add_missing, tokens_by_id, tokens_by_text
from dspark_core.tokenization.sampling_defaults import read_defaults
from dspark_core.tokenization.tokenizer import GenerationDefaults, TokenizerParts


def read_directory(directory: Path) -> TokenizerParts:
    """Raises CheckpointError naming the file that is missing or unreadable."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"no tokenizer: {path} does not exist")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for anything it cannot parse
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    config = _read_json(directory / "tokenizer_config.json")
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path)
    # Older checkpoints name their special tokens only in the other file.
    named = {**_read_json(directory / "special_tokens_map.json"), **config}
    special_tokens = dict(_special_tokens(named))
    _add_tokens(directory, backend, config, special_tokens.values())
    return TokenizerParts(
        backend=backend,
        special_tokens=special_tokens,
        eos_token_ids=_eos_ids(directory, backend, special_tokens, generation),
        chat_template=_chat_template(directory, config),
        defaults=_defaults(generation_path, generation),
    )


def _read_json(path: Path) -> Mapping[str, Any]:
    """An absent file counts as empty: all but tokenizer.json are optional."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _special_tokens(named: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Those of all models and those of their own, such as `image_token`, for chat templates."""
    for name, token in named.items():
        if isinstance(token, Mapping):  # a serialised AddedToken
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            yield name, token


def _add_tokens(
    directory: Path, backend: tokenizers.Tokenizer, config: Mapping[str, Any], special: Collection[str]
) -> None:
    """As in `transformers`, the newer layout hides the older one."""
    if "added_tokens_decoder" in config:
        origin = str(directory / "tokenizer_config.json")
        add_missing(backend, origin, tokens_by_id(origin, config["added_tokens_decoder"]))
    else:
        path = directory / "added_tokens.json"
        add_missing(backend, str(path), tokens_by_text(str(path), _read_json(path), special))


def _eos_ids(
    directory: Path,
    backend: tokenizers.Tokenizer,
    special_tokens: Mapping[str, str],
    generation: Mapping[str, Any],
) -> tuple[int, ...]:
    config = _read_json(directory / "config.json")
    text = config.get("text_config")  # multimodal models may declare it only there
    ids: set[int] = set()
    for name, source in (
        ("generation_config.json", generation),
        ("config.json", config),
        ("config.json: text_config", text if isinstance(text, Mapping) else {}),
    ):
        declared = source.get("eos_token_id")
        if declared is not None:
            ids = _declared_ids(f"{directory / name}: eos_token_id", declared)
            break
    own = backend.token_to_id(special_tokens["eos_token"]) if "eos_token" in special_tokens else None
    if own is not None:
        ids.add(own)
    return tuple(sorted(ids))


def _declared_ids(name: str, declared: object) -> set[int]:
    ids = declared if isinstance(declared, list) else [declared]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise CheckpointError(f"{name} must be a token id, or a list of them, got {declared!r}")
    return set(ids)


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
    match config.get("chat_template"):
        case None | str() as template:
            return template
        case [*entries] if all(map(_names_template, entries)):
            return {entry["name"]: entry["template"] for entry in entries}.get("default")
    raise CheckpointError(
        f"{directory / 'tokenizer_config.json'}: chat_template must be text, or a list of objects with "
        "name and template"
    )


def _names_template(entry: object) -> bool:
    match entry:
        case {"name": str(), "template": str()}:
            return True
    return False


def _defaults(path: Path, generation: Mapping[str, Any]) -> GenerationDefaults:
    try:
        return read_defaults(generation, {name: name for name in ("temperature", "top_p", "top_k", "min_p")})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
