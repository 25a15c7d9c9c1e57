"""Loads a model's tokenizer from the model's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_core.errors import CheckpointError
from dspark_core.tokenization.chat_template import NO_ARGUMENTS
from dspark_core.tokenization.gguf_tokenizer import read_gguf
from dspark_core.tokenization.huggingface import read_directory
from dspark_core.tokenization.tokenizer import Tokenizer


def load_tokenizer(path: Path, template_arguments: Mapping[str, Any] = NO_ARGUMENTS) -> Tokenizer:
    """path: a GGUF file or a Hugging Face directory. template_arguments: for every conversation, see
    `ChatTemplate`.

    Raises:
        CheckpointError: no tokenizer, or an unsupported one.
        ConfigError: an argument that no template may get.
    """
    if path.is_dir():
        return Tokenizer(read_directory(path), template_arguments)
    if path.suffix == ".gguf":
        return Tokenizer(read_gguf(path), template_arguments)
    raise CheckpointError(f"no tokenizer in {path}: neither a directory nor a .gguf file")
