"""The script that `helm test` runs, over real HTTP."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

import pytest

from tests.integration.deploy.helm import CHART, of_kind, render
from tests.support.served_http import served


@contextmanager
def gateway(completion_tokens: int, status: int = 200, key: str | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert body["model"] == "tiny"
            allowed = key is None or self.headers["Authorization"] == f"Bearer {key}"
            self.reply(status if allowed else 401, {"usage": {"completion_tokens": completion_tokens}})

        def reply(self, code: int, value: object) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_: object) -> None:
            """Silent."""

    with served(Handler) as url:
        yield url


def smoke(url: str, **variables: str) -> int:
    command = [sys.executable, "-c", (CHART / "files/smoke.py").read_text()]
    environment = {**os.environ, "GATEWAY_URL": url, **variables}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False).returncode


@pytest.mark.parametrize(("tokens", "status", "passes"), [(3, 200, True), (0, 200, False), (3, 503, False)])
def test_passes_only_when_tokens_come_back(tokens, status, passes):
    with gateway(tokens, status) as url:
        assert (smoke(url) == 0) is passes


def test_sends_the_key_that_the_gateway_asks_for():
    with gateway(3, key="k1") as url:
        assert smoke(url, DSPARK_API_KEYS="k1,k2") == 0
        assert smoke(url, DSPARK_API_KEYS="k1@gold,k2") == 0
        assert smoke(url, DSPARK_API_KEY="k1") == 0
        assert smoke(url) != 0
    with gateway(3, key="k@1") as url:
        assert smoke(url, DSPARK_API_KEYS="k@1@gold") == 0


def test_fails_without_a_gateway():
    assert smoke("http://127.0.0.1:9") != 0


def test_the_pod_runs_the_script_against_the_gateway_service(helm):
    rendered = render(helm, "everything")
    (container,) = of_kind(rendered, "Pod")["test"]["spec"]["containers"]
    assert container["command"] == ["python", "-c", (CHART / "files/smoke.py").read_text()]
    service = of_kind(rendered, "Service")["gateway"]
    url = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert container["env"] == [{"name": "GATEWAY_URL", "value": url}]
    assert container["envFrom"] == [{"secretRef": {"name": "gateway-keys"}}], "keys the gateway asks for"


def test_the_pod_has_the_keys_that_the_gateway_has_in_plain_text(helm):
    keys = {"DSPARK_API_KEY": "k1", "DSPARK_API_KEYS": "k1@gold,k2"}
    values = {**keys, "DSPARK_CORS_ORIGINS": "*"}
    flags = [f"gateway.env.{name}={value}".replace(",", "\\,") for name, value in values.items()]
    rendered = render(helm, "default", *(part for flag in flags for part in ("--set-string", flag)))
    (container,) = of_kind(rendered, "Pod")["test"]["spec"]["containers"]
    assert {one["name"]: one["value"] for one in container["env"][1:]} == keys
