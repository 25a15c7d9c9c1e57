"""Draws the paper's figures 7 and 8 from measured points."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.frontier_parts.claims import FrontierPoint
from dspark_core.simulation.plots import scale_by_ratios

FRONTIER_FILE = "frontier.png"
VERIFY_FILE = "verify_length.png"


def draw(
    points: Sequence[FrontierPoint], scheduled: Sequence[str], directory: Path, title: str
) -> list[Path]:
    """Write both figures -> their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / FRONTIER_FILE, directory / VERIFY_FILE]
    _frontier(points, scheduled, title).savefig(written[0], dpi=120)
    _verify_length(points, scheduled, title).savefig(written[1], dpi=120)
    return written


def _frontier(points: Sequence[FrontierPoint], scheduled: Sequence[str], title: str) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, members in _by_method(points).items():
        axes.plot(
            [p.tokens_per_second_per_user for p in members],
            [p.tokens_per_second for p in members],
            label=method,
            **_style(method, scheduled),
        )
    for point in (p for p in points if p.method in scheduled):
        axes.annotate(
            str(point.concurrency),
            (point.tokens_per_second_per_user, point.tokens_per_second),
            textcoords="offset points",
            xytext=(4, 5),
            fontsize="small",
        )
    axes.set(xlabel="tokens/s per user", ylabel="tokens/s, all users", title=title)
    scale_by_ratios(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize="small")
    return figure


def _verify_length(points: Sequence[FrontierPoint], scheduled: Sequence[str], title: str) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    verified, accepted = figure.subplots(1, 2, sharex=True)
    for method, members in _by_method(points).items():
        users = [p.concurrency for p in members]
        style = _style(method, scheduled)
        verified.plot(users, [p.verify_length for p in members], label=method, **style)
        accepted.plot(users, [p.accepted_length for p in members], label=method, **style)
    verified.set(ylabel="draft tokens verified per request and round", title=title)
    accepted.set(ylabel="accepted length (bonus token included)")
    for axes in (verified, accepted):
        scale_by_ratios(axes, base=2)
        axes.set_xlabel("users at a time")
        axes.grid(alpha=0.3)
    accepted.legend(fontsize="small")
    return figure


def _by_method(points: Sequence[FrontierPoint]) -> dict[str, list[FrontierPoint]]:
    found: dict[str, list[FrontierPoint]] = {}
    for point in sorted(points, key=lambda p: p.concurrency):
        found.setdefault(point.method, []).append(point)
    return found


def _style(method: str, scheduled: Sequence[str]) -> dict[str, Any]:
    if method in scheduled:
        color = ("black", "dimgray")[scheduled.index(method)]
        return {"color": color, "linewidth": 2.5, "marker": "o"}
    return {"linewidth": 1.2, "marker": "."}
