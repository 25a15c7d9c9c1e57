"""The matrix unit (AMX), its instructions emulated, against the vectors that compute without it.

`test_native_matrix` asks of both what is asked of any product.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from gguf.quants import quantize

from dspark_core.errors import ConfigError
from dspark_core.kernels.build import BuildSettings, KernelsUnavailableError, compile_library, processor_flags
from dspark_core.kernels.library import Format, Kernels, load_kernels
from dspark_core.kernels.matrix import NativeMatrix, QuantizedRows
from dspark_core.kernels.prebuilt import X86_LEVELS

QUANTISED = {
    Format.Q4: (Format.Q4, gguf.GGMLQuantizationType.Q4_1),
    Format.I4: (Format.Q4, gguf.GGMLQuantizationType.Q4_1),
    Format.Q8: (Format.Q8, gguf.GGMLQuantizationType.Q8_0),
    Format.I8: (Format.Q8, gguf.GGMLQuantizationType.Q8_0),
}
ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 70)
"""Around the 16 rows of a tile and the 32 of a product."""


def matrix(kernels: Kernels, kind: Format, outputs: int, inputs: int) -> NativeMatrix:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(inputs)) * 0.1
    if kind not in QUANTISED:
        return NativeMatrix(kernels, weight, kind)
    stored, blocks = QUANTISED[kind]
    rows = torch.from_numpy(quantize(weight.numpy(), blocks))
    return NativeMatrix(kernels, QuantizedRows(stored, rows, inputs), kind)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", [Format.BFLOAT16, *QUANTISED])
def test_it_computes_what_vectors_do(
    kernels: Kernels, unit_kernels: Kernels, kind: Format, rows: int
) -> None:
    x = torch.randn(
        rows, 160, generator=torch.Generator().manual_seed(rows)
    ).bfloat16()  # an odd number of groups
    # 160 inputs are an odd number of groups.
    by_vectors = matrix(kernels, kind, 100, 160).multiply(x, torch.float32)
    by_unit = matrix(unit_kernels, kind, 100, 160).multiply(x, torch.float32)
    torch.testing.assert_close(by_unit, by_vectors, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("inputs", [2, 34, 62, 94])
def test_inputs_that_fill_no_tile_are_filled_up(kernels: Kernels, unit_kernels: Kernels, inputs: int) -> None:
    x = torch.randn(20, inputs + 6, generator=torch.Generator().manual_seed(1)).bfloat16()[:, :inputs]
    by_vectors = matrix(kernels, Format.BFLOAT16, 40, inputs).multiply(x, torch.float32)
    by_unit = matrix(unit_kernels, Format.BFLOAT16, 40, inputs).multiply(x, torch.float32)
    torch.testing.assert_close(by_unit, by_vectors, atol=2e-5, rtol=1e-5)


def test_float32_is_left_to_vectors(kernels: Kernels, unit_kernels: Kernels) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    expected = matrix(kernels, Format.FLOAT32, 40, 64).multiply(x, torch.float32)
    assert torch.equal(matrix(unit_kernels, Format.FLOAT32, 40, 64).multiply(x, torch.float32), expected)


def instructions(library: Path, **environ: str) -> str:
    """What it says in a process of its own: it decides once."""
    script = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1])\n"
        "library.dspark_instructions.restype = ctypes.c_char_p\n"
        "print(library.dspark_instructions().decode())"
    )
    command = [sys.executable, "-c", script, str(library)]
    done = subprocess.run(
        command, env={**os.environ, **environ}, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_it_can_be_switched_off(unit_kernels: Kernels) -> None:
    assert instructions(unit_kernels.path) == "emulated amx"
    assert instructions(unit_kernels.path, DSPARK_AMX="off") == "amx not emulated"


def test_another_switch_than_on_and_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_AMX", "maybe")
    with pytest.raises(ConfigError, match="DSPARK_AMX must be on or off, got 'maybe'"):
        load_kernels.__wrapped__()


def test_a_library_for_the_unit_runs_on_a_processor_without_one(tmp_path: Path) -> None:
    with_unit, without = X86_LEVELS[:2]
    if not processor_flags().issuperset(without.needs):
        pytest.skip(f"this processor runs nothing made for {without.name}")
    try:
        compiler = BuildSettings.from_env(os.environ).compiler
    except KernelsUnavailableError as reason:
        pytest.skip(str(reason))
    library = tmp_path / "kernels.so"
    assert compile_library(compiler, with_unit.arguments, library) is None
    expected = "avx512_bf16, amx" if processor_flags().issuperset(with_unit.needs) else "avx512_bf16"
    assert instructions(library) == expected
