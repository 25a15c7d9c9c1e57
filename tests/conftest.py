"""Runs the suite on the CPU even on machines with GPUs, unless GPU tests are selected with `-m gpu`."""

import gc
import logging
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The time of a Hypothesis example depends on how busy the machine is, not on whether the property holds.
settings.register_profile("dspark", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dspark")


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background: tests send it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    asked = config.getoption("markexpr", default="")
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        # Must be set before the first import of the Triton kernels, which then run in its interpreter.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """A service takes all that it has loaded out of the garbage collector's sight, which would here include
    what earlier tests left behind."""
    yield
    if gc.get_freeze_count():
        gc.unfreeze()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command that runs in the test's process sends all logs to its stderr, which pytest then closes: what
    is logged afterwards, by any test, would print an error about that."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
