"""Wrong values are refused, and the message names the value."""

import pytest

from tests.integration.deploy.helm import CHART, run

PUBLIC = "gateway.ingress.enabled=true,gateway.ingress.hosts[0].host=a"
UNWRITABLE = (
    "model.volume.type=pvc,model.volume.accessModes={ReadOnlyMany},model.initContainers[0].name=download"
)
SECRET = "gateway.envFrom[0].secretRef"


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("gateway.replica=2", ["gateway", "replica"]),
        ("verifer.replicas=2", ["verifer"]),
        ("gateway.replicas=-1", ["gateway", "replicas"]),
        ("gateway.replicas=two", ["gateway", "replicas", "integer"]),
        ("drainSeconds=-1", ["drainSeconds"]),
        ("fullnameOverride=1shop", ["fullnameOverride"]),
        ("fullnameOverride=a.b", ["fullnameOverride"]),
        (f"nameOverride={'a' * 64}", ["nameOverride"]),
        ("model.dtype=float16", ["model", "dtype", "bfloat16"]),
        ("model.target=", ["model", "target"]),
        ("model.volume.type=nfs", ["volume", "type", "hostPath"]),
        ("model.volume.type=hostPath", ["model.volume.hostPath must be set"]),
        ("model.volume.mountPath=models", ["mountPath"]),
        (UNWRITABLE, ["model.volume.accessModes is ReadOnlyMany", "model.initContainers"]),
        ("model.initContainers[0].name=download", ["model.initContainers", "model.volume.type is none"]),
        ("logFormat=xml", ["logFormat", "json"]),
        ("redis.url=localhost:6379", ["redis", "url"]),
        ("redis.prefix=", ["redis", "prefix"]),
        ("tracing.endpoint=collector:4317", ["tracing", "endpoint"]),
        ("scheduler.replicas=2,scheduler.leaderElection=off", ["scheduler.replicas is 2", "leaderElection"]),
        ("scheduler.leaderElection=redis", ["scheduler.leaderElection is redis", "redis.url"]),
        ("scheduler.leaderElection=vote", ["leaderElection", "lease"]),
        ("scheduler.env.DSPARK_LEADER_ELECTION=off", ["DSPARK_LEADER_ELECTION", "sets this variable itself"]),
        ("verifier.env.DSPARK_PORT=1", ["verifier.env.DSPARK_PORT", "sets this variable itself"]),
        ("gateway.env.DSPARK_DRAIN_SECONDS=60", ["gateway.env.DSPARK_DRAIN_SECONDS", "sets this variable"]),
        ("drafter.env.DSPARK_METRICS_PORT=1", ["drafter.env.DSPARK_METRICS_PORT", "sets this variable"]),
        ("verifier.env.DSPARK_SCHEDULER_ADDRESS=a:1", ["DSPARK_SCHEDULER_ADDRESS", "sets this variable"]),
        ("scheduler.env.DSPARK_TLS_CERT=/c", ["scheduler.env.DSPARK_TLS_CERT", "sets this variable"]),
        ("gateway.env.DSPARK_TLS_NAME=a", ["gateway.env.DSPARK_TLS_NAME", "sets this variable"]),
        ("gateway.ingress.enabled=true", ["gateway.ingress.hosts"]),
        ("gateway.ingress.hosts[0].path=/v1", ["gateway", "hosts", "host"]),
        (PUBLIC, ["DSPARK_API_KEYS", "gateway.envFrom", "gateway.ingress.allowWithoutKeys"]),
        (f"{PUBLIC},gateway.envFrom[0].configMapRef.name=c", ["no API keys are set"]),
        (f"{PUBLIC},{SECRET}.name=k,{SECRET}.optional=true", ["no API keys are set"]),
        ("gateway.podDisruptionBudget.maxUnavailable=0", ["maxUnavailable"]),
        ("verifier.startupSeconds=1", ["startupSeconds"]),
    ],
)
def test_a_wrong_value_is_refused_by_name(each_helm, setting, named):
    done = run(each_helm, "template", "shop", CHART, "--set", setting)
    assert done.returncode != 0
    assert [word for word in named if word not in done.stderr] == [], done.stderr


def test_an_autoscaler_cannot_have_its_minimum_above_its_maximum(helm):
    flags = (
        "drafter.autoscaling.enabled=true,drafter.autoscaling.minReplicas=5,drafter.autoscaling.maxReplicas=4"
    )
    done = run(helm, "template", "shop", CHART, "--set", flags)
    assert done.returncode != 0
    assert "drafter.autoscaling.minReplicas 5 is above maxReplicas 4" in done.stderr
