"""Builds the lookup of drafts, with or without an n-gram table."""

from __future__ import annotations

import logging
from pathlib import Path

from dspark_core.algorithms.ngram_table import NgramTable
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.errors import CheckpointError
from dspark_core.models.loading import TargetFacts
from dspark_core.models.ngram_file import load_ngrams
from dspark_core.zoo_paths import resolve_ngrams_path

_log = logging.getLogger(__name__)


def build_lookup(
    ngrams: str, target_model: str, target: TargetFacts, *, always: bool = False
) -> LookupDrafting:
    """`ngrams` in the form that `resolve_ngrams_path` takes; `always`: see `LookupDrafting`. Raises
    ConfigError and CheckpointError."""
    return LookupDrafting(find_table(ngrams, target_model, target), always=always)


def find_table(ngrams: str, target_model: str, target: TargetFacts) -> NgramTable | None:
    """The table of that name, or None if none is to be used; raises as `build_lookup` does."""
    path = resolve_ngrams_path(ngrams, target_model)
    return None if path is None else load_table(path, target)


def load_table(path: Path, target: TargetFacts) -> NgramTable:
    """Raises CheckpointError for a table with another vocabulary size.

    A table of other weights is used, with a warning: a fine-tuned or differently quantised target says much
    the same, and drafts affect only speed.
    """
    table, origin = load_ngrams(path)
    vocab_size = target.config.vocab_size
    if origin.vocab_size != vocab_size:
        raise CheckpointError(
            f"table of n-grams {path} is of a target with {origin.vocab_size} tokens ({origin.target}); "
            f"{target.path.name} has {vocab_size}"
        )
    if origin.fingerprint != target.fingerprint:
        _log.warning(
            "table of n-grams %s holds words of %s with other weights (fingerprint %s, here %s)",
            path,
            origin.target,
            origin.fingerprint,
            target.fingerprint,
        )
    count, tokens = table.entries, origin.answer_tokens
    _log.info("table of n-grams %s: %d contexts of %d answer tokens", path, count, tokens)
    return table
