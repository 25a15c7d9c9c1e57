"""What tools mean for a request: its prompt, its grammar, and how calls are found in its answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.grammar_checking import GrammarChecker
from dspark_core.tokenization.tokenizer import Tokenizer
from dspark_core.tokenization.tool_formats import CallShape, CallSyntax, ToolFormat
from dspark_core.tokenization.tool_messages import adapt_messages
from dspark_core.tokenization.tool_prompts import spell_out_tools
from services.gateway.marks import TokenIds
from services.gateway.requests import ChatRole, Conversation
from services.gateway.thread_work import ThreadWork
from services.gateway.tools.parameter_kinds import ParameterKinds, parameter_kinds
from services.gateway.tools.tool_grammar import call_grammar, strict_grammar
from services.gateway.tools.tool_stream import NO_KINDS, CallStream
from services.gateway.tools.tools import ToolUse


@dataclass(frozen=True, slots=True, kw_only=True)
class CallReading:
    """How to find calls in an answer."""

    syntax: CallSyntax
    names: frozenset[str]
    kinds: Mapping[str, ParameterKinds] = field(default_factory=lambda: NO_KINDS)
    shown_token_ids: frozenset[int]
    """Tokens that mark calls; elsewhere they are not shown as text."""
    eager: bool
    parallel: bool
    forced: bool
    """The answer consists of calls."""

    def stream(self) -> CallStream:
        return CallStream(
            self.syntax,
            self.names,
            eager=self.eager,
            parallel=self.parallel,
            forced=self.forced,
            kinds=self.kinds,
        )


class _Tokens(TypedDict):
    """What grammars of calls need to know about the model's tokens."""

    token_id: TokenIds
    in_text: Sequence[int]


class ToolPreparer:
    def __init__(
        self, tokenizer: Tokenizer, grammars: GrammarChecker, asked: ToolFormat | None = None
    ) -> None:
        """asked: the format of calls; None: that of the model's chat template."""
        self._tokenizer = tokenizer
        self._style = tokenizer.tool_style(asked)
        self._grammars = grammars
        marks = (tokenizer.added_token_id(mark) for mark in self._style.syntax.marks)
        self._mark_ids = frozenset(mark for mark in marks if mark is not None)
        in_text = [one for one in tokenizer.shown_added_token_ids if one not in self._mark_ids]
        self._tokens = _Tokens(token_id=tokenizer.added_token_id, in_text=in_text)

    def render(self, conversation: Conversation, use: ToolUse | None) -> str:
        """The prompt as text. Raises InvalidRequestError if the template refuses the conversation."""
        messages, arguments = _messages(conversation), conversation.template_arguments
        tools = [tool.declared for tool in use.tools] if use else []
        plain = not tools and all(message.plain for message in conversation.messages)
        if self._style.native or plain:
            messages = adapt_messages(messages, self._style)
            return self._tokenizer.render_chat(messages, tools=tools or None, arguments=arguments)
        return self._tokenizer.render_chat(spell_out_tools(messages, tools, self._style), arguments=arguments)

    async def grammar(self, use: ToolUse, otherwise: Grammar | None, work: ThreadWork) -> Grammar | None:
        """The grammar of the answer, checked; None: it may be anything. otherwise: that of an answer without
        calls. work: tracks the check, which continues if this is cancelled.

        Raises InvalidRequestError naming the tool with an invalid schema.
        """
        grammar = self._grammar(use, otherwise)
        if grammar is None:
            return None
        try:
            await work.wait(self._grammars.check(grammar, "tools", work.owner))
        except InvalidRequestError:
            for tool in use.callable.values():
                schema = Grammar(kind=GrammarKind.JSON_SCHEMA, text=tool.schema)
                field = f"{tool.place}.parameters"
                await work.wait(self._grammars.check(schema, field, work.owner))
            raise
        return grammar

    def _grammar(self, use: ToolUse, otherwise: Grammar | None) -> Grammar | None:
        if otherwise is not None and otherwise.kind is not GrammarKind.JSON_SCHEMA:
            raise AssertionError("only JSON schemas go together with tools")
        syntax, tools = self._style.syntax, tuple(use.callable.values())
        several = use.parallel and use.only is None
        if use.forced or otherwise is not None:
            answer = None if otherwise is None else otherwise.text
            return call_grammar(syntax, tools, several=several, or_else=answer, **self._tokens)
        if use.bounded:
            return strict_grammar(syntax, tools, several=several, **self._tokens)
        return None

    def reading(self, use: ToolUse, grammar: Grammar | None) -> CallReading:
        """grammar: the answer's, if any; it limits the number of calls by itself."""
        tools, tagged = use.callable.values(), self._style.syntax.shape is CallShape.TAGS
        return CallReading(
            syntax=self._style.syntax,
            names=frozenset(tool.name for tool in tools),
            kinds={tool.name: parameter_kinds(json.loads(tool.schema)) for tool in tools}
            if tagged
            else NO_KINDS,
            shown_token_ids=self._mark_ids,
            eager=use.eager or bool(use.forced),
            parallel=use.parallel or grammar is not None,
            forced=bool(use.forced),
        )


def _messages(conversation: Conversation) -> list[dict[str, Any]]:
    """The messages in the form that chat templates expect."""
    messages = []
    names: dict[str, str] = {}
    for entry in conversation.messages:
        message: dict[str, Any] = {"role": entry.role.value, "content": entry.content}
        if entry.reasoning:
            message["reasoning_content"] = entry.reasoning
        if entry.tool_calls:
            message["tool_calls"] = [
                _call(call.call_id, call.name, call.arguments) for call in entry.tool_calls
            ]
            names |= {call.call_id: call.name for call in entry.tool_calls}
        if entry.role is ChatRole.TOOL and entry.tool_call_id is not None:
            message["tool_call_id"] = entry.tool_call_id
            if entry.tool_call_id in names:
                message["name"] = names[entry.tool_call_id]
        messages.append(message)
    return messages


def _call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": _object(arguments)}}


def _object(arguments: str) -> Mapping[str, Any] | str:
    """Templates expect an object; arguments that a model wrote and that are none stay text."""
    try:
        value = json.loads(arguments or "{}")
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # JSON escapes can form lone surrogates, which are not text
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
