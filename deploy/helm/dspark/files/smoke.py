"""Asks the gateway at GATEWAY_URL one question and fails unless tokens come back.

Sends DSPARK_API_KEY, else the first of DSPARK_API_KEYS, where the gateway asks for a key.
"""

import json
import os
import urllib.request

url = os.environ["GATEWAY_URL"]
entry = os.environ.get("DSPARK_API_KEYS", "").split(",")[0].strip()
key = os.environ.get("DSPARK_API_KEY") or entry.rpartition("@")[0] or entry  # key or key@tier
headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
request = urllib.request.Request(f"{url}/v1/models", headers=headers)
with urllib.request.urlopen(request, timeout=10) as response:
    model = json.load(response)["data"][0]["id"]
body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16}
request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), headers)
with urllib.request.urlopen(request, timeout=120) as response:
    answer = json.load(response)
print(json.dumps(answer, indent=2))
if answer["usage"]["completion_tokens"] < 1:
    raise SystemExit("the answer is empty")
