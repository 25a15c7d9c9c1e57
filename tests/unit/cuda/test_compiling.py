"""The kernels compile to machine code for GPUs, which needs Triton and no GPU."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="the kernels' tests need triton: pip install triton")

from dspark_core.cuda.tiles import SMALLEST_SHARED_BYTES


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("capability", "shared_bytes"), [(89, SMALLEST_SHARED_BYTES), (90, 227 * 1024)], ids=["L4", "H100"]
)
def test_kernels_compile_and_fit(capability, shared_bytes, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ".:proto/gen"}
    command = [sys.executable, "-m", "tests.unit.cuda.compile_kernels", str(capability), str(shared_bytes)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shared = json.loads(done.stdout.splitlines()[-1])
    assert {name.split()[0] for name in shared} == {"attend", "combine", "store"}
    assert max(shared.values()) <= shared_bytes, shared
