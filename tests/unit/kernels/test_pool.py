"""The threads that share a job."""

from __future__ import annotations

import subprocess
import sys

import pytest

WITHOUT_THREADS = """
import resource
import torch
from dspark_core.kernels.library import Format, native_kernels
from dspark_core.kernels.matrix import NativeMatrix

torch.set_num_threads(1)
matrix = NativeMatrix(native_kernels(), torch.randn(256, 64), Format.FLOAT32)
x = torch.randn(2, 64)
alone = matrix.multiply(x, torch.float32)
with open("/proc/self/statm") as file:
    mapped = int(file.read().split()[0]) * resource.getpagesize()
room = mapped + (4 << 20)  # less than a thread's stack
resource.setrlimit(resource.RLIMIT_AS, (room, room))
torch.set_num_threads(4)
for _ in range(3):
    assert torch.equal(matrix.multiply(x, torch.float32), alone)
print("multiplied")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits its memory as Linux does")
@pytest.mark.usefixtures("kernels")
def test_where_the_system_gives_no_threads_the_caller_does_the_work() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THREADS], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "multiplied\n"), done.stderr
