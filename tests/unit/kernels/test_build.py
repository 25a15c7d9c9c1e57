"""Building never fails the program: it yields a library, or a reason."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from dspark_core.errors import ConfigError
from dspark_core.kernels.build import BuildSettings, KernelsUnavailableError, build_library
from dspark_core.kernels.library import Kernels, load_kernels, native_kernels


def settings(directory: Path, *command: str) -> BuildSettings:
    return BuildSettings(cache_directory=directory, compiler=command)


def fake_compiler(directory: Path, body: str) -> str:
    path = directory / "c++"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exit 0\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_the_switch_and_the_compiler_come_from_the_environment(tmp_path: Path) -> None:
    found = BuildSettings.from_env({"CXX": "ccache g++", "DSPARK_CACHE_DIR": str(tmp_path)})
    assert found == BuildSettings(cache_directory=tmp_path, compiler=("ccache", "g++"))
    with pytest.raises(KernelsUnavailableError, match="DSPARK_KERNELS=off"):
        BuildSettings.from_env({"DSPARK_KERNELS": "off"})


@pytest.mark.parametrize("prebuilt", ["", "/nowhere"])
def test_a_wrong_switch_does_not_pass_for_a_machine_without_kernels(
    monkeypatch: pytest.MonkeyPatch, prebuilt: str
) -> None:
    monkeypatch.setenv("DSPARK_KERNELS", "maybe")
    monkeypatch.setenv("DSPARK_PREBUILT_KERNELS", prebuilt)
    with pytest.raises(ConfigError, match="DSPARK_KERNELS must be on or off, got 'maybe'"):
        load_kernels.__wrapped__()


def test_the_cache_lies_in_the_users_cache_directory() -> None:
    environ = {"CXX": "g++", "HOME": "/home/someone"}
    assert BuildSettings.from_env(environ).cache_directory == Path("/home/someone/.cache/dspark")
    environ["XDG_CACHE_HOME"] = "/var/cache"
    assert BuildSettings.from_env(environ).cache_directory == Path("/var/cache/dspark")


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the directory lies that is used without HOME."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"dspark-{os.geteuid()}"


def test_without_a_home_the_cache_is_the_users_alone(temporary: Path) -> None:
    for _ in range(2):  # made, then found
        assert BuildSettings.from_env({"CXX": "g++"}).cache_directory == temporary
        assert temporary.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "another's"])
def test_without_a_home_nothing_is_loaded_that_others_could_have_put_there(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    if kind == "a file":
        temporary.touch()
    elif kind == "a link":
        private = temporary.with_name("private")
        private.mkdir(mode=0o700)
        temporary.symlink_to(private)
    else:
        temporary.mkdir(mode=0o700)
        temporary.chmod(0o770 if kind == "open to others" else 0o700)
    if kind == "another's":
        other = os.geteuid() + 1
        temporary.rename(temporary.with_name(f"dspark-{other}"))
        monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(KernelsUnavailableError, match=r"HOME is not set, and .*/dspark-"):
        BuildSettings.from_env({"CXX": "g++"})


def test_a_library_is_compiled_once(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    compiler = fake_compiler(tmp_path, f'echo x >> {log}\nfor last; do :; done\n: > "$last"')
    first = build_library(settings(tmp_path / "cache", compiler))
    assert build_library(settings(tmp_path / "cache", compiler)) == first
    assert log.read_text() == "x\n"
    assert sorted(path.name for path in first.parent.iterdir()) == [first.name, "kernels.lock"]


def test_flags_the_compiler_does_not_know_are_left_out(tmp_path: Path) -> None:
    script = 'case "$*" in *-march=*|*-mcpu=*) echo "error: what?" >&2; exit 1;; esac'
    compiler = fake_compiler(tmp_path, f'{script}\nfor last; do :; done\n: > "$last"')
    assert build_library(settings(tmp_path / "cache", compiler)).is_file()


def test_the_kernels_compile_and_load_where_there_is_a_compiler() -> None:
    """Tests of kernels are skipped without kernels: broken sources must not pass as a bare machine."""
    try:
        found = BuildSettings.from_env(os.environ)
    except KernelsUnavailableError as reason:
        pytest.skip(str(reason))
    Kernels(build_library(found))


def test_a_failing_compiler_is_quoted_and_leaves_nothing(tmp_path: Path) -> None:
    compiler = fake_compiler(tmp_path, 'echo "x.cpp:1: error: no such thing" >&2; exit 1')
    with pytest.raises(KernelsUnavailableError, match="error: no such thing"):
        build_library(settings(tmp_path / "cache", compiler))
    assert list((tmp_path / "cache").glob("kernels-*")) == []


def test_a_compiler_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelsUnavailableError, match="no-such-compiler cannot be run"):
        build_library(settings(tmp_path, str(tmp_path / "no-such-compiler")))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(KernelsUnavailableError, match="cannot write to"):
        build_library(settings(tmp_path / "cache", "true"))


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "kernels.so").write_text("nothing")
    with pytest.raises(KernelsUnavailableError, match="cannot be loaded"):
        Kernels(tmp_path / "kernels.so")


def test_the_kernels_say_what_they_were_compiled_for() -> None:
    kernels = native_kernels()
    if kernels is None:
        pytest.skip("no native kernels on this machine")
    assert kernels.instructions in ("avx512_bf16, amx", "avx512_bf16", "avx512", "avx2", "portable")
