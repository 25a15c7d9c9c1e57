"""Frontiers and verify lengths of simulated planners. Loads matplotlib only when asked to draw."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from dspark_core.errors import ConfigError
from dspark_core.simulation.running import FrontierPoint

FRONTIER_FILE = "frontier.png"
VERIFY_FILE = "verify_length.png"


def require_matplotlib() -> None:
    """Raises ConfigError, so that a long run does not end in one."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'dspark[simulate]'")


def draw_frontier(
    frontiers: Mapping[str, Sequence[FrontierPoint]], directory: Path, title: str
) -> list[Path]:
    """Writes PNGs -> their paths."""
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
    axes.set_xscale("log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(written[0], dpi=120)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for planner, points in frontiers.items():
        users = [point.users_per_verifier for point in points]
        axes.plot(users, [point.summary.verify_length for point in points], label=planner, marker="o")
    axes.set(xlabel="users per verifier", ylabel="draft tokens verified per request and round", title=title)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(written[1], dpi=120)
    return written
