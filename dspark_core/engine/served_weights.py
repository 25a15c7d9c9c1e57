"""Tells whether two verifiers compute the same model, without reading all of its weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from dspark_core.engine.building import EngineOptions
from dspark_core.errors import CheckpointError
from dspark_core.models.hf import weight_files
from dspark_core.models.loading import TargetFacts
from dspark_core.models.packing import WeightChoice

SAMPLES = 1024
"""Pieces of the checkpoint that are read, at even distances. Together with the start of every tensor, which
the target's fingerprint covers, they show another training or quantisation: it changes nearly all values."""
SAMPLE_BYTES = 4096
_WHOLE_FILES = ("config.json", "tokenizer.json")
"""Small files of a directory that determine the output: the tokenizer by way of grammars."""
_VLLM_ROUNDING = ("hf_overrides", "kv_cache_dtype", "quantization")
"""Arguments of vLLM that change what is computed; others, such as the number of GPUs, only how."""


def served_weights(options: EngineOptions, facts: TargetFacts) -> str:
    """Equal for engines that compute the same model: same checkpoint files, same precision. Engines that
    differ only in speed, such as CPU and GPU, agree. Raises CheckpointError for unreadable files."""
    exact = WeightChoice(options.weights).exact
    precision = {
        "dtype": options.dtype,
        "weights": WeightChoice.STORED.value if exact else options.weights,
        "vllm": {name: options.vllm_arguments.get(name) for name in _VLLM_ROUNDING},
    }
    digest = hashlib.sha256(json.dumps([facts.fingerprint, precision], sort_keys=True, default=str).encode())
    try:
        for content in _contents(facts.path):
            digest.update(hashlib.sha256(content).digest())
    except OSError as error:
        raise CheckpointError(f"{facts.path}: cannot be read: {error}") from error
    return digest.hexdigest()[:16]


def _contents(path: Path) -> list[bytes]:
    if not path.is_dir():
        return [_sample([path])]
    small = [path / name for name in _WHOLE_FILES]
    return [file.read_bytes() if file.is_file() else b"" for file in small] + [_sample(weight_files(path))]


def _sample(files: Sequence[Path]) -> bytes:
    """Sizes, and pieces at even distances over all files, the first at the start of the first file."""
    sizes = [file.stat().st_size for file in files]
    parts = [json.dumps(sizes).encode()]
    distance = max(sum(sizes) // SAMPLES, SAMPLE_BYTES)
    start = 0
    for file, size in zip(files, sizes, strict=True):
        with file.open("rb") as opened:
            places = range(-start % distance, size, distance)
            parts += [os.pread(opened.fileno(), SAMPLE_BYTES, at) for at in places]
        start += size
    return b"".join(parts)
