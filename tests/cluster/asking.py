"""Runs in a pod: asks the gateway at GATEWAY_URL for SECONDS, over as many connections as there are USERS.

Prints a line of JSON: how many answers were whole, how many of them differed from an earlier one to the same
question, and what failed.
"""

import http.client
import json
import os
import random
import threading
import time
from urllib.parse import urlsplit

QUESTIONS = ["Why is the sky blue?", "List five prime numbers.", "def fib(n):", "What is a lease?"]
ADDRESS = urlsplit(os.environ["GATEWAY_URL"]).netloc
MODEL = os.environ["MODEL"]
ENDS = time.monotonic() + float(os.environ["SECONDS"])

known: dict[tuple, str] = {}
told = {"whole": 0, "different": 0, "failures": []}
lock = threading.Lock()


def answer(connection: http.client.HTTPConnection, question: tuple) -> str:
    text, seed, temperature, stream = question
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": text}],
        "seed": seed,
        "temperature": temperature,
        "max_tokens": 40,
        "stream": stream,
    }
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read().decode()
    if response.status != 200:
        raise RuntimeError(f"{response.status} {content}")
    if not stream:
        return json.loads(content)["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in content.split("\n") if line.startswith("data: ")]
    if events[-1] != "[DONE]":
        raise RuntimeError(f"the stream ended with {events[-1]}")
    parts = [choice["delta"] for event in events[:-1] for choice in json.loads(event)["choices"]]
    return "".join(part.get("content") or "" for part in parts)


def user(number: int) -> None:
    choices = random.Random(number)
    connection = http.client.HTTPConnection(ADDRESS, timeout=60)
    while time.monotonic() < ENDS:
        question = (choices.choice(QUESTIONS), choices.randrange(2), choices.choice([0, 1.0]))
        try:
            text = answer(connection, (*question, choices.random() < 0.5))
        except (OSError, http.client.HTTPException, RuntimeError) as error:
            connection.close()
            with lock:
                told["failures"].append(f"{type(error).__name__}: {error}")
            time.sleep(0.2)
        else:
            with lock:
                told["whole"] += 1
                told["different"] += known.setdefault(question, text) != text


users = [threading.Thread(target=user, args=(number,)) for number in range(int(os.environ["USERS"]))]
for one in users:
    one.start()
for one in users:
    one.join()
print(json.dumps(told))
