"""Which drafter a verifier and a drafter are told to use."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from dspark_core.zoo_paths import DEFAULT_DRAFTER, NO_DRAFTER
from services.drafter.config import DrafterServiceConfig
from services.verifier.config import VerifierServiceConfig

AT = {"DSPARK_DRAFTER_ADDRESS": "drafter:50054"}


@pytest.mark.parametrize(
    ("environ", "address", "drafter"),
    [
        (AT, "drafter:50054", DEFAULT_DRAFTER),
        ({**AT, "DSPARK_DRAFTER": "/models/d"}, "drafter:50054", "/models/d"),
        ({**AT, "DSPARK_DRAFTER": NO_DRAFTER}, None, None),
        ({"DSPARK_DRAFTER": NO_DRAFTER}, None, None),
        ({}, None, None),
    ],
)
def test_a_verifier_needs_both_a_drafter_and_its_address(
    environ: Mapping[str, str], address: str | None, drafter: str | None
) -> None:
    config = VerifierServiceConfig.from_env(environ)
    assert (config.drafter_address, config.engine.drafter) == (address, drafter)


def test_a_drafter_may_have_nothing_to_draft_with() -> None:
    assert DrafterServiceConfig.from_env({"DSPARK_DRAFTER": NO_DRAFTER}).engine.drafter is None
    assert DrafterServiceConfig.from_env({}).engine.drafter == DEFAULT_DRAFTER


def test_a_drafter_reads_the_size_of_its_own_cache_or_shares_the_verifiers_setting() -> None:
    own = DrafterServiceConfig.from_env({"DSPARK_DRAFT_CACHE_MB": "64", "DSPARK_KV_CACHE_MB": "1024"}).engine
    assert (own.draft_cache_bytes, own.kv_cache_bytes) == (64 * 2**20, 2**30)
    assert DrafterServiceConfig.from_env({"DSPARK_KV_CACHE_MB": "1024"}).engine.draft_cache_bytes is None
