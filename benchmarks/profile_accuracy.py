"""Compares served steps with passes timed as in a profile, interleaved so that a busy machine slows both.

    python -m benchmarks.profile_accuracy [--seconds 6]

"shared pages" repeats the pass with all requests on one set of pages, which stays in the CPU's cache. The
passes overwrite pages of running answers, so times are real but texts are not. Figures are medians.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks.frontier_parts.planners import FixedLengthPlanSource
from benchmarks.frontier_parts.stack import LoadedLoop, Method
from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.engine.profiling.profile_passes import ProfilePasses
from dspark_core.engine.target.batch import Run
from dspark_core.evaluation.prompt_sets import read_prompt_set
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER

USERS = (1, 4, 16, 32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="seconds per row")
    parser.add_argument("--prompts", type=Path, default=Path("loadtest/prompts.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(resolve_model_path(DEFAULT_MODEL))
    rows = read_prompt_set(arguments.prompts).rows
    prompts = [tokenizer.encode_chat(row.chat()) for row in rows]
    options = EngineOptions(target_model=DEFAULT_MODEL, drafter=DEFAULT_DRAFTER, kv_cache_bytes=2**30)
    target = build_target(options)
    passes = ProfilePasses(target.engine)
    while passes.write_chunk():
        pass
    loop = LoadedLoop(
        target,
        options,
        prompts,
        max_running=max(USERS),
        max_tokens=192,
        temperature=0.0,
        stop_token_ids=tokenizer.stop_token_ids,
        profiled=False,
    )
    print("requests x tokens   turns   served ms   shared pages   own pages")
    for length in (0, 4):
        for users in USERS:
            served, shared, own = _turns(loop, passes, users, length, arguments.seconds)
            print(
                f"{users:4} x {1 + length:<12} {len(served):6} {1e3 * median(served):9.2f} "
                f"{1e3 * median(shared):10.2f} ({median(served) / median(shared):.2f}x) "
                f"{1e3 * median(own):10.2f} ({median(served) / median(own):.2f}x)"
            )


def _turns(
    loop: LoadedLoop, passes: ProfilePasses, users: int, length: int, seconds: float
) -> tuple[list[float], list[float], list[float]]:
    """-> seconds of served steps, of passes over shared pages and of passes over own pages."""
    method = Method("fixed", FixedLengthPlanSource(length))
    served: list[float] = []
    shared: list[float] = []
    own: list[float] = []
    ends = time.perf_counter() + seconds
    while time.perf_counter() < ends or not served:
        loop.run_slice(method, users, 1, 0.0)  # a few rounds
        for report in loop.plans.reports:
            decoded = sum(1 + request.verify_length for request in report.requests)
            if len(report.requests) != users or report.batch_tokens != decoded:
                continue
            runs = passes.runs(users, report.batch_tokens, report.context_tokens // users)
            served.append(report.step_seconds)
            own.append(_seconds(passes.verify, runs))
            longest = max(runs, key=lambda run: len(run.pages)).pages
            together = [replace(run, pages=longest) for run in runs]
            passes.verify(together)
            shared.append(_seconds(passes.verify, together))
    return served, shared, own


def _seconds(work: Callable[[Sequence[Run]], None], runs: Sequence[Run]) -> float:
    started = time.perf_counter()
    work(runs)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
