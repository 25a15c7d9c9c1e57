"""The suite is a CPU's, also on a machine with GPUs, except where their tests are asked for: `-m gpu`."""

import os

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, not whether a law holds.
settings.register_profile("dspark", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dspark")


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("markexpr", default="")
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Triton's kernels then run in its interpreter, which counts when they are first imported.
        os.environ["TRITON_INTERPRET"] = "1"
