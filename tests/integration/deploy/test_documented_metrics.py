"""The operators' table of metrics is the list of metrics there are."""

import re

from tests.integration.deploy.exposed_metrics import exposed_names
from tests.integration.deploy.helm import ROOT


def test_documented_metrics_are_those_exposed():
    text = (ROOT / "docs/operators.md").read_text()
    table = text.partition("## Metrics")[2].partition("### Logs")[0]
    documented = set(re.findall(r"`(dspark_[a-z_]+)(?:\{[a-z,]+\})?`", table))
    assert documented == exposed_names()
