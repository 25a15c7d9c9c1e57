"""Streams chats against a gateway and reports what users saw; exits 1 when a promised speed was not kept.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 -u 8 -r 8 -t 60s \\
        --min-tokens-per-second 20

Besides locust's own table (one row per measure, outside its total) it prints a report at the end of each run
and can write it as JSON. With locust's worker processes the verdict is the master's.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
from gevent import GreenletExit
from locust import HttpUser, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.clients import ResponseContextManager
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import DistributedRunner, LocalRunner, MasterRunner, Runner, WorkerRunner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # locust only adds this file's directory

from loadtest import options, prompts, sla
from loadtest.collector import Collector
from loadtest.last_reports import answer_for_last_report, wait_for_last_reports
from loadtest.meter import ChatMeter, ChatSample
from loadtest.sse import StreamError
from loadtest.sse import events as sse_events

CHAT, MODELS = "/v1/chat/completions", "/v1/models"
GAVE_UP = "gave up"
CONNECT_SECONDS, SILENCE_SECONDS = 10.0, 60.0
MAX_RETRY_AFTER_SECONDS = 5.0

PROMPTS = itertools.cycle(prompts.load())
collectors: dict[Environment, Collector] = {}
"""Of the current run, or of the last one."""
durations: dict[Environment, float] = {}
"""In seconds, of runs that have ended."""
reported: set[Environment] = set()
"""Those whose last run has been reported."""


@events.init_command_line_parser.add_listener
def add_options(parser: LocustArgumentParser) -> None:
    options.add_options(parser)


@events.init.add_listener
def start(environment: Environment, **_: object) -> None:
    runner = environment.runner
    if _limit(environment) and isinstance(runner, DistributedRunner):
        sys.exit("--requests counts the chats of one process: give -t instead with --processes or --worker")
    begin(environment)
    if isinstance(runner, MasterRunner):
        runner.register_message(GAVE_UP, lambda environment, msg: give_up(environment, msg.data["reason"]))
        wait_for_last_reports(runner)
    if isinstance(runner, WorkerRunner):
        answer_for_last_report(runner)
    else:  # listeners are called in order: the workers report first
        environment.events.test_stop.add_listener(conclude)


@events.test_start.add_listener
def begin(environment: Environment, **_: object) -> None:
    collectors[environment] = Collector(_limit(environment))
    reported.discard(environment)


def _limit(environment: Environment) -> int:
    return environment.parsed_options.requests if environment.parsed_options else 0


def give_up(environment: Environment, reason: str) -> None:
    """End the run in all processes; the reason is printed once, however many users give up."""
    runner = environment.runner
    if runner is not None and collectors[environment].end():
        if isinstance(runner, WorkerRunner):
            runner.send_message(GAVE_UP, {"reason": reason})
        else:
            print(reason, file=sys.stderr, flush=True)
            environment.process_exit_code = 1
            _end_soon(environment, runner)


def _end_soon(environment: Environment, runner: Runner) -> None:
    """With the web UI, another run may follow."""
    gevent.spawn(runner.stop if environment.web_ui else runner.quit)


@events.report_to_master.add_listener
def send_to_master(client_id: str, data: dict[str, Any]) -> None:
    for collector in collectors.values():
        data["dspark"] = collector.drain()


@events.worker_report.add_listener
def receive_from_worker(client_id: str, data: dict[str, Any]) -> None:
    for collector in collectors.values():
        collector.merge(data["dspark"])


@events.test_stopping.add_listener
def note_duration(environment: Environment, **_: object) -> None:
    durations[environment] = time.time() - environment.stats.start_time


@events.quitting.add_listener
def quit_after_report(environment: Environment, **_: object) -> None:
    if isinstance(environment.runner, LocalRunner):  # a signal ends the process without ending the run
        environment.runner.stop()
    if not isinstance(environment.runner, WorkerRunner):
        conclude(environment)


def conclude(environment: Environment, **_: object) -> None:
    """Reports and judges the run that has ended."""
    chosen = environment.parsed_options
    if chosen is None or environment in reported:
        return
    reported.add(environment)
    promise = None
    if chosen.min_tokens_per_second or chosen.max_first_token_ms:
        promise = sla.Promise(
            min_tokens_per_second=chosen.min_tokens_per_second,
            share=chosen.promise_share,
            max_first_token_ms=chosen.max_first_token_ms or None,
        )
    outcomes = replace(collectors[environment].outcomes(), seconds=durations.get(environment, 0.0))
    beside_json = sys.stderr if chosen.json else sys.stdout  # of `--json`, standard output has nothing else
    print("\n" + sla.render(outcomes, promise), file=beside_json, flush=True)
    if promise:
        environment.process_exit_code = environment.process_exit_code or int(
            not sla.judge(outcomes, promise).kept
        )
    elif not outcomes.samples:
        environment.process_exit_code = 1
    if chosen.report_json:
        try:
            Path(chosen.report_json).write_text(json.dumps(sla.report(outcomes, promise), indent=2) + "\n")
        except OSError as error:  # for example, the disk has filled up meanwhile
            print(f"the report cannot be written: {error}", file=sys.stderr, flush=True)
            environment.process_exit_code = 1


class ChatUser(HttpUser):
    """Asks, reads the whole answer, asks again."""

    wait_time = constant(0)

    def on_start(self) -> None:
        self.collector = collectors[self.environment]
        self.chosen = self.environment.parsed_options
        if self.chosen.api_key:
            self.client.headers["Authorization"] = f"Bearer {self.chosen.api_key}"
        self.model = self.chosen.model or self._first_model()

    @task
    def chat(self) -> None:
        if not self.collector.may_start():
            raise StopUser
        meter = ChatMeter(time.perf_counter, time.perf_counter())
        try:
            pause_seconds = self._ask(meter)
        except GreenletExit:  # the run ends
            self.collector.add_unfinished(meter.unfinished(self.chosen.max_tokens))
            raise
        gevent.sleep(pause_seconds)
        runner = self.environment.runner
        if not isinstance(runner, WorkerRunner) and self.collector.finished and self.collector.end():
            _end_soon(self.environment, runner)

    def _ask(self, meter: ChatMeter) -> float:
        """The seconds to wait before asking again, as the gateway wants it."""
        with self.client.post(
            CHAT,
            json=self._body(next(PROMPTS)),
            stream=True,
            catch_response=True,
            timeout=(CONNECT_SECONDS, SILENCE_SECONDS),
        ) as response:
            if response.status_code != 429:
                self._finish(response, meter)
                return 0.0
            self.collector.add_refusal()
            response.success()
            return _retry_after(response)

    def _finish(self, response: ResponseContextManager, meter: ChatMeter) -> None:
        try:
            if response.status_code != 200:
                raise StreamError(f"HTTP {response.status_code}: {response.text[:200]}")
            lines = (line.decode() for line in response.iter_lines())
            sample = meter.measure(sse_events(lines))
        except Exception as error:  # whatever a server sends: a chat that cannot be read has failed
            self.collector.add_failure()
            expected = isinstance(error, (StreamError, OSError))  # requests' own errors are OSErrors
            response.failure(str(error) if expected else f"the answer cannot be read: {error!r}")
            return
        response.request_meta = {**response.request_meta, "response_time": sample.total_seconds * 1000}
        response.success()
        self.collector.add(sample)
        self._log(sample)

    def _log(self, sample: ChatSample) -> None:
        """Log as separate rows: fired as requests, they would be added to locust's total."""
        measures = {
            "time to first token [ms]": sample.first_token_seconds * 1000,
            "tokens/s per user": sample.tokens_per_second,
            "accepted length x100": sample.accepted_length and sample.accepted_length * 100,
        }
        for name, value in measures.items():
            if value is not None:
                self.environment.stats.get(name, "METRIC").log(value, 0)

    def _body(self, prompt: str) -> dict[str, object]:
        same_length = {"ignore_eos": True} if self.chosen.ignore_eos else {}
        return {
            **same_length,
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.chosen.max_tokens,
            "temperature": self.chosen.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            "speculation": {"enabled": self.chosen.speculation == "on"},
        }

    def _first_model(self) -> str:
        response = self.client.get(MODELS, timeout=CONNECT_SECONDS)
        try:
            if response.status_code == 200:
                return str(response.json()["data"][0]["id"])
            reason = _refusal(response)
        except (ValueError, LookupError, TypeError):
            reason = f"the gateway names no model: {response.text[:200]}"
        give_up(self.environment, reason)
        raise GreenletExit  # locust prints a traceback for any other exception


def _refusal(response: ResponseContextManager) -> str:
    if response.status_code == 0:
        return f"the gateway cannot be asked for its models: {response.error}"
    try:
        said = response.json()["error"]["message"]
    except (ValueError, LookupError, TypeError):  # not a DSpark gateway
        said = response.text[:200]
    hint = "; give --api-key" if response.status_code == 401 else ""
    return f"the gateway refuses to tell its models, HTTP {response.status_code}: {said}{hint}"


def _retry_after(response: ResponseContextManager) -> float:
    try:
        return min(max(0.0, float(response.headers.get("Retry-After", 1))), MAX_RETRY_AFTER_SECONDS)
    except ValueError:  # an HTTP date
        return MAX_RETRY_AFTER_SECONDS
