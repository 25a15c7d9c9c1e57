"""The gateway as a process in a small cluster: routing, failover during a stream, drain."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk

from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.scheduler.scheduler import Scheduler
from services.scheduler.servicer import SchedulerServicer
from tests.support.byte_tokenizer import TEMPLATE, byte_backend
from tests.support.polling import eventually
from tests.support.scripted_verifier import ScriptedVerifier

TEXT = "one two three four five six"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def model(tmp_path: Path) -> str:
    byte_backend().save(str(tmp_path / "tokenizer.json"))
    settings = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return str(tmp_path)


class Cluster:
    """A real scheduler and two scripted verifiers."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.scheduler = Scheduler(lease_seconds=60)
        self.scheduler_server = GrpcServer(
            ServerOptions(port=0, host="127.0.0.1"),
            [SchedulerServicer(self.scheduler).register],
            Telemetry(service="scheduler"),
        )
        self.verifiers = [ScriptedVerifier(name, model, TEXT) for name in ("v1", "v2")]

    async def start(self) -> None:
        await self.scheduler.start()
        await self.scheduler_server.start()
        for verifier in self.verifiers:
            await verifier.start()
            await self.scheduler.register(verifier.replica)

    async def stop(self) -> None:
        for verifier in self.verifiers:
            await verifier.kill()
        await self.scheduler.close()
        await self.scheduler_server.stop()

    def busy(self) -> ScriptedVerifier | None:
        return next((verifier for verifier in self.verifiers if verifier.running), None)


@pytest.fixture
async def cluster(model: str) -> AsyncIterator[Cluster]:
    cluster = Cluster(model)
    await cluster.start()
    yield cluster
    await cluster.stop()


@asynccontextmanager
async def gateway(cluster: Cluster) -> AsyncIterator[tuple[asyncio.subprocess.Process, AsyncOpenAI]]:
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([".", "proto/gen"]),
        "DSPARK_TARGET_MODEL": cluster.model,
        "DSPARK_SERVED_MODEL_NAME": "demo",
        "DSPARK_HOST": "127.0.0.1",
        "DSPARK_PORT": "0",
        "DSPARK_HTTP_PORT": "0",
        "DSPARK_DRAIN_SECONDS": "10",
        "DSPARK_SCHEDULER_ADDRESS": f"127.0.0.1:{cluster.scheduler_server.port}",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway.main", env=environ, stderr=asyncio.subprocess.PIPE
    )
    try:
        port = await read_until(process, r"HTTP on port (\d+)")
        await read_until(process, r"ready on port (\d+)")
        url = f"http://127.0.0.1:{port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, timeout=30) as client:
            yield process, client
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def read_until(process: asyncio.subprocess.Process, pattern: str) -> str:
    seen = []
    async with asyncio.timeout(120):
        while line := (await process.stderr.readline()).decode():
            seen.append(line)
            if match := re.search(pattern, line):
                return match[1]
    raise AssertionError("the process ended early:\n" + "".join(seen))


async def text_until(stream: AsyncIterator[ChatCompletionChunk], whole: str) -> str:
    text = ""
    while text != whole:
        text += (await anext(stream)).choices[0].delta.content or ""
    return text


async def test_a_stream_survives_its_verifier_and_then_the_scheduler(cluster: Cluster) -> None:
    for verifier in cluster.verifiers:
        verifier.hold_after_rounds = 4
    async with gateway(cluster) as (_, client):
        stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        text = await text_until(stream, TEXT[:8])
        first = cluster.busy()
        other = next(verifier for verifier in cluster.verifiers if verifier is not first)
        other.hold_after_rounds = None
        await first.kill()
        chunks = [chunk async for chunk in stream]
        text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == TEXT
        assert other.prompts[0] == (*first.prompts[0], *TEXT[:8].encode())
        assert chunks[-1].choices[0].finish_reason == "stop"
        assert chunks[-1].model_extra["speculation"]["rounds"] == 4 + 10

        await cluster.scheduler_server.stop()
        answer = await client.chat.completions.create(model="demo", messages=HELLO)
        assert answer.choices[0].message.content == TEXT


async def test_sigterm_lets_a_stream_end_and_exits_cleanly(cluster: Cluster) -> None:
    for verifier in cluster.verifiers:
        verifier.hold_after_rounds = 4
    async with gateway(cluster) as (process, client):
        stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        text = await text_until(stream, TEXT[:8])
        process.send_signal(signal.SIGTERM)
        await read_until(process, "(draining)")
        for verifier in cluster.verifiers:
            verifier.release.set()
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
        assert text == TEXT
        async with asyncio.timeout(20):
            assert await process.wait() == 0


async def test_a_client_that_leaves_frees_its_verifier(cluster: Cluster) -> None:
    for verifier in cluster.verifiers:
        verifier.hold_after_rounds = 2
    async with gateway(cluster) as (_, client):
        stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True)
        await anext(stream)
        assert cluster.busy() is not None
        await stream.close()
        await eventually(lambda: cluster.busy() is None)
