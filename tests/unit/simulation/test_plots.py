"""Axes of speeds and loads tell them as people do."""

import pytest
from matplotlib.figure import Figure

from dspark_core.simulation.plots import scale_by_ratios


@pytest.mark.parametrize(
    ("base", "values", "labels"),
    [(2, (1, 64), {"1", "2", "16", "64"}), (10, (5, 400), {"10", "20", "100", "200", "300"})],
)
def test_ticks_are_figures_not_powers(base: int, values: tuple[int, int], labels: set[str]) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot(values, values)
    scale_by_ratios(axes, base)
    figure.draw_without_rendering()
    shown = {one.get_text() for minor in (False, True) for one in axes.get_xticklabels(minor=minor)}
    assert labels <= shown
    assert not any("^" in one for one in shown)
