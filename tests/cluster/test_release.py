"""The chart on a cluster: schedulers elect by Lease, pods are replaced under load, TLS is turned on."""

import time
from pathlib import Path

import pytest

from services.common.tls import DEFAULT_NAME
from tests.cluster.cluster import RELEASE, Cluster
from tests.support.certificates import write_tls

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

COMPONENTS = ("gateway", "scheduler", "drafter", "verifier")


def test_the_charts_own_test_passes(cluster: Cluster) -> None:
    assert "Succeeded" in cluster.run_helm("test", RELEASE)


def test_another_scheduler_leads_within_five_seconds_of_its_leaders_death(cluster: Cluster) -> None:
    holder, address = cluster.leader()
    addresses = {pod["status"]["podIP"]: pod["metadata"]["name"] for pod in cluster.pods("scheduler")}
    leading = addresses[address.rpartition(":")[0]]
    began = time.monotonic()
    cluster.run_kubectl("delete", "pod", leading, "--force", "--grace-period=0", "--wait=false")
    while (now := cluster.leader())[0] == holder:
        assert time.monotonic() - began < 30
        time.sleep(0.1)
    assert time.monotonic() - began < 5
    assert now[1] != address
    cluster.run_kubectl("rollout", "status", f"deployment/{RELEASE}-scheduler", "--timeout", "5m")


def test_replacing_every_pod_fails_no_request_and_changes_no_answer(cluster: Cluster) -> None:
    cluster.start_asking("through-rollouts", seconds=150)
    time.sleep(5)
    for component in COMPONENTS:
        cluster.restart(component)
    asked = cluster.end_asking("through-rollouts", seconds=300)
    assert asked.failures == []
    assert asked.different == 0
    assert asked.whole > 50


def test_killing_pods_without_a_warning_fails_no_request(cluster: Cluster) -> None:
    """All but gateways: their clients' connections end there."""
    cluster.run_kubectl("scale", f"deployment/{RELEASE}-verifier", "--replicas", "2")
    cluster.run_kubectl("rollout", "status", f"deployment/{RELEASE}-verifier", "--timeout", "5m")
    cluster.start_asking("through-kills", seconds=90)
    time.sleep(5)
    for component in ("drafter", "scheduler", "verifier"):
        name = cluster.pods(component)[0]["metadata"]["name"]
        cluster.run_kubectl("delete", "pod", name, "--force", "--grace-period=0", "--wait=false")
        time.sleep(8)
        cluster.run_kubectl("rollout", "status", f"deployment/{RELEASE}-{component}", "--timeout", "5m")
    asked = cluster.end_asking("through-kills", seconds=300)
    assert asked.failures == []
    assert asked.different == 0
    assert asked.whole > 50


def test_tls_between_services_can_be_turned_on(cluster: Cluster, tmp_path: Path) -> None:
    tls = write_tls(tmp_path)
    files = {"tls.crt": tls.certificate, "tls.key": tls.key, "ca.crt": tls.authority}
    cluster.run_kubectl(
        *("create", "secret", "generic", "between-services"),
        *(f"--from-file={key}={path}" for key, path in files.items()),
    )
    cluster.install("--set", "tls.existingSecret=between-services", "--set", f"tls.serverName={DEFAULT_NAME}")
    assert "Succeeded" in cluster.run_helm("test", RELEASE)
