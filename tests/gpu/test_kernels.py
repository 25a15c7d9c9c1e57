"""The compiled kernels against plain PyTorch on the CPU: what the interpreter cannot show."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from dspark_core.algorithms import coupling, sampling
from dspark_core.cuda.tiles import TUNING, shared_bytes_of
from dspark_core.engine.gpu.attention import RaggedRuns
from tests.support.gpu_parts import generator
from tests.support.reference_attention import attend_runs
from tests.unit.cuda.test_paged_attention import ragged

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
PAGE = 16


def cases():
    """Decoding with drafts, a chunk of a prompt, both, and a batch too small to fill a GPU."""
    return {
        "drafts": [(100 + 37 * n, 8) for n in range(6)],
        "chunk": [(64, 200)],
        "both": [(300, 1), (0, 150), (17, 5)],
        "one": [(900, 1)],
    }


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize(
    "shape", [(32, 8, 128), (9, 3, 64), (8, 4, 256), (8, 4, 512)], ids=str
)  # heads, kv_heads, head_dim
def test_attention(cuda, dtype, window, case, shape):
    from dspark_core.cuda.paged_attention import paged_attention

    heads, kv_heads, head_dim = shape
    room = {"head_dim": head_dim, "value_bytes": dtype.itemsize, "shared_bytes": shared_bytes_of(cuda)}
    where, tokens = ragged(cases()[case], heads // kv_heads, page=PAGE, num_pages=512, **room)
    drawing = generator(0)
    q = torch.randn(tokens, heads, head_dim, generator=drawing).to(dtype)
    cache = torch.randn(2, 512 * PAGE, kv_heads, head_dim, generator=drawing).to(dtype)
    expected = attend_runs(q.float(), cache[0].float(), cache[1].float(), where, window)
    on_device = RaggedRuns(
        where.runs.to(cuda), where.tiles.to(cuda), where.pages.to(cuda), where.tile_queries, PAGE
    )
    keys, values = cache.to(cuda)
    actual = paged_attention(q.to(cuda), keys, values, on_device, window, TUNING, room["shared_bytes"])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(actual.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_keys_and_values_are_stored(cuda, dtype):
    from dspark_core.cuda.paged_attention import store_keys_values

    wide = torch.randn(40, 48, 128, dtype=dtype, device=cuda)
    k, v = wide[:, 32:40], wide[:, 40:]
    slots = torch.randperm(4096, device=cuda)[:40]
    keys, values = torch.zeros(2, 4096, 8, 128, dtype=dtype, device=cuda)
    store_keys_values(k, v, keys, values, slots)
    assert torch.equal(keys[slots], k)
    assert torch.equal(values[slots], v)
    assert int((keys != 0).any(dim=-1).any(dim=-1).sum()) == 40


def test_noise_is_the_same_uniforms_on_every_device(cuda):
    """The hash bit for bit; the logarithm's last bits may be another's."""
    words = torch.randint(-(2**63), 2**63 - 1, (1 << 20,), generator=generator(0))
    assert torch.equal(coupling._mix(words.to(cuda)).cpu(), coupling._mix(words))
    seeds, positions, tokens = torch.arange(64), torch.arange(64) * 7, torch.arange(5000)
    here = coupling.exponential_noise(seeds, positions, tokens)
    there = coupling.exponential_noise(seeds.to(cuda), positions.to(cuda), tokens.to(cuda)).cpu()
    torch.testing.assert_close(there, here, rtol=4e-15, atol=1e-300)


@pytest.mark.parametrize("vocab", [1000, 151_936])
def test_laws_and_coupled_draws_are_the_cpus(cuda, vocab):
    from dspark_core.records import SamplingParams

    params = [
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(top_k=40),
        SamplingParams(min_p=0.05),
    ]
    logits = 4 * torch.randn(3, vocab, generator=generator(1))
    here = sampling.target_probabilities(logits, sampling.SamplingRows.from_params(params))
    rows = sampling.SamplingRows.from_params(params, device=cuda)
    there = sampling.target_probabilities(logits.to(cuda), rows).cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-7)
    seeds, positions = torch.arange(3), torch.arange(3) + 9
    drawn = coupling.sample_coupled(here.to(cuda), seeds.to(cuda), positions.to(cuda)).cpu()
    assert torch.equal(drawn, coupling.sample_coupled(here, seeds, positions))


@pytest.mark.parametrize("rows", [1, 8, 300])
def test_a_product_of_bfloat16_comes_in_float32(cuda, rows):
    from dspark_core.engine.gpu.logits import multiplies_into_float32

    if not multiplies_into_float32(torch.bfloat16, cuda):
        pytest.skip(f"PyTorch {torch.__version__} has no such product")
    hidden = torch.randn(rows, 512, generator=generator(2)).bfloat16()
    weight = torch.randn(5000, 512, generator=generator(3)).bfloat16()
    out = torch.empty(400, 5000, device=cuda)[:rows]
    logits = torch.mm(hidden.to(cuda), weight.to(cuda).t(), out_dtype=torch.float32, out=out)
    assert logits.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out.cpu(), hidden.float() @ weight.float().t(), atol=1e-3, rtol=1e-4)
