"""Names and paths of drafters and tables of n-grams, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dspark_core import zoo_paths
from dspark_core.errors import ConfigError
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.zoo_paths import (
    BASELINES,
    DEFAULT_DRAFTER,
    NGRAMS_AUTO,
    NO_NGRAMS,
    resolve_drafter_path,
    resolve_ngrams_path,
    shipped_drafters,
    shipped_ngrams,
)

SHIPPED = f"{DEFAULT_MODEL}-ngrams"


def test_what_ships_is_found_by_name() -> None:
    assert (resolve_drafter_path(DEFAULT_DRAFTER) / "model.safetensors").is_file()
    assert SHIPPED in shipped_ngrams()
    by_name = resolve_ngrams_path(SHIPPED.upper(), "whatever")
    assert by_name is not None
    assert by_name.is_file()
    assert resolve_ngrams_path(NGRAMS_AUTO, DEFAULT_MODEL.upper()) == by_name


@pytest.mark.parametrize(("name", "target"), [(NO_NGRAMS, DEFAULT_MODEL), (NGRAMS_AUTO, "/models/other")])
def test_there_may_be_none(name: str, target: str) -> None:
    assert resolve_ngrams_path(name, target) is None


def test_files_are_taken_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "ngrams.safetensors"
    file.touch()
    assert resolve_ngrams_path(str(file), DEFAULT_MODEL) == file


@pytest.mark.parametrize("name", ["", "nothing", "/"])
def test_unknown_names_are_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{SHIPPED}, auto, none"):
        resolve_ngrams_path(name, DEFAULT_MODEL)
    with pytest.raises(ConfigError, match=DEFAULT_DRAFTER):
        resolve_drafter_path("" if name == "/" else name)


def test_a_baseline_that_is_left_out_is_said_to_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zoo_paths, "_ZOO", tmp_path)
    for name in BASELINES:
        with pytest.raises(
            ConfigError, match=rf"'{name}' is a baseline and not part.*dspark_core/zoo/{name} in"
        ):
            resolve_drafter_path(name)


def test_a_checkout_holds_the_default_and_the_baselines() -> None:
    assert set(shipped_drafters()) == {DEFAULT_DRAFTER, *BASELINES}


def test_resolving_needs_no_torch() -> None:
    code = "import sys, dspark_core.zoo_paths; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
