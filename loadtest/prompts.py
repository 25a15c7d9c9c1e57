"""The built-in workload: short chats of several kinds, picked in a fixed order."""

from __future__ import annotations

import json
from pathlib import Path

PROMPTS = Path(__file__).with_name("prompts.jsonl")


def load(path: Path = PROMPTS) -> tuple[str, ...]:
    """One prompt per line, `{"kind": ..., "prompt": ...}`; errors name the file and line."""
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            prompts.append(str(json.loads(line)["prompt"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}:{number}: expected an object with a prompt, got {line[:80]!r}"
            ) from error
    if not prompts:
        raise ValueError(f"{path}: no prompts")
    return tuple(prompts)
