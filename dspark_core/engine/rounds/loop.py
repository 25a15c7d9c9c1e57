"""The round loop: draft, plan, verify in one target pass, accept, commit.

Synchronous and single-threaded: one `step()` is one round, over every running sequence or one cohort. It
reaches the outside only through `DraftSource` and `PlanSource`.
"""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark_core.algorithms.prefix_scheduler import survival_from_confidence
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.caches.block_manager import BlockManager
from dspark_core.engine.drafts.draft_room import within_batch, within_pages
from dspark_core.engine.drafts.draft_turns import DraftTurns
from dspark_core.engine.drafts.drafting import Drafting, DraftRound, draft_limit
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.drafts.plan_inputs import may_look_ahead, plan_requests, speed_floors
from dspark_core.engine.grammars import GrammarCompiler, SequenceGrammar
from dspark_core.engine.protocols import DraftBlock, PlanSource
from dspark_core.engine.rounds.batching import Batcher, BatchLimits
from dspark_core.engine.rounds.pacing import (
    MIN_CHUNK_TOKENS,
    PrefillPacer,
    chunk_pairs,
    prompt_shares,
    tokens_per_pair,
)
from dspark_core.engine.sequence import SequenceState
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.engine.verdicts.acceptance import NO_BLOCK, Acceptor, Proposal, Verdict, shaped_rows
from dspark_core.engine.verdicts.grammar_masks import mask
from dspark_core.engine.verdicts.logit_adjusting import LogitAdjuster
from dspark_core.engine.verdicts.logprobs import logprob_rows, token_logprobs
from dspark_core.errors import ContextLengthError, DSparkError, InvalidRequestError
from dspark_core.output_rules import Grammar
from dspark_core.records import (
    MAX_SEED,
    DraftOrigin,
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    RequestSurvival,
    RoundReport,
    TokenLogprobs,
)

UNKNOWN_CONFIDENCE = 0.7
"""Assumed for drafters without a confidence head."""


@dataclass(frozen=True, slots=True)
class RoundOutput:
    request_id: str
    chunk: GenerateChunk
    error: DSparkError | None = None
    """Why the request cannot continue; `chunk` is then empty."""


@dataclass(frozen=True, slots=True)
class _RoundTimes:
    step_seconds: float
    loop_seconds: float
    drafts: DraftRound


