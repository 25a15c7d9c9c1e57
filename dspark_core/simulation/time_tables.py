"""Tabulated round times: a simulation of millions of rounds cannot afford to interpolate each."""

from __future__ import annotations

import numpy as np

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_surface import Floats

CONTEXT_STEP = 64
"""Context per request is rounded to a multiple of this many tokens."""


class TimeTables:
    """`RoundTimeModel` tabulated by (requests, context); each table is computed once."""

    def __init__(
        self, model: RoundTimeModel, max_draft_tokens_per_request: int, prefill_tokens: int = 0
    ) -> None:
        self.model = model
        self._block = max_draft_tokens_per_request
        self._prefill = prefill_tokens
        self._steps: dict[tuple[int, int], Floats] = {}
        self._drafts: dict[int, float] = {}

    def step(self, requests: int, context_tokens: int) -> Floats:
        """Seconds of a target pass by number of tokens beyond one per request:
        [requests * block + prefill + 1]."""
        mean = context_tokens // max(requests, 1)
        bucket = (mean + CONTEXT_STEP // 2) // CONTEXT_STEP
        key = (requests, bucket)
        table = self._steps.get(key)
        if table is None:
            longest = requests * self._block + self._prefill
            tokens = np.arange(requests, requests + longest + 1, dtype=np.int64)
            table = self.model.verify.table(requests, tokens, bucket * CONTEXT_STEP * requests)
            self._steps[key] = table
        return table

    def draft(self, requests: int) -> float:
        """Seconds of drafting, without the network."""
        seconds = self._drafts.get(requests)
        if seconds is None:
            seconds = self._drafts[requests] = self.model.draft.seconds(requests)
        return seconds
