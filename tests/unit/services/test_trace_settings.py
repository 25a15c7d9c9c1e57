"""Where rounds are traced is said once, whichever way the stack is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_core.errors import ConfigError
from services.cli.main import build_parser
from services.embedded.options import StackOptions
from services.verifier.config import VerifierServiceConfig


def test_a_verifier_traces_nothing_unless_told_to() -> None:
    assert VerifierServiceConfig.from_env({}).trace is None
    assert StackOptions().trace is None


def test_a_verifier_reads_file_share_and_size() -> None:
    environ = {
        "DSPARK_TRACE_FILE": "/data/rounds.jsonl",
        "DSPARK_TRACE_SAMPLE": "0.5",
        "DSPARK_TRACE_MAX_MB": "3",
    }
    trace = VerifierServiceConfig.from_env(environ).trace
    assert trace is not None
    assert (trace.path, trace.sample, trace.max_bytes) == (Path("/data/rounds.jsonl"), 0.5, 3 * 2**20)


@pytest.mark.parametrize(
    ("name", "value"),
    [("DSPARK_TRACE_SAMPLE", "2"), ("DSPARK_TRACE_MAX_MB", "0"), ("DSPARK_TRACE_SAMPLE", "0")],
)
def test_a_wrong_setting_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be .*{value}"):
        VerifierServiceConfig.from_env({"DSPARK_TRACE_FILE": "x", name: value})


def test_the_flags_of_dspark_up_reach_the_options() -> None:
    arguments = build_parser("up").parse_args(["up", "--trace", "r.jsonl", "--trace-sample", "0.25"])
    assert (arguments.trace, arguments.trace_sample) == (Path("r.jsonl"), 0.25)
    options = StackOptions(trace_file=arguments.trace, trace_sample=arguments.trace_sample)
    assert options.trace is not None
    assert options.trace.sample == 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trace_sample": 3.0}, "--trace-sample 3.0 needs --trace FILE"),
        ({"trace_max_mb": 1}, "--trace-max-mb 1 needs --trace FILE"),
        ({"trace_file": Path("t.jsonl"), "trace_sample": 3.0}, r"trace sample must be in \(0, 1\], got 3.0"),
    ],
)
def test_trace_options_that_cannot_be_meant_are_refused_before_anything_is_loaded(fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        StackOptions(**fields)
