"""Asks the gateway at GATEWAY_URL one question and fails unless tokens come back."""

import json
import os
import urllib.request

url = os.environ["GATEWAY_URL"]
with urllib.request.urlopen(f"{url}/v1/models", timeout=10) as response:
    model = json.load(response)["data"][0]["id"]
body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
request = urllib.request.Request(
    f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
)
with urllib.request.urlopen(request, timeout=120) as response:
    answer = json.load(response)
print(json.dumps(answer, indent=2))
if answer["usage"]["completion_tokens"] < 1:
    raise SystemExit("the answer is empty")
