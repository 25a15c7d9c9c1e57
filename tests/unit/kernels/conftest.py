"""The compiled kernels, for tests that compare them with their references."""

from __future__ import annotations

import os

import pytest

from dspark_core.kernels.build import BuildSettings, KernelsUnavailableError, build_library
from dspark_core.kernels.library import Kernels, native_kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    found = native_kernels()
    if found is None:
        pytest.skip("no native kernels on this machine")
    return found


@pytest.fixture(scope="session")
def unit_kernels() -> Kernels:
    """Kernels that compute by the matrix unit (AMX), whose instructions are emulated."""
    try:
        found = BuildSettings.from_env(os.environ)
    except KernelsUnavailableError as reason:
        pytest.skip(str(reason))
    compiler = (*found.compiler, "-DDSPARK_AMX_EMULATED")
    return Kernels(build_library(BuildSettings(cache_directory=found.cache_directory, compiler=compiler)))
