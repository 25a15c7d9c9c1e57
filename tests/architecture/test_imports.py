"""Checks which packages import which. The tables below are the rule; a package missing from them fails."""

import ast
import sys

import pytest

from tests.support.source_tree import Source, tracked_sources

VALUES = ("dspark_core.errors", "dspark_core.records", "dspark_core.output_rules")
# Locations of models and drafters on disk.
PATHS = ("dspark_core.model_paths", "dspark_core.zoo_paths")
MODELS = (*VALUES, *PATHS, "dspark_core.algorithms", "dspark_core.kernels", "dspark_core.models")
APPLICATION = (*MODELS, "dspark_core.engine", "dspark_core.tokenization")
ENGINE_VALUES = tuple(
    f"dspark_core.engine.{name}" for name in ("devices", "grammars", "protocols", "sequence")
)
TORCH_FREE_ALGORITHMS = (
    "dspark_core.algorithms.prefix_scheduler",
    "dspark_core.algorithms.delayed_scheduler",
    "dspark_core.algorithms.speed_floor",
    "dspark_core.algorithms.draft_policy",
    "dspark_core.algorithms.cohorts",
    "dspark_core.algorithms.draft_price",
    "dspark_core.algorithms.drafting_choice",
    "dspark_core.algorithms.plan_batch",
    "dspark_core.algorithms.plan_request",
    "dspark_core.algorithms.plan_search",
    "dspark_core.algorithms.planner",
    "dspark_core.algorithms.prefix_hashes",
    "dspark_core.algorithms.loop_time",
    "dspark_core.algorithms.round_time",
    "dspark_core.algorithms.step_surface",
    "dspark_core.algorithms.step_time",
    "dspark_core.algorithms.survival_scaling",
    "dspark_core.algorithms.calibration",
    "dspark_core.algorithms.calibration_error",
)

# Package -> the project's modules it may import, besides itself.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "dspark_core.errors": (),
    "dspark_core.output_rules": ("dspark_core.errors",),
    "dspark_core.records": ("dspark_core.errors", "dspark_core.output_rules"),
    "dspark_core.model_paths": (*VALUES, *PATHS),
    "dspark_core.zoo_paths": (*VALUES, *PATHS),
    "dspark_core.zoo": VALUES,
    "dspark_core.tokenization": (*VALUES, *PATHS),
    "dspark_core.algorithms": VALUES,
    "dspark_core.kernels": VALUES,
    # Loaded by name and only on a GPU: it needs triton.
    "dspark_core.cuda": VALUES,
    "dspark_core.models": MODELS,
    "dspark_core.engine": (*MODELS, "dspark_core.tokenization"),
    **{
        f"dspark_core.engine.{package}": (
            *MODELS,
            *ENGINE_VALUES,
            *(f"dspark_core.engine.{below}" for below in packages),
        )
        for package, packages in {
            "caches": (),
            "gpu": (),
            "target": ("caches", "gpu"),
            "verdicts": (),
            "draft_engines": ("caches", "gpu", "target"),
            "drafts": ("caches", "target", "verdicts"),
            "rounds": ("caches", "drafts", "target", "verdicts"),
            "profiling": ("building", "target", "verdicts"),
            "tracing": (),
        }.items()
    },
    # Loaded by name and only if configured: it needs vllm.
    "dspark_core.vllm_engine": (*MODELS, "dspark_core.engine"),
    "dspark_core.cluster": (*VALUES, *TORCH_FREE_ALGORITHMS),
    **{
        f"dspark_core.cluster.{package}": (
            *VALUES,
            *TORCH_FREE_ALGORITHMS,
            "dspark_core.cluster.limits",
            *(f"dspark_core.cluster.{below}" for below in packages),
        )
        for package, packages in {
            "planning": (),
            "replicas": ("planning",),
        }.items()
    },
    "dspark_core.training": APPLICATION,
    "dspark_core.evaluation": APPLICATION,
    "dspark_core.simulation": (*APPLICATION, "dspark_core.cluster"),
    "services.common": VALUES,
    "services.gateway": (
        *VALUES,
        *PATHS,
        *TORCH_FREE_ALGORITHMS,
        "dspark_core.tokenization",
        "services.common",
    ),
    "services.scheduler": (*VALUES, *TORCH_FREE_ALGORITHMS, "dspark_core.cluster", "services.common"),
    **{
        f"services.scheduler.{package}": (
            *VALUES,
            *TORCH_FREE_ALGORITHMS,
            "dspark_core.cluster",
            "services.common",
            *(f"services.scheduler.{below}" for below in packages),
        )
        for package, packages in {
            "storage": (),
            "leadership": ("config", "storage"),
        }.items()
    },
    "services.engines": (*APPLICATION, "services.common"),
    "services.drafter": (*APPLICATION, "services.common", "services.engines"),
    "services.verifier": (*APPLICATION, "services.common", "services.engines"),
    # The one place that may import several services.
    "services.embedded": (*APPLICATION, "services"),
    "services.cli": (
        *APPLICATION,
        "dspark_core.evaluation",
        "dspark_core.simulation",
        "dspark_core.training",
        "services",
    ),
    "loadtest": (),
    "benchmarks": (
        *APPLICATION,
        "dspark_core.cuda",
        "dspark_core.evaluation",
        "dspark_core.training",
        "dspark_core.simulation",
        "services",
    ),
    "scripts": (*APPLICATION, "services"),
}

