"""A real kube-apiserver with its etcd, from the binaries in the folder that KUBEBUILDER_ASSETS names."""

import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml

from tests.support.ports import free_ports

TOKEN = "lease-test"


@contextmanager
def kube_apiserver(folder: Path):
    """Yields the path of a kubeconfig with full rights."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets or not (Path(assets) / "kube-apiserver").is_file():
        pytest.skip("KUBEBUILDER_ASSETS does not name a folder with etcd and kube-apiserver")
    etcd_port, peer_port, port = free_ports(3)
    etcd = f"http://127.0.0.1:{etcd_port}"
    key = folder / "accounts.key"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text(f"{TOKEN},tester,1,system:masters\n")
    with ExitStack() as stack:
        _start(
            stack,
            Path(assets) / "etcd",
            *("--data-dir", folder / "etcd", "--listen-client-urls", etcd, "--advertise-client-urls", etcd),
            *("--listen-peer-urls", f"http://127.0.0.1:{peer_port}"),
        )
        _start(
            stack,
            Path(assets) / "kube-apiserver",
            *("--etcd-servers", etcd, "--cert-dir", folder / "certificates"),
            *("--bind-address", "127.0.0.1", "--secure-port", str(port)),
            *("--token-auth-file", folder / "tokens.csv", "--authorization-mode", "RBAC"),
            *("--service-account-issuer", "https://test", "--service-account-key-file", key),
            *("--service-account-signing-key-file", key, "--service-cluster-ip-range", "10.0.0.0/24"),
        )
        _wait(f"https://127.0.0.1:{port}/readyz")
        yield _kubeconfig(folder, port)


def _start(stack: ExitStack, *command: str | Path) -> None:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(process.wait, 20)
    stack.callback(process.terminate)


def _wait(url: str) -> None:
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5, context=trusting):
                return
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.2)


def _kubeconfig(folder: Path, port: int) -> Path:
    server = {"server": f"https://127.0.0.1:{port}", "insecure-skip-tls-verify": True}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": server}],
        "users": [{"name": "me", "user": {"token": TOKEN}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me", "namespace": "default"}}],
        "current-context": "here",
    }
    path = folder / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path
