"""The compiled kernels, for tests that compare them with their references."""

from __future__ import annotations

import pytest

from dspark_core.kernels.library import Kernels, native_kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    found = native_kernels()
    if found is None:
        pytest.skip("no native kernels on this machine")
    return found
