"""Loads a model's tokenizer from wherever the model lies."""

from __future__ import annotations

from pathlib import Path

from dspark_core.errors import CheckpointError
from dspark_core.tokenization.gguf_tokenizer import read_gguf
from dspark_core.tokenization.huggingface import read_directory
from dspark_core.tokenization.tokenizer import Tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """path: a GGUF file or a Hugging Face directory.

    Raises:
        CheckpointError: there is no tokenizer, or not one that is supported.
    """
    if path.is_dir():
        return Tokenizer(read_directory(path))
    if path.suffix == ".gguf":
        return Tokenizer(read_gguf(path))
    raise CheckpointError(f"no tokenizer in {path}: neither a directory nor a .gguf file")
