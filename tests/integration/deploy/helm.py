"""Runs the real helm on the project's chart and reads what it renders."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "deploy/helm/dspark"
HERE = Path(__file__).resolve().parent

VALUES: dict[str, Path | None] = {
    "default": None,
    "gpu": ROOT / "deploy/helm/values/gpu.yaml",
    "vllm": ROOT / "deploy/helm/values/vllm.yaml",
    "production": ROOT / "deploy/helm/values/production.yaml",
    "everything": HERE / "values/everything.yaml",
    "minimal": HERE / "values/minimal.yaml",
    "claim": HERE / "values/claim.yaml",
    "lease": HERE / "values/lease.yaml",
    "own_account": HERE / "values/own_account.yaml",
    "scaling": HERE / "values/scaling.yaml",
    "tls": HERE / "values/tls.yaml",
    "no_drafter": HERE / "values/no_drafter.yaml",
}

Manifest = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    source: str
    """Path of the template below the chart."""
    manifest: Manifest


def find(name: str) -> Path | None:
    """A helm that scripts/fetch_helm.sh fetched; failing that the machine's own."""
    fetched = ROOT / os.environ.get("TOOLS", ".cache/tools") / name
    if fetched.is_file():
        return fetched
    own = shutil.which("helm")
    return Path(own) if own else None


def run(helm: Path, *arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [helm, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def render(helm: Path, values: str = "default", *flags: str) -> list[Rendered]:
    """Every object the chart makes, hooks included, with the template each came from."""
    rendered = []
    for document in re.split(r"^---\n", _template(helm, values, *flags), flags=re.MULTILINE):
        manifest = yaml.load(document, Loader=yaml.CSafeLoader)
        if manifest is not None:
            source = re.search(r"^# Source: dspark/(.*)$", document, flags=re.MULTILINE)
            assert source, document
            rendered.append(Rendered(source.group(1), manifest))
    return rendered


@cache
def _template(helm: Path, values: str, *flags: str) -> str:
    path = VALUES[values]
    chosen = ["-f", str(path)] if path else []
    done = run(helm, "template", "shop", CHART, "--namespace", "llm", *chosen, *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_kind(rendered: list[Rendered], kind: str) -> dict[str, Manifest]:
    """Objects of a kind by their component."""
    return {
        item.manifest["metadata"]["labels"]["app.kubernetes.io/component"]: item.manifest
        for item in rendered
        if item.manifest["kind"] == kind
    }
