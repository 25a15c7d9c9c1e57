"""Device names and how they resolve on a machine."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from dspark_core.engine import devices
from dspark_core.engine.building import EngineOptions
from dspark_core.engine.devices import resolve_device
from dspark_core.engine.gpu import settings as gpu_settings
from dspark_core.errors import ConfigError
from services.drafter.config import DrafterServiceConfig
from services.embedded.options import StackOptions
from services.verifier.config import VerifierServiceConfig


@pytest.fixture
def machine(monkeypatch):
    def of(gpus: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    return of


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("auto", 0, "cpu"),
        ("auto", 2, "cuda:0"),
        ("cpu", 2, "cpu"),
        ("cuda", 1, "cuda:0"),
        ("cuda:1", 2, "cuda:1"),
    ],
)
def test_a_name_means_a_device_of_this_machine(machine, name, gpus, expected):
    machine(gpus)
    assert resolve_device(name) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "gpus", "message"),
    [
        ("cuda", 0, "device 'cuda'.*use device cpu"),
        ("cuda:3", 2, "device 'cuda:3' does not exist: there is cuda:0 to cuda:1"),
        ("cuda:1", 1, "device 'cuda:1' does not exist: there is cuda:0$"),
    ],
)
def test_a_device_that_is_not_here_is_named(machine, name, gpus, message):
    machine(gpus)
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "CPU", "mps", ""])
def test_what_is_no_device_is_refused_before_anything_is_loaded(name):
    with pytest.raises(ConfigError, match="device must be auto, cpu, cuda or cuda:N"):
        EngineOptions(target_model="none", drafter=None, device=name)


def test_services_read_their_device():
    environ = {"DSPARK_DEVICE": "cuda:1", "DSPARK_CUDA_GRAPHS": "off"}
    for config in (VerifierServiceConfig, DrafterServiceConfig):
        engine = config.from_env(environ).engine
        assert (engine.device, engine.cuda_graphs) == ("cuda:1", False)
        assert config.from_env({}).engine.device == devices.AUTO
    assert StackOptions(device="cpu").engine.device == "cpu"


def test_without_triton_or_a_compiler_operators_do_and_a_line_says_so(monkeypatch, caplog):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert gpu_settings.gpu_settings(gpu, block_size=7) is None
    assert "there is no C compiler for triton: PyTorch's operators compute on cuda:0" in caplog.text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu_settings.missing_for_kernels() == "triton is not installed"
    assert gpu_settings.gpu_settings(torch.device("cpu"), block_size=7) is None


def test_weights_that_only_a_cpu_computes_are_refused_on_a_gpu(machine):
    from dspark_core.engine.building import build_target

    machine(1)
    options = EngineOptions(target_model="none", drafter=None, weights="int8", device="cuda")
    with pytest.raises(ConfigError, match="int8 need the native kernels of a CPU, got device 'cuda'"):
        build_target(options)
