"""Prompts the target writes itself (Magpie, arXiv 2406.08464): no dataset, and no licence but the target's.

An aligned model that is given its chat template up to where the user's words would begin continues with a
plausible user turn. Turns are generated in chunks, each by a fresh run with its own noise, and kept in a
journal: a killed run loses at most one chunk, and the next run continues with the same turns.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dspark_core.errors import ConfigError
from dspark_core.records import FinishReason, SamplingParams
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.training.data.generation import BatchGenerator, Generated, Job
from dspark_core.training.data.prompt_filters import PromptFilter
from dspark_core.training.data.prompts import Prompt, user_prompt

SOURCE = "self-synthesised"
FRUITLESS_CHUNKS = 8
"""Give up after this many consecutive chunks without a turn to keep."""
_MARK = "USER-CONTENT"


@dataclass(frozen=True, slots=True, kw_only=True)
class SynthesisSettings:
    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 256
    """A turn that does not end within this limit is dropped."""
    chunk_turns: int = 2048
    """Attempts per chunk; the journal is written after each chunk."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_tokens", "chunk_turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")

    def sampling(self, attempt: int) -> SamplingParams:
        seed = (self.seed * 1_000_000_007 + attempt) % 2**62
        return SamplingParams(temperature=self.temperature, top_p=self.top_p, seed=seed)


class Synthesiser:
    def __init__(
        self,
        generator: BatchGenerator,
        tokenizer: Tokenizer,
        settings: SynthesisSettings,
        on_generated: Callable[[int], None] = lambda _: None,
    ) -> None:
        """`on_generated` gets the token count of each finished turn.

        Raises ConfigError when the chat template has no usable user header.
        """
        self._generator = generator
        self._tokenizer = tokenizer
        self._settings = settings
        self._header = user_header(tokenizer)
        self._on_generated = on_generated

    def chunk(self, number: int) -> list[str]:
        """The turns of one chunk in the order of their attempts; depends only on number and settings."""
        size = self._settings.chunk_turns
        found: dict[str, str] = {}
        keys = [str(attempt) for attempt in range(number * size, (number + 1) * size)]
        for written in self._generator.run(self._job(key) for key in keys):
            if isinstance(written, Generated):
                self._on_generated(len(written.token_ids))
                if written.finish is FinishReason.STOP:
                    found[written.key] = self._tokenizer.decode(written.token_ids).strip()
        return [found[key] for key in keys if found.get(key)]

    def _job(self, key: str) -> Job:
        sampling = self._settings.sampling(int(key))
        return Job(key=key, prompt_ids=self._header, sampling=sampling, max_tokens=self._settings.max_tokens)


class TurnJournal:
    """Chunks of turns already generated: a line of settings, then one JSON line per chunk."""

    def __init__(self, path: Path, settings: SynthesisSettings, fingerprint: str) -> None:
        """Raises ConfigError when the file is damaged or was begun with other settings or another target."""
        self._path = path
        self._head = json.dumps({"target": fingerprint, **asdict(settings)})
        self.chunks: list[list[str]] = []
        lines = self._whole_lines() or [self._head]
        if lines[0] != self._head:
            raise ConfigError(
                f"{path} was begun with other settings ({lines[0]}, not {self._head}): remove it"
            )
        try:
            self.chunks = [list(map(str, json.loads(line))) for line in lines[1:]]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path} is damaged: {error}; remove it") from error
        self._replace("".join(line + "\n" for line in lines))

    def append(self, chunk: list[str]) -> None:
        """On disk when this returns."""
        self._write(self._path, json.dumps(chunk) + "\n", "a")
        self.chunks.append(chunk)

    def _whole_lines(self) -> list[str]:
        """The complete lines, without a truncated last one."""
        if not self._path.exists():
            return []
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error}") from error

    def _replace(self, text: str) -> None:
        partial = self._path.with_name(self._path.name + ".partial")
        self._write(partial, text, "w")
        partial.replace(self._path)

    def _write(self, path: Path, text: str, mode: str) -> None:
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ConfigError(f"cannot write to {path}: {error}") from error


def begun_chunk_turns(path: Path) -> int | None:
    """`chunk_turns` of an existing journal, which takes precedence over later settings; None: no journal with
    that field."""
    try:
        with path.open(encoding="utf-8") as lines:
            return int(json.loads(lines.readline())["chunk_turns"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def synthesise(synthesiser: Synthesiser, journal: TurnJournal, chosen: PromptFilter) -> Iterator[Prompt]:
    """Endless stream of the user turns that `chosen` keeps, from the journal first, then newly generated.

    Raises ConfigError when consecutive chunks yield none.
    """
    number = fruitless = 0
    while True:
        if number == len(journal.chunks):
            journal.append(synthesiser.chunk(number))
        before = chosen.kept
        turns = (user_prompt(text, domain="chat", source=SOURCE) for text in journal.chunks[number])
        yield from chosen.keep(turns)
        number += 1
        if not any(journal.chunks[-3:]):
            raise ConfigError(
                "--synthesise: this target ends no turn of a user within the length allowed; "
                "is it an aligned model with a chat template?"
            )
        fruitless = 0 if chosen.kept > before else fruitless + 1
        if fruitless == FRUITLESS_CHUNKS:
            refused = ", ".join(f"{count} {reason.value}" for reason, count in chosen.refused.items())
            raise ConfigError(
                f"--synthesise: the filters kept no turn of the last {fruitless} chunks (so far kept: "
                f"{chosen.kept}; refused: {refused}): ask for fewer, or change the filters or --temperature"
            )


def user_header(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens of the chat template up to where the user's content begins. Raises ConfigError if there are
    none."""
    if not tokenizer.has_chat_template:
        raise ConfigError("--synthesise needs a target with a chat template; this one has none")
    text = tokenizer.render_chat([{"role": "user", "content": _MARK}])
    header, found, _ = text.partition(_MARK)
    if not found or not header:
        raise ConfigError("--synthesise: the target's chat template has nothing before a user's content")
    return tokenizer.encode(header, add_special_tokens=False)
