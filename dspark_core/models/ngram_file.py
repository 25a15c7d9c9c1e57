"""N-gram tables on disk: one safetensors file whose metadata identifies the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from dspark_core.algorithms.lookup_evidence import LookupEvidence
from dspark_core.algorithms.ngram_table import NgramTable
from dspark_core.errors import CheckpointError
from dspark_core.models.tensor_files import open_tensors, save_arrays

FORMAT = "dspark-ngrams-1"
_ARRAYS = {"checks": np.uint16, "tokens": np.uint32, "levels": np.uint8, "rates": np.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramOrigin:
    """The target and data a table was built from."""

    target: str
    """File or directory name, for humans."""
    fingerprint: str
    """Fingerprint of the target's weights, as in `LoadedTarget.fingerprint`."""
    vocab_size: int
    answer_tokens: int


def save_ngrams(table: NgramTable, origin: NgramOrigin, path: Path) -> None:
    """Stores tokens in two bytes if the vocabulary allows it."""
    narrow = origin.vocab_size <= 2**16
    arrays = {
        "checks": table.checks,
        "tokens": table.tokens.astype(np.uint16) if narrow else table.tokens,
        "levels": table.levels,
        "rates": table.evidence.rates,
    }
    described = {
        "format": FORMAT,
        "order": str(table.order),
        "target": origin.target,
        "fingerprint": origin.fingerprint,
        "vocab_size": str(origin.vocab_size),
        "answer_tokens": str(origin.answer_tokens),
    }
    partial = path.with_name(path.name + ".partial")
    save_arrays({name: np.ascontiguousarray(array) for name, array in arrays.items()}, partial, described)
    partial.replace(path)


def load_ngrams(path: Path) -> tuple[NgramTable, NgramOrigin]:
    """Raises CheckpointError naming the file and the problem."""
    try:
        with open_tensors(path, "numpy") as file:
            described = file.metadata() or {}
            if described.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is no table of n-grams: format {described.get('format')!r}, expected {FORMAT!r}"
                )
            arrays = {name: file.get_tensor(name).astype(kind) for name, kind in _ARRAYS.items()}
        origin = NgramOrigin(
            target=described["target"],
            fingerprint=described["fingerprint"],
            vocab_size=int(described["vocab_size"]),
            answer_tokens=int(described["answer_tokens"]),
        )
        evidence = LookupEvidence(arrays.pop("rates"))
        table = NgramTable(int(described["order"]), **arrays, evidence=evidence)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"table of n-grams {path} cannot be read: {error}") from error
    if arrays["tokens"].max(initial=0) >= origin.vocab_size:
        raise CheckpointError(
            f"{path} names token {arrays['tokens'].max()} of a vocabulary of {origin.vocab_size}"
        )
    return table, origin
