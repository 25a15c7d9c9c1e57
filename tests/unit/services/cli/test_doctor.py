"""What `dspark doctor` says of the surroundings."""

import pytest

from services.cli.main import main
from services.cli.serving import doctor
from services.cli.serving.doctor import CHECKS, Finding, Outcome
from services.embedded.options import StackOptions


@pytest.mark.parametrize(
    "url", ["redis://joe:secret@127.0.0.1:1/0", "redis://joe:secret@[::1", "unix://joe:secret@/no"]
)
def test_a_redis_that_does_not_answer_is_told_without_its_password(url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REDIS_URL", url)
    found = CHECKS["redis"](StackOptions())
    assert found.outcome is Outcome.FAILED
    assert "REDIS_URL=" in found.text
    assert "secret" not in found.text


@pytest.mark.parametrize("terminal", [True, False])
def test_findings_are_shown_whole(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys):
    path = "/a/path/" + "0123456789" * 12
    texts = {"torch": "not installed: pip install 'dspark[engine]'", "native kernels": f"avx2, {path}"}
    checks = {name: lambda _, text=text: Finding(Outcome.NOTE, text) for name, text in texts.items()}
    monkeypatch.setattr(doctor, "CHECKS", checks)
    monkeypatch.setenv("COLUMNS", "80")
    if terminal:
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "dspark[engine]" in shown
    if terminal:
        shown = "".join(sign for sign in shown if sign.isascii() and not sign.isspace())
    assert path in shown
    if not terminal:
        assert shown.splitlines()[1] == f"native kernels  note    avx2, {path}"


@pytest.mark.parametrize(
    ("lookup", "said"), [(True, "drafts come from lookup only"), (False, "plain decoding")]
)
def test_no_drafter_leaves_lookup(lookup: bool, said: str):
    assert CHECKS["drafter"](StackOptions(drafter=None, lookup=lookup)).text == f"none: {said}"
