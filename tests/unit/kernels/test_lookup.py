"""Native looked-up blocks against their references, as texts grow."""

from __future__ import annotations

import random

import pytest

from dspark_core.algorithms.lookup_chain import lookup_chain
from dspark_core.algorithms.ngram_table import NgramTable, empty_table
from dspark_core.algorithms.suffix_match import SuffixIndex
from dspark_core.engine.drafts.lookup_chains import native_lookup
from dspark_core.kernels.library import Kernels
from dspark_core.kernels.lookup import Chain, NativeText
from tests.unit.algorithms.test_ngram_table import table_of


def reference(table: NgramTable, text: list[int], most: int) -> Chain:
    return lookup_chain(table, text, SuffixIndex().longest(text, most), most)


def random_table(chance: random.Random, order: int, vocab: int) -> NgramTable:
    entries = {
        tuple(chance.randrange(vocab) for _ in range(chance.randint(1, order))): (
            chance.randrange(vocab),
            chance.randrange(256),
        )
        for _ in range(300)
    }
    return table_of(entries, order)


@pytest.mark.parametrize("order", [1, 3, 8])
@pytest.mark.parametrize("vocab", [3, 40, 4000])
def test_blocks_are_those_of_the_reference_while_texts_grow(kernels: Kernels, order: int, vocab: int) -> None:
    chance = random.Random(order * 100 + vocab)
    table = random_table(chance, order, vocab)
    native = native_lookup(table, kernels)
    tokens = [[chance.randrange(vocab) for _ in range(chance.randint(1, 60))] for _ in range(40)]
    texts = [NativeText(kernels) for _ in tokens]
    lengths: set[int] = set()
    for _ in range(12):
        asked = sorted(chance.sample(range(len(tokens)), chance.randint(1, len(tokens))))
        wanted = [chance.randint(1, 15) for _ in asked]
        found = native.chains([texts[i] for i in asked], [tokens[i] for i in asked], wanted)
        given = zip(asked, wanted, strict=True)
        assert found == [reference(table, tokens[i], most) for i, most in given]
        lengths |= {len(drafted) for drafted, _ in found}
        for text in tokens:
            text += [chance.randrange(vocab) for _ in range(chance.randint(0, 4))]
            text += text[-chance.randint(1, 30) :] if chance.random() < 0.3 else []
    assert len(lengths) > 3


def test_without_a_table_blocks_are_of_the_text_alone(kernels: Kernels) -> None:
    native = native_lookup(empty_table(), kernels)
    text = [5, 6, 7, 8, 5, 6]
    assert native.chains([NativeText(kernels)], [text], [4]) == [reference(empty_table(), text, 4)]
    assert native.chains([NativeText(kernels)], [[5, 6]], [4]) == [((), ())]


def test_long_prompts_large_token_ids_and_empty_batches(kernels: Kernels) -> None:
    table = table_of({(250_000,): (260_000, 255)})
    native = native_lookup(table, kernels)
    assert native.chains([], [], []) == []
    text = [*range(3000), 250_000]
    assert native.chains([NativeText(kernels)], [text], [4]) == [reference(table, text, 4)]


def test_texts_are_freed_with_their_objects(kernels: Kernels) -> None:
    native = native_lookup(empty_table(), kernels)
    text = NativeText(kernels)
    native.chains([text], [list(range(100))], [3])
    free = text.free
    assert free.alive
    del text
    assert not free.alive
