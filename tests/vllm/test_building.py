"""What vLLM is told at start, and what is refused then."""

from pathlib import Path

import pytest

from dspark_core.models.loading import read_target_facts
from tests.vllm.test_engine import options

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]


def test_graphs_compiled_for_other_layers_are_not_taken_from_vllms_cache(target_directory: Path) -> None:
    """They contain what the drafter is given, and vLLM finds them again by its configuration's hash."""
    from dspark_core.vllm_engine.building import configuration

    facts = read_target_facts(str(target_directory))
    given = options(target_directory, additional_config={"own": 1})
    found = {
        layers: configuration(given, facts, most_drafts=7, tap_layers=layers) for layers in [(), (0,), (0, 2)]
    }
    assert len({one.compute_hash() for one in found.values()}) == 3
    again = configuration(given, facts, most_drafts=7, tap_layers=(0, 2))
    assert again.compute_hash() == found[0, 2].compute_hash()
    assert again.additional_config["own"] == 1
