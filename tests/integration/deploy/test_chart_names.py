"""Names and other text of users arrive as they are."""

import re

import pytest
import yaml

from tests.integration.deploy.helm import CHART, Rendered, run
from tests.integration.deploy.test_chart_manifests import KUBERNETES, validate

NUMBERS = """
nameOverride: "123"
image: {pullSecrets: ["123"]}
model:
  target: "123"
  drafter: "123"
  ngrams: "123"
  servedName: "123"
  volume: {type: pvc, existingClaim: "123", size: "123"}
redis: {existingSecret: "123", existingSecretKey: "123", prefix: "123"}
tls: {existingSecret: "123", serverName: "123"}
serviceAccount: {create: false, name: "123"}
scheduler: {replicas: 2, leaderElection: lease}
verifier: {sharedMemory: "123", runtimeClassName: "123", priorityClassName: "123", env: {"ON": "123"}}
gateway:
  keysSecret: "123"
  ingress:
    enabled: true
    className: "123"
    hosts: [{host: "123"}]
    tls: [{secretName: "123", hosts: ["123"]}]
metrics: {serviceMonitor: {enabled: true}, prometheusRule: {enabled: true}, dashboard: {enabled: true}}
networkPolicy: {enabled: true}
"""


@pytest.mark.parametrize(
    "change", ["", "model: {volume: {type: pvc, storageClass: '123', existingClaim: ''}}"]
)
def test_text_that_looks_like_a_number_stays_text(each_helm, tmp_path, change):
    files = {"numbers.yaml": NUMBERS, "change.yaml": change}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    chosen = [part for name in files for part in ("-f", tmp_path / name)]
    done = run(each_helm, "template", "r123", CHART, "--namespace", "1234", *chosen)
    assert done.returncode == 0, done.stderr
    for manifest in filter(None, yaml.safe_load_all(done.stdout)):
        validate(Rendered("", manifest), KUBERNETES[-1])


@pytest.mark.parametrize("release", ["shop.v2", "a" * 53, "a.b.dspark"])
def test_services_have_valid_names_whatever_the_release_is_called(helm, release):
    done = run(helm, "template", release, CHART)
    assert done.returncode == 0, done.stderr
    objects = [one for one in yaml.safe_load_all(done.stdout) if one]
    names = [one["metadata"]["name"] for one in objects if one["kind"] == "Service"]
    assert len(names) == 4
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", name) for name in names), names


def test_a_release_after_which_no_service_can_be_called_is_refused(helm):
    done = run(helm, "template", "1shop", CHART)
    assert done.returncode != 0
    assert "set fullnameOverride" in done.stderr
    assert run(helm, "template", "1shop", CHART, "--set", "fullnameOverride=shop").returncode == 0