class RoundLoop:
    def __init__(
        self,
        engine: TargetEngine,
        planner: PlanSource,
        *,
        drafting: Drafting | None = None,
        lookup: LookupDrafting | None = None,
        cohorts: int | None = None,
        grammars: GrammarCompiler | None = None,
        limits: BatchLimits | None = None,
        replica_id: str = "local",
        generator: torch.Generator | None = None,
        step_time: StepTimeModel | None = None,
        on_end: Callable[[SequenceState], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """
        Args:
            lookup: Also drafts from the sequences' own text, where that is better than the drafter.
            cohorts: 1 or 2, see `DraftTurns`; None: whichever is faster by the planner's times.
            grammars: None: requests with a grammar are refused.
            step_time: Measured; paces prefill if the limits bound a step's time. None: learned.
            on_end: Called for each sequence that ends without being cancelled, before its pages are freed.
        """
        self._engine = engine
        self._planner = planner
        self._drafting = drafting
        self._lookup = lookup
        self._grammars = grammars
        self._turns = DraftTurns(planner, drafting, lookup, cohorts)
        self._manager = BlockManager(engine.num_pages, engine.page_tokens)
        self.batcher = Batcher(self._manager, limits or BatchLimits())
        self._replica_id = replica_id
        self._on_end = on_end
        self._sequences: dict[str, SequenceState] = {}
        self._arrivals = itertools.count()
        self._rounds = itertools.count(1)
        if generator is None:
            generator = torch.Generator().manual_seed(secrets.randbelow(MAX_SEED))
        self._acceptor = Acceptor(generator)
        self._adjuster = LogitAdjuster()
        longest = self.batcher.limits.max_step_seconds
        self._clock = clock
        self._pass_ended: float | None = None  # end of the previous pass; None after an idle time
        self._committing = False
        self._pacer: PrefillPacer | None = None
        if longest is not None:
            pairs = tokens_per_pair(engine.config)
            self._pacer = PrefillPacer(longest, step_time, tokens_per_pair=pairs)

    @property
    def has_work(self) -> bool:
        return bool(self._sequences)

    @property
    def free_kv_fraction(self) -> float:
        return self._manager.available_pages / self._manager.usable_pages

    def compile_grammar(self, request: GenerateRequest, grammar: Grammar) -> Future[SequenceGrammar]:
        """Compiles a grammar for `submit`, from any thread; may take long. Raises InvalidRequestError if
        grammars are not supported."""
        if self._grammars is None:
            raise InvalidRequestError("grammar: there is none for this model's tokenizer", field="grammar")
        return self._grammars.compile(request, grammar)

    def submit(self, request: GenerateRequest, grammar: SequenceGrammar | None = None) -> None:
        """Queues a request. Raises InvalidRequestError, ContextLengthError or QueueFullError."""
        self._validate(request)
        if request.grammar is not None and grammar is None:
            grammar = self.compile_grammar(request, request.grammar).result()
        limit = self._engine.max_context_tokens
        if request.max_tokens is not None:
            limit = min(limit, len(request.prompt_token_ids) + request.max_tokens)
        seed = request.sampling.seed
        sequence = SequenceState(
            request=request,
            order=next(self._arrivals),
            noise_seed=secrets.randbelow(MAX_SEED) if seed is None else seed,
            max_length=limit,
            grammar=grammar,
        )
        self.batcher.enqueue(sequence)
        self._sequences[request.request_id] = sequence

    def cancel(self, request_id: str) -> None:
        """Frees everything a request holds; unknown ids are ignored (it may just have ended)."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._forget(sequence)

    def recover(self) -> list[str]:
        """After `step` raised: its sequences go on from their committed tokens, at first each in a round of
        its own. Returns the ids of requests that cannot: one that failed alone again, or all that ran, if
        they may have committed tokens that nobody was told of.
        """
        self._pass_ended = None
        if self._committing:
            self._committing = False
            return [sequence.sequence_id for sequence in self.batcher.running]
        tried = self._taking_part()
        if not tried:
            return list(self._sequences)
        if tried[0].suspect:
            return [tried[0].sequence_id]
        for sequence in tried:
            sequence.suspect = True
        return []

    def step(self) -> list[RoundOutput]:
        """One round. Returns what it committed, sequence by sequence; see `recover` if it raises."""
        self.batcher.admit()
        self.batcher.skip_filled()
        decoding, drafts = self._turns.take(self._secure_anchors())
        started = self._clock()
        proposals, survival = self._plan(decoding, drafts)
        decode_tokens = sum(1 + len(p.draft_token_ids) for p in proposals)
        prefills = self._prefill_chunks(proposals, decode_tokens)
        runs = [self._decode_run(p) for p in proposals] + [self._prefill_run(s, n) for s, n in prefills]
        if not runs:
            self._pass_ended = None
            for sequence in self._taking_part():
                sequence.suspect = False  # there are no pages to try it alone
            return []
        logits = self._engine.forward(runs)
        sampled = proposals + [Proposal(s) for s, n in prefills if n == s.uncomputed]
        logprob_logits: Mapping[int, Tensor] = {}
        if shaped := shaped_rows(sampled):
            logprob_logits = logprob_rows(logits, shaped)
            self._adjuster.apply(logits, shaped)
            mask(logits, shaped)
        verdicts = self._acceptor.accept(logits, sampled)
        if self._lookup:
            self._lookup.learn(proposals, verdicts)
        ended = self._clock()
        elapsed = ended - started
        loop_seconds = 0.0 if self._pass_ended is None else started - self._pass_ended - drafts.seconds
        self._learn_pace(proposals, decode_tokens, prefills, elapsed)
        if self._lookup and not prefills and self._pass_ended is not None:
            self._lookup.timed(proposals, verdicts, ended - self._pass_ended)
        for sequence, count in prefills:
            sequence.computed += count
            sequence.suspect = False
            sequence.publish_full_pages(self._manager)
        times = _RoundTimes(elapsed, max(loop_seconds, 0.0), drafts)
        self._report(proposals, verdicts, survival, runs, times)
        self._committing = True
        outputs = self._commit(sampled, verdicts, len(proposals), drafts, elapsed, logprob_logits)
        self._turns.end(self.batcher.running)
        self._committing = False
        self._pass_ended = ended if self._sequences else None
        return outputs

    def _validate(self, request: GenerateRequest) -> None:
        if request.request_id in self._sequences:
            raise InvalidRequestError(
                f"request_id {request.request_id!r} is already running", field="request_id"
            )
        vocab = self._engine.config.vocab_size
        for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
            if not 0 <= token_id < vocab:
                raise InvalidRequestError(
                    f"prompt_token_ids must be in [0, {vocab}), got {token_id}", field="prompt_token_ids"
                )
        biased = max((token_id for token_id, _ in request.adjustments.logit_bias), default=0)
        if biased >= vocab:
            raise InvalidRequestError(
                f"logit_bias must be of tokens in [0, {vocab}), got {biased}", field="logit_bias"
            )
        limit = self._engine.max_context_tokens
        if len(request.prompt_token_ids) >= limit:
            raise ContextLengthError(
                f"the prompt has {len(request.prompt_token_ids)} tokens; "
                f"with at least one token to generate the limit is {limit}",
                field="prompt_token_ids",
                limit=limit,
            )

    def _taking_part(self) -> list[SequenceState]:
        """Those of the next round, oldest first: all that run, or one that is to be tried alone."""
        running = sorted(self.batcher.running, key=lambda s: s.order)
        return [s for s in running if s.suspect][:1] or running

    def _secure_anchors(self) -> list[SequenceState]:
        """Decoding sequences that have a page for their anchor, oldest first."""
        ready, preemptions = [], self.batcher.preemptions
        for sequence in self._taking_part():
            if not sequence.decoding:
                continue  # still in prefill
            if self.batcher.preemptions != preemptions and sequence not in self.batcher.running:
                continue  # preempted by an older one just now
            if self.batcher.secure(sequence, len(sequence.tokens)):
                ready.append(sequence)
        return ready

    def _plan(
        self, decoding: Sequence[SequenceState], drafts: DraftRound
    ) -> tuple[list[Proposal], list[list[float]]]:
        """Scheduled draft prefixes, and the survival estimates they were planned from."""
        blocks = [drafts.blocks.get(s.sequence_id) or NO_BLOCK for s in decoding]
        survival = [self._survival(s, block) for s, block in zip(decoding, blocks, strict=True)]
        if any(survival):
            shares = within_batch([len(row) for row in survival], self._draft_room(len(decoding)))
            shares = within_pages(decoding, shares, self._manager)
            survival = [row[:share] for row, share in zip(survival, shares, strict=True)]
        origins = [block.origin for block in blocks]
        lengths = self._planner.plan(plan_requests(decoding, survival, origins)) if decoding else ()
        proposals = []
        for sequence, block, length in zip(decoding, blocks, lengths, strict=True):
            if length and not sequence.reserve(self._manager, len(sequence.tokens) + length):
                raise AssertionError("a plan needs more pages than there were")
            proposals.append(Proposal(sequence, block, length))
        return proposals, survival

    def _draft_room(self, num_decoding: int) -> int:
        """Draft tokens that fit a step besides the anchors and the smallest prefill chunk."""
        unread = sum([s.uncomputed for s in self.batcher.running if not s.decoding])
        return self.batcher.limits.max_batch_tokens - num_decoding - min(unread, MIN_CHUNK_TOKENS)

    def _survival(self, sequence: SequenceState, block: DraftBlock) -> list[float]:
        count = len(block.token_ids)
        if not count:
            return []
        confidences = block.confidences or (UNKNOWN_CONFIDENCE,) * count
        limit = draft_limit(sequence, count)
        # For other requests, verify lengths must not depend on the draft tokens (the causal barrier).
        if sequence.grammar is not None and may_look_ahead(sequence.request):
            limit = min(limit, sequence.grammar.valid(block.token_ids))
        return list(survival_from_confidence(confidences[:limit]))

    def _prefill_chunks(
        self, proposals: Sequence[Proposal], decode_tokens: int
    ) -> list[tuple[SequenceState, int]]:
        """Sequences that prefill in this round and their numbers of tokens, in order of arrival."""
        limits = self.batcher.limits
        budget = min(limits.prefill_chunk_tokens, limits.max_batch_tokens - decode_tokens)
        waiting = [s for s in self._taking_part() if not s.decoding]
        if self._pacer is not None and proposals and waiting:
            context, start = _context_tokens(proposals), waiting[0].computed
            budget = self._pacer.allowance(len(proposals), decode_tokens, context, budget, start=start)
        # Of those that share the page they come to next, the earliest computes it, for all.
        readers: dict[int, SequenceState] = {}
        for sequence in waiting:
            readers.setdefault(sequence.next_page, sequence)
        shares = prompt_shares([sequence.uncomputed for sequence in readers.values()], max(budget, 0))
        return [(sequence, count) for sequence, count in zip(readers.values(), shares, strict=True) if count]

    def _learn_pace(
        self,
        proposals: Sequence[Proposal],
        decode_tokens: int,
        prefills: Sequence[tuple[SequenceState, int]],
        seconds: float,
    ) -> None:
        if self._pacer is not None and proposals and prefills:
            prompt_tokens = sum(count for _, count in prefills)
            context = _context_tokens(proposals)
            pairs = sum(chunk_pairs(sequence.computed, count) for sequence, count in prefills)
            self._pacer.observe(len(proposals), decode_tokens, prompt_tokens, context, seconds, pairs=pairs)

    def _decode_run(self, proposal: Proposal) -> Run:
        sequence = proposal.sequence
        token_ids = [sequence.tokens[-1], *proposal.draft_token_ids]
        start, name = len(sequence.tokens) - 1, sequence.sequence_id
        return Run(token_ids, start, sequence.pages, len(token_ids), name)

    def _prefill_run(self, sequence: SequenceState, count: int) -> Run:
        token_ids = sequence.tokens[sequence.computed : sequence.computed + count]
        rows = 1 if count == sequence.uncomputed else 0
        return Run(token_ids, sequence.computed, sequence.pages, rows, sequence.sequence_id)

    def _commit(
        self,
        sampled: Sequence[Proposal],
        verdicts: Sequence[Verdict],
        num_decoding: int,
        drafts: DraftRound,
        verify_seconds: float,
        logprob_logits: Mapping[int, Tensor],
    ) -> list[RoundOutput]:
        outputs = []
        for index, (proposal, verdict) in enumerate(zip(sampled, verdicts, strict=True)):
            sequence = proposal.sequence
            if index < num_decoding:
                sequence.computed += 1 + verdict.accepted
            committed = self._append(sequence, proposal, verdict)
            sequence.suspect = False
            if sequence.grammar is not None and sequence.grammar.problem is not None:
                outputs.append(self._failed(sequence, sequence.grammar.problem))
                continue
            if index < num_decoding:
                # A stop token inside the accepted prefix ends the round there.
                accepted = min(verdict.accepted, len(committed))
                if self._drafting and proposal.drafted and proposal.block.origin is DraftOrigin.DRAFTER:
                    sequence.learn_useful_draft(self._drafting.block_size, proposal.verify_length)
                sequence.stats = sequence.stats.add_round(
                    drafted=proposal.drafted,
                    verified=len(proposal.draft_token_ids),
                    accepted=accepted,
                    committed=len(committed),
                    draft_seconds=drafts.seconds,
                    verify_seconds=verify_seconds,
                    origin=proposal.block.origin,
                )
            logprobs: tuple[TokenLogprobs, ...] = ()
            if index in logprob_logits:
                top = sequence.request.top_logprobs or 0
                logprobs = token_logprobs(logprob_logits[index], committed, top)
            outputs.append(RoundOutput(sequence.sequence_id, self._chunk(sequence, committed, logprobs)))
            if sequence.finish_reason is not None:
                if self._on_end is not None:
                    self._on_end(sequence)
                self._forget(sequence)
            else:
                sequence.publish_full_pages(self._manager)
        return outputs

    def _append(self, sequence: SequenceState, proposal: Proposal, verdict: Verdict) -> list[int]:
        """Commits tokens up to the first stop token or the length limit."""
        committed = []
        stops = sequence.request.stop_token_ids
        for token_id in (*proposal.draft_token_ids[: verdict.accepted], verdict.next_token_id):
            sequence.tokens.append(token_id)
            committed.append(token_id)
            if token_id in stops or _completes(sequence.grammar, token_id):
                sequence.finish_reason = FinishReason.STOP
                break
            if sequence.grammar is not None and sequence.grammar.problem is not None:
                break
            if sequence.remaining == 0:
                sequence.finish_reason = FinishReason.LENGTH
                break
        return committed

    def _failed(self, sequence: SequenceState, problem: str) -> RoundOutput:
        self._forget(sequence)
        error = InvalidRequestError(f"grammar: {problem}", field="grammar")
        return RoundOutput(sequence.sequence_id, GenerateChunk(token_ids=()), error)

    def _chunk(
        self, sequence: SequenceState, committed: Sequence[int], logprobs: tuple[TokenLogprobs, ...]
    ) -> GenerateChunk:
        return GenerateChunk(
            token_ids=tuple(committed),
            finish_reason=sequence.finish_reason,
            stats=sequence.stats,
            cached_prompt_tokens=sequence.cached_prompt_tokens,
            logprobs=logprobs,
        )

    def _forget(self, sequence: SequenceState) -> None:
        # Publishing first keeps a finished conversation warm for its next turn.
        sequence.computed = min(sequence.computed, len(sequence.tokens))
        sequence.publish_full_pages(self._manager)
        self.batcher.remove(sequence)
        del self._sequences[sequence.sequence_id]
        if self._drafting:
            self._drafting.release([sequence.sequence_id])
        if self._lookup:
            self._lookup.release(sequence.sequence_id)
        self._turns.release(sequence.sequence_id)
        self._adjuster.release(sequence.sequence_id)

    def _report(
        self,
        proposals: Sequence[Proposal],
        verdicts: Sequence[Verdict],
        survival: Sequence[Sequence[float]],
        runs: Sequence[Run],
        times: _RoundTimes,
    ) -> None:
        floors = speed_floors([proposal.sequence for proposal in proposals])
        requests = tuple(
            RequestSurvival(
                sequence_id=proposal.sequence.sequence_id,
                survival=tuple(row),
                verify_length=len(proposal.draft_token_ids),
                accepted=verdict.accepted,
                min_tokens_per_second=floor or 0.0,
                origin=proposal.block.origin,
                temperature=proposal.sequence.request.sampling.temperature,
            )
            for proposal, verdict, row, floor in zip(proposals, verdicts, survival, floors, strict=False)
        )
        self._planner.report(
            RoundReport(
                replica_id=self._replica_id,
                round=next(self._rounds),
                requests=requests,
                batch_tokens=sum(len(run.token_ids) for run in runs),
                context_tokens=sum(run.start for run in runs),
                step_seconds=times.step_seconds,
                draft_seconds=times.drafts.seconds + times.drafts.hidden_seconds,
                hidden_draft_seconds=times.drafts.hidden_seconds,
                loop_seconds=times.loop_seconds,
                draft_compute_seconds=times.drafts.compute_seconds,
                drafter_id=times.drafts.drafter_id,
                drafter_primed=times.drafts.primed,
                cohorts=self._turns.cohorts,
            )
        )


def _completes(grammar: SequenceGrammar | None, token_id: int) -> bool:
    """Advances the grammar by the token; returns whether only the end may follow."""
    if grammar is None:
        return False
    if not grammar.take((token_id,)) and grammar.problem is None:
        grammar.fail(f"token {token_id} cannot follow")
    return grammar.complete


def _context_tokens(proposals: Sequence[Proposal]) -> int:
    """Context positions of the decoding requests. A prompt's own context is counted as pairs instead."""
    return sum(len(proposal.sequence.tokens) - 1 for proposal in proposals)
