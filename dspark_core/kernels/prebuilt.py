"""Libraries compiled ahead of time for several processor levels, for machines without a compiler.

An image is built on one machine and runs on others: it carries one library per processor level, and
each start picks the best one that the local processor can run.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dspark_core.kernels.build import BuildSettings, KernelsUnavailableError, compile_library, processor_flags

_V3 = ("avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")


@dataclass(frozen=True, slots=True)
class Level:
    """A processor level: its compiler flags and the features /proc/cpuinfo must list."""

    name: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]


_V4_ARGUMENTS = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
_V4_NEEDS = (*_V4, "avx512_bf16", "avx512_vnni")

X86_LEVELS = (
    Level(
        "x86-64-v4-amx",
        (*_V4_ARGUMENTS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
        (*_V4_NEEDS, "amx_tile", "amx_bf16", "amx_int8"),
    ),
    Level("x86-64-v4-bf16", _V4_ARGUMENTS, _V4_NEEDS),
    Level("x86-64-v3", ("-march=x86-64-v3",), _V3),
)
"""Best first."""
OTHER_LEVELS = (Level("baseline", (), ()),)


def levels(machine: str) -> tuple[Level, ...]:
    """Levels to compile for on a machine of this architecture, best first."""
    return X86_LEVELS if machine in ("x86_64", "AMD64") else OTHER_LEVELS


def prebuild(
    directory: Path, settings: BuildSettings, on_built: Callable[[Path], None] = lambda _: None
) -> tuple[Path, ...]:
    """Compiles one library per level into `directory`; raises KernelsUnavailableError."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for level in levels(platform.machine()):
        # Links the C++ library statically: the target machine may have another version, or none.
        arguments = (*level.arguments, "-static-libstdc++", "-static-libgcc")
        target = _path(directory, level)
        failure = compile_library(settings.compiler, arguments, target)
        if failure is not None:
            raise KernelsUnavailableError(f"{' '.join(settings.compiler)} failed for {level.name}: {failure}")
        on_built(target)
        paths.append(target)
    return tuple(paths)


def find_prebuilt(
    directory: Path, *, machine: str | None = None, flags: frozenset[str] | None = None
) -> Path:
    """The best library in `directory` for a processor with these flags (default: the local one).

    Raises KernelsUnavailableError if none fits.
    """
    have = processor_flags() if flags is None else flags
    known = levels(machine or platform.machine())
    for level in known:
        if have.issuperset(level.needs) and _path(directory, level).is_file():
            return _path(directory, level)
    names = ", ".join(level.name for level in known)
    raise KernelsUnavailableError(f"no library in {directory} runs on this processor (looked for {names})")


def _path(directory: Path, level: Level) -> Path:
    return directory / f"kernels-{level.name}.so"
