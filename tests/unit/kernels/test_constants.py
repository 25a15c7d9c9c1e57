"""Constants that the kernels and their references write down separately. Needs no compiler."""

from __future__ import annotations

import re

import pytest

from dspark_core.algorithms import lookup_chain, lookup_evidence, ngram_table, splitmix, suffix_match
from dspark_core.algorithms.lookup_evidence import Support
from dspark_core.kernels.build import SOURCES

CONSTANT = re.compile(r"(\w+)(?:\[[^\]]*\])? = (?:\{([^}]*)\}|([\w.]+))")


def constants(header: str) -> dict[str, float | tuple[int, ...]]:
    """Name -> value of every constexpr, arrays as tuples."""
    found: dict[str, float | tuple[int, ...]] = {}
    for declaration in re.findall(r"constexpr \w+ ([^;]+);", (SOURCES / header).read_text()):
        for name, items, number in CONSTANT.findall(declaration):
            found[name] = tuple(map(int, items.split(","))) if items else _number(number)
    return found


def _number(text: str) -> float:
    return float(text) if "." in text else int(text.removesuffix("ull"), 0)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("splitmix.h", {"kWeyl": splitmix.WEYL, "kMix1": splitmix.MIX_1, "kMix2": splitmix.MIX_2}),
        (
            "lookup.h",
            {
                "kLevelClasses": lookup_evidence.LEVEL_CLASSES,
                "kMatchClasses": lookup_evidence.CLASS_SHAPE[1],
                "kLongestMatch": suffix_match.MAX_MATCH,
                "kMaxOrder": ngram_table.MAX_ORDER,
                "kMatch": Support.MATCH,
                "kTable": Support.TABLE,
                "kBoth": Support.BOTH,
                "kLeastSurvival": lookup_chain.LEAST_SURVIVAL,
                "kMatchClass": lookup_evidence.MATCH_CLASSES,
                "kRemembered": suffix_match.REMEMBERED,
            },
        ),
    ],
)
def test_kernels_and_references_agree(header: str, expected: dict[str, object]) -> None:
    assert constants(header) == expected
