"""Limits the prompt tokens that may join a step, so that running requests do not wait too long for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.models.config import DecoderConfig

MIN_CHUNK_TOKENS = 8
"""A prompt advances by at least this much per step, whatever the cost, so that it does not starve."""
MAX_SLOWDOWN = 2.0
"""A prompt may make a step this many times as long as decoding alone, even beyond the budget. Otherwise a
large model that needs half the budget for decoding would prefill in tiny chunks, each costing a step."""

MAX_SURPRISE = 2.0
"""Bound on the ratio between a step's time and the expected one."""
SLOWER_RATE, FASTER_RATE = 0.5, 0.15
"""Share of a surprise that is adopted: chunks shrink at once and grow again slowly."""

HEADROOM = 0.9
"""Share of the budget that a step is planned to take: times vary, and nearly all should stay within it."""

ATTENTION_COST = 1.5
"""Time of one attention operation relative to one of a linear layer; attention's tiles are smaller."""


def tokens_per_pair(config: DecoderConfig) -> float:
    """Time for one token to attend to one position, in units of one token's time in the linear layers.

    A prompt's last tokens attend to all tokens before them, which step times by batch tokens do not include.
    """
    width = config.num_heads * config.head_dim
    linear = config.hidden_size * (
        2 * width + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size
    )
    return ATTENTION_COST * 2 * width / linear


def chunk_pairs(start: int, count: int) -> float:
    """(token, position) pairs of a prefill chunk of `count` tokens from position `start` on."""
    return count * (start + (count + 1) / 2)


def prompt_shares(unread: Sequence[int], budget: int) -> list[int]:
    """Tokens of each waiting prompt that join a step of at most `budget` prompt tokens -> [prompts].

    `unread`: tokens left of each, oldest first. Half of the budget is the oldest's, so that it is done in at
    most twice the time it takes alone. The rest goes to those with the fewest left: a short prompt does not
    wait until all long ones before it have been read.
    """
    counts = [0] * len(unread)
    if not unread:
        return counts
    half = budget if len(unread) == 1 else (budget + 1) // 2
    counts[0] = min(unread[0], half)
    left = budget - counts[0]
    for index in sorted(range(1, len(unread)), key=unread.__getitem__):
        counts[index] = min(unread[index], left)
        left -= counts[index]
    counts[0] += min(unread[0] - counts[0], left)
    return counts


class PrefillPacer:
    """Sizes prefill chunks by expected step times, which it corrects from the steps it paced."""

    def __init__(
        self,
        max_step_seconds: float,
        step_time: StepTimeModel | None = None,
        *,
        tokens_per_pair: float = 0.0,
    ) -> None:
        """`step_time` None: it is learned from paced steps, beginning with small chunks."""
        self._budget = HEADROOM * max_step_seconds
        self._tokens_per_pair = tokens_per_pair
        self._model = step_time
        self._slower = 1.0
        self._grown = MIN_CHUNK_TOKENS

    def allowance(
        self, requests: int, decode_tokens: int, context_tokens: int, most: int, *, start: int = 0
    ) -> int:
        """Prompt tokens, at most `most`, for a step that also decodes `decode_tokens` of `requests` >= 1.

        `start`: the chunk's first position in its prompt.
        """
        if most < 1 or self._model is None:
            return min(most, MIN_CHUNK_TOKENS)
        # Index n is a step with n prompt tokens; index 0 has none.
        prompt = np.arange(most + 1)
        pairs = prompt * (start + (prompt + 1) / 2)
        tokens = decode_tokens + prompt + np.rint(self._tokens_per_pair * pairs).astype(np.int64)
        seconds = self._slower * self._model.table(requests, tokens, context_tokens)
        budget = max(self._budget, MAX_SLOWDOWN * seconds[0])
        fits = int(np.searchsorted(seconds, budget, side="right")) - 1
        if self._model.learned:  # unreliable beyond what it has seen
            fits = min(fits, 2 * self._grown)
        return min(max(fits, MIN_CHUNK_TOKENS), most)

    def observe(
        self,
        requests: int,
        decode_tokens: int,
        prompt_tokens: int,
        context_tokens: int,
        seconds: float,
        *,
        pairs: float = 0.0,
    ) -> None:
        """Learns from a step with prompt tokens; `pairs` is the sum of `chunk_pairs` over its chunks."""
        if seconds <= 0:
            return  # a clock too coarse for the step
        tokens = decode_tokens + prompt_tokens + round(self._tokens_per_pair * pairs)
        self._grown = max(self._grown, prompt_tokens)
        if self._model is None:
            self._model = StepTimeModel.learn(requests, tokens, context_tokens, seconds)
        elif self._model.learned:
            self._model = self._model.observed(requests, tokens, context_tokens, seconds)
        else:
            expected = self._slower * self._model.seconds(requests, tokens, context_tokens)
            surprise = math.log(min(max(seconds / expected, 1.0 / MAX_SURPRISE), MAX_SURPRISE))
            self._slower *= math.exp((SLOWER_RATE if surprise > 0 else FASTER_RATE) * surprise)
