"""Converts requests and chunks of the gRPC API. Requests are checked by the same rules as in REST."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dspark_proto.v1 import gateway_pb2
from pydantic_core import from_json

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from services.common.convert import (
    adjustments_from_proto,
    finish_reason_to_proto,
    grammar_from_proto,
    logprobs_to_proto,
    speculation_from_proto,
    stats_to_proto,
)
from services.gateway.generation import TimedDelta
from services.gateway.openai.messages import ChatMessageBody
from services.gateway.openai.tool_fields import (
    FunctionBody,
    ToolBody,
    ToolCallBody,
    ToolChoiceBody,
    grammar_beside,
    tool_use,
)
from services.gateway.requests import (
    ChatMessage,
    ChatRole,
    Conversation,
    TextRequest,
    check_call_count,
    check_message_count,
)
from services.gateway.tools.tool_stream import CallDelta
from services.gateway.tools.tools import ToolUse, check_tool_count

_CHOICES = {
    gateway_pb2.TOOL_CHOICE_UNSPECIFIED: "auto",
    gateway_pb2.TOOL_CHOICE_NONE: "none",
    gateway_pb2.TOOL_CHOICE_REQUIRED: "required",
}


def request_from_proto(
    message: gateway_pb2.GatewayGenerateRequest, request_id: str, only_model: str
) -> TextRequest:
    """Raises InvalidRequestError naming the field."""
    tools = _tools(message)
    grammar = _grammar(message, tools)
    return TextRequest(
        request_id=request_id,
        model=message.model or only_model,
        prompt=_prompt(message),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else None,
        top_p=message.top_p if message.HasField("top_p") else None,
        top_k=message.top_k if message.HasField("top_k") else None,
        min_p=message.min_p if message.HasField("min_p") else None,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        speculation=speculation_from_proto(message.speculation),
        min_tokens_per_second=(
            message.min_tokens_per_second if message.HasField("min_tokens_per_second") else None
        ),
        cache_salt=message.cache_salt if message.HasField("cache_salt") else None,
        ignore_eos=message.ignore_eos,
        adjustments=adjustments_from_proto(message.adjustments),
        grammar=grammar,
        tools=tools,
        choices=message.n if message.HasField("n") else 1,
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
    )


def chunk_to_proto(timed: TimedDelta, new_call_id: Callable[[], str]) -> gateway_pb2.GatewayGenerateChunk:
    delta = timed.delta
    chunk = gateway_pb2.GatewayGenerateChunk(
        text=delta.text,
        reasoning=delta.reasoning,
        token_ids=delta.token_ids,
        finish_reason=finish_reason_to_proto(delta.finish_reason),
        logprobs=logprobs_to_proto(token.logprobs for token in delta.logprobs),
        choice=timed.choice,
        tool_calls=[_call_to_proto(call, new_call_id) for call in delta.calls],
    )
    if delta.finish_reason is not None:
        chunk.called = delta.called
        chunk.decode_tokens_per_second = timed.decode_tokens_per_second
        chunk.min_tokens_per_second = timed.min_tokens_per_second or 0.0
        chunk.usage.prompt_tokens = delta.usage.prompt_tokens
        chunk.usage.completion_tokens = delta.usage.completion_tokens
        chunk.usage.cached_prompt_tokens = delta.usage.cached_prompt_tokens
        chunk.usage.reasoning_tokens = delta.usage.reasoning_tokens
        if delta.stats is not None:
            chunk.stats.CopyFrom(stats_to_proto(delta.stats))
    return chunk


def _call_to_proto(call: CallDelta, new_id: Callable[[], str]) -> gateway_pb2.ToolCallDelta:
    if call.name is None:
        return gateway_pb2.ToolCallDelta(index=call.index, arguments=call.arguments)
    return gateway_pb2.ToolCallDelta(index=call.index, id=new_id(), name=call.name, arguments=call.arguments)


def _prompt(message: gateway_pb2.GatewayGenerateRequest) -> Conversation | str:
    if message.HasField("prompt"):
        if message.messages:
            raise InvalidRequestError("send either messages or prompt, got both", field="prompt")
        for field in ("tools", "chat_template_kwargs"):
            if getattr(message, field):
                raise InvalidRequestError(f"{field} needs messages, got prompt", field=field)
        return message.prompt
    check_message_count(len(message.messages))
    check_call_count(sum(len(entry.tool_calls) for entry in message.messages))
    entries = enumerate(message.messages)
    arguments = _json_object(message.chat_template_kwargs, "chat_template_kwargs")
    return Conversation(
        messages=tuple(_message(entry, f"messages[{place}]") for place, entry in entries),
        template_arguments=arguments,
    )


_ROLES = {"system": ChatRole.SYSTEM, "developer": ChatRole.SYSTEM} | {role.value: role for role in ChatRole}


def _message(entry: gateway_pb2.ChatMessage, place: str) -> ChatMessage:
    role = _ROLES.get(entry.role)
    if role is None:
        field = f"{place}.role"
        raise InvalidRequestError(
            f"{field} must be one of {', '.join(_ROLES)}, got {entry.role!r}", field=field
        )
    if role is not ChatRole.TOOL and not (entry.tool_calls or entry.tool_call_id or entry.reasoning):
        return ChatMessage(role=role, content=entry.content)  # only the other fields need checks
    calls = [
        ToolCallBody.model_validate(
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
        )
        for call in entry.tool_calls
    ]
    body = ChatMessageBody.model_validate(
        {
            "role": entry.role,
            "content": entry.content,
            "tool_calls": calls or None,
            "tool_call_id": entry.tool_call_id or None,
            "reasoning": entry.reasoning or None,
        }
    )
    return body.to_record(place)


def _tools(message: gateway_pb2.GatewayGenerateRequest) -> ToolUse | None:
    if message.tools:
        check_tool_count(len(message.tools))
    tools = [
        ToolBody(
            type="function",
            function=FunctionBody(
                name=tool.name,
                description=tool.description if tool.HasField("description") else None,
                strict=tool.strict,
                parameters=(
                    _json_object(tool.parameters, f"tools[{index}].function.parameters")
                    if tool.HasField("parameters")
                    else None
                ),
            ),
        )
        for index, tool in enumerate(message.tools)
    ]
    return tool_use(tools, _choice(message), parallel=_parallel(message), eager=True)


def _grammar(message: gateway_pb2.GatewayGenerateRequest, use: ToolUse | None) -> Grammar | None:
    grammar = grammar_from_proto(message.grammar)
    is_json = grammar is not None and grammar.kind is GrammarKind.JSON_SCHEMA
    return grammar_beside(use, grammar, "response_format" if is_json else "grammar")


def _parallel(message: gateway_pb2.GatewayGenerateRequest) -> bool:
    return message.parallel_tool_calls if message.HasField("parallel_tool_calls") else True


def _choice(message: gateway_pb2.GatewayGenerateRequest) -> ToolChoiceBody:
    kind = _CHOICES.get(message.tool_choice)
    if kind is None:
        raise InvalidRequestError(
            f"tool_choice must be one of {', '.join(_CHOICES.values())}, got {message.tool_choice}",
            field="tool_choice",
        )
    if message.allowed_tools:
        return _allowed(message, kind)
    if not message.HasField("called_tool"):
        return ToolChoiceBody.model_validate({"type": kind})
    if kind != "auto":
        raise InvalidRequestError(
            f"called_tool cannot be combined with tool_choice {kind!r}", field="called_tool"
        )
    return ToolChoiceBody.model_validate({"type": "function", "function": {"name": message.called_tool}})


def _allowed(message: gateway_pb2.GatewayGenerateRequest, kind: str) -> ToolChoiceBody:
    other = "called_tool" if message.HasField("called_tool") else f"tool_choice {kind!r}"
    if kind == "none" or message.HasField("called_tool"):
        raise InvalidRequestError(f"allowed_tools cannot be combined with {other}", field="allowed_tools")
    tools = [{"type": "function", "function": {"name": name}} for name in message.allowed_tools]
    return ToolChoiceBody.model_validate(
        {"type": "allowed_tools", "allowed_tools": {"mode": kind, "tools": tools}}
    )


def _json_object(text: str, field: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        value = from_json(text)
    except ValueError as error:
        raise InvalidRequestError(f"{field} must be JSON: {error}, got {text!r:.80}", field=field) from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{field} must be a JSON object, got {text!r:.80}", field=field)
    return value
