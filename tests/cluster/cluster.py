"""A release of the chart on a real cluster, by the commands an operator would use."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.integration.deploy.helm import CHART

ASKING = Path(__file__).with_name("asking.py")
RELEASE = "dspark"


@dataclass(frozen=True, slots=True)
class Asked:
    whole: int
    different: int
    failures: list[str]


@dataclass(frozen=True, slots=True)
class Cluster:
    helm: Path
    namespace: str

    def install(self, *flags: str) -> None:
        """Installs or upgrades until all is ready. DSPARK_CLUSTER_HELM_FLAGS tells of images and sizes."""
        own = shlex.split(os.environ.get("DSPARK_CLUSTER_HELM_FLAGS", ""))
        chart = os.environ.get("DSPARK_CLUSTER_CHART", str(CHART))
        self.run_helm(
            *("upgrade", "--install", RELEASE, chart, "--create-namespace", "--wait", "--timeout", "10m"),
            *("--set", "scheduler.replicas=2", "--set", "drainSeconds=8", *own, *flags),
        )

    def run_helm(self, *arguments: str) -> str:
        return _run(self.helm, "--namespace", self.namespace, *arguments)

    def run_kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return _run("kubectl", "--namespace", self.namespace, *arguments, stdin=stdin)

    def get(self, *arguments: str) -> Any:
        return json.loads(self.run_kubectl("get", *arguments, "--output", "json"))

    def pods(self, component: str) -> list[dict[str, Any]]:
        return self.get("pods", "--selector", f"app.kubernetes.io/component={component}")["items"]

    def leader(self) -> tuple[str, str]:
        """-> (who holds the lease, its address)"""
        lease = self.get("lease", f"{RELEASE}-scheduler")
        return lease["spec"]["holderIdentity"], lease["metadata"]["annotations"]["dspark-advertise-address"]

    def restart(self, component: str) -> None:
        deployment = f"deployment/{RELEASE}-{component}"
        self.run_kubectl("rollout", "restart", deployment)
        self.run_kubectl("rollout", "status", deployment, "--timeout", "5m")

    def start_asking(self, name: str, *, seconds: int, users: int = 4) -> None:
        """From a pod of the gateway's image: who is outside would be forwarded to one gateway only."""
        gateway = self.get("deployment", f"{RELEASE}-gateway")["spec"]["template"]["spec"]
        environ = {
            "GATEWAY_URL": f"http://{RELEASE}-gateway:8000",
            "MODEL": "smollm2-135m-instruct",
            "SECONDS": str(seconds),
            "USERS": str(users),
        }
        container = {
            "name": "asking",
            "image": gateway["containers"][0]["image"],
            "imagePullPolicy": gateway["containers"][0]["imagePullPolicy"],
            "command": ["python", "-c", ASKING.read_text(encoding="utf-8")],
            "env": [{"name": key, "value": value} for key, value in environ.items()],
            "securityContext": gateway["containers"][0]["securityContext"],
        }
        spec = {
            "restartPolicy": "Never",
            "enableServiceLinks": False,
            "securityContext": gateway["securityContext"],
            "containers": [container],
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
        self.run_kubectl("apply", "--filename", "-", stdin=yaml.safe_dump(pod))

    def end_asking(self, name: str, *, seconds: float) -> Asked:
        deadline = time.monotonic() + seconds
        while (phase := self.get("pod", name)["status"]["phase"]) in ("Pending", "Running"):
            assert time.monotonic() < deadline, f"pod {name} is still {phase}"
            time.sleep(1)
        printed = self.run_kubectl("logs", name)
        assert phase == "Succeeded", printed
        return Asked(**json.loads(printed.splitlines()[-1]))


def _run(*command: str | Path, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout
