"""How attention is cut into tiles: by a GPU's shared memory, a head's size and the kind of numbers."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from dspark_core.cuda.tiles import (
    SMALLEST_SHARED_BYTES,
    SPARE_BYTES,
    Tuning,
    shared_bytes_of,
    tile_of,
    tile_queries,
)

L4, A100, H100 = 99 << 10, 163 << 10, 227 << 10


def tile(shared_bytes, head_dim, value_bytes, group=4, tuning=None):
    tuning = tuning or Tuning()
    queries = tile_queries(
        1000,
        group=group,
        head_dim=head_dim,
        value_bytes=value_bytes,
        shared_bytes=shared_bytes,
        tuning=tuning,
    )
    return tile_of(queries * group, head_dim, value_bytes, shared_bytes, tuning)


@pytest.mark.parametrize(
    ("longest", "group", "queries"), [(1, 4, 1), (8, 4, 8), (300, 4, 16), (8, 3, 8), (9, 1, 16), (5, 100, 1)]
)
def test_a_tile_holds_what_its_rows_allow(longest, group, queries):
    assert tile_queries(longest, group=group, head_dim=128, value_bytes=2) == queries


@pytest.mark.parametrize(
    ("shared_bytes", "head_dim", "value_bytes", "rows", "stages"),
    [
        (L4, 128, 2, 64, 2),
        (L4, 256, 2, 64, 2),
        (L4, 512, 2, 32, 2),
        (L4, 128, 4, 32, 2),
        (L4, 256, 4, 32, 2),
        (L4, 512, 4, 16, 1),
        (A100, 512, 2, 64, 2),
        (A100, 512, 4, 32, 2),
        (H100, 512, 2, 64, 2),
        (H100, 512, 4, 32, 2),
    ],
)
def test_rows_are_given_up_before_stages_where_memory_is_short(
    shared_bytes, head_dim, value_bytes, rows, stages
):
    chosen = tile(shared_bytes, head_dim, value_bytes)
    assert (chosen.rows, chosen.stages) == (rows, stages)


@pytest.mark.parametrize("shared_bytes", [L4, H100])
def test_tiles_of_float32_have_half_the_rows_and_keys_by_as_many_warps(shared_bytes):
    """Or registers spill, as the assembler reports of 64 rows of 128."""
    half, whole = tile(shared_bytes, 128, 4), tile(shared_bytes, 128, 2)
    assert (half.rows, half.keys, half.warps) == (32, 16, 8)
    assert (whole.rows, whole.keys, whole.warps) == (64, 64, 8)


@pytest.mark.parametrize("shared_bytes", [64 << 10, L4, A100, H100])
@pytest.mark.parametrize("tuning", [Tuning(), Tuning(max_rows=128), Tuning(stages=4)], ids=str)
def test_what_is_chosen_fits(shared_bytes, tuning):
    for head_dim, value_bytes, group in itertools.product((20, 64, 128, 256, 512), (2, 4), (1, 2, 8)):
        smallest = tile_of(group, head_dim, value_bytes, 0, tuning)
        chosen = tile(shared_bytes, head_dim, value_bytes, group, tuning)
        if smallest.shared_bytes(value_bytes) + SPARE_BYTES <= shared_bytes:
            assert chosen.shared_bytes(value_bytes) + SPARE_BYTES <= shared_bytes
        else:  # the launch tells
            assert chosen == smallest


@pytest.mark.parametrize("value_bytes", [2, 4])
def test_a_run_that_needs_fewer_rows_has_no_less_room(value_bytes):
    """Tiles are cut once for a batch; short runs are then computed with fewer rows of the same limit."""
    for head_dim in (64, 128, 256, 512):
        most = tile(L4, head_dim, value_bytes, group=1).rows
        for rows in (16, 32, 64):
            if rows <= most:
                assert tile_of(rows, head_dim, value_bytes, L4).shared_bytes(value_bytes) <= L4 - SPARE_BYTES


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        (SimpleNamespace(shared_memory_per_block_optin=H100), H100),
        (SimpleNamespace(name="of an older PyTorch"), SMALLEST_SHARED_BYTES),
    ],
)
def test_a_devices_room_is_asked_for(monkeypatch, properties, expected):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert shared_bytes_of(torch.device("cuda", 0)) == expected
