"""Terminal tables for simulated clusters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from dspark_core.simulation.records import Summary
from dspark_core.simulation.running import FrontierPoint
from dspark_core.simulation.scenario import Scenario
from services.cli.clusters.tables import open_table

HEADS = ("tokens/s", "5 %", "50 %", "95 %", "first", "tau", "length", "broken", "verif.", "draft.")
LEGEND = (
    "tokens/s in total; percentiles of a user's tokens/s after the first token; first: 95th percentile of "
    "the time to the first token; tau: accepted length; length: draft tokens verified per request and round; "
    "broken: speed floors missed; verif., draft.: how busy verifiers and drafters are"
)


def summary_table(summaries: Sequence[Summary], scenario: Scenario) -> Table:
    load = f"{scenario.users} users" if scenario.users else f"{scenario.arrivals_per_second:g} requests/s"
    drafters = scenario.drafters or "as many"
    table = open_table(f"{scenario.verifiers} verifiers, {drafters} drafters, {load}")
    table.caption = LEGEND
    table.add_column("planner", no_wrap=True)
    for head in HEADS:
        table.add_column(head, justify="right", no_wrap=True)
    for one in summaries:
        table.add_row(
            one.planner,
            f"{one.steady_tokens_per_second:.0f}",
            *(f"{speed:.1f}" for speed in one.user_speed),
            f"{one.time_to_first_token[2]:.2f}s",
            f"{one.accepted_length:.2f}",
            f"{one.verify_length:.2f}",
            f"{100 * one.floors_broken / one.promised:.0f} %" if one.promised else "-",
            f"{100 * one.verifier_utilisation:.0f} %",
            f"{100 * one.drafter_utilisation:.0f} %",
        )
    return table


def frontier_table(frontiers: Mapping[str, Sequence[FrontierPoint]]) -> Table:
    table = Table("users per verifier", *frontiers, title="tokens/s in total at tokens/s per user (median)")
    loads = [point.users_per_verifier for point in next(iter(frontiers.values()))]
    for index, users in enumerate(loads):
        points = [members[index] for members in frontiers.values()]
        cells = (f"{p.summary.steady_tokens_per_second:.0f} at {p.user_speed:.1f}" for p in points)
        table.add_row(str(users), *cells)
    return table


def pool_lines(summary: Summary, scenario: Scenario) -> list[str]:
    """What a planner's figures say about the sizes of the pools."""
    lines = []
    if summary.verifier_utilisation > 0.9 and scenario.arrivals_per_second:
        lines.append("verifiers are saturated: add some, or the queue grows")
    elif summary.verifier_utilisation < 0.4 and scenario.arrivals_per_second:
        spare = 1.0 - summary.verifier_utilisation / 0.7
        lines.append(
            f"verifiers are underused: without about {100 * spare:.0f} % of them, the rest would be 70 % busy"
        )
    pool = scenario.drafters or scenario.verifiers
    needed = max(1, round(pool * summary.drafter_utilisation / 0.5 + 0.499))
    if summary.drafter_utilisation > 0:
        lines.append(
            f"{summary.planner}: drafters are {100 * summary.drafter_utilisation:.0f} % busy, drafts spend "
            f"{100 * max(summary.draft_queue_share, 0.0):.0f} % of their latency queued behind others; "
            f"at 50 % busy, {min(needed, scenario.verifiers)} would be enough"
        )
    if summary.promised:
        broken = 100 * summary.floors_broken / summary.promised
        lines.append(f"{summary.planner}: {broken:.1f} % of the speed floors are missed")
    return lines
