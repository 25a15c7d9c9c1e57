"""Whole engines with the GPU code paths, run on a CPU: golden DeepSpec rounds, and Gemma's windows."""

from __future__ import annotations

import pytest
import torch

from dspark_core.engine import building
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.loading import load_target
from tests.support.gpu_parts import CallAgain, PlainKernels, plain_gpu
from tests.unit.engine.test_golden import check_golden_rounds
from tests.unit.models.gemma_tiny import WINDOW, gemma4, gemma4_large, gemma4_small


@pytest.mark.timeout(600)
def test_golden_rounds_hold_with_a_gpus_parts(monkeypatch):
    recorder = CallAgain()
    asked: list[int | None] = []

    def settings(device, *, block_size, looked_up, graphs):
        asked.append(block_size)
        return plain_gpu(recorder, max_tokens=16)

    monkeypatch.setattr(building, "gpu_settings", settings)
    monkeypatch.setattr(DSparkDrafter, "pack", lambda self, **_: None)  # as on a GPU, where nothing is packed
    check_golden_rounds("dspark_vanilla", "cpu")
    assert recorder.replays > recorder.records > 0
    assert len(asked) == 2  # the target and the drafter


@pytest.mark.parametrize("model", [gemma4, gemma4_small, gemma4_large])
def test_gemmas_windows_and_shared_layers_go_the_same_way(model, tmp_path):
    model().save_pretrained(tmp_path)
    loaded = load_target(str(tmp_path), torch.float32)
    kernels = PlainKernels()
    ours, expected = (
        TargetEngine.of_decoder(loaded.decoder, loaded.config, num_pages=40, page_tokens=4, gpu=gpu)
        for gpu in (plain_gpu(CallAgain(), kernels=kernels), None)
    )
    first, second = list(range(1, 12)), list(range(12, 20))
    passes = [
        [Run(list(range(3, 33)), 0, first, 2)],
        [Run([5, 6, 7], 30, first, 3), Run(list(range(40, 45)), 0, second, 1)],
        [Run([8], 33, first, 1), Run([9, 10], 5, second, 2)],
    ]
    for runs in passes:
        torch.testing.assert_close(ours.forward(runs), expected.forward(runs), atol=1e-4, rtol=1e-4)
    assert kernels.windows == {None, WINDOW}


def test_tiles_are_those_that_every_kind_of_layer_has_room_for(tmp_path):
    gemma4_large().save_pretrained(tmp_path)
    loaded = load_target(str(tmp_path), torch.float32)
    config = loaded.config
    layers = [config.attention_kind(layer) for layer in range(config.num_cached_layers)]
    kinds = {(config.num_heads // kind.num_kv_heads, kind.head_dim, 4) for kind in layers}
    assert len(kinds) == 2
    largest = max(head_dim for _, head_dim, _ in kinds)

    class Sparing(PlainKernels):
        def __init__(self):
            super().__init__()
            self.asked, self.tiles = set(), set()

        def tile_queries(self, longest_run, *, group, head_dim, value_bytes):
            self.asked.add((group, head_dim, value_bytes))
            return 1 if head_dim == largest else 4

        def attend(self, q, keys, values, where, window):
            self.tiles.add(where.tile_queries)
            return super().attend(q, keys, values, where, window)

    kernels = Sparing()
    engine = TargetEngine.of_decoder(
        loaded.decoder, config, num_pages=40, page_tokens=4, gpu=plain_gpu(CallAgain(), kernels=kernels)
    )
    for runs in ([Run([3, 4, 5, 6, 7, 8, 9], 0, [1, 2], 1)], [Run([5, 6], 7, [1, 2, 3], 2)]):
        engine.forward(runs)
    assert kernels.asked == kinds
    assert kernels.tiles == {1}
