"""Drafters in DeepSpec's format behave as they did there, round by round."""

from __future__ import annotations

import pytest

from tests.unit.models.dspark_golden import decode_greedily, golden, golden_drafter


@pytest.mark.parametrize("prompt", range(3))
@pytest.mark.parametrize("name", ["dspark_vanilla", "dflash"])
def test_greedy_rounds_match_the_golden_ones(name: str, prompt: int) -> None:
    expected = golden(name)["generation"][prompt]
    output, rounds = decode_greedily(golden_drafter(name), expected["prompt"])
    assert output == expected["output"]
    assert len(rounds) == len(expected["rounds"])
    for found, wanted in zip(rounds, expected["rounds"], strict=True):
        assert found.candidates == wanted["candidates"]
        assert (found.accepted, found.next_token) == (wanted["accepted"], wanted["next_token"])
        if wanted["confidence_logits"] is None:
            assert found.confidence_logits is None
        else:
            assert found.confidence_logits == pytest.approx(wanted["confidence_logits"], rel=1e-4, abs=1e-6)
    assert [r.accepted + 1 for r in rounds] == expected["acceptance_lengths"]


def test_drafts_are_accepted_at_all() -> None:
    """Guards the comparison above against fixtures in which nothing happens."""
    _, rounds = decode_greedily(
        golden_drafter("dspark_vanilla"), golden("dspark_vanilla")["generation"][0]["prompt"]
    )
    assert max(r.accepted for r in rounds) == 7
