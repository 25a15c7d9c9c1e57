"""How processes say why they ended."""

from __future__ import annotations

EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130  # as shells count: 128 and SIGINT
