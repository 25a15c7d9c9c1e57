"""Numbers that no service could work with are refused at start, by every service that reads them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import pytest

from dspark_core.errors import ConfigError
from services.cli.main import main
from services.drafter.config import DrafterServiceConfig
from services.gateway.config import GatewayConfig
from services.scheduler.config import SchedulerConfig
from services.verifier.config import VerifierServiceConfig

Reader = Callable[[Mapping[str, str]], object]
VERIFIER, DRAFTER = VerifierServiceConfig.from_env, DrafterServiceConfig.from_env
GATEWAY, SCHEDULER = GatewayConfig.from_env, SchedulerConfig.from_env
ALL = (VERIFIER, DRAFTER, GATEWAY, SCHEDULER)
HUGE = str(10**30)

REFUSED: tuple[tuple[str, tuple[Reader, ...], tuple[str, ...]], ...] = (
    ("DSPARK_KV_CACHE_MB", (VERIFIER, DRAFTER), ("0", "-1", HUGE)),
    ("DSPARK_DRAFT_CACHE_MB", (DRAFTER,), ("0", "-1", HUGE)),
    ("DSPARK_TORCH_THREADS", (VERIFIER, DRAFTER), ("0", "-1", "100000", HUGE)),
    ("DSPARK_MAX_RUNNING", (VERIFIER,), ("0", "-1", HUGE)),
    ("DSPARK_MAX_BATCH_TOKENS", (VERIFIER,), ("0", "-1", "31", HUGE)),  # 32 requests run
    ("DSPARK_DEVICE", (VERIFIER, DRAFTER), ("gpu", "cuda:x")),
    (
        "DSPARK_MAX_CONTEXT_TOKENS",
        (VERIFIER, GATEWAY),
        ("0", "1"),
    ),  # a prompt and an answer have a token each
    ("DSPARK_DRAFT_DEADLINE_SECONDS", (VERIFIER,), ("0", "-1", "1e300")),
    ("DSPARK_DRAIN_SECONDS", ALL, ("-1", "1e300")),
    ("DSPARK_MAX_CALLS", (VERIFIER, DRAFTER, SCHEDULER), ("0", "-1")),
    ("DSPARK_REQUEST_TIMEOUT_SECONDS", (GATEWAY,), ("0", "-1", "1e10")),  # gRPC: over already
    ("DSPARK_MAX_BODY_BYTES", (GATEWAY,), ("0", "-1", "10", HUGE)),
    ("DSPARK_LEASE_SECONDS", (SCHEDULER,), ("0", "-1", "1e-300", "1e300")),
    ("DSPARK_SYNC_SECONDS", (SCHEDULER,), ("0", "-1", "1e-300", "1e300")),
    ("DSPARK_LOCK_SECONDS", (SCHEDULER,), ("0", "-1", "1e-300", "1e300")),
    ("DSPARK_SCHEDULER_ADDRESS", (VERIFIER, DRAFTER, GATEWAY), ("scheduler:0",)),
    ("DSPARK_DRAFTER_ADDRESS", (VERIFIER,), ("drafter:0",)),
    ("DSPARK_ADVERTISE_ADDRESS", (VERIFIER, DRAFTER, SCHEDULER), ("me:0",)),
)


@pytest.mark.parametrize(
    ("name", "read", "value"),
    [(name, read, value) for name, readers, values in REFUSED for read in readers for value in values],
)
def test_what_cannot_work_is_refused_with_its_variable(name: str, read: Reader, value: str) -> None:
    read({})
    with pytest.raises(ConfigError) as caught:
        read({name: value})
    assert str(caught.value).startswith(f"{name} must be ")
    shown = f"{float(value)}" if re.fullmatch(r"1e-?\d+", value) else value
    assert shown in str(caught.value)


def test_more_requests_than_tokens_are_refused_with_both_variables() -> None:
    with pytest.raises(ConfigError, match=r"DSPARK_MAX_BATCH_TOKENS .* DSPARK_MAX_RUNNING \(600\), got 512"):
        VERIFIER({"DSPARK_MAX_RUNNING": "600", "DSPARK_MAX_BATCH_TOKENS": "512"})
    assert VERIFIER({"DSPARK_MAX_RUNNING": "600", "DSPARK_MAX_BATCH_TOKENS": "600"})


@pytest.mark.parametrize(("running", "tokens"), [("32", 512), ("600", 600)])
def test_where_nothing_is_said_about_tokens_all_requests_have_room(running: str, tokens: int) -> None:
    assert VERIFIER({"DSPARK_MAX_RUNNING": running}).limits.max_batch_tokens == tokens


@pytest.mark.parametrize("flag", ["--pack-tokens", "--max-length"])
def test_features_of_no_tokens_are_refused_before_a_model_is_looked_for(
    capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    places = ("--target-model", "/nowhere", "--answers", "/nowhere", "--out", "/nowhere")
    assert main(["data", "features", *places, flag, "0"]) == 2
    assert f"{flag} must be >= 1, got 0" in capsys.readouterr().err
