"""The kernels compile to machine code for GPUs, which needs Triton and no GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels' tests need triton: pip install triton")

SMALLEST_SHARED_BYTES = 99 * 1024
"""Of a block on the GPUs that have least of it (L4, RTX)."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("capability", [90])
def test_kernels_compile_and_fit(capability, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ".:proto/gen"}
    command = [sys.executable, "-m", "tests.unit.cuda.compile_kernels", str(capability)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    assert set(shared) == {"attend", "combine", "store"}
    assert max(shared.values()) <= SMALLEST_SHARED_BYTES
