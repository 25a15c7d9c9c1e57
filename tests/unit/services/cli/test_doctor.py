"""What `dspark doctor` says of the surroundings."""

import pytest

from services.cli.serving.doctor import CHECKS, Outcome
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
