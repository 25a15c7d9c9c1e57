"""A fake Kubernetes API server for leases, over HTTP: versions, conflicts, missing rights and hanging."""

import json
import threading
from collections import Counter
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

VERBS = {"GET": "get", "POST": "create", "PUT": "update"}


class KubernetesApi:
    """Answers like the real one for `coordination.k8s.io/v1` leases in its namespaces."""

    def __init__(self, *namespaces: str) -> None:
        self.namespaces = set(namespaces)
        self.leases: dict[tuple[str, str], dict[str, Any]] = {}
        self.denied: set[str] = set()
        """Verbs that are answered with 403."""
        self.calls: Counter[str] = Counter()
        self.answering = threading.Event()
        self.answering.set()
        self._version = 0
        self._lock = threading.Lock()
        api = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def do_PUT(self) -> None:
                self._answer()

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else {}
                api.answering.wait(30)
                status, document = api.answer(self.command, self.path, body)
                text = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: object) -> None:
                """Silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """May be called more than once."""
        self.answering.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def kubeconfig(self, folder: Path, namespace: str | None = None) -> Path:
        context = {"cluster": "here", "user": "me"} | ({"namespace": namespace} if namespace else {})
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": {"token": "t"}}],
            "contexts": [{"name": "here", "context": context}],
            "current-context": "here",
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(document))
        return path

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self._lock:
            return self._answer(method, path, body)

    def _answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        verb = VERBS[method]
        self.calls[verb] += 1
        parts = path.removeprefix("/apis/coordination.k8s.io/v1/namespaces/").split("/")
        if parts[1] != "leases" or parts[0] not in self.namespaces:
            return _status(404, "NotFound")
        if verb in self.denied:
            return _status(403, "Forbidden")
        name = body["metadata"]["name"] if verb == "create" else parts[2]
        key = (parts[0], name)
        stored = self.leases.get(key)
        if verb == "create":
            if stored is not None:
                return _status(409, "AlreadyExists")
            return 201, self._store(key, body, datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        if stored is None:
            return _status(404, "NotFound")
        if verb == "get":
            return 200, stored
        asked = body["metadata"].get("resourceVersion")
        if asked and asked != stored["metadata"]["resourceVersion"]:
            return _status(409, "Conflict")
        return 200, self._store(key, body, stored["metadata"]["creationTimestamp"])

    def _store(self, key: tuple[str, str], body: dict[str, Any], created: str) -> dict[str, Any]:
        self._version += 1
        metadata = body["metadata"] | {"resourceVersion": str(self._version), "creationTimestamp": created}
        # The real server accepts MicroTime only in this format.
        if "spec" in body:
            datetime.strptime(body["spec"]["renewTime"].replace("Z", "+00:00"), "%Y-%m-%dT%H:%M:%S.%f%z")
        self.leases[key] = {**body, "metadata": metadata}
        return self.leases[key]


def _status(code: int, reason: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
