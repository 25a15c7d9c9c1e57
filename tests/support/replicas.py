"""Replicas, as services register them."""

from __future__ import annotations

from dspark_core.records import Replica, Role


def new_replica(replica_id: str, **fields) -> Replica:
    """A verifier of model `m` at its own address, unless `fields` say otherwise."""
    defaults = {"role": Role.VERIFIER, "address": f"{replica_id}:1", "model": "m"}
    return Replica(replica_id=replica_id, **{**defaults, **fields})
