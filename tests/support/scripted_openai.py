"""An OpenAI-compatible server that follows a script: real HTTP, no model."""

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Script:
    """`answer` gets the request body and how often its prompt was asked before. A `bytes` answer is sent
    with a gzip header."""

    answer: Callable[[dict[str, Any], int], tuple[int, object]]
    asked: list[dict[str, Any]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    attempts: Counter[str] = field(default_factory=Counter)


def completion(text: object, finish: object = "stop", **fields: object) -> dict[str, object]:
    message = {"role": "assistant", "content": text, **fields}
    return {"choices": [{"message": message, "finish_reason": finish}]}


@contextmanager
def scripted_openai(script: Script) -> Iterator[str]:
    """Yields the server's address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "scripted"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][-1]["content"]
            with script.lock:
                script.asked.append(body)
                before = script.attempts[prompt]
                script.attempts[prompt] += 1
                script.at_once += 1
                script.most_at_once = max(script.most_at_once, script.at_once)
            status, content = script.answer(body, before)
            with script.lock:
                script.at_once -= 1
            self._send(status, content)

        def _send(self, status: int, content: object) -> None:
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            data = text.encode() if isinstance(text, str) else text
            try:
                self.send_response(status)
                if isinstance(content, bytes):
                    self.send_header("content-encoding", "gzip")
                self.send_header("content-length", str(len(data)))
                self.send_header("content-type", "application/json")
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:
                pass  # the client has gone

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
