"""Answers of a server: bounded, patient, and never silently missing."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from dspark_core.errors import ConfigError, UnavailableError
from dspark_core.records import FinishReason, SamplingParams
from dspark_core.training.data.generation import Failure
from services.cli.data.openai_endpoint import GIVE_UP_AFTER, EndpointConfig, OpenAIEndpoint, Question, Reply
from services.cli.data.remote_answers import end_of_turn
from services.cli.main import main
from tests.support.byte_tokenizer import END, TEMPLATE, byte_tokenizer
from tests.support.scripted_openai import Script, completion, scripted_openai
from tests.support.tiny_target import write_tiny_target

BUSY = (503, {"error": {"message": "busy"}})


def questions(count: int) -> list[Question]:
    sampling = SamplingParams(temperature=0.5, top_p=0.9, seed=3)
    return [
        Question(
            key=f"k{n}", messages=[{"role": "user", "content": f"q{n}"}], sampling=sampling, max_tokens=8
        )
        for n in range(count)
    ]


async def ask(url: str, count: int, **options: object) -> dict[str, Reply | Failure]:
    results: dict[str, Reply | Failure] = {}
    config = EndpointConfig(url=url, **{"backoff_seconds": 0.001, "attempts": 3, **options})
    async with OpenAIEndpoint(config, jitter=lambda: 0.0) as endpoint:
        await endpoint.run(questions(count), lambda result: results.update({result.key: result}))
    return results


async def test_every_question_is_answered_within_the_bound() -> None:
    gate = threading.Barrier(4, timeout=20)

    def together(body: dict, before: int) -> tuple[int, object]:
        gate.wait()  # answers only when four are in flight
        return 200, completion(body["messages"][0]["content"].upper(), "length")

    script = Script(together)
    with scripted_openai(script) as url:
        results = await ask(url, 12, concurrency=4)
    assert results == {
        f"k{n}": Reply(key=f"k{n}", text=f"Q{n}", finish=FinishReason.LENGTH) for n in range(12)
    }
    assert script.most_at_once == 4
    fields = {"model": "scripted", "max_tokens": 8, "temperature": 0.5, "top_p": 0.9, "seed": 3}
    assert all(body.items() >= fields.items() for body in script.asked)


async def test_a_server_on_this_machine_is_asked_past_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with scripted_openai(Script(lambda body, before: (200, completion("yes")))) as url:
        assert (await ask(url, 1))["k0"] == Reply(key="k0", text="yes", finish=FinishReason.STOP)


async def test_variables_of_the_chat_template_are_sent_where_there_are_some() -> None:
    script = Script(lambda body, before: (200, completion("yes")))
    with scripted_openai(script) as url:
        await ask(url, 1)
        await ask(url, 1, template_arguments={"enable_thinking": False})
    assert [body.get("chat_template_kwargs") for body in script.asked] == [None, {"enable_thinking": False}]


async def test_a_busy_server_is_asked_again_and_then_given_up() -> None:
    def busy_for_a_while(body: dict, before: int) -> tuple[int, object]:
        patience = int(body["messages"][0]["content"][1:])
        return (200, completion("yes")) if before >= patience else BUSY

    with scripted_openai(Script(busy_for_a_while)) as url:
        results = await ask(url, 4, concurrency=1)
    assert [isinstance(results[f"k{n}"], Reply) for n in range(4)] == [True, True, True, False]
    assert results["k3"] == Failure(key="k3", problem="status 503: busy (3 attempts)")


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((400, {"error": {"message": "too long"}}), "status 400: too long"),
        ((404, "nothing here"), "status 404: nothing here"),
        ((200, {"choices": []}), "not a chat completion"),
        ((200, "no json"), "not a chat completion"),
        ((200, completion("")), "the answer is empty"),
        ((200, completion("whole", reasoning_content="Hm.")), "the model's thought apart"),
        ((200, completion("whole", reasoning="Hm.")), "the model's thought apart"),
        ((200, completion("half", "content_filter")), "finish_reason 'content_filter'"),
        ((200, completion("half", ["stop"])), "finish_reason ['stop']"),
        ((200, completion([{"type": "text", "text": "a part"}])), 'not text: [{"type": "text"'),
        ((200, completion("half \ud83d")), "the answer contains the lone surrogate '\\ud83d' at character 5"),
    ],
)
async def test_what_asking_again_cannot_change_fails_at_once(answer: tuple, problem: str) -> None:
    script = Script(lambda body, before: answer)
    with scripted_openai(script) as url:
        results = await ask(url, 1)
    assert isinstance(results["k0"], Failure)
    assert problem in results["k0"].problem
    assert len(script.asked) == 1


async def test_a_reply_that_cannot_be_unpacked_is_a_failure() -> None:
    script = Script(lambda body, before: (200, b"this is not gzip"))
    with scripted_openai(script) as url:
        results = await ask(url, 1, attempts=2)
    assert isinstance(results["k0"], Failure)
    assert "DecodingError" in results["k0"].problem
    assert len(script.asked) == 2


async def test_an_answer_that_takes_too_long_is_a_failure() -> None:
    released = threading.Event()

    def stuck(body: dict, before: int) -> tuple[int, object]:
        released.wait(timeout=20)
        return 200, completion("late")

    with scripted_openai(Script(stuck)) as url:
        results = await ask(url, 1, deadline_seconds=0.1, attempts=2, model="scripted")
        released.set()
    assert results["k0"] == Failure(key="k0", problem="no answer within 0.1 s (2 attempts)")


async def test_a_server_that_is_gone_ends_the_run() -> None:
    script = Script(lambda body, before: BUSY)
    with scripted_openai(script) as url:
        with pytest.raises(UnavailableError, match=rf"left {GIVE_UP_AFTER} prompts in a row unanswered"):
            await ask(url, 500, attempts=1, concurrency=4)
        assert len(script.asked) < GIVE_UP_AFTER + 5
    with pytest.raises(UnavailableError, match="does not list a model"):
        await ask(url, 1)


def test_an_impossible_endpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="must begin with http:// or https://, got 'localhost:8000'"):
        EndpointConfig(url="localhost:8000")
    with pytest.raises(ConfigError, match="must be a URL, got 'http://localhost:80a0': Invalid port"):
        EndpointConfig(url="http://localhost:80a0")
    with pytest.raises(ConfigError, match="must name a host, got 'http:///v1'"):
        EndpointConfig(url="http:///v1")
    assert EndpointConfig(url="http://x/").base_url == EndpointConfig(url="http://x/v1").base_url


def test_the_end_of_an_answer_is_the_templates() -> None:
    assert end_of_turn(byte_tokenizer()) == END
    with pytest.raises(ConfigError, match="needs a target with a chat template"):
        end_of_turn(byte_tokenizer(chat_template=None))
    with pytest.raises(ConfigError, match="does not end an answer with a stop token"):
        end_of_turn(byte_tokenizer(chat_template=TEMPLATE.replace("<|im_end|>", "<end>")))


def test_failures_are_listed_and_tried_again(tmp_path: Path, capsys) -> None:
    target = write_tiny_target(tmp_path / "target")
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out" / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"q{n}"}) + "\n" for n in range(3)))
    healed = threading.Event()

    def picky(body: dict, before: int) -> tuple[int, object]:
        if body["messages"][0]["content"] == "q1" and not healed.is_set():
            return 400, {"error": {"message": "not today"}}
        return 200, completion("fine")

    command = ["data", "regenerate", "--prompts", str(prompts), "--out", str(out)]
    with scripted_openai(Script(picky)) as url:
        command += ["--endpoint", url, "--target-model", str(target)]
        assert main(command) == 1
        assert "1 prompts failed" in capsys.readouterr().out
        failures = out.with_name("answers.jsonl.failures.jsonl")
        assert json.loads(failures.read_text()) == {"id": "p1", "problem": "status 400: not today"}
        healed.set()
        assert main(command) == 0
    assert not failures.exists()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == ["p0", "p1", "p2"]
    assert rows[0]["answer_ids"] == [*b"fine", END]
    tokenizer = byte_tokenizer()
    asked = int(rows[0]["id"][1:])
    assert rows[0]["prompt_ids"] == list(tokenizer.encode_chat([{"role": "user", "content": f"q{asked}"}]))
