"""Names and other text of users arrive as they are."""

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
