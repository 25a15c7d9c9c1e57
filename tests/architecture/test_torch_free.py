"""The gateway and the scheduler start without torch, which their images do not contain."""

import os
import subprocess
import sys

import pytest

from tests.support.source_tree import ROOT

TORCH_FREE = ("services.gateway.wiring", "services.scheduler.wiring", "dspark_core.cluster.fleet")


def _loaded_with(module: str) -> set[str]:
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "proto/gen")])}
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("module", TORCH_FREE)
def test_no_torch_is_loaded(module: str):
    loaded = _loaded_with(module)
    assert module in loaded
    assert loaded.isdisjoint({"torch", "transformers", "safetensors.torch"})


def test_tracing_costs_no_import_while_it_is_off():
    loaded = _loaded_with("services.scheduler.wiring")
    assert "opentelemetry.trace" in loaded
    assert loaded.isdisjoint({"opentelemetry.sdk.trace", "opentelemetry.exporter"})


def test_the_kubernetes_client_is_loaded_for_a_lease_alone():
    assert "kubernetes" not in _loaded_with("services.scheduler.wiring")
    assert "kubernetes" in _loaded_with("services.scheduler.leadership.kubernetes_leases")


@pytest.mark.parametrize("service", ["gateway", "scheduler", "verifier", "drafter"])
def test_what_starts_a_service_leaves_slow_imports_and_grpc_to_what_it_runs(service: str):
    assert _loaded_with(f"services.{service}.main").isdisjoint({"torch", "grpc"})
