"""How models mark a thought before their answer, and whether a prompt leaves room for one.

Model names play no part: a chat template that handles thoughts names the mark at their end.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class ThoughtStart(Enum):
    """Where a prompt leaves the model."""

    OPTIONAL = "the answer may begin with a thought"
    OPEN = "the prompt has begun a thought, which the answer continues"
    CLOSED = "the prompt has ended a thought, mostly an empty one: the model is not to think"


@dataclass(frozen=True, slots=True)
class ThoughtMarks:
    begin: str
    end: str

    @property
    def both(self) -> tuple[str, str]:
        return self.begin, self.end

    def left_by(self, prompt: str) -> ThoughtStart:
        """prompt: the end of it is enough."""
        written = prompt.rstrip()
        if written.endswith(self.end):
            return ThoughtStart.CLOSED
        return ThoughtStart.OPEN if written.endswith(self.begin) else ThoughtStart.OPTIONAL


MARKS = (
    ThoughtMarks("<think>", "</think>"),  # Qwen, DeepSeek, GLM, SmolLM3 and many others
    ThoughtMarks("[THINK]", "[/THINK]"),  # Mistral
)


def thought_marks(template: str | None) -> ThoughtMarks | None:
    """The marks that a chat template names; None: its model does not think, or in an unknown format."""
    return next((marks for marks in MARKS if template and marks.end in template), None)
