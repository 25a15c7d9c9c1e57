"""Tells operators of a model whose verifiers serve different weights: a rollout in progress, or a mistake.

Both kinds are sent new requests. A running stream continues on its own weights only; routing sees to that.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping

from dspark_core.records import Replica, Role

_log = logging.getLogger(__name__)

_NAMED = 3
"""Verifiers named per weights in a message."""


class WeightsWatch:
    def __init__(self) -> None:
        self._different: dict[str, frozenset[str]] = {}
        """Weights by model, where there are several."""
        self._problem: str | None = None

    @property
    def problem(self) -> str | None:
        """Which models are served with different weights, and by whom; None: no model is."""
        return self._problem

    def look(self, replicas: Iterable[Replica]) -> dict[str, int]:
        """Takes in the replicas that are registered now; logs changes only. Returns by model how many
        different weights are served."""
        served = _by_weights(replicas)
        different = {model: frozenset(found) for model, found in served.items() if len(found) > 1}
        messages = {model: _message(model, served[model]) for model in different}
        for model, found in different.items():
            if found != self._different.get(model):
                _log.warning("%s; a stream continues on its own weights only", messages[model])
        for model in self._different.keys() - different.keys():
            _log.info("verifiers of model %s no longer serve different weights", model)
        self._different = different
        self._problem = "; ".join(messages.values()) or None
        return {model: len(found) for model, found in served.items()}


def _by_weights(replicas: Iterable[Replica]) -> dict[str, dict[str, list[str]]]:
    """Model -> weights -> ids of the verifiers. Those whose weights are unknown are left out."""
    served: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for replica in replicas:
        if replica.role is Role.VERIFIER and replica.weights:
            served[replica.model][replica.weights].append(replica.replica_id)
    return served


def _message(model: str, served: Mapping[str, list[str]]) -> str:
    each = [f"{weights} ({_names(served[weights])})" for weights in sorted(served)]
    return f"verifiers of model {model} serve different weights: {', '.join(each)}"


def _names(ids: list[str]) -> str:
    more = len(ids) - _NAMED
    return ", ".join(ids[:_NAMED]) + (f" and {more} more" if more > 0 else "")
