"""Computes looked-up blocks: with native kernels if available, otherwise with their reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dspark_core.algorithms.lookup_chain import lookup_chain
from dspark_core.algorithms.ngram_table import NgramTable, empty_table
from dspark_core.algorithms.suffix_match import SuffixIndex
from dspark_core.engine.sequence import SequenceState
from dspark_core.kernels.library import Kernels, native_kernels
from dspark_core.kernels.lookup import Chain, NativeLookup, NativeText


class LookupChains(Protocol):
    """Indexes the sequences' texts on demand."""

    @property
    def remembered(self) -> int:
        """Number of sequences whose text is indexed."""
        ...

    def chains(self, sequences: Sequence[SequenceState], wanted: Sequence[int]) -> list[Chain]:
        """For each sequence, at most `wanted` tokens that may follow, and the survival of each."""
        ...

    def release(self, sequence_id: str) -> None:
        """Forgets a sequence; ignores unknown ids."""
        ...


def lookup_chains(table: NgramTable | None) -> LookupChains:
    """`table` None: look up only in the texts themselves."""
    kernels = native_kernels()
    known = table or empty_table()
    return ReferenceChains(known) if kernels is None else NativeChains(known, kernels)


def native_lookup(table: NgramTable, kernels: Kernels) -> NativeLookup:
    return NativeLookup(
        kernels,
        order=table.order,
        checks=table.checks,
        tokens=table.tokens,
        levels=table.levels,
        rates=table.evidence.rates,
    )


class ReferenceChains:
    def __init__(self, table: NgramTable) -> None:
        self._table = table
        self._indices: dict[str, SuffixIndex] = {}

    @property
    def remembered(self) -> int:
        return len(self._indices)

    def chains(self, sequences: Sequence[SequenceState], wanted: Sequence[int]) -> list[Chain]:
        return [self._chain(sequence, most) for sequence, most in zip(sequences, wanted, strict=True)]

    def release(self, sequence_id: str) -> None:
        self._indices.pop(sequence_id, None)

    def _chain(self, sequence: SequenceState, most: int) -> Chain:
        index = self._indices.setdefault(sequence.sequence_id, SuffixIndex())
        return lookup_chain(self._table, sequence.tokens, index.longest(sequence.tokens, most), most)


class NativeChains:
    def __init__(self, table: NgramTable, kernels: Kernels) -> None:
        self._kernels = kernels
        self._native = native_lookup(table, kernels)
        self._texts: dict[str, NativeText] = {}

    @property
    def remembered(self) -> int:
        return len(self._texts)

    def chains(self, sequences: Sequence[SequenceState], wanted: Sequence[int]) -> list[Chain]:
        texts = [self._text(sequence.sequence_id) for sequence in sequences]
        return self._native.chains(texts, [sequence.tokens for sequence in sequences], wanted)

    def release(self, sequence_id: str) -> None:
        self._texts.pop(sequence_id, None)

    def _text(self, sequence_id: str) -> NativeText:
        text = self._texts.get(sequence_id)
        if text is None:
            text = self._texts[sequence_id] = NativeText(self._kernels)
        return text
