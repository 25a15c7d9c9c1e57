"""Results of the failover benchmark and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from benchmarks.failover_parts.clients import Load
from benchmarks.failover_parts.windows import Window


@dataclass(frozen=True, slots=True, kw_only=True)
class KillResult:
    present: tuple[Window, ...]
    """Windows with a scheduler: before, between and after those without."""
    absent: tuple[Window, ...]
    """Windows without a scheduler, each starting at the kill."""

    @property
    def loss(self) -> float:
        """Share of throughput lost without a scheduler, from means over all windows."""
        return 1.0 - _rate(self.absent) / _rate(self.present)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleResult:
    verifier: int
    """The verifier slowed down, which was the busier one before."""
    before: Window
    after: Window

    def summary(self) -> dict[str, float]:
        return {
            "share_before": self.before.request_share(self.verifier),
            "share_after": self.after.request_share(self.verifier),
            "verify_length_before": self.before.verify_lengths[self.verifier],
            "verify_length_after": self.after.verify_lengths[self.verifier],
        }


def tables(kill: KillResult | None, throttle: ThrottleResult | None, load: Load) -> list[Table]:
    found = []
    if kill is not None:
        found.append(_kill_table(kill, load))
    if throttle is not None:
        found.append(_throttle_table(throttle))
    return found


def _kill_table(kill: KillResult, load: Load) -> Table:
    table = Table(title="killing the scheduler (two verifiers, one drafter)")
    for head in ("", "tok/s", "each", "requests", "verify length", "planned by it", "cores"):
        table.add_column(head, justify="right")
    for name, windows in (("with", kill.present), ("without", kill.absent)):
        each = " ".join(f"{window.tokens_per_second:.0f}" for window in windows)
        sent = [sum(counts) for counts in zip(*(window.requests for window in windows), strict=True)]
        table.add_row(
            name,
            f"{_rate(windows):.1f}",
            each,
            " / ".join(f"{count:.0f}" for count in sent),
            " / ".join(f"{length:.2f}" for length in windows[0].verify_lengths),
            f"{100 * fmean(window.scheduler_plans for window in windows):.0f} %",
            " ".join(f"{role} {share:.2f}" for role, share in windows[0].processor_share.items()),
        )
    table.caption = f"loss {100 * kill.loss:.1f} %; {sum(map(len, load.answers.values()))} answers"
    if load.comparable:
        table.caption += f", {len(load.differing)} prompts answered differently"
    return table


def _throttle_table(throttle: ThrottleResult) -> Table:
    table = Table(title=f"slowing verifier {throttle.verifier} down, from 2 s after")
    for head in ("", "before", "after"):
        table.add_column(head, justify="right")
    known = throttle.summary()
    table.add_row("share of requests", *(f"{100 * known[f'share_{when}']:.0f} %" for when in _WHEN))
    table.add_row("verify length", *(f"{known[f'verify_length_{when}']:.2f}" for when in _WHEN))
    table.add_row("requests", str(throttle.before.requests), str(throttle.after.requests))
    table.add_row(
        "tok/s", f"{throttle.before.tokens_per_second:.1f}", f"{throttle.after.tokens_per_second:.1f}"
    )
    return table


_WHEN = ("before", "after")


def _rate(windows: Sequence[Window]) -> float:
    return fmean(window.tokens_per_second for window in windows)
