"""Have the target answer prompts, in this process or on an OpenAI-compatible server (--endpoint).

Run the same command again to continue after an interruption or to retry failed prompts.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dspark_core.engine.building import BuiltTarget
from dspark_core.errors import ConfigError
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.training.data.answer_log import Answer, AnswerLog
from dspark_core.training.data.generation import DEFAULT_CONCURRENCY, BatchGenerator, Failure
from dspark_core.training.data.local_answers import AnswerSettings, Encoded, LocalAnswers, encode
from dspark_core.training.data.prompts import Prompt, read_prompts
from dspark_core.training.data.recording import FeatureRecorder, RecordedShards, recorded_layers
from dspark_core.training.data.sampling_mix import SamplingMix, parse_temperatures
from dspark_core.training.origin import default_tap_layers, describe_target, template_digest
from services.cli.data.arguments import (
    TokenProgress,
    add_layers_argument,
    add_target_arguments,
    load_engine,
    load_tokenizer_of,
)
from services.cli.data.openai_endpoint import EndpointConfig, OpenAIEndpoint
from services.cli.data.remote_answers import RemoteAnswers
from services.cli.output_files import require_writable
from services.cli.template_arguments import template_arguments

FAILURES_SUFFIX = ".failures.jsonl"
EXIT_FAILED_PROMPTS = 1


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("regenerate", help="have the target answer prompts", description=__doc__)
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file, as written by `dspark data prompts`",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSONL file for the answers; an unfinished one is completed",
    )
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="prompts to take from the file (default: all)"
    )
    _add_sampling(parser)
    _add_features(parser)
    _add_endpoint(parser)
    add_target_arguments(parser)
    parser.set_defaults(run=run)


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--temperatures",
        default="0",
        metavar="T",
        help="one temperature, or several with shares, e.g. 0:0.6,0.2:0.3,0.7:0.1; 0 is greedy "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="nucleus sampling; 1 is off (default: %(default)g)",
    )
    group.add_argument(
        "--top-k",
        type=int,
        default=0,
        metavar="K",
        help="sample from the K likeliest tokens; 0 is off (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all sampling (default: %(default)s)"
    )
    group.add_argument(
        "--max-tokens", type=int, default=512, metavar="N", help="tokens per answer (default: %(default)s)"
    )
    group.add_argument(
        "--concurrency",
        type=int,
        default=DEFAULT_CONCURRENCY,
        metavar="N",
        help="answers generated together (default: %(default)s)",
    )
    group.add_argument(
        "--chunk",
        type=int,
        default=AnswerSettings(mix=SamplingMix(temperatures=((0.0, 1.0),))).chunk_prompts,
        metavar="N",
        help="prompts per chunk; an interrupted chunk is generated again (default: %(default)s)",
    )


def _add_features(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("features")
    group.add_argument(
        "--features",
        type=Path,
        default=None,
        metavar="DIR",
        help="also write the target's hidden states to DIR, one shard per chunk (not with --endpoint)",
    )
    add_layers_argument(group)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    defaults = EndpointConfig(url="http://host")
    group = parser.add_argument_group("server")
    group.add_argument(
        "--endpoint",
        default=None,
        metavar="URL",
        help="OpenAI-compatible server to ask (default: answer in this process)",
    )
    group.add_argument(
        "--model", default=None, metavar="NAME", help="the server's name for the model (default: its first)"
    )
    group.add_argument(
        "--api-key-env",
        default="OPENAI_API_KEY",
        metavar="NAME",
        help="environment variable that holds the API key (default: %(default)s)",
    )
    group.add_argument(
        "--deadline",
        type=float,
        default=defaults.deadline_seconds,
        metavar="SECONDS",
        help="time limit per attempt (default: %(default)g)",
    )
    group.add_argument(
        "--attempts",
        type=int,
        default=defaults.attempts,
        metavar="N",
        help="attempts per prompt (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> int:
    settings = AnswerSettings(
        mix=SamplingMix(
            temperatures=parse_temperatures(arguments.temperatures),
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            seed=arguments.seed,
        ),
        max_tokens=arguments.max_tokens,
        chunk_prompts=arguments.chunk,
    )
    if arguments.features is None and arguments.layers is not None:
        raise ConfigError("--layers needs --features: it selects the layers whose hidden states are written")
    if arguments.features is not None and arguments.endpoint is not None:
        raise ConfigError("--features cannot be used with --endpoint: a server does not send hidden states")
    require_writable(arguments.out)
    prompts = _read(arguments)
    work = _Work(arguments, settings, prompts)
    try:
        if arguments.endpoint is None:
            work.answer_here()
        else:
            work.answer_there()
    finally:
        work.report()
    return EXIT_FAILED_PROMPTS if work.failures else 0


def _read(arguments: argparse.Namespace) -> list[Prompt]:
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit must be >= 1, got {arguments.limit}")
    found: dict[str, Prompt] = {}
    for prompt in read_prompts(arguments.prompts):
        if found.setdefault(prompt.prompt_id, prompt) is not prompt:
            raise ConfigError(f"{arguments.prompts} has two prompts with id {prompt.prompt_id!r}")
    if not found:
        raise ConfigError(f"{arguments.prompts} has no prompts")
    return list(found.values())[: arguments.limit]


class _Work:
    """One run: its prompts and their results."""

    def __init__(
        self, arguments: argparse.Namespace, settings: AnswerSettings, prompts: Sequence[Prompt]
    ) -> None:
        self._arguments = arguments
        self._settings = settings
        self._prompts = prompts
        self._tokenizer: Tokenizer = load_tokenizer_of(arguments)
        self.failures: list[Failure] = []
        self.written = 0
        self._begun = False
        self._rate = 0.0

    def answer_here(self) -> None:
        if not self._tokenizer.has_chat_template:
            raise ConfigError(
                f"--target-model {self._arguments.target_model} has no chat template to ask the prompts with"
            )
        built = load_engine(self._arguments, self._kept_layers)
        described = {
            "target": built.loaded.path.name,
            "fingerprint": built.loaded.fingerprint,
            "dtype": self._arguments.dtype,
            "concurrency": self._arguments.concurrency,
            "chunk": self._settings.chunk_prompts,
        }
        recorder = None
        if self._arguments.features is not None:
            recorder = FeatureRecorder(built.engine, built.loaded.decoder)
        generator = BatchGenerator(
            built.engine,
            self._tokenizer.stop_token_ids,
            concurrency=self._arguments.concurrency,
            on_end=recorder,
        )
        shards = None if recorder is None else self._shards(recorder, built, described)
        answers = LocalAnswers(generator, self._tokenizer, self._settings, shards)
        with self._log(described) as log, self._progress(log) as progress:
            results = answers.run(
                self._prompts,
                done=log.done.__contains__,
                on_generated=lambda count: progress.add(tokens=count),
            )
            for result in results:
                self._take(result, log, progress)

    def _taps(self, num_layers: int) -> tuple[int, ...]:
        return tuple(self._arguments.layers or default_tap_layers(num_layers))

    def _kept_layers(self, num_layers: int) -> tuple[int, ...]:
        if self._arguments.features is None:
            return ()
        return recorded_layers(self._taps(num_layers), num_layers)

    def _shards(
        self, recorder: FeatureRecorder, built: BuiltTarget, described: Mapping[str, object]
    ) -> RecordedShards:
        taps = self._taps(built.loaded.config.num_layers)
        origin = describe_target(built.loaded, self._arguments.dtype, taps, self._tokenizer.chat_template)
        mix = self._settings.mix
        prompts = [(one.prompt_id, one.messages, mix.sampling_of(one.prompt_id)) for one in self._prompts]
        follows = repr((sorted({**described, **self._sampling()}.items()), prompts))
        digest = hashlib.sha256(follows.encode()).hexdigest()
        chunks = -(-len(self._prompts) // self._settings.chunk_prompts)
        return RecordedShards(self._arguments.features, recorder, origin, digest, chunks)

    def answer_there(self) -> None:
        arguments = self._arguments
        config = EndpointConfig(
            url=arguments.endpoint,
            model=arguments.model,
            api_key=os.environ.get(arguments.api_key_env),
            concurrency=arguments.concurrency,
            deadline_seconds=arguments.deadline,
            attempts=arguments.attempts,
            template_arguments=template_arguments(arguments),
        )
        asyncio.run(self._ask(config))

    async def _ask(self, config: EndpointConfig) -> None:
        async with OpenAIEndpoint(config) as endpoint:
            described = {"endpoint": config.base_url, "model": endpoint.model}
            remote = RemoteAnswers(endpoint, self._tokenizer, self._settings)
            with self._log(described) as log, self._progress(log) as progress:
                pending = [prompt for prompt in self._prompts if prompt.prompt_id not in log.done]

                def on_result(result: Answer | Failure) -> None:
                    tokens = len(result.answer_ids) if isinstance(result, Answer) else 0
                    progress.add(tokens=tokens)
                    self._take(result, log, progress)

                await remote.run(pending, on_result)

    @contextmanager
    def _log(self, described: Mapping[str, object]) -> Iterator[AnswerLog]:
        with AnswerLog(self._arguments.out, {**described, **self._sampling()}) as log:
            self._require_same_prompts(log)
            self._begun = True
            yield log

    def _require_same_prompts(self, log: AnswerLog) -> None:
        answered = [prompt for prompt in self._prompts if prompt.prompt_id in log.done]
        console = Console(stderr=True)
        for prompt in track(
            answered,
            "comparing answered prompts",
            console=console,
            transient=True,
            disable=not console.is_terminal,
        ):
            found = encode(prompt, self._tokenizer, sys.maxsize)
            token_ids = found.token_ids if isinstance(found, Encoded) else ()
            log.require_same_prompt(prompt.prompt_id, token_ids)

    def _sampling(self) -> dict[str, object]:
        mix = self._settings.mix
        return {
            "temperatures": [list(pair) for pair in mix.temperatures],
            "top_p": mix.top_p,
            "top_k": mix.top_k,
            "seed": mix.seed,
            "max_tokens": self._settings.max_tokens,
            "chat_template": template_digest(self._tokenizer.chat_template),
            **({"chat_template_kwargs": asked} if (asked := template_arguments(self._arguments)) else {}),
        }

    def _progress(self, log: AnswerLog) -> TokenProgress:
        done = sum(prompt.prompt_id in log.done for prompt in self._prompts)
        return TokenProgress("answers", len(self._prompts), done)

    def _take(self, result: Answer | Failure, log: AnswerLog, progress: TokenProgress) -> None:
        if isinstance(result, Failure):
            self.failures.append(result)
        else:
            log.append(result)
            self.written += 1
        progress.add(items=1)
        self._rate = progress.tokens_per_second

    def report(self) -> None:
        """Prints a summary and lists this run's failures, if any, in a file beside the answers."""
        if not self._begun:
            return
        path = self._arguments.out.with_name(self._arguments.out.name + FAILURES_SUFFIX)
        console = Console()
        summary = f"{self.written} answers written to {self._arguments.out}, {self._rate:,.0f} tokens/s"
        console.print(summary, soft_wrap=True)
        if not self.failures:
            path.unlink(missing_ok=True)
            return
        rows = (json.dumps({"id": one.key, "problem": one.problem}) + "\n" for one in self.failures)
        path.write_text("".join(rows), encoding="utf-8")
        console.print(f"[red]{len(self.failures)} prompts failed[/red], listed in {path}", soft_wrap=True)
