"""The kernels' matrices against plain arithmetic on the weights they say they hold."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from dspark_core.kernels.library import Format, Kernels
from dspark_core.kernels.matrix import NativeMatrix, QuantizedRows, supports

BLOCKS = {Format.Q4: gguf.GGMLQuantizationType.Q4_1, Format.Q8: gguf.GGMLQuantizationType.Q8_0}
STORED_AS = {Format.Q4: Format.Q4, Format.Q8: Format.Q8, Format.I4: Format.Q4, Format.I8: Format.Q8}
ROUNDING = [Format.I4, Format.I8]
EXACT = [kind for kind in Format if kind not in ROUNDING]
SHAPES = [(96, 64), (50, 96), (1, 32), (576, 576)]  # whole panels, a part of one, a single output


@pytest.fixture(params=["vectors", "matrix unit"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """What this processor has, and what others have."""
    found: Kernels = request.getfixturevalue("kernels" if request.param == "vectors" else "unit_kernels")
    return found


def weights(outputs: int, inputs: int) -> Tensor:
    generator = torch.Generator().manual_seed(outputs * 1000 + inputs)
    return torch.randn(outputs, inputs, generator=generator) * 0.1


def source_of(kind: Format, weight: Tensor) -> tuple[Tensor | QuantizedRows, Tensor]:
    """What to build a matrix from, and the float32 weights it then stands for."""
    if stored := STORED_AS.get(kind):
        blocks = quantize(weight.numpy(), BLOCKS[stored])
        expected = torch.from_numpy(dequantize(blocks, BLOCKS[stored]))
        return QuantizedRows(stored, torch.from_numpy(blocks), weight.shape[1]), expected
    return weight, weight.bfloat16().float() if kind is Format.BFLOAT16 else weight


def inputs_of(kind: Format, rows: int, size: int) -> Tensor:
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(rows))
    return x if kind is Format.FLOAT32 else x.bfloat16()


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2])
@pytest.mark.parametrize("kind", EXACT)
def test_products_are_those_of_the_weights(
    kernels: Kernels, kind: Format, shape: tuple[int, int], paired: bool
) -> None:
    source, expected_weight = source_of(kind, weights(*shape))
    bias = torch.randn(shape[0], generator=torch.Generator().manual_seed(5))
    matrix = NativeMatrix(kernels, source, kind, bias=bias, paired=paired)
    x = inputs_of(kind, 29, shape[1])

    out = matrix.multiply(x, torch.float32)

    exact = x.double() @ expected_weight.double().T + bias.double()
    torch.testing.assert_close(out.double(), exact, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", EXACT)
def test_it_computes_with_exactly_the_stored_weights(
    kernels: Kernels, kind: Format, shape: tuple[int, int]
) -> None:
    source, expected = source_of(kind, weights(*shape))
    matrix = NativeMatrix(kernels, source, kind)
    assert torch.equal(matrix.dequantize(), expected)
    # One input at a time reads the weights back through the arithmetic itself; Q4's scale and
    # minimum are applied after the sum, so its last bit may round otherwise.
    columns = torch.eye(shape[1])
    read = matrix.multiply(columns if kind is Format.FLOAT32 else columns.bfloat16(), torch.float32).T
    torch.testing.assert_close(read, expected, rtol=1e-6 if kind is Format.Q4 else 0, atol=1e-8)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", Format)
def test_a_row_is_the_same_bits_whatever_rows_share_the_call(
    kernels: Kernels, kind: Format, threads: int
) -> None:
    source, _ = source_of(kind, weights(200, 96))
    matrix = NativeMatrix(kernels, source, kind)
    x = inputs_of(kind, 41, 96)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = matrix.multiply(x, torch.float32)
        for first, rows in ((0, 1), (3, 2), (7, 5), (12, 12), (20, 13), (1, 40)):
            alone = matrix.multiply(x[first : first + rows], torch.float32)
            assert torch.equal(alone, together[first : first + rows])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("shape", [(96, 64), (50, 96), (576, 576)])
@pytest.mark.parametrize("kind", ROUNDING)
def test_byte_products_are_exact_for_activations_that_bytes_hold(
    kernels: Kernels, kind: Format, shape: tuple[int, int], paired: bool
) -> None:
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(shape[0], generator=generator)
    source, expected = source_of(kind, weights(*shape))
    matrix = NativeMatrix(kernels, source, kind, bias=bias, paired=paired)
    assert torch.equal(matrix.dequantize(), expected)
    groups = torch.randint(-127, 128, (29, shape[1] // 32, 32), generator=generator)
    groups[..., 7] = -127  # the largest of every group, so that steps are powers of two
    groups[4] = 0
    powers = 2.0 ** torch.randint(-12, 3, (29, shape[1] // 32, 1), generator=generator)
    x = (groups * powers).view(29, -1).bfloat16()

    out = matrix.multiply(x, torch.float32)

    exact = x.double() @ matrix.dequantize().double().T + bias.double()
    torch.testing.assert_close(out.double(), exact, atol=2e-4, rtol=1e-5)


def test_byte_products_round_activations_to_half_a_step(kernels: Kernels) -> None:
    matrix = NativeMatrix(kernels, torch.eye(64), Format.I8)  # gives back what it read
    x = inputs_of(Format.I8, 29, 64)
    groups = x.float().view(29, 2, 32)
    half_step = groups.abs().amax(-1, keepdim=True) / 127 * 0.5
    error = (matrix.multiply(x, torch.float32).view_as(groups) - groups).abs()
    assert bool((error <= half_step * 1.01).all())


@pytest.mark.parametrize("kind", [Format.Q8, Format.I8])
def test_quantising_to_int8_stays_within_half_a_step(kernels: Kernels, kind: Format) -> None:
    weight = weights(40, 64)
    weight[3] = 0.0
    matrix = NativeMatrix(kernels, weight, kind)
    groups = weight.view(40, 2, 32)
    half_step = groups.abs().amax(-1, keepdim=True) / 127 * 0.5
    error = (matrix.dequantize().view_as(groups) - groups).abs()
    assert bool((error <= half_step * 1.1 + 1e-7).all())
    assert torch.equal(matrix.dequantize(3, 1), torch.zeros(1, 64))


def test_scales_smaller_than_a_normal_half_are_kept(kernels: Kernels) -> None:
    weight = weights(16, 32) * 1e-5
    source, expected = source_of(Format.Q8, weight)
    assert torch.equal(NativeMatrix(kernels, source, Format.Q8).dequantize(), expected)


def test_no_rows_give_no_rows_and_leading_axes_are_kept(kernels: Kernels) -> None:
    matrix = NativeMatrix(kernels, weights(16, 32), Format.FLOAT32)
    assert matrix.multiply(torch.zeros(0, 32), torch.float32).shape == (0, 16)
    x = torch.randn(2, 3, 32)
    assert torch.equal(matrix.multiply(x, torch.float32)[1, 2], matrix.multiply(x[1, 2], torch.float32))


def test_the_input_need_not_be_contiguous(kernels: Kernels) -> None:
    matrix = NativeMatrix(kernels, weights(16, 32), Format.FLOAT32)
    x = torch.randn(32, 5)
    assert torch.equal(matrix.multiply(x.T, torch.float32), matrix.multiply(x.T.contiguous(), torch.float32))


@pytest.mark.parametrize(
    ("kind", "inputs", "dtype", "expected"),
    [
        (Format.FLOAT32, 7, torch.float32, True),
        (Format.FLOAT32, 8, torch.bfloat16, False),
        (Format.BFLOAT16, 7, torch.bfloat16, False),
        (Format.BFLOAT16, 8, torch.bfloat16, True),
        (Format.Q4, 48, torch.bfloat16, False),
        (Format.Q8, 64, torch.float32, False),
    ],
)
def test_what_is_supported(kind: Format, inputs: int, dtype: torch.dtype, expected: bool) -> None:
    assert supports(kind, inputs, dtype) is expected


def test_blocks_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="64 inputs need rows of 40 bytes, got 39"):
        QuantizedRows(Format.Q4, torch.from_numpy(np.zeros((3, 39), np.uint8)), 64)
