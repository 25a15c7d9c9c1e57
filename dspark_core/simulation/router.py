"""Sends each simulated request to a verifier by the scheduler's rule.

Times are those of `routing`, for requests of average context, in a table: `routing.choose` compares
candidates one by one, which for a thousand verifiers takes longer than simulating them. Step times are known
rather than learned from reports. Prefixes, free KV cache and speed floors play no part: a simulated cluster
has no prefix caches, and takes in requests whatever floors they break, so that broken ones can be counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.cluster.planning.pace import VerifierPace
from dspark_core.cluster.replicas.routing import ALIKE, expected_rounds


class Router:
    def __init__(
        self,
        round_time: RoundTimeModel,
        slowdowns: Sequence[float],
        max_running: int,
        context_per_request: float = 0.0,
    ) -> None:
        """`slowdowns`: factor of each verifier's step times."""
        self._round_time = round_time
        self._pace = VerifierPace()
        self._pace.start_from(round_time.verify)
        self._slowdowns = np.array(slowdowns)
        self._max_running = max_running
        self._context_per_request = context_per_request
        self._requests = np.zeros(len(slowdowns), dtype=np.int64)
        self._known: dict[tuple[float, int], float] = {}
        self._seconds = np.array([self._estimate(slowdown, 1) for slowdown in slowdowns])

    def choose(self, prompt_tokens: int) -> int:
        """The verifier for a new request, which counts as that verifier's until `ended`."""
        seconds = self._seconds + self._slowdowns * self._pace.prefill_seconds(prompt_tokens)
        alike = np.flatnonzero(seconds <= (1.0 + ALIKE) * seconds.min())
        verifier = int(alike[np.lexsort((seconds[alike], self._requests[alike]))[0]])
        self._counts(verifier, 1)
        return verifier

    def ended(self, verifier: int) -> None:
        self._counts(verifier, -1)

    def _counts(self, verifier: int, more: int) -> None:
        self._requests[verifier] += more
        requests = int(self._requests[verifier])
        self._seconds[verifier] = self._estimate(float(self._slowdowns[verifier]), requests + 1)

    def _estimate(self, slowdown: float, requests: int) -> float:
        """Time to serve the last of `requests` requests, its prompt left out."""
        known = self._known.get((slowdown, requests))
        if known is None:
            model = self._round_time
            verify = replace(model.verify, scale=slowdown * model.verify.scale)
            context = round(requests * self._context_per_request)
            seconds = replace(model, verify=verify).seconds(requests, requests, context)
            known = self._known[slowdown, requests] = expected_rounds(requests, self._max_running) * seconds
        return known
