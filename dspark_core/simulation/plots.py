"""Plots frontiers and verify lengths of simulated planners. Loads matplotlib only when asked to draw."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_core.errors import ConfigError
from dspark_core.simulation.running import FrontierPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FRONTIER_FILE = "frontier.png"
VERIFY_FILE = "verify_length.png"
MAX_DECADES = 3
"""Wider axes have no room for labels between powers of ten."""


def require_matplotlib() -> None:
    """Raises ConfigError if it is missing; call it before a long run rather than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'dspark[simulate]'")


def scale_by_ratios(axes: Axes, base: int = 10) -> None:
    """Logarithmic x axis with plain tick labels such as 20, 30 and 64 instead of matplotlib's powers."""
    from matplotlib.ticker import LogFormatter

    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_formatter(LogFormatter(base))
    if base == 10:
        axes.xaxis.set_minor_formatter(LogFormatter(base, minor_thresholds=(MAX_DECADES, 0.4)))


def draw_frontier(
    frontiers: Mapping[str, Sequence[FrontierPoint]], directory: Path, title: str
) -> list[Path]:
    """Write PNG files -> their paths."""
    require_matplotlib()
    from matplotlib.figure import Figure  # draws to files only: no display, no global state

    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / FRONTIER_FILE, directory / VERIFY_FILE]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for planner, points in frontiers.items():
        speeds = [point.user_speed for point in points]
        axes.plot(speeds, [p.summary.steady_tokens_per_second for p in points], label=planner, marker="o")
    axes.set(xlabel="tokens/s per user (median)", ylabel="tokens/s, all users", title=title)
    scale_by_ratios(axes)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(written[0], dpi=120)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for planner, points in frontiers.items():
        users = [point.users_per_verifier for point in points]
        axes.plot(users, [point.summary.verify_length for point in points], label=planner, marker="o")
    axes.set(xlabel="users per verifier", ylabel="draft tokens verified per request and round", title=title)
    scale_by_ratios(axes, base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(written[1], dpi=120)
    return written
