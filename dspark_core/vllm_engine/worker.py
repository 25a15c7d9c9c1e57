"""Runs inside vLLM's workers: computes passes that this project scheduled, up to the logits.

vLLM's own scheduler, sampler and rejection rule are bypassed. The worker gets a pass in the form that
vLLM's scheduler would use, computes it as usual (kernels, graphs and tensor parallel groups),
and stops before sampling, as acceptance happens elsewhere. Written for the model runner of vLLM 0.32 that its
configuration calls V1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from dspark_core.vllm_engine.sharing import SharedRows, SharedWriter
from dspark_core.vllm_engine.steps import SequenceStep, WorkerStep

PROPOSER = f"{__name__}.NoProposer"
WORKER = f"{__name__}.StepWorker"


class NoProposer:
    """Placeholder for the drafter vLLM requires before it computes logits of drafts; never called."""

    def __init__(self, config: object) -> None: ...

    def load_model(self, *given: object) -> None: ...

    def propose(self, *given: object) -> None:
        raise AssertionError("drafts come from the round loop")


class StepOutput(NamedTuple):
    logits: Tensor | SharedRows
    """[requested rows, vocab], in the order of the step."""
    taps: Tensor | SharedRows | None
    """[tokens, m * hidden], in the order of the step; None: not requested."""


class StepWorker:
    """Mixed into vLLM's worker class, so all of its own names start with `dspark`."""

    model_runner: GPUModelRunner
    execute_model: Any

    def dspark_tap(self, layers: tuple[int, ...]) -> str | None:
        """Makes later passes return the outputs of these layers (-1: the embedding).

        Must be called before the cache is created. Returns why it is impossible, or None.
        """
        model = self.model_runner.get_model()
        if not hasattr(model, "set_aux_hidden_state_layers"):
            return f"{type(model).__name__} hands out no hidden states"
        # vLLM numbers layer inputs, so the last layer's output has its own number, and returns states in
        # ascending order of layers.
        model.set_aux_hidden_state_layers(tuple(layer + 1 for layer in layers))
        ascending = sorted(set(layers))
        self.dspark_places = [ascending.index(layer) for layer in layers]
        self.model_runner.use_aux_hidden_state_outputs = True
        return None

    def dspark_step(self, step: WorkerStep) -> StepOutput | None:
        """None if another worker has the result."""
        runner = self.model_runner
        runner.execute_model_state = None  # may be left over from a failed pass
        _guard_inputs(runner)
        for one in step.sequences:
            if not one.fresh:
                _rewrite_row(runner, one)
        self.execute_model(_scheduled(runner, step))
        state, runner.execute_model_state = runner.execute_model_state, None
        runner.kv_connector_output = None
        if get_tp_group().rank_in_group != 0:
            return None
        order = _order(runner.input_batch.req_ids, step)
        taps = None
        if step.taps:
            states = [state.aux_hidden_states[place] for place in self.dspark_places]
            taps = _taps(states, step, order)
        logits = _logits(state.logits, step, order)
        return self._dspark_share(logits, taps) if step.shared else StepOutput(logits, taps)

    def _dspark_share(self, logits: Tensor, taps: Tensor | None) -> StepOutput:
        if not hasattr(self, "dspark_writer"):
            self.dspark_writer = SharedWriter()
        shared = StepOutput(
            self.dspark_writer.publish("logits", logits),
            None if taps is None else self.dspark_writer.publish("taps", taps),
        )
        if logits.is_cuda:
            torch.cuda.current_stream().synchronize()
        return shared


def _guard_inputs(runner: GPUModelRunner) -> None:
    """Turns on vLLM's wait before it refills the pinned memory from which a GPU still copies the last inputs.

    vLLM has it only with its asynchronous scheduling; without, its sampler waits, which never runs here.
    """
    if runner.device.type == "cuda" and runner.prepare_inputs_event is None:
        runner.prepare_inputs_event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _rewrite_row(runner: GPUModelRunner, one: SequenceStep) -> None:
    """Sets the tokens with which a known sequence continues; earlier ones are computed and not read again."""
    request = runner.requests[one.key]
    end = one.start + len(one.token_ids)
    held = request.output_token_ids
    length = end - request.num_prompt_tokens
    del held[length - len(one.token_ids) :]
    held.extend([0] * (length - len(one.token_ids) - len(held)))
    held.extend(one.token_ids)
    batch = runner.input_batch
    row = batch.req_id_to_index.get(one.key)
    if row is not None:
        batch.token_ids_cpu[row, one.start : end] = one.token_ids
        batch.num_tokens_no_spec[row] = end


def _scheduled(runner: GPUModelRunner, step: WorkerStep) -> SchedulerOutput:
    fresh = [one for one in step.sequences if one.fresh]
    known = [one for one in step.sequences if not one.fresh]
    return SchedulerOutput(
        scheduled_new_reqs=[_new_request(one) for one in fresh],
        scheduled_cached_reqs=CachedRequestData(
            req_ids=[one.key for one in known],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[(one.pages,) if one.pages else None for one in known],
            num_computed_tokens=[one.start for one in known],
            num_output_tokens=[len(runner.requests[one.key].output_token_ids) for one in known],
        ),
        num_scheduled_tokens={one.key: one.num_tokens for one in step.sequences},
        total_num_scheduled_tokens=sum(one.num_tokens for one in step.sequences),
        scheduled_spec_decode_tokens={one.key: one.draft_ids for one in step.sequences if one.draft_ids},
        scheduled_encoder_inputs={},
        finished_req_ids=set(step.ended),
        free_encoder_mm_hashes=[],
    )


def _new_request(one: SequenceStep) -> NewRequestData:
    return NewRequestData(
        req_id=one.key,
        prompt_token_ids=[0] * one.start + one.token_ids,
        mm_features=[],
        sampling_params=SamplingParams(temperature=0.0),
        pooling_params=None,
        block_ids=(one.pages,),
        num_computed_tokens=one.start,
        lora_request=None,
    )


def _order(keys: Sequence[str], step: WorkerStep) -> list[int]:
    """The index in the step of each row of the worker's batch."""
    place = {one.key: index for index, one in enumerate(step.sequences)}
    return [place[key] for key in keys]


def _logits(logits: Tensor, step: WorkerStep, order: Sequence[int]) -> Tensor:
    """Reorders the worker's 1 + drafts rows per sequence, which are in its own order."""
    counts = np.array([1 + len(one.draft_ids) for one in step.sequences])
    return _pick(logits, counts, np.array(step.logit_rows), order)


def _taps(states: Sequence[Tensor], step: WorkerStep, order: Sequence[int]) -> Tensor:
    counts = np.array([one.num_tokens for one in step.sequences])
    tapped = torch.cat([state[: counts.sum()] for state in states], dim=1)
    return _pick(tapped, counts, counts, order)


def _pick(rows: Tensor, counts: np.ndarray, wanted: np.ndarray, order: Sequence[int]) -> Tensor:
    """The last `wanted[i]` of the `counts[i]` rows of each sequence. `rows` are in `order`, results by i."""
    if np.array_equal(wanted, counts) and list(order) == list(range(len(order))):
        return rows
    ends = np.empty_like(counts)
    ends[list(order)] = counts[list(order)].cumsum()
    first = np.repeat(ends - wanted - (wanted.cumsum() - wanted), wanted)
    return rows[torch.from_numpy(first + np.arange(wanted.sum())).to(rows.device)]
