"""Starts a gateway: `python -m services.gateway.main`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from services.common.process import run_process


async def run(environ: Mapping[str, str]) -> None:
    from services.gateway.wiring import run  # not at the top: see `run_process`

    await run(environ)


def main() -> NoReturn:
    run_process("gateway", run)


if __name__ == "__main__":
    main()