# Package -> the only third-party packages it may import.
ONLY: dict[str, tuple[str, ...]] = {
    "dspark_core.errors": (),
    "dspark_core.records": (),
    "dspark_core.output_rules": (),
    "dspark_core.algorithms": ("numpy",),
    "dspark_core.cluster": ("numpy",),
    "dspark_core.cuda": ("torch", "triton"),
    **{
        f"dspark_core.algorithms.{name}": ("torch", "numpy")
        for name in ("sampling", "rejection", "coupling", "transfer")
    },
}

OPTIONAL = ("triton", "vllm")
NETWORK = ("grpc", "grpc_health", "fastapi", "uvicorn", "httpx", "redis", "kubernetes", "dspark_proto")
TORCH = ("torch", "safetensors", "transformers", "vllm")

# Package -> third-party packages it must not import.
NEVER: dict[str, tuple[str, ...]] = {
    "dspark_core": NETWORK,
    **dict.fromkeys(("dspark_core.models", "dspark_core.engine", "services"), OPTIONAL),
    "dspark_core.tokenization": TORCH,
    **dict.fromkeys(PATHS, TORCH),
    "services.common": TORCH,
    "services.gateway": TORCH,
    "services.scheduler": TORCH,
}

OWN = ("dspark_core", "services", "loadtest", "benchmarks", "scripts")
PROTO_MODULES = ("servicer", "convert", "clients")


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _longest_match(module: str, table: dict[str, tuple[str, ...]]) -> str | None:
    fitting = [package for package in table if _within(module, (package,))]
    return max(fitting, key=len, default=None)


def _third_party(name: str) -> bool:
    return name.partition(".")[0] not in sys.stdlib_module_names and not _within(name, (*OWN, "tests"))


def violations(source: Source) -> list[str]:
    module = source.module
    package = _longest_match(module, MAY_IMPORT)
    if package is None:
        is_plain_package = module in (*OWN, "dspark_core", "services") and source.path.endswith("__init__.py")
        return [] if is_plain_package else [f"{module} is in no row of MAY_IMPORT"]
    found = []
    only = _longest_match(module, ONLY)
    for name in source.imports():
        if _within(name, OWN) and not _within(name, (package, *MAY_IMPORT[package])):
            found.append(f"{module} must not import {name}: not in its row of MAY_IMPORT")
        if _third_party(name):
            if only is not None and not _within(name, ONLY[only]):
                found.append(f"{module} must not import {name}: not in its row of ONLY")
            if any(_within(module, (row,)) and _within(name, NEVER[row]) for row in NEVER):
                found.append(f"{module} must not import {name}: in its row of NEVER")
            if _within(name, ("dspark_proto",)) and not module.endswith(PROTO_MODULES):
                found.append(f"{module} must not import {name}: not a servicer, convert or clients module")
    return found


