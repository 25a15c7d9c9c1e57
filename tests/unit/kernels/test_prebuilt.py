"""Libraries for kinds of processors: which there are, and which is taken."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from dspark_core.kernels.build import BuildSettings, KernelsUnavailableError
from dspark_core.kernels.library import Kernels
from dspark_core.kernels.prebuilt import X86_LEVELS, find_prebuilt, levels, prebuild

BEST, MIDDLE, PLAIN = X86_LEVELS


def compiler(directory: Path, body: str) -> tuple[str, ...]:
    """A stand-in that is quick: a script."""
    script = directory / "cxx"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)
    return (str(script),)


def settings(directory: Path, body: str) -> BuildSettings:
    return BuildSettings(cache_directory=directory, compiler=compiler(directory, body))


WRITE_ARGUMENTS = 'for last; do :; done; echo "$@" > "$last"'


def test_each_kind_of_processor_gets_a_library_of_its_own(tmp_path: Path) -> None:
    heard: list[Path] = []
    made = prebuild(tmp_path / "out", settings(tmp_path, WRITE_ARGUMENTS), on_built=heard.append)
    expected = levels(platform.machine())
    assert heard == list(made)
    assert len(made) == len(expected)
    for path, level in zip(made, expected, strict=True):
        assert set(level.arguments) <= set(path.read_text().split())
        assert "-march=native" not in path.read_text()


def test_a_compiler_that_fails_is_named_with_its_error(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match=r"cxx failed for .*: error: no such thing"):
        prebuild(tmp_path / "out", settings(tmp_path, "echo 'error: no such thing' >&2; exit 1"))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (frozenset(BEST.needs), BEST.name),
        (frozenset(BEST.needs) - {"amx_int8"}, MIDDLE.name),
        (frozenset(BEST.needs) - {"avx512_bf16"}, PLAIN.name),
        (frozenset(PLAIN.needs), PLAIN.name),
    ],
)
def test_the_best_library_that_the_processor_can_run_is_taken(
    tmp_path: Path, flags: frozenset[str], name: str
) -> None:
    for level in X86_LEVELS:
        (tmp_path / f"kernels-{level.name}.so").touch()
    found = find_prebuilt(tmp_path, machine="x86_64", flags=flags)
    assert found == tmp_path / f"kernels-{name}.so"


def test_a_processor_that_can_run_none_of_them_is_told_so(tmp_path: Path) -> None:
    for level in X86_LEVELS:
        (tmp_path / f"kernels-{level.name}.so").touch()
    with pytest.raises(KernelsUnavailableError, match="x86-64-v3"):
        find_prebuilt(tmp_path, machine="x86_64", flags=frozenset({"sse2"}))
    with pytest.raises(KernelsUnavailableError, match="baseline"):
        find_prebuilt(tmp_path, machine="aarch64", flags=frozenset())


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / f"kernels-{BEST.name}.so"
    path.write_text("not a library")
    with pytest.raises(KernelsUnavailableError, match="cannot be loaded"):
        Kernels(find_prebuilt(tmp_path, machine="x86_64", flags=frozenset(BEST.needs)))
