"""How many prompt tokens may join a step, so that running streams do not wait for it too long."""

from __future__ import annotations

import math

import numpy as np

from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.models.config import DecoderConfig

MIN_CHUNK_TOKENS = 8
"""A prompt advances by this much in every step, whatever that costs: it must not starve."""
MAX_SLOWDOWN = 2.0
"""Where decoding alone takes half the budget or more, a prompt may still make it this many times as long:
otherwise a large model would read prompts in crumbs, each paying for a whole step."""

MAX_SURPRISE = 2.0
"""How far one step may be from what was expected."""
SLOWER_RATE, FASTER_RATE = 0.5, 0.15
"""How much of a surprise is believed: chunks shrink at once and grow again slowly."""

HEADROOM = 0.9
"""Of the budget, what a step is expected to take: its time varies, and the budget is meant for nearly all."""

ATTENTION_COST = 1.5
"""What an operation of attention takes, in operations of a linear layer: its tiles are smaller."""


def tokens_per_pair(config: DecoderConfig) -> float:
    """How many tokens' time in linear layers one token takes to attend to one position.

    A prompt's last tokens attend to all before them, which times measured by batch tokens do not hold.
    """
    width = config.num_heads * config.head_dim
    linear = config.hidden_size * (
        2 * width + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size
    )
    return ATTENTION_COST * 2 * width / linear


def chunk_pairs(start: int, count: int) -> float:
    """(token, position) pairs of a chunk of a prompt from position `start` on."""
    return count * (start + (count + 1) / 2)


class PrefillPacer:
    """Sizes prompt chunks by expected step times, which the steps it paced correct."""

    def __init__(
        self,
        max_step_seconds: float,
        step_time: StepTimeModel | None = None,
        *,
        tokens_per_pair: float = 0.0,
    ) -> None:
        """`step_time`: measured; None: learned from paced steps, beginning with small chunks."""
        self._budget = HEADROOM * max_step_seconds
        self._tokens_per_pair = tokens_per_pair
        self._model = step_time
        self._slower = 1.0
        self._grown = MIN_CHUNK_TOKENS

    def allowance(
        self, requests: int, decode_tokens: int, context_tokens: int, most: int, *, start: int = 0
    ) -> int:
        """Prompt tokens for a step that also decodes `decode_tokens` of `requests` >= 1; at most `most`.

        `start`: the first of them in its prompt.
        """
        if most < 1 or self._model is None:
            return min(most, MIN_CHUNK_TOKENS)
        # Index n is a step with n prompt tokens; its first is the step without any.
        prompt = np.arange(most + 1)
        pairs = prompt * (start + (prompt + 1) / 2)
        tokens = decode_tokens + prompt + np.rint(self._tokens_per_pair * pairs).astype(np.int64)
        seconds = self._slower * self._model.table(requests, tokens, context_tokens)
        budget = max(self._budget, MAX_SLOWDOWN * seconds[0])
        fits = int(np.searchsorted(seconds, budget, side="right")) - 1
        if self._model.learned:  # it knows little beyond what it has seen
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
        """How long a step with prompt tokens took; `pairs` as in `chunk_pairs`, of all chunks."""
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
