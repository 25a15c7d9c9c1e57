"""How much memory is taken to be free, on machines and in containers that are files here."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.cli.serving import doctor
from services.cli.serving.doctor import CHECKS, Outcome
from services.cli.serving.free_memory import free_memory
from services.embedded.options import StackOptions

MIB = 2**20
GIB = 2**30
MACHINE = {
    "proc/meminfo": "MemTotal: 16777216 kB\nMemFree: 524288 kB\nMemAvailable: 8388608 kB\n",
}
"""Half of it holds files."""
UNLIMITED_1 = "9223372036854771712"


def root_of(folder: Path, files: dict[str, str]) -> Path:
    for name, text in {**MACHINE, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def group_2(folder: str, limit: str, used: int, cached: int) -> dict[str, str]:
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 1\nfile {9 * GIB}\nactive_file {cached}\ninactive_file {MIB}\n",
    }


def group_1(folder: str, limit: str, used: int, cached: int) -> dict[str, str]:
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.stat": f"active_file 5\ntotal_active_file {cached}\ntotal_inactive_file {MIB}\n",
    }


def test_what_holds_files_is_free(tmp_path: Path) -> None:
    assert free_memory(root_of(tmp_path, {})) == 8 * GIB


def test_a_container_of_version_2_is_told_its_own_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **group_2("sys/fs/cgroup", str(4 * GIB), 3 * GIB, GIB)}
    assert free_memory(root_of(tmp_path, files)) == 2 * GIB + MIB


def test_the_least_of_a_group_and_those_around_it_counts(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/user.slice/user-1.slice/dspark.scope\n",
        **group_2("sys/fs/cgroup/user.slice/user-1.slice/dspark.scope", "max", GIB, 0),
        **group_2("sys/fs/cgroup/user.slice/user-1.slice", str(3 * GIB), 2 * GIB, 0),
        **group_2("sys/fs/cgroup/user.slice", str(30 * GIB), 2 * GIB, 0),
    }
    assert free_memory(root_of(tmp_path, files)) == GIB + MIB


@pytest.mark.parametrize("folder", ["sys/fs/cgroup/memory", "sys/fs/cgroup/memory/docker/0a1b"])
def test_a_container_of_version_1_is_told_its_own_limit(tmp_path: Path, folder: str) -> None:
    """Its path is the host's, which it sees only where it shares the host's folders."""
    files = {
        "proc/self/cgroup": "11:cpu,cpuacct:/docker/0a1b\n9:memory:/docker/0a1b\n0::/docker/0a1b\n",
        **group_1(folder, str(2 * GIB), GIB, 3 * MIB),
    }
    assert free_memory(root_of(tmp_path, files)) == GIB + 4 * MIB


def test_groups_without_a_limit_limit_nothing(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "9:memory:/\n0::/\n",
        **group_1("sys/fs/cgroup/memory", UNLIMITED_1, GIB, 0),
        **group_2("sys/fs/cgroup", "max", GIB, 0),
    }
    assert free_memory(root_of(tmp_path, files)) == 8 * GIB


def test_a_group_over_its_limit_has_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", **group_2("sys/fs/cgroup", str(GIB), 2 * GIB, 0)}
    assert free_memory(root_of(tmp_path, files)) == 0


@pytest.mark.parametrize(("free", "outcome"), [(GIB // 2, Outcome.FAILED), (GIB, Outcome.OK)])
def test_the_doctor_asks_for_the_room_of_the_cache(
    monkeypatch: pytest.MonkeyPatch, free: int, outcome: Outcome
) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: free)
    assert CHECKS["memory"](StackOptions(kv_cache_mb=1024, device="cpu")).outcome is outcome
