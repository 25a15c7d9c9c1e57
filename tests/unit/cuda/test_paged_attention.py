"""The Triton kernels against plain PyTorch, by Triton's interpreter where there is no GPU."""

import random

import pytest
import torch

pytest.importorskip("triton", reason="the kernels' tests need triton: pip install triton")

from dspark_core.cuda.paged_attention import paged_attention, store_keys_values
from dspark_core.cuda.tiles import SMALLEST_SHARED_BYTES, Tuning, num_splits, tile_queries
from dspark_core.engine.gpu.attention import RaggedRuns
from dspark_core.engine.target.step_inputs import NO_QUERY
from tests.support.reference_attention import attend_runs, store_runs

# Rows that nothing wrote hold anything; the interpreter's arithmetic on them may overflow.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

PAGE = 4
SLOTS = 64 * PAGE


def ragged(
    lengths,
    group,
    *,
    two_way=False,
    padding=0,
    seed=0,
    page=PAGE,
    num_pages=SLOTS // PAGE,
    head_dim=64,
    value_bytes=4,
    shared_bytes=SMALLEST_SHARED_BYTES,
):
    """Runs of (start, count) over pages in random order; `padding` tiles and runs fill the shape up."""
    source = random.Random(seed)
    free = list(range(1, num_pages))
    source.shuffle(free)
    runs, pages, tiles, row = [], [], [], 0
    longest = max(count for _, count in lengths)
    queries = tile_queries(
        longest, group=group, head_dim=head_dim, value_bytes=value_bytes, shared_bytes=shared_bytes
    )
    for index, (start, count) in enumerate(lengths):
        runs.append((row, count, start, len(pages)))
        pages.extend(free.pop() for _ in range(-(-(start + count) // page)))
        tiles.extend((index, first) for first in range(0, count, queries))
        row += count
    runs.extend([(0, 0, 0, 0)] * padding)
    tiles.extend([(0, NO_QUERY)] * padding)
    return RaggedRuns(*map(torch.tensor, (runs, tiles, pages)), queries, page, two_way), row


def tensors(tokens, heads, kv_heads, head_dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(tokens, heads, head_dim, generator=generator).to(dtype)
    cache = torch.randn(2, SLOTS, kv_heads, head_dim, generator=generator).to(dtype)
    return q, cache[0], cache[1]


def poisoned_empty(*size, **options):
    return torch.full(*size, float("nan"), **options)


SHORT = [(0, 1), (17, 5), (3, 8), (40, 1)]


@pytest.mark.parametrize("lengths", [[(0, 1)], SHORT, [(9, 30)], [(0, 21), (33, 3)]])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("shape", [(4, 2, 8), (3, 1, 20)], ids=str)  # heads, kv_heads, head_dim
def test_runs_see_their_own_context(lengths, window, shape):
    where, tokens = ragged(lengths, shape[0] // shape[1])
    q, keys, values = tensors(tokens, *shape)
    expected = attend_runs(q, keys, values, where, window)
    torch.testing.assert_close(
        paged_attention(q, keys, values, where, window), expected, atol=2e-6, rtol=2e-6
    )


def test_many_tiles_need_no_splits_and_few_share_their_context():
    many, few = [(5, 2)] * 20, [(60, 2)]
    for lengths in (many, few):
        where, tokens = ragged(lengths, 1)
        kv_heads = 32 if lengths is many else 1
        assert (num_splits(len(where.tiles), kv_heads) == 1) == (lengths is many)
        q, keys, values = tensors(tokens, kv_heads, kv_heads, 16)
        expected = attend_runs(q, keys, values, where)
        torch.testing.assert_close(paged_attention(q, keys, values, where), expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("lengths", [[(200, 1)], [(200, 3), (0, 2)]], ids=["long", "long and short"])
def test_one_long_sequence_is_split_among_as_many_programs_as_a_gpu_wants(lengths):
    """What is left of splits that reach no key is whatever was in memory, and must not be read."""
    tuning = Tuning(stage_bytes=1 << 10)  # few keys at a time, so that most programs have some
    where, tokens = ragged(lengths, 1, head_dim=16)
    assert num_splits(1, 8) == 64
    assert num_splits(len(where.tiles), 1) == 64
    q, keys, values = tensors(tokens, 1, 1, 16)
    expected = attend_runs(q, keys, values, where)
    for empty in (torch.empty, poisoned_empty):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            actual = paged_attention(q, keys, values, where, None, tuning)
        torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("context", [0, 3, 19])
def test_a_draft_block_sees_itself_both_ways(context):
    where, tokens = ragged([(context, 5), (2 * context, 5)], 2, two_way=True)
    q, keys, values = tensors(tokens, 4, 2, 8)
    expected = attend_runs(q, keys, values, where)
    torch.testing.assert_close(paged_attention(q, keys, values, where), expected, atol=2e-6, rtol=2e-6)


def test_what_fills_a_shape_up_changes_nothing():
    plain, tokens = ragged(SHORT, 2)
    padded, _ = ragged(SHORT, 2, padding=3)
    q, keys, values = tensors(tokens + 4, 4, 2, 8)
    keys[:PAGE], values[:PAGE] = float("nan"), float("nan")  # the page that padding writes to
    expected = paged_attention(q[:tokens], keys, values, plain)
    assert not expected.isnan().any()
    torch.testing.assert_close(
        paged_attention(q, keys, values, padded)[:tokens], expected, atol=2e-6, rtol=2e-6
    )


def test_half_precision_is_as_good_as_its_rounding():
    """float16: the interpreter has no products of bfloat16, which `tests/gpu` looks at."""
    where, tokens = ragged(SHORT, 2)
    q, keys, values = tensors(tokens, 4, 2, 16, torch.float16)
    expected = attend_runs(q.float(), keys.float(), values.float(), where)
    actual = paged_attention(q, keys, values, where)
    assert actual.dtype is torch.float16
    torch.testing.assert_close(actual.float(), expected, atol=2e-3, rtol=2e-3)


def test_queries_may_be_a_slice_of_something_wider():
    where, tokens = ragged(SHORT, 2)
    wide, keys, values = tensors(tokens, 7, 2, 8)
    q = wide[:, 1:5]
    expected = attend_runs(q.contiguous(), keys, values, where)
    torch.testing.assert_close(paged_attention(q, keys, values, where), expected, atol=2e-6, rtol=2e-6)


def test_keys_and_values_go_to_their_slots():
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 9, 12, generator=generator)  # heads of q, k and v beside each other
    k, v = wide[:, 3:6], wide[:, 6:]
    slots = torch.tensor([7, 100, 3, 4, 250])
    ours, expected = torch.zeros(2, SLOTS, 3, 12), torch.zeros(2, SLOTS, 3, 12)
    store_keys_values(k, v, ours[0], ours[1], slots)
    store_runs(k, v, expected[0], expected[1], slots)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("shared_bytes", [8 << 10, 20 << 10, 64 << 10])
def test_a_gpu_with_less_room_gets_smaller_tiles_and_the_same_sums(shared_bytes):
    shape, room = (4, 2, 32), {"head_dim": 32, "shared_bytes": shared_bytes}
    where, tokens = ragged([(9, 30), (0, 3)], 2, **room)
    q, keys, values = tensors(tokens, *shape)
    expected = attend_runs(q, keys, values, where)
    actual = paged_attention(q, keys, values, where, None, Tuning(), shared_bytes)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)
