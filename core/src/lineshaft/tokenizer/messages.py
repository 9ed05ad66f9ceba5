"""Messages and tools of a chat, as OpenAI's API has them, checked and in the shape that chat templates read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lineshaft.errors import ChatError

MESSAGE = '{"role": "user", "content": "..."}'
TOOL = '{"type": "function", "function": {"name": "...", "parameters": {"type": "object", "properties": {...}}}}'


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of the messages, with lists of text parts joined, and tool calls' arguments as objects, not JSON text.

    Raises ChatError for no message, and for one without a role or with parts that are no text.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ChatError(f"messages must be a list of at least one message like {MESSAGE}, not {messages!r:.80}")
    return [_plain(f"message {index}", message) for index, message in enumerate(messages)]


def _plain(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ChatError(f"{where} must be like {MESSAGE}, not {message!r:.80}")
    made = dict(message)
    if not isinstance(made.get("content"), str | None):
        made["content"] = _joined(where, made["content"])
    if made.get("tool_calls") is not None:
        made["tool_calls"] = _calls(where, made["tool_calls"])
    return made


def _joined(where: str, parts: Any) -> str:
    """The texts of content given in parts, one a line."""
    wanted = 'a text, or a list of {"type": "text", "text": "..."}: no other input is supported'
    if not isinstance(parts, list | tuple):
        raise ChatError(f"the content of {where} is {parts!r:.80}; it must be {wanted}")
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ChatError(f"the content of {where} has the part {part!r:.80}; it must be {wanted}")
    return "\n".join(part["text"] for part in parts)


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls of an earlier answer; templates write `arguments` out as JSON, so JSON text would come out twice."""

    def refuse(found: Any) -> NoReturn:
        raise ChatError(
            f'a tool call of {where} must be like {{"type": "function", "function": {{"name": "...", "arguments": '
            f"{{...}}}}}}, not {found!r:.80}"
        )

    made = []
    for call in calls if isinstance(calls, list | tuple) else refuse(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            refuse(call)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except ValueError:
                refuse(call)
        made.append({**call, "function": {**function, "arguments": arguments}})
    return made


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tools as they are, None for none. Raises ChatError for one that is no function with a schema of an object."""
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list | tuple):
        raise ChatError(f"tools must be a list of functions like {TOOL}, not {tools!r:.80}")
    for index, tool in enumerate(tools):
        wrong = _wrong(tool)
        if wrong:
            raise ChatError(f"tools[{index}]: {wrong}; a tool is like {TOOL}")
    return [dict(tool) for tool in tools]


def _wrong(tool: Any) -> str:
    """What is wrong with a tool; "" where nothing is."""
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type") != "function":
        return f"{tool!r:.80} is no function"
    try:
        json.dumps(tool)
    except (TypeError, ValueError) as error:
        return f"it cannot be written as JSON ({error})"
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not name:
        return f"its name is {name!r:.80}"
    if schema is None:
        return ""
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        return f"its parameters are {schema!r:.80}, no JSON schema of an object"
    if not isinstance(schema.get("properties", {}), Mapping):
        return f"the properties of its parameters are {schema['properties']!r:.80}"
    return ""
