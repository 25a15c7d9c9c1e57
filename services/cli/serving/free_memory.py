"""Memory that this process can still allocate, as limited by the machine and by its control groups.

File caches count as free in both, because the kernel reclaims them on demand.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _Names:
    """Names of a control group's files, which differ between cgroup v1 and v2."""

    mount: str
    limit: str
    used: str
    cached: frozenset[str]
    """Fields of `memory.stat` that count file caches."""


_VERSION_1 = _Names(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    frozenset({"total_active_file", "total_inactive_file"}),
)
_VERSION_2 = _Names(
    "sys/fs/cgroup", "memory.max", "memory.current", frozenset({"active_file", "inactive_file"})
)


def free_memory(root: Path = Path("/")) -> int:
    """In bytes. `root`: directory that holds `proc` and `sys`."""
    return min([_of_machine(root), *_of_groups(root)])


def _of_machine(root: Path) -> int:
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _of_groups(root: Path) -> Iterator[int]:
    """For every control group with a limit that contains this process, directly or through a child."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = _VERSION_1 if controllers else _VERSION_2
        group = PurePosixPath(path.strip().lstrip("/"))
        # In a container the path may be the host's. Then only the mount's root exists, the container's group.
        for one in (group, *group.parents):
            free = _of_group(root / names.mount / one, names)
            if free is not None:
                yield free


def _of_group(folder: Path, names: _Names) -> int | None:
    """None if the group does not exist or has no limit."""
    limit, used = _number(folder / names.limit), _number(folder / names.used)
    if limit is None or used is None:
        return None
    stat = (line.split() for line in _lines(folder / "memory.stat"))
    cached = sum(int(value) for name, value in stat if name in names.cached)
    return max(limit - used + cached, 0)


def _number(path: Path) -> int | None:
    """None also for `max`, which means no limit."""
    (text, *_) = _lines(path) or [""]
    return int(text) if text.strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    """Empty if the file cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
