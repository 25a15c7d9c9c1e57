"""Draws the requests of a soak test from a seed: every kind that users send, including abusive ones."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "List five fruits and their colours.",
    "What is 17 times 23? Show the steps.",
    "Name the planets of the solar system in order.",
    "Write a Python function that reverses a list.",
    "Give three tips for better sleep.",
    "What does a compiler do?",
)
SEEDS = 4
"""Seeds per prompt; few, so that each pair repeats many times."""
LONG_PROMPT_WORDS = 700
PATH = "/v1/chat/completions"


class Kind(Enum):
    GREEDY = "greedy"
    SEEDED = "seeded"
    SAMPLED = "sampled"
    STOPPED = "stop strings"
    LONG = "long prompt"
    CANCELLED = "cancelled"
    BAD = "bad request"


WEIGHTS: Mapping[Kind, float] = {
    Kind.GREEDY: 0.22,
    Kind.SEEDED: 0.28,
    Kind.SAMPLED: 0.2,
    Kind.STOPPED: 0.1,
    Kind.LONG: 0.04,
    Kind.CANCELLED: 0.12,
    Kind.BAD: 0.04,
}

BAD_FIELDS: tuple[Mapping[str, Any], ...] = (
    {"temperature": -1.0},
    {"max_tokens": 0},
    {"max_tokns": 5},
    {"messages": []},
    {"model": "no such model"},
    {"seed": "seven"},
    {"messages": [{"role": "user", "content": "word " * 20_000}]},
)


@dataclass(frozen=True, slots=True)
class Ask:
    kind: Kind
    body: Mapping[str, Any] = field(repr=False)
    cancel_after_events: int | None = None
    """The client disconnects after this many stream events; 0: once the response starts."""
    repeats: str | None = None
    """Requests with the same value must get the same answer."""

    @property
    def streams(self) -> bool:
        return bool(self.body.get("stream"))


def draw(rng: random.Random, model: str) -> Ask:
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    prompt = rng.choice(PROMPTS)
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": rng.choice((24, 48, 96)),
        "stream": rng.random() < 0.5,
    }
    cancel_after, repeats = None, None
    match kind:
        case Kind.GREEDY:
            body.update(temperature=0.0, max_tokens=48)
            repeats = prompt
        case Kind.SEEDED:
            seed = rng.randrange(SEEDS)
            body.update(temperature=0.8, top_p=0.95, seed=seed, max_tokens=48)
            repeats = f"{prompt} seed {seed}"
        case Kind.SAMPLED:
            body.update(temperature=rng.choice((0.5, 1.0, 1.3)), top_p=rng.choice((0.9, 1.0)))
        case Kind.STOPPED:
            body.update(temperature=0.0, stop=["\n\n", " the"], max_tokens=64)
            repeats = f"{prompt} stopped"
        case Kind.LONG:
            words = " ".join(f"{rng.randrange(10_000)}" for _ in range(rng.randrange(100, LONG_PROMPT_WORDS)))
            body.update(messages=[{"role": "user", "content": f"Summarise: {words}"}], max_tokens=16)
        case Kind.CANCELLED:
            body.update(stream=True, max_tokens=256)
            cancel_after = rng.choice((0, 1, 3, 10, 30))
        case Kind.BAD:
            body.update(rng.choice(BAD_FIELDS))
    return Ask(kind, body, cancel_after, repeats)
