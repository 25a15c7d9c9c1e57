"""Python's garbage collector in a serving process."""

from __future__ import annotations

import gc


def spare_what_was_loaded() -> None:
    """Has the collector look at nothing that exists now. To be called once, at the end of a process's start.

    Imports and models leave some 250,000 objects that live as long as the process. The collector goes through
    all of them every few hundred requests, holding up every thread, and finds nothing.
    """
    gc.collect()
    gc.freeze()
