"""Builds a response from the generated deltas, and yields every step as an event."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from dspark_core.records import FinishReason
from services.gateway.answers import AnswerFactory
from services.gateway.assembly import TokenWithLogprobs
from services.gateway.generation import TimedDelta
from services.gateway.http.errors import ErrorAnswer
from services.gateway.openai.completion_answers import SpeculationStatsBody
from services.gateway.openai.logprobs import LogprobsWriter, TokenLogprobBody
from services.gateway.openai.responses_answer import (
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
    CallBody,
    ContentPartEvent,
    ErrorEvent,
    EventBody,
    ItemBody,
    ItemEvent,
    ItemStatus,
    MessageBody,
    OutputTextBody,
    PartBody,
    ReasoningBody,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    ReasoningTextBody,
    ResponseBody,
    ResponseEvent,
    TextDeltaEvent,
    TextDoneEvent,
)
from services.gateway.tools.tool_stream import CallDelta, json_object


class ResponseWriter:
    """One item is open at a time: text after a call or a thought is a message of its own."""

    def __init__(self, response: ResponseBody, answers: AnswerFactory, logprobs: LogprobsWriter) -> None:
        """response: in its initial state."""
        self.response = response
        self._answers = answers
        self._logprobs = logprobs
        self._numbers = itertools.count()
        self._done: list[ItemBody] = []
        self._open: _Message | _Call | _Thought | None = None
        self._held: list[TokenWithLogprobs] = []
        """Log-probabilities of tokens whose text has not been written yet."""
        self.begun = False

    def add(self, timed: TimedDelta) -> Iterator[EventBody]:
        return self._numbered(self._events(timed))

    def fail(self, answer: ErrorAnswer) -> Iterator[EventBody]:
        """Marks a response that has already begun as failed."""
        output = self._done if self._open is None else [*self._done, self._open.item("incomplete")]
        self.response = self.response.failed(output, answer.message)
        failed = ResponseEvent(type="response.failed", response=self.response)
        return self._numbered(iter((ErrorEvent.of(answer), failed)))

    def _numbered(self, events: Iterator[EventBody]) -> Iterator[EventBody]:
        for event in events:
            event.sequence_number = next(self._numbers)
            yield event

    def _events(self, timed: TimedDelta) -> Iterator[EventBody]:
        if not self.begun:
            self.begun = True
            yield ResponseEvent(type="response.created", response=self.response)
            yield ResponseEvent(type="response.in_progress", response=self.response)
        delta = timed.delta
        self._held += delta.logprobs
        yield from self._thought(delta.reasoning)
        sent = 0
        for call in delta.calls:
            yield from self._text(delta.text[sent : call.text_before])
            yield from self._call(call)
            sent = call.text_before
        yield from self._text(delta.text[sent:])
        if delta.finish_reason is not None:
            yield from self._end(timed)

    def _thought(self, text: str) -> Iterator[EventBody]:
        """Thoughts have no place for log-probabilities: they come with the text that follows."""
        if not text:
            return
        if not isinstance(self._open, _Thought):
            yield from self._close()
            self._open = _Thought(self._answers.new_id(), len(self._done))
            yield from self._open.begin()
        yield self._open.add(text)

    def _text(self, text: str, *, always: bool = False) -> Iterator[EventBody]:
        if not text and not always:
            return
        if not isinstance(self._open, _Message):
            yield from self._close()
            self._open = _Message(self._answers.new_id(), len(self._done))
            yield from self._open.begin()
        logprobs, self._held = self._logprobs.chat(self._held).content, []
        yield self._open.add(text, logprobs)

    def _call(self, call: CallDelta) -> Iterator[EventBody]:
        if call.name is not None:
            yield from self._close()
            self._open = _Call(self._answers, call.name, len(self._done))
            yield self._open.begin()
        elif isinstance(self._open, _Call):
            yield self._open.add(call.arguments)

    def _close(self, *, cut: bool = False) -> Iterator[EventBody]:
        if self._open is not None:
            # A call that breaks off is incomplete, however the answer ends.
            whole = self._open.whole if isinstance(self._open, _Call) else not cut
            status: ItemStatus = "completed" if whole else "incomplete"
            yield from self._open.end(status)
            self._done.append(self._open.item(status))
            self._open = None

    def _end(self, timed: TimedDelta) -> Iterator[EventBody]:
        cut = timed.delta.finish_reason is FinishReason.LENGTH
        if isinstance(self._open, _Thought):
            yield from self._close(cut=cut)
        if self._held or (self._open is None and not self._done):  # tokens without text, or an empty answer
            yield from self._text("", always=True)
        yield from self._close(cut=cut)
        self.response = self.response.completed(self._done, timed.delta.usage, SpeculationStatsBody.of(timed))
        if cut:
            self.response = self.response.cut_short()
        yield ResponseEvent(type=f"response.{self.response.status}", response=self.response)


class _Spoken:
    """An item with a single text."""

    def __init__(self, name: str, index: int) -> None:
        self._id = name
        self._index = index
        self._texts: list[str] = []

    @property
    def _text(self) -> str:
        return "".join(self._texts)

    def _added(self, empty: ItemBody, part: PartBody) -> Iterator[EventBody]:
        yield ItemEvent(type="response.output_item.added", output_index=self._index, item=empty)
        yield self._part("response.content_part.added", part)

    def _done(self, whole: ItemBody, part: PartBody) -> Iterator[EventBody]:
        yield self._part("response.content_part.done", part)
        yield ItemEvent(type="response.output_item.done", output_index=self._index, item=whole)

    def _part(self, kind: str, part: PartBody) -> ContentPartEvent:
        return ContentPartEvent(type=kind, item_id=self._id, output_index=self._index, part=part)


class _Message(_Spoken):
    def __init__(self, name: str, index: int) -> None:
        super().__init__(f"msg_{name}", index)
        self._logprobs: list[TokenLogprobBody] = []

    def begin(self) -> Iterator[EventBody]:
        return self._added(MessageBody(id=self._id, status="in_progress", content=[]), self._content())

    def add(self, text: str, logprobs: Sequence[TokenLogprobBody]) -> EventBody:
        self._texts.append(text)
        self._logprobs += logprobs
        return TextDeltaEvent(item_id=self._id, output_index=self._index, delta=text, logprobs=list(logprobs))

    def end(self, status: ItemStatus) -> Iterator[EventBody]:
        yield TextDoneEvent(
            item_id=self._id, output_index=self._index, text=self._text, logprobs=self._logprobs
        )
        yield from self._done(self.item(status), self._content())

    def item(self, status: ItemStatus) -> MessageBody:
        return MessageBody(id=self._id, status=status, content=[self._content()])

    def _content(self) -> OutputTextBody:
        return OutputTextBody(text=self._text, logprobs=self._logprobs)


class _Thought(_Spoken):
    def __init__(self, name: str, index: int) -> None:
        super().__init__(f"rs_{name}", index)

    def begin(self) -> Iterator[EventBody]:
        return self._added(ReasoningBody(id=self._id, status="in_progress", content=[]), self._content())

    def add(self, text: str) -> EventBody:
        self._texts.append(text)
        return ReasoningDeltaEvent(item_id=self._id, output_index=self._index, delta=text)

    def end(self, status: ItemStatus) -> Iterator[EventBody]:
        yield ReasoningDoneEvent(item_id=self._id, output_index=self._index, text=self._text)
        yield from self._done(self.item(status), self._content())

    def item(self, status: ItemStatus) -> ReasoningBody:
        return ReasoningBody(id=self._id, status=status, content=[self._content()])

    def _content(self) -> ReasoningTextBody:
        return ReasoningTextBody(text=self._text)


class _Call:
    def __init__(self, answers: AnswerFactory, name: str, index: int) -> None:
        self._id = f"fc_{answers.new_id()}"
        self._call_id = answers.call_id()
        self._name = name
        self._index = index
        self._fragments: list[str] = []

    def begin(self) -> EventBody:
        item = self.item("in_progress")
        return ItemEvent(type="response.output_item.added", output_index=self._index, item=item)

    def add(self, arguments: str) -> EventBody:
        self._fragments.append(arguments)
        return ArgumentsDeltaEvent(item_id=self._id, output_index=self._index, delta=arguments)

    def end(self, status: ItemStatus) -> Iterator[EventBody]:
        item = self.item(status)
        yield ArgumentsDoneEvent(
            item_id=self._id, output_index=self._index, name=self._name, arguments=item.arguments
        )
        yield ItemEvent(type="response.output_item.done", output_index=self._index, item=item)

    @property
    def whole(self) -> bool:
        return json_object("".join(self._fragments)) is not None

    def item(self, status: ItemStatus) -> CallBody:
        return CallBody(
            id=self._id,
            status=status,
            call_id=self._call_id,
            name=self._name,
            arguments="".join(self._fragments),
        )
