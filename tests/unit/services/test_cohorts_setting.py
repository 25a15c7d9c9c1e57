"""How a verifier is told about cohorts."""

import pytest

from dspark_core.errors import ConfigError
from services.verifier.config import VerifierServiceConfig


@pytest.mark.parametrize(("text", "cohorts"), [("auto", None), ("1", 1), ("2", 2)])
def test_cohorts_are_given_or_chosen(text: str, cohorts: int | None) -> None:
    assert VerifierServiceConfig.from_env({"DSPARK_COHORTS": text}).cohorts == cohorts
    assert VerifierServiceConfig.from_env({}).cohorts is None


def test_a_number_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="DSPARK_COHORTS must be one of auto, 1, 2, got '3'"):
        VerifierServiceConfig.from_env({"DSPARK_COHORTS": "3"})
