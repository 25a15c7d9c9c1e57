"""Prompts with the same beginning have the same first hashes."""

from dspark_core.algorithms.prefix_hashes import BLOCK_TOKENS, prefix_hashes

PROMPT = tuple(range(20 * BLOCK_TOKENS))


def test_prefix_hashes_are_equal_exactly_as_far_as_prompts_are():
    changed = (*PROMPT[: 3 * BLOCK_TOKENS + 5], 7, *PROMPT[3 * BLOCK_TOKENS + 6 :])
    same = [a == b for a, b in zip(prefix_hashes(PROMPT), prefix_hashes(changed), strict=True)]
    assert same == [True] * 3 + [False] * 17
    assert prefix_hashes(PROMPT[: BLOCK_TOKENS - 1]) == ()
    assert not {*prefix_hashes(PROMPT)} & {*prefix_hashes(PROMPT, "salt")}
    assert prefix_hashes(PROMPT, "salt") == prefix_hashes(PROMPT, "salt")
    assert len(prefix_hashes(tuple(range(100_000)))) == 32
