"""Whole engines with a GPU's parts, on a CPU: golden rounds of DeepSpec checkpoints, and Gemma's windows."""

from __future__ import annotations

import pytest
import torch

from dspark_core.engine import building
from dspark_core.engine.batch import Run
from dspark_core.engine.target_engine import TargetEngine
from dspark_core.models.dspark import DSparkDrafter
from dspark_core.models.loading import load_target
from tests.support.gpu_parts import CallAgain, PlainKernels, plain_gpu
from tests.unit.engine.test_golden import check_golden_rounds
from tests.unit.models.gemma_tiny import WINDOW, gemma4, gemma4_large, gemma4_small


@pytest.mark.timeout(600)
def test_golden_rounds_hold_with_a_gpus_parts(monkeypatch):
    recorder = CallAgain()
    asked: list[int | None] = []

    def settings(device, *, block_size, graphs):
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
