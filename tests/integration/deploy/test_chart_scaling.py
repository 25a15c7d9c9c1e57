"""What the numbers of pods follow."""

import re

import pytest

from tests.integration.deploy.exposed_metrics import exposed_series
from tests.integration.deploy.helm import CHART, ROOT, of_kind, render, run


@pytest.mark.parametrize("component", ["verifier", "drafter"])
def test_engines_scale_by_metrics_of_their_own_not_by_the_cpu(helm, component):
    """One stream keeps all their threads busy: by CPU there would be the most pods at any load."""
    metrics = of_kind(render(helm, "scaling"), "HorizontalPodAutoscaler")[component]["spec"]["metrics"]
    names = {one["pods"]["metric"]["name"] for one in metrics}
    assert names <= set(exposed_series())
    assert names <= set(re.findall(r"dspark_\w+", (ROOT / "docs/operators.md").read_text()))


def test_production_scales_without_an_adapter_only_what_the_cpu_tells_of(helm):
    assert set(of_kind(render(helm, "production"), "HorizontalPodAutoscaler")) == {"gateway"}


def test_the_cpu_may_be_chosen(helm):
    file = "templates/verifier-hpa.yaml"
    flags = "verifier.autoscaling.enabled=true,verifier.autoscaling.targetCPUUtilizationPercentage=90"
    chosen = ["--set", flags, "--set-json", "verifier.autoscaling.metrics=[]", "-s", file]
    (autoscaler,) = render(helm, "default", *chosen)
    (metric,) = autoscaler.manifest["spec"]["metrics"]
    assert metric["resource"]["target"]["averageUtilization"] == 90


def test_an_autoscaler_needs_something_to_go_by(helm):
    flags = ["--set", "verifier.autoscaling.enabled=true", "--set-json", "verifier.autoscaling.metrics=[]"]
    done = run(helm, "template", "shop", CHART, *flags)
    assert done.returncode != 0
    assert "set verifier.autoscaling.metrics or targetCPUUtilizationPercentage" in done.stderr
