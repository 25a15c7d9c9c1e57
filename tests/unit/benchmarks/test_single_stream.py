"""The benchmark of one stream needs no more than it was asked for."""

from __future__ import annotations

import importlib
import sys

import pytest


def test_it_runs_where_transformers_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("benchmarks.single_stream", "benchmarks.peers_transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not there
    importlib.import_module("benchmarks.single_stream")
