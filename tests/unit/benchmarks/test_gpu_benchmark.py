"""The GPU benchmark's parts with tiny shapes on a CPU; figures come from GPUs only."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.engine_parts.floors import Machine
from benchmarks.engine_parts.steps import Shape
from benchmarks.gpu_parts.attention import attention_row
from benchmarks.gpu_parts.models import SHAPES, drafter_config, engine_of, random_decoder, random_drafter
from benchmarks.gpu_parts.steps import draft_row, kv_tokens, step_row
from benchmarks.gpu_parts.timing import machine_rates
from dspark_core.engine.draft_engines.gpu_blocks import GpuDraftEngine
from dspark_core.models.gemma import build_decoder
from dspark_core.records import SamplingParams
from tests.support.gpu_parts import CallAgain, PlainKernels, plain_gpu

CPU = torch.device("cpu")
TINY = dataclasses.replace(
    SHAPES["qwen3-4b"],
    vocab_size=80,
    hidden_size=32,
    intermediate_size=48,
    num_layers=5,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context_tokens=128,
)
MACHINE = Machine(bytes_per_second=1e10, operations_per_second=1e11)


@pytest.fixture(scope="module")
def decoder():
    return random_decoder(TINY, torch.float32, CPU)


def test_steps_are_measured_by_engine_and_against_the_floor(decoder):
    shapes = [Shape(2, 3, 9), Shape(1, 5, 0)]
    recorder = CallAgain()
    drafter = random_drafter(decoder)
    room = kv_tokens(shapes, 16)
    engines = {
        "graph": engine_of(decoder, drafter, plain_gpu(recorder), kv_tokens=room),
        "launched": engine_of(decoder, drafter, plain_gpu(), kv_tokens=room),
    }
    for shape in shapes:
        row = step_row(engines, decoder, shape, MACHINE, repeats=2)
        assert row["graph_ms"] > 0
        assert row["launched_ms"] > 0
        assert row["roofline_share"] > 0
        assert row["floor_ms"] == pytest.approx(
            row["roofline_share"] * min(row["graph_ms"], row["launched_ms"])
        )
    assert recorder.replays == len(shapes) * 4


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_draft_passes_take_in_what_was_committed(decoder, temperature):
    engine = GpuDraftEngine(
        random_drafter(decoder), plain_gpu(CallAgain()), fingerprint="tiny", num_pages=64, page_tokens=16
    )
    row = draft_row({"graph": engine}, 2, 20, SamplingParams(temperature=temperature), repeats=1)
    assert row["graph_ms"] > 0
    assert engine.num_sequences == 0


def test_attention_is_measured_beside_what_it_replaces():
    variants = {"ours": PlainKernels(), "wider": PlainKernels(4)}
    row = attention_row(TINY, variants, Shape(2, 3, 21), torch.float32, CPU, repeats=1)
    assert all(row[f"{name}_us"] > 0 for name in ("ours", "wider", "gathered"))


def test_the_shapes_are_those_of_the_models_they_are_named_after():
    sizes = {}
    for name, config in SHAPES.items():
        with torch.device("meta"):
            built = build_decoder(config)
        sizes[name] = sum(p.numel() for p in {id(p): p for p in built.parameters()}.values())
        assert drafter_config(config).backbone.num_layers == 5
    assert sizes["llama-8b"] == 8_030_261_248
    assert sizes["qwen3-4b"] == pytest.approx(4.02e9, rel=0.01)


def test_rates_of_a_machine_are_positive():
    assert all(rate > 0 for rate in machine_rates(CPU, torch.float32, megabytes=1, size=32))


@pytest.mark.parametrize(
    ("device", "message"), [("cuda", "device 'cuda'"), ("cpu", "a CUDA device and triton")]
)
def test_without_a_gpu_it_refuses_and_says_why(monkeypatch, capsys, device, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", device])
    assert gpu.main() == 2
    assert message in capsys.readouterr().err


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Of a tiny model on a CPU that says how much memory is free."""
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(gpu, "machine_rates", lambda *_, **__: (1e10, 1e11))
    monkeypatch.setattr(gpu, "STEPS", (Shape(1, 2, 9),))
    monkeypatch.setattr(gpu, "served_rows", lambda device: [])
    monkeypatch.setattr(gpu.Bench, "_attention", lambda self, decoder: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    arguments = gpu._parser().parse_args(["--models", "tiny"])
    arguments.dtype, arguments.repeats, arguments.out = "float32", 1, tmp_path / "gpu.json"
    return gpu.Bench(arguments, CPU, plain_gpu)


def test_what_does_not_fit_the_memory_is_left_out_and_named(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 2**40))
    bench.run()
    assert bench.left_out == ["tiny (2.1 GB, 1.0 are free)", "smollm2 (4.3 GB, 1.0 are free)"]


def test_what_was_measured_outlives_what_fails(bench, monkeypatch):
    def failing(self, name, drafter):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(gpu.Bench, "_drafts", failing)
    with pytest.raises(RuntimeError, match="the device is lost"):
        bench.run()
    written = json.loads(bench._arguments.out.read_text())
    assert list(written["results"]) == ["tiny steps"]
