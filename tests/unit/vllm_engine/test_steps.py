"""What workers are told suffices: a row that is kept by it holds what each run says."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from dspark_core.engine.target.batch import Run
from dspark_core.vllm_engine.steps import SequenceTracker, WorkerStep

PAGE = 4


@dataclass
class Row:
    """One request as vLLM's worker keeps it: tokens that only grow or are written over, pages appended."""

    prompt: int
    tokens: list[int]
    pages: list[int] = field(default_factory=list)


@dataclass
class Worker:
    rows: dict[str, Row] = field(default_factory=dict)
    computed: dict[str, list[int]] = field(default_factory=dict)

    def apply(self, step: WorkerStep) -> list[tuple[list[int], int, list[int], int]]:
        """-> what it would compute of each sequence: tokens, start, pages, rows of logits."""
        for key in step.ended:
            del self.rows[key]
        found = []
        for one, wanted in zip(step.sequences, step.logit_rows, strict=True):
            end = one.start + len(one.token_ids)
            if one.fresh:
                assert one.key not in self.rows
                self.rows[one.key] = Row(end, [0] * one.start + one.token_ids)
            row = self.rows[one.key]
            assert one.start <= len(row.tokens) + 100  # behind whatever was computed
            assert end >= row.prompt, "a row cannot become shorter than it was at first"
            row.tokens[one.start :] = one.token_ids
            row.pages += one.pages
            found.append((one.token_ids + one.draft_ids, one.start, list(row.pages), wanted))
            assert wanted in (0, 1 + len(one.draft_ids))
        assert set(self.rows) == {one.key for one in step.sequences}
        return found


@dataclass
class Text:
    pages: list[int]
    computed: int = 0
    prompt: int = 10


@given(st.data())
def test_a_worker_computes_what_the_runs_say(data: st.DataObject) -> None:
    """Prompts in chunks, drafts, rejections, passes without a sequence, preemption into other pages."""
    tracker, worker = SequenceTracker(), Worker()
    texts = {name: Text([]) for name in "abcd"}
    pages = iter(range(1, 10_000))
    for _ in range(data.draw(st.integers(1, 12))):
        runs = []
        for name in data.draw(st.lists(st.sampled_from("abcd"), unique=True, min_size=1)):
            text = texts[name]
            if data.draw(st.integers(0, 9)) == 0:
                text.computed, text.pages = data.draw(st.integers(0, text.computed)), []
            if text.computed < text.prompt:
                count = data.draw(st.integers(1, text.prompt - text.computed))
                rows = int(text.computed + count == text.prompt)
            else:
                count = rows = data.draw(st.integers(1, 5))
            while len(text.pages) * PAGE < text.computed + count:
                text.pages.append(next(pages))
            tokens = data.draw(st.lists(st.integers(1, 99), min_size=count, max_size=count))
            runs.append(Run(tokens, text.computed, list(text.pages), rows, name))
            text.computed += count if rows <= 1 else data.draw(st.integers(1, count))
        if data.draw(st.booleans()):
            runs.append(Run([5, 6], 3, [next(pages), next(pages)], 2))
        found = worker.apply(tracker.step(runs, taps=True))
        assert found == [(list(r.token_ids), r.start, list(r.pages), r.logit_rows) for r in runs]
        if data.draw(st.integers(0, 9)) == 0:
            tracker.forget()


def test_a_sequence_that_goes_on_is_told_in_few_words() -> None:
    tracker = SequenceTracker()
    tracker.step([Run(list(range(100)), 0, list(range(25)), 1, "a")], taps=False)
    (one,) = tracker.step([Run([7, 8, 9], 100, list(range(26)), 3, "a")], taps=False).sequences
    assert (one.fresh, one.start, one.token_ids, one.draft_ids, one.pages) == (False, 100, [7], [8, 9], [25])


def test_after_a_failure_everybody_is_new() -> None:
    tracker = SequenceTracker()
    before = tracker.step([Run([1, 2], 0, [1], 1, "a")], taps=False).sequences[0]
    tracker.forget()
    step = tracker.step([Run([3], 2, [1], 1, "a")], taps=False)
    assert step.sequences[0].fresh
    assert step.sequences[0].key != before.key
    assert step.ended == [before.key]
