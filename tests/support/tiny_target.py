"""A minimal target directory: the golden fixture's weights with a byte tokenizer."""

import json
import shutil
from pathlib import Path

from tests.support.byte_tokenizer import TEMPLATE, byte_backend

_WEIGHTS = Path(__file__).parents[1] / "fixtures" / "golden" / "qwen3_tiny_target"


def write_tiny_target(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    shutil.copytree(_WEIGHTS, directory)
    byte_backend().save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", **({"chat_template": template} if template else {})}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
