"""Runs the embedded stack in its own process and reports that process's internal counts on request.

Prints its URL as the first line once it serves. Answers every input line with a line of JSON and exits at the
end of the input.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import sys
import threading

from services.common.logs import setup_logging
from services.embedded.options import StackOptions
from services.embedded.stack import EmbeddedStack


async def serve(options: StackOptions) -> None:
    stack = EmbeddedStack(options)
    await stack.start()
    print(stack.url, flush=True)
    try:
        while await asyncio.to_thread(sys.stdin.readline):
            # Uncollected garbage and memory cached by the allocator are not leaks.
            gc.collect()
            _trim()
            counts = {
                "tasks": len(asyncio.all_tasks()),
                "threads": threading.active_count(),
                "objects": len(gc.get_objects()),
            }
            print(json.dumps(counts), flush=True)
    finally:
        await stack.stop()


def _trim() -> None:
    """Return free memory to the system, if the C library supports it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-mb", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    setup_logging("dspark", {"DSPARK_LOG_LEVEL": "WARNING"})
    options = StackOptions(
        http_port=0,
        grpc_port=0,
        dtype=arguments.dtype,
        kv_cache_mb=arguments.kv_cache_mb,
        threads=arguments.threads,
    )
    asyncio.run(serve(options))


if __name__ == "__main__":
    main()
