"""Every variable that the chart and the compose file set is one that a service reads."""

import re

import pytest
import yaml

from tests.integration.deploy.helm import ROOT, VALUES, of_kind, render

READ = set(
    re.findall(
        r'"((?:DSPARK|REDIS|OTEL)_[A-Z_]+)"',
        "\n".join(path.read_text() for path in sorted((ROOT / "services").rglob("*.py"))),
    )
)
# The OpenTelemetry SDK, Triton and PyTorch read these themselves; POD_IP is only put into another value.
READ_ELSEWHERE = {
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "POD_IP",
    "TORCHINDUCTOR_CACHE_DIR",
    "TRITON_CACHE_DIR",
}
FREE = {"DSPARK_FLAG"}  # the chart's tests set it to see that users' own variables arrive


@pytest.mark.parametrize("values", VALUES)
def test_chart_variables_are_read(helm, values):
    rendered = render(helm, values)
    given = set(of_kind(rendered, "ConfigMap")["config"]["data"])
    for deployment in of_kind(rendered, "Deployment").values():
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        given |= {entry["name"] for entry in container["env"]}
    assert given - READ - READ_ELSEWHERE - FREE == set()


@pytest.mark.parametrize("file", ["docker-compose.yml", "docker-compose.gpu.yml"])
def test_compose_variables_are_read(file):
    services = yaml.safe_load((ROOT / file).read_text())["services"]
    given = {name for service in services.values() for name in service.get("environment", {})}
    assert given - READ - READ_ELSEWHERE == set()


def test_every_variable_is_documented_for_operators():
    documented = set(re.findall(r"(?:DSPARK|REDIS)_[A-Z_]+", (ROOT / "docs/operators.md").read_text()))
    assert {name for name in READ if not name.startswith("OTEL_")} - documented == set()
