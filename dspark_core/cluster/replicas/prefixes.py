"""Remembers by hash which verifiers were sent which prompt prefixes; bounded, evicts the least recent."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from dspark_core.algorithms.prefix_hashes import BLOCK_TOKENS

MAX_PREFIXES = 65_536
REPLICAS_PER_PREFIX = 4


class PrefixTable:
    def __init__(self, max_prefixes: int = MAX_PREFIXES) -> None:
        self._max_prefixes = max_prefixes
        self._replicas: OrderedDict[int, tuple[str, ...]] = OrderedDict()  # latest first

    def __len__(self) -> int:
        return len(self._replicas)

    def record(self, hashes: Sequence[int], replica_id: str) -> None:
        """Notes that a request with these prefixes was sent to the replica."""
        for key in hashes:
            others = (known for known in self._replicas.get(key, ()) if known != replica_id)
            self._replicas[key] = (replica_id, *others)[:REPLICAS_PER_PREFIX]
            self._replicas.move_to_end(key)
        while len(self._replicas) > self._max_prefixes:
            self._replicas.popitem(last=False)

    def forget(self, replica_id: str) -> None:
        """Drops what the replica was sent: its cache is gone."""
        for key in [key for key, known in self._replicas.items() if replica_id in known]:
            others = tuple(known for known in self._replicas[key] if known != replica_id)
            if others:
                self._replicas[key] = others
            else:
                del self._replicas[key]

    def matched_tokens(self, hashes: Sequence[int]) -> dict[str, int]:
        """Leading prompt tokens that each verifier has seen before, as far as remembered."""
        matched: dict[str, int] = {}
        for blocks, key in enumerate(hashes, start=1):
            known = self._replicas.get(key, ())
            if not known:
                break
            for replica_id in known:
                matched[replica_id] = blocks * BLOCK_TOKENS
        return matched
