"""How a service process starts and ends: logging, the event loop, exit codes."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine, Mapping

from dspark_core.errors import ConfigError
from services.common.logs import setup_logging

EXIT_CONFIG = 2


def run_process(
    service: str,
    run: Callable[[Mapping[str, str]], Coroutine[None, None, None]],
    environ: Mapping[str, str] = os.environ,
) -> int:
    """Runs a service to its end: 0 after a drain, 2 for a bad configuration (one line, no traceback).

    Anything else that is raised leaves as it is, with its traceback and exit code 1.
    """
    try:
        setup_logging(service, environ)
        asyncio.run(run(environ))
    except ConfigError as error:
        if not logging.getLogger().handlers:
            print(f"{service}: {error}", file=sys.stderr)
        else:
            logging.getLogger(service).error("%s", error)
        return EXIT_CONFIG
    return 0
