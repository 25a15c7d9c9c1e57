"""What the chart reads from a running cluster, here a server that knows one Deployment."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import yaml

from tests.integration.deploy.helm import CHART, run
from tests.support.served_http import served

DEPLOYMENTS = "/apis/apps/v1/namespaces/llm/deployments/"
KINDS = {
    "v1": ("ConfigMap", "Service", "ServiceAccount", "Pod"),
    "apps/v1": ("Deployment",),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "policy/v1": ("PodDisruptionBudget",),
}


def discovery() -> dict[str, dict]:
    groups = [version.split("/") for version in KINDS if "/" in version]
    known = {
        "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "groups": [
                {"name": group, "versions": [{"groupVersion": f"{group}/{version}", "version": version}]}
                for group, version in groups
            ],
        },
    }
    for version, kinds in KINDS.items():
        resources = [
            {"name": f"{kind.lower()}s", "namespaced": True, "kind": kind, "verbs": ["get"]} for kind in kinds
        ]
        listed = {"kind": "APIResourceList", "groupVersion": version, "resources": resources}
        known[f"/apis/{version}" if "/" in version else f"/api/{version}"] = listed
    return known


@contextmanager
def cluster(answers: dict[str, dict]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0])
            missing = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
            self.send_response(404 if found is None else 200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(found or missing).encode())

        def log_message(self, *_: object) -> None:
            """Silent."""

    with served(Handler) as url:
        yield url


def replicas(helm: Path, live: int | None, *flags: str) -> int | None:
    answers = discovery()
    if live is not None:
        name = "shop-dspark-gateway"
        owner = {"meta.helm.sh/release-name": "shop", "meta.helm.sh/release-namespace": "llm"}
        labels = {"app.kubernetes.io/managed-by": "Helm"}
        metadata = {"name": name, "namespace": "llm", "annotations": owner, "labels": labels}
        running = {"metadata": metadata, "spec": {"replicas": live}}
        answers[DEPLOYMENTS + name] = {"apiVersion": "apps/v1", "kind": "Deployment", **running}
    with cluster(answers) as url:
        where = [
            "--namespace",
            "llm",
            "--dry-run=server",
            "--kube-apiserver",
            url,
            "--disable-openapi-validation",
        ]
        file = "templates/gateway-deployment.yaml"
        done = run(helm, "template", "shop", CHART, *where, "-s", file, *flags)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)["spec"].get("replicas")


@pytest.mark.parametrize("live", [5, 0])
def test_turning_autoscaling_on_keeps_the_number_of_pods(each_helm, live):
    """Without a number the API server would take one pod, until the autoscaler has looked."""
    assert replicas(each_helm, live, "--set", "gateway.autoscaling.enabled=true") == live


def test_a_new_release_leaves_the_number_to_the_autoscaler(helm):
    assert replicas(helm, None, "--set", "gateway.autoscaling.enabled=true") is None


def test_without_autoscaling_the_values_decide(helm):
    assert replicas(helm, 5) == 2
