"""Hugging Face `transformers` on the same weights: plain, or with prompt lookup at batch size 1."""

from __future__ import annotations

import time

import torch

from benchmarks.peers_parts.contract import Outcome, Stopwatch, Trial
from benchmarks.peers_transformers import as_transformers

PAD_TOKEN_ID = 0
LOOKUP_TOKENS = 10


class TransformersPeer:
    def __init__(self, model: str, dtype: torch.dtype, *, prompt_lookup: bool = False) -> None:
        self._model = as_transformers(model, dtype)
        self._prompt_lookup = prompt_lookup

    def run(self, trial: Trial) -> Outcome:
        watch = Stopwatch(trial, time.perf_counter())
        for wave in trial.waves():
            self._answer(trial, wave, watch)
        return watch.outcome()

    @torch.inference_mode()
    def _answer(self, trial: Trial, wave: range, watch: Stopwatch) -> None:
        """Answer a wave as one padded batch, the only way `generate` takes several prompts."""
        prompts = [trial.prompts[index] for index in wave]
        if self._prompt_lookup and len(prompts) > 1:
            raise ValueError("prompt lookup takes one prompt at a time")
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), PAD_TOKEN_ID)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        passed: list[float] = []
        for index in wave:
            watch.ask(index, time.perf_counter())
        # Time the forward pass itself; logits processors also run earlier, for looked-up tokens.
        hook = self._model.register_forward_hook(lambda *_: passed.append(time.perf_counter()))
        try:
            out = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=trial.max_tokens,
                min_new_tokens=trial.max_tokens,
                do_sample=False,
                pad_token_id=PAD_TOKEN_ID,
                **({"prompt_lookup_num_tokens": LOOKUP_TOKENS} if self._prompt_lookup else {}),
            )
        finally:
            hook.remove()
        ended = time.perf_counter()
        for index, row in zip(wave, out, strict=True):
            answer = row[width:].tolist()
            watch.add(index, answer[:1], passed[0])
            watch.add(index, answer[1:], ended)
