"""Reports over several sets, their comparison, and the plots drawn from them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from dspark_core.errors import ConfigError
from dspark_core.evaluation.comparison import EvalResult, compare, read_results
from dspark_core.evaluation.plots import POSITIONS_FILE, SWEEP_FILE, draw_plots, require_matplotlib
from dspark_core.evaluation.report import EvalReport, macro_mean, report_sets
from dspark_core.evaluation.round_table import DraftRound
from dspark_core.evaluation.runner import AnsweredPrompt, EvalPrompt, EvalRun

PNG = b"\x89PNG\r\n\x1a\n"


def answered(name: str, *rounds: DraftRound) -> AnsweredPrompt:
    prompt = EvalPrompt(set_name=name, row=0, token_ids=(1,))
    return AnsweredPrompt(prompt=prompt, rounds=rounds, token_ids=(7,))


def two_drafts(accepted: int, *survival: float) -> DraftRound:
    return DraftRound(
        drafted=2, verified=2, accepted=accepted, committed=accepted + 1, survival=tuple(survival)
    )


def report(*, confident: bool = True, **arguments: object) -> EvalReport:
    easy = (0.9, 0.8) if confident else ()
    hard = (0.5, 0.1) if confident else ()
    run = EvalRun(
        answered=(
            answered("easy", two_drafts(2, *easy), two_drafts(2, *easy), two_drafts(0, *hard)),
            answered("hard", two_drafts(0, *hard)),
        ),
        too_long=(),
    )
    sets = report_sets(run, ["easy", "hard", "silent"])
    return EvalReport(arguments=arguments, environment={}, seconds=1.0, sets=sets, macro=macro_mean(sets))


def test_every_set_counts_the_same_and_empty_ones_not_at_all() -> None:
    found = report()
    assert [one.acceptance.accepted_length for one in found.sets] == [pytest.approx(7 / 3), 1.0, None]
    assert found.macro.accepted_length == pytest.approx((7 / 3 + 1.0) / 2)
    assert found.macro.accept_rate == (pytest.approx((2 / 3 + 0.0) / 2), 1.0)
    assert found.macro.survival == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    # Position 1: easy predicts 0.9 twice and 0.5 once, of which the first two stand; hard predicts 0.5.
    assert found.macro.ece[0] == pytest.approx(((0.2 + 0.5) / 3 + 0.5) / 2)
    by_threshold = {point.threshold: point for point in found.macro.sweep}
    assert by_threshold[0.0].verify_length == 2.0
    assert by_threshold[0.85].verify_length == pytest.approx((2 / 3 + 0.0) / 2)
    assert by_threshold[0.85].acceptance_rate == 1.0  # of the set that verified anything


def test_documents_are_plain_json() -> None:
    document = json.loads(json.dumps(report(seed=1).document(), allow_nan=False))
    assert document["arguments"] == {"seed": 1}
    assert document["sets"][1]["confidence"][0]["auc"] is None
    assert document["sets"][0]["acceptance"]["positions"][1]["tried"] == 2


def result(label: str, lengths: dict[str, float | None], **arguments: object) -> EvalResult:
    return EvalResult(label=label, accepted_lengths=lengths, arguments=arguments)


def test_gains_are_relative_to_the_first_and_the_mean_is_over_shared_sets() -> None:
    found = compare(
        [
            result("a", {"x": 2.0, "y": 4.0, "only-a": 9.0}),
            result("b", {"y": 5.0, "x": 3.0, "only-b": 1.0}),
        ]
    )
    assert [one.name for one in found.sets] == ["x", "y", "only-a", "only-b"]
    assert [one.gains[1] for one in found.sets] == [pytest.approx(0.5), pytest.approx(0.25), None, None]
    assert found.sets[3].accepted_lengths == (None, 1.0)
    assert found.macro is not None
    assert found.macro.accepted_lengths == (3.0, 4.0)
    assert found.macro.gains == (0.0, pytest.approx(1 / 3))
    assert found.macro_sets == 2


def test_nothing_shared_means_no_mean() -> None:
    found = compare([result("a", {"x": 2.0}), result("b", {"x": None})])
    assert (found.macro, found.macro_sets) == (None, 0)


def test_different_protocols_are_pointed_out_and_different_drafters_are_not() -> None:
    protocol = {"temperature": 1.0, "max_tokens": 64}
    found = compare(
        [
            result("a", {}, **protocol, drafter="a"),
            result("b", {}, **protocol, drafter="b"),
            result("c", {}, **{**protocol, "max_tokens": 32}, drafter="c"),
        ]
    )
    assert found.differing_arguments == ("max_tokens",)


def test_written_reports_are_read_back(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "a.json", tmp_path / "other" / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps(report(temperature=0.0).document()))
    read = read_results(paths)
    assert [one.label for one in read] == [str(paths[0]), str(paths[1]), "b"]
    assert read[0].accepted_lengths == {"easy": pytest.approx(7 / 3), "hard": 1.0, "silent": None}
    assert read[0].arguments == {"temperature": 0.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "not a result of dspark eval"),
        ('{"format": "other"}', "format must be 'dspark-eval-1', got 'other'"),
        ('{"format": "dspark-eval-1", "sets": [{}]}', "is incomplete: KeyError"),
    ],
)
def test_files_that_are_no_results_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_results([path])
    assert str(path) in str(caught.value)


def test_plots_are_drawn(tmp_path: Path) -> None:
    written = draw_plots(report(), tmp_path / "plots")
    assert [path.name for path in written] == [POSITIONS_FILE, SWEEP_FILE]
    for path in written:
        assert path.read_bytes().startswith(PNG)


def test_no_legend_hides_a_line(tmp_path: Path, monkeypatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = []
    monkeypatch.setattr(figure, "savefig", lambda self, *_, **__: drawn.append(self))
    draw_plots(report(), tmp_path)
    for one in drawn:
        one.draw_without_rendering()
        [legend] = one.legends
        panels = [axes.get_window_extent() for axes in one.axes]
        assert not any(legend.get_window_extent().overlaps(panel) for panel in panels)


def test_no_sweep_is_drawn_without_confidence(tmp_path: Path) -> None:
    assert [path.name for path in draw_plots(report(confident=False), tmp_path)] == [POSITIONS_FILE]


def test_plots_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'dspark\[eval\]'"):
        require_matplotlib()
