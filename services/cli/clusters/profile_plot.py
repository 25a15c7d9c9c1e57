"""Plots a profile: step time over batch tokens, one line per request count, and draft time."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.errors import ConfigError
from dspark_core.simulation.plots import scale_by_ratios


def draw_profile(model: RoundTimeModel, path: Path) -> None:
    """Raises ConfigError if the file cannot be written."""
    from matplotlib.figure import Figure  # draws to files only: no display, no global state

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    steps, drafts = figure.subplots(1, 2, width_ratios=(2, 1))
    usual = model.verify.surface.context_per_request
    rows = sorted({p.requests for p in model.verify.points})
    for requests in rows:
        points = [
            p
            for p in model.verify.points
            if p.requests == requests and (usual is None or p.context_tokens == usual * requests)
        ]
        tokens = [p.batch_tokens for p in points]
        if not tokens:
            continue
        context = points[0].context_tokens
        dense = np.arange(min(tokens), max(tokens) + 1)
        (line,) = steps.plot(dense, 1000 * model.verify.table(requests, dense, context), linewidth=1.2)
        steps.plot(
            tokens,
            [1000 * p.seconds for p in points],
            marker="o",
            linestyle="",
            color=line.get_color(),
            label=f"{requests} request{'s' if requests > 1 else ''}",
        )
    steps.set(title=f"target step, {model.verify.key}", xlabel="batch tokens", ylabel="ms")
    scale_by_ratios(steps, base=2)
    steps.legend(fontsize="small")
    if model.draft.requests:
        drafts.plot(model.draft.requests, [1000 * s for s in model.draft.draft_seconds], marker="o")
    drafts.set(title="draft block", xlabel="requests", ylabel="ms", ylim=(0, None))
    for axes in (steps, drafts):
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
    steps.title.set_fontsize("small")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ConfigError(f"cannot write the plot {path}: {error}") from error
