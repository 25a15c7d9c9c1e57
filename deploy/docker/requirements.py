"""Prints the project's requirements, or those of one extra, from pyproject.toml.

Lets the image build install dependencies before it copies the sources.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
chosen = project["optional-dependencies"][sys.argv[1]] if len(sys.argv) > 1 else project["dependencies"]
print("\n".join(chosen))