SOURCES = tracked_sources(*OWN)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.path)
def test_imports_follow_the_tables(source: Source):
    assert violations(source) == []


@pytest.mark.parametrize(
    "source", [s for s in SOURCES if s.path.endswith("__init__.py")], ids=lambda source: source.path
)
def test_packages_hold_a_docstring_only(source: Source):
    assert ast.get_docstring(source.tree), f"{source.path} must say what the package is"
    assert len(source.tree.body) == 1, f"{source.path} must hold a docstring and nothing else"


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("dspark_core/records.py", "import numpy"),
        ("dspark_core/errors.py", "from dspark_core.records import Role"),
        ("dspark_core/algorithms/step_time.py", "import torch"),
        ("dspark_core/algorithms/rejection.py", "from dspark_core.engine.rounds.loop import RoundLoop"),
        ("dspark_core/models/decoder.py", "from ..engine import kv_cache"),
        (
            "dspark_core/engine/caches/block_manager.py",
            "from dspark_core.engine.target.batch import RaggedBatch",
        ),
        ("dspark_core/engine/drafts/lookup.py", "from dspark_core.engine.rounds.loop import RoundLoop"),
        ("dspark_core/engine/target/gpu_passes.py", "import triton"),
        ("dspark_core/engine/target/gpu_passes.py", "from dspark_core.cuda import paged_attention"),
        ("dspark_core/engine/rounds/loop.py", "def f():\n    import grpc.aio"),
        ("dspark_core/cluster/fleet.py", "import torch"),
        ("dspark_core/cluster/fleet.py", "from dspark_core.algorithms.rejection import accept"),
        ("dspark_core/cluster/fleet.py", "from services.common.limits import MOST_TIERS"),
        ("dspark_core/cluster/planning/pace.py", "from dspark_core.cluster.fleet import Fleet"),
        ("dspark_core/training/trainer.py", "from dspark_core.evaluation import tasks"),
        ("dspark_core/evaluation/runner.py", "from dspark_core.training.losses import loss"),
        ("dspark_core/evaluation/plots.py", "from services.cli import eval_tables"),
        ("services/verifier/main.py", "from dspark_core.evaluation.runner import EvalRunner"),
        ("services/common/server.py", "from services.gateway.config import GatewayConfig"),
        ("services/common/server.py", "from dspark_proto.v1 import common_pb2"),
        ("services/gateway/verifiers/backend.py", "from services import scheduler"),
        ("services/gateway/verifiers/backend.py", "import torch.nn"),
        ("dspark_core/cluster/planning/planner.py", "from dspark_core.algorithms.rejection import accept"),
        ("services/verifier/main.py", "from dspark_core.training.losses import loss"),
        ("services/verifier/main.py", "from services.drafter.servicer import DrafterServicer"),
        ("loadtest/locustfile.py", "from dspark_core.records import Role"),
        ("dspark_core/surprise/module.py", "import json"),
    ],
)
def test_each_kind_of_forbidden_import_is_found(path: str, line: str):
    assert violations(Source(path, line)) != []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("dspark_core/records.py", "from dspark_core.errors import InvalidRequestError"),
        ("dspark_core/algorithms/rejection.py", "import torch"),
        ("services/gateway/clients.py", "from dspark_proto.v1 import gateway_pb2"),
        (
            "dspark_core/cluster/planning/planner.py",
            "from dspark_core.algorithms.step_time import StepTimeModel",
        ),
        ("services/embedded/system.py", "from services.gateway.main import run"),
        ("services/drafter/servicer.py", "import torch"),
    ],
)
def test_allowed_imports_pass(path: str, line: str):
    assert violations(Source(path, line)) == []
