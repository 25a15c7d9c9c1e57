"""Accepted length and acceptance per draft position, from recorded rounds."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.evaluation.round_table import RoundTable


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionAcceptance:
    """Draft position k; rates are None where no round provides data."""

    position: int
    tried: int
    """Rounds that verified this position and accepted all positions before it."""
    accept_rate: float | None
    """Accepted share of `tried`: the paper's accept_rate@k."""
    verified: int
    """Rounds that verified this position, whether or not they accepted those before it."""
    survival: float | None
    """Share of `verified` that accepted this position and all before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    rounds: int
    undrafted_rounds: int
    """Rounds without a draft; they commit one token each and are included in all means."""
    drafted_tokens: int
    verified_tokens: int
    accepted_tokens: int
    committed_tokens: int
    accepted_length: float | None
    """Committed tokens per round, the bonus token included."""
    verify_length: float | None
    """Verified draft tokens per round."""
    verify_rate: float | None
    """Verified share of the drafted tokens."""
    acceptance_rate: float | None
    """Accepted share of the verified tokens."""
    positions: tuple[PositionAcceptance, ...]


def measure_acceptance(table: RoundTable) -> Acceptance:
    drafted, verified = int(table.drafted.sum()), int(table.verified.sum())
    accepted, committed = int(table.accepted.sum()), int(table.committed.sum())
    return Acceptance(
        rounds=table.rounds,
        undrafted_rounds=int((table.drafted == 0).sum()),
        drafted_tokens=drafted,
        verified_tokens=verified,
        accepted_tokens=accepted,
        committed_tokens=committed,
        accepted_length=ratio(committed, table.rounds),
        verify_length=ratio(verified, table.rounds),
        verify_rate=ratio(verified, drafted),
        acceptance_rate=ratio(accepted, verified),
        positions=tuple(_position(table, k) for k in range(1, table.positions + 1)),
    )


def ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _position(table: RoundTable, position: int) -> PositionAcceptance:
    known = table.known(position)
    tried = known & table.survived(position - 1)
    stood = int((known & table.survived(position)).sum())
    return PositionAcceptance(
        position=position,
        tried=int(tried.sum()),
        accept_rate=ratio(stood, int(tried.sum())),
        verified=int(known.sum()),
        survival=ratio(stood, int(known.sum())),
    )
