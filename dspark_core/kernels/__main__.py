"""`python -m dspark_core.kernels`: compiles the kernels now, so that no start has to wait for it.

Prints the result and exits with 0 even without a compiler, since PyTorch is the fallback. With `--prebuild
DIRECTORY` it compiles for each supported kind of processor instead, and fails if it cannot; this needs
only the standard library, since the image that compiles has no torch.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from dspark_core.kernels.build import BuildSettings, KernelsUnavailableError
from dspark_core.kernels.prebuilt import prebuild


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m dspark_core.kernels", description=__doc__)
    parser.add_argument(
        "--prebuild", type=Path, metavar="DIRECTORY", help="for $DSPARK_PREBUILT_KERNELS of other machines"
    )
    directory: Path | None = parser.parse_args().prebuild
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if directory is not None:
            prebuild(directory, BuildSettings.from_env(os.environ), on_built=print)
            return
        from dspark_core.kernels.library import load_kernels  # loads torch

        kernels = load_kernels()
    except KernelsUnavailableError as error:
        if directory is not None:
            raise SystemExit(str(error)) from error
        print(f"none, PyTorch will compute the target, slower: {error}")
    else:
        print(f"{kernels.instructions}, {kernels.path}")


if __name__ == "__main__":
    main()
