"""`dspark profile` on the demo model: table, JSON and plot, and errors reported before the slow work."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_core.engine.profiling.profile_file import read_profile
from services.cli.main import main
from services.common.exits import EXIT_CONFIG

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]


def test_a_profile_is_measured_shown_written_and_drawn(tmp_path: Path, capsys) -> None:
    out, plot = tmp_path / "profile.json", tmp_path / "profile.png"
    arguments = ["profile", "--quick", "--seconds", "1", "--max-requests", "4", "--threads", "1"]
    assert main([*arguments, "--kv-cache-mb", "64", "--out", str(out), "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "step time, ms" in printed
    assert "draft block, ms" in printed
    model = read_profile(out)
    assert model.verify.key.model == "smollm2-135m-instruct"
    assert model.seconds(1, 8, 128, drafted=1) > model.seconds(1, 1, 128) > 0
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-requests", "0"], "--max-requests must be >= 1, got 0"),
        (["--seconds", "0"], "budget_seconds of a profile must be > 0, got 0.0"),
        (["--plot", "here.pdf"], "--plot must end in .png, got here.pdf"),
        (["--plot", "/dev/null/here.png"], "cannot write to /dev/null"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, capsys) -> None:
    assert main(["profile", *arguments]) == EXIT_CONFIG
    assert message in capsys.readouterr().err
