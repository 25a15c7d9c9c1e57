"""Plots reliability diagrams: predicted against observed survival, by draft position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dspark_core.algorithms.calibration_error import reliability_bins
from dspark_core.evaluation.calibrating import CalibrationStudy
from dspark_core.evaluation.plots import require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RELIABILITY_FILE = "reliability.png"
_COLUMNS = 4


def draw_reliability(study: CalibrationStudy, directory: Path) -> Path:
    """Write one PNG file for the held-out rounds -> its path. Raises ConfigError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure  # draws to files only: no display, no global state

    scaling = study.calibration.scaling
    count = len(scaling.temperatures)
    rows = math.ceil(count / _COLUMNS)
    figure = Figure(figsize=(3.2 * _COLUMNS, 3.4 * rows), layout="constrained")
    for position, panel in enumerate(_panels(figure, count, rows)):
        panel.plot([0, 1], [0, 1], color="gray", linestyle=":")
        for label, used in (("before", None), ("after", scaling)):
            predicted, observed = study.held_out_rounds.survival(used)[position]
            bins = reliability_bins(predicted, observed)
            panel.plot(
                [one.mean_predicted for one in bins],
                [one.mean_observed for one in bins],
                marker="o",
                label=label,
            )
        title = (
            f"{position + 1}: T = {scaling.temperatures[position]:.2f}, b = {scaling.biases[position]:+.2f}"
        )
        panel.set(title=title, xlim=(0, 1), ylim=(0, 1))
        panel.grid(alpha=0.3)
        if position == 0:
            panel.set(xlabel="predicted survival", ylabel="share that survived")
            panel.legend(fontsize="small")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / RELIABILITY_FILE
    figure.savefig(path, dpi=120)
    return path


def _panels(figure: Figure, count: int, rows: int) -> Sequence[Axes]:
    grid = [panel for row in figure.subplots(rows, _COLUMNS, squeeze=False) for panel in row]
    for unused in grid[count:]:
        unused.set_axis_off()
    return grid[:count]
