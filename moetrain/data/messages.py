"""Chat messages as found in data, checked and brought into one form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from moetrain.data.sources import BadLine

Message = dict[str, Any]
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one field; Transformers sets the others from it


def read_messages(messages: Any, origin: str) -> list[Message]:
    """Messages in the form that templates expect: content as one string, arguments as objects, no empty fields.

    Raises:
        BadLine: anything else than a list of messages in OpenAI's form with text content.
    """
    if not isinstance(messages, list) or not messages:
        raise BadLine(origin, "the messages are not a list, or an empty one")
    return [_read_message(message, f"{origin}, message {i}") for i, message in enumerate(messages)]


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise BadLine(where, "not an object with a text field 'role'")
    result = {name: value for name, value in message.items() if value is not None}
    result["content"] = _read_content(message.get("content"), where)
    for name in REASONING:
        if not isinstance(result.get(name, ""), str):
            raise BadLine(where, f"field {name!r} is not text")
    if "tool_calls" in result:
        result["tool_calls"] = _read_tool_calls(result["tool_calls"], where)
    return result


def _read_content(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
        kinds = {part.get("type") for part in content} - {"text"}
        if not kinds and all(isinstance(part.get("text"), str) for part in content):
            return "".join(part["text"] for part in content)
        if kinds:
            raise BadLine(where, f"content parts of type {sorted(map(str, kinds))}; only 'text' is supported")
    raise BadLine(where, "field 'content' is neither text nor a list of text parts")


def _read_tool_calls(calls: Any, where: str) -> list[Any]:
    """Arguments given as JSON text become an object."""
    if not isinstance(calls, list):
        raise BadLine(where, "field 'tool_calls' is not a list")
    result = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadLine(where, "a tool call has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except json.JSONDecodeError as error:
                raise BadLine(where, f"the arguments of tool call {function['name']!r} are not JSON: {error}") from None
        result.append({**call, "function": {**function, "arguments": arguments if arguments is not None else {}}})
    return result


def with_text_arguments(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def read_tools(tools: Any, origin: str) -> list[Any] | None:
    """Tool schemas as a list of objects; None without any. JSON text is read. Raises BadLine for anything else."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise BadLine(origin, f"the tools are not JSON: {error}") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise BadLine(origin, "the tools are not a list of objects")
    return tools
