"""llama.cpp through `llama-cpp-python`, on the GGUF file itself with its own quantised kernels.

Several prompts are decoded in one batch, one sequence id each, as llama.cpp's server does.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.peers_parts.contract import Outcome, Stopwatch, Trial

BATCH_TOKENS = 512


class LlamaCppPeer:
    def __init__(self, path: Path, *, threads: int, max_requests: int, context_tokens: int) -> None:
        """`context_tokens`: maximum length of prompt and answer together, per request."""
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context_tokens * max_requests
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_seq_max = max_requests
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot allocate its context")
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def run(self, trial: Trial) -> Outcome:
        watch = Stopwatch(trial, time.perf_counter())
        for wave in trial.waves():
            self._answer(trial, wave, watch)
        return watch.outcome()

    def _answer(self, trial: Trial, wave: range, watch: Stopwatch) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        prompts = [trial.prompts[index] for index in wave]
        for index in wave:
            watch.ask(index, time.perf_counter())
        last = []
        for sequence, (index, prompt) in enumerate(zip(wave, prompts, strict=True)):
            token = self._prefill(sequence, prompt)
            watch.add(index, [token], time.perf_counter())
            last.append(token)
        for step in range(trial.max_tokens - 1):
            self._batch.n_tokens = 0
            for sequence, prompt in enumerate(prompts):
                self._add(last[sequence], len(prompt) + step, sequence, wanted=True)
            self._decode()
            last = [self._greedy(sequence) for sequence in range(len(last))]
            now = time.perf_counter()
            for index, token in zip(wave, last, strict=True):
                watch.add(index, [token], now)

    def _prefill(self, sequence: int, prompt: tuple[int, ...]) -> int:
        for start in range(0, len(prompt), BATCH_TOKENS):
            self._batch.n_tokens = 0
            for position in range(start, min(start + BATCH_TOKENS, len(prompt))):
                self._add(prompt[position], position, sequence, wanted=position == len(prompt) - 1)
            self._decode()
        return self._greedy(self._batch.n_tokens - 1)

    def _add(self, token: int, position: int, sequence: int, *, wanted: bool) -> None:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row] = token
        batch.pos[row] = position
        batch.n_seq_id[row] = 1
        batch.seq_id[row][0] = sequence
        batch.logits[row] = wanted
        batch.n_tokens += 1

    def _decode(self) -> None:
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")

    def _greedy(self, row: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, row)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


@llama_cpp.llama_log_callback
def _QUIET(level: int, text: bytes, data: object) -> None:  # noqa: N802
    """llama.cpp logs a lot while loading."""
