"""Plots acceptance by position and the threshold sweep. Loads matplotlib only when asked to draw."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_core.errors import ConfigError
from dspark_core.evaluation.report import EvalReport
from dspark_core.evaluation.threshold_sweep import SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIONS_FILE = "acceptance_by_position.png"
SWEEP_FILE = "threshold_sweep.png"
MACRO_LABEL = "macro mean"

Style = dict[str, Any]  # keyword arguments of `Axes.plot`
_MACRO: Style = {"color": "black", "linewidth": 2.5, "marker": "o"}
_SET: Style = {"linewidth": 1.0, "marker": ".", "alpha": 0.8}


def require_matplotlib() -> None:
    """Raises ConfigError if it is missing; call it before a long run rather than after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: pip install 'dspark[eval]'")


def draw_plots(report: EvalReport, directory: Path) -> list[Path]:
    """Write PNG files -> their paths; drafters without a confidence head get no sweep plot."""
    require_matplotlib()
    from matplotlib.figure import Figure  # draws to files only: no display, no global state

    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / POSITIONS_FILE]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    _draw_positions(figure, report)
    figure.savefig(written[0], dpi=120)
    if report.macro.sweep:
        written.append(directory / SWEEP_FILE)
        figure = Figure(figsize=(13, 4.2), layout="constrained")
        _draw_sweep(figure, report)
        figure.savefig(written[1], dpi=120)
    return written


def _draw_positions(figure: Figure, report: EvalReport) -> None:
    conditional, survival = figure.subplots(1, 2, sharey=True)
    for one in report.sets:
        positions = one.acceptance.positions
        _by_position(conditional, [p.accept_rate for p in positions], one.name, _SET)
        _by_position(survival, [p.survival for p in positions], one.name, _SET)
    _by_position(conditional, report.macro.accept_rate, MACRO_LABEL, _MACRO)
    _by_position(survival, report.macro.survival, MACRO_LABEL, _MACRO)
    conditional.set(title="accepted, when all before it were", ylabel="share", ylim=(0, 1.02))
    survival.set(title="survival: accepted with all before it")
    for axes in (conditional, survival):
        axes.set_xlabel("draft position")
        axes.set_xticks(range(1, len(report.macro.accept_rate) + 1))
        axes.grid(alpha=0.3)
    _legend(figure, conditional)


def _by_position(axes: Axes, values: Sequence[float | None], label: str, style: Style) -> None:
    _line(axes, list(enumerate(values, start=1)), label, style)


def _draw_sweep(figure: Figure, report: EvalReport) -> None:
    panels = figure.subplots(1, 3)
    for one in report.sets:
        _sweep_lines(panels, one.sweep, one.name, _SET)
    _sweep_lines(panels, report.macro.sweep, MACRO_LABEL, _MACRO)
    titles = ("acceptance rate of verified tokens", "verified draft tokens per round", "accepted length")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="survival threshold")
        axes.grid(alpha=0.3)
    panels[0].set_ylim(0, 1.02)
    _legend(figure, panels[0])


def _legend(figure: Figure, axes: Axes) -> None:
    """Placed beside the panels, because the names of nine sets would cover half of one."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")


def _sweep_lines(panels: Sequence[Axes], sweep: Sequence[SweepPoint], label: str, style: Style) -> None:
    rate, verified, accepted = panels
    _line(rate, [(point.threshold, point.acceptance_rate) for point in sweep], label, style)
    _line(verified, [(point.threshold, point.verify_length) for point in sweep], label, style)
    _line(accepted, [(point.threshold, point.accepted_length) for point in sweep], label, style)


def _line(axes: Axes, points: Sequence[tuple[float, float | None]], label: str, style: Style) -> None:
    """Skips points without a value."""
    known = [(x, y) for x, y in points if y is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], label=label, **style)
