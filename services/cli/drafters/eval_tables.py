"""Terminal tables for the results of an evaluation."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from dspark_core.evaluation.comparison import ComparedSet, Comparison
from dspark_core.evaluation.report import EvalReport

MISSING = "-"
MACRO = "macro mean"
MAX_POSITIONS = 8


def result_table(report: EvalReport) -> Table:
    table = _table("accepted length", "prompts", "rounds", "accepted length", "verify length", "accepted")
    for one in report.sets:
        acceptance = one.acceptance
        table.add_row(
            escape(one.name),
            str(one.prompts),
            str(acceptance.rounds),
            _number(acceptance.accepted_length),
            _number(acceptance.verify_length),
            _percent(acceptance.acceptance_rate),
        )
    macro = report.macro
    table.add_section()
    table.add_row(
        MACRO,
        str(sum(one.prompts for one in report.sets)),
        str(sum(one.acceptance.rounds for one in report.sets)),
        _number(macro.accepted_length),
        _number(macro.verify_length),
        _percent(macro.acceptance_rate),
    )
    return table


def position_table(report: EvalReport) -> Table:
    """Only the first positions: looked-up drafts have more of them than fit into a terminal."""
    heads = _position_heads(report)[:MAX_POSITIONS]
    table = _table("accepted, given that all earlier positions were, by draft position, %", *heads)
    for one in report.sets:
        rates = [position.accept_rate for position in one.acceptance.positions][: len(heads)]
        table.add_row(escape(one.name), *map(_bare_percent, rates))
    table.add_section()
    table.add_row(MACRO, *map(_bare_percent, report.macro.accept_rate[: len(heads)]))
    return table


def confidence_table(report: EvalReport) -> Table:
    heads = _position_heads(report)
    table = _table("calibration error (ECE) of predicted survival, %", "mean", *heads)
    for one in report.sets:
        errors = {measured.position: measured.ece for measured in one.confidence}
        cells = (errors.get(position) for position in range(1, len(heads) + 1))
        table.add_row(escape(one.name), _bare_percent(one.mean_ece), *map(_bare_percent, cells))
    table.add_section()
    table.add_row(
        MACRO, _bare_percent(report.macro.mean_ece), *(_bare_percent(one) for one in report.macro.ece)
    )
    return table


def sweep_table(report: EvalReport) -> Table:
    """Macro means for every second threshold."""
    title = "verifying only while survival >= threshold, macro mean"
    table = _table(title, "verify length", "accepted", "accepted length", first="threshold")
    for point in report.macro.sweep[::2]:
        table.add_row(
            f"{point.threshold:.2f}",
            _number(point.verify_length),
            _percent(point.acceptance_rate),
            _number(point.accepted_length),
        )
    return table


def comparison_table(comparison: Comparison) -> Table:
    base = comparison.labels[0]
    table = _table(f"accepted length and gain over {base}", *comparison.labels)
    for one in comparison.sets:
        table.add_row(escape(one.name), *_comparison_cells(one))
    if comparison.macro is not None:
        table.add_section()
        table.add_row(f"macro mean of {comparison.macro_sets}", *_comparison_cells(comparison.macro))
    return table


def _comparison_cells(one: ComparedSet) -> list[str]:
    cells = [_number(one.accepted_lengths[0])]
    for length, gain in zip(one.accepted_lengths[1:], one.gains[1:], strict=True):
        cells.append(_number(length) if gain is None else f"{_number(length)} ({100 * gain:+.1f} %)")
    return cells


def _table(title: str, *heads: str, first: str = "set") -> Table:
    # Names come from the user's files: brackets in them are not markup.
    table = Table(title=escape(title))
    table.add_column(first, no_wrap=True)
    for head in heads:
        table.add_column(escape(head), justify="right")
    return table


def _position_heads(report: EvalReport) -> tuple[str, ...]:
    return tuple(f"@{position}" for position in range(1, len(report.macro.accept_rate) + 1))


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f} %"


def _bare_percent(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.1f}"
