"""A section that is null, for example because all its lines are comments, sets nothing: it is no error."""

import pytest
import yaml

from tests.integration.deploy.helm import CHART, run

SERVICES = ("gateway", "scheduler", "drafter", "verifier")
SECTIONS = (
    *("redis", "tracing", "tls", "serviceAccount", "networkPolicy", "metrics", "model.volume"),
    *("metrics.serviceMonitor", "metrics.dashboard", "gateway.service", "gateway.ingress"),
    *(f"{service}.{name}" for service in SERVICES for name in ("env", "podDisruptionBudget", "resources")),
    *(f"{service}.autoscaling" for service in SERVICES if service != "scheduler"),
)


def test_sections_may_be_null(each_helm):
    failed = {}
    for section in SECTIONS:
        done = run(each_helm, "template", "shop", CHART, "--set", f"{section}=null")
        if done.returncode:
            failed[section] = done.stderr
    assert failed == {}


@pytest.mark.parametrize("section", ["redis", "gateway.service", "model.volume"])
def test_a_null_section_is_one_with_nothing_set(helm, section):
    usual = run(helm, "template", "shop", CHART)
    assert run(helm, "template", "shop", CHART, "--set", f"{section}=null").stdout == usual.stdout


def test_a_dashboard_needs_no_labels_of_its_own(helm):
    flags = "metrics.dashboard.enabled=true,metrics.dashboard.labels=null"
    done = run(helm, "template", "shop", CHART, "--set", flags, "-s", "templates/dashboard.yaml")
    assert yaml.safe_load(done.stdout)["metadata"]["labels"]["app.kubernetes.io/component"] == "metrics"
