"""Exit codes of commands and services."""

from __future__ import annotations

EXIT_FAILURE = 1
EXIT_CONFIG = 2
EXIT_INTERRUPTED = 130  # as in shells: 128 + SIGINT
EXIT_TERMINATED = 143  # 128 + SIGTERM
