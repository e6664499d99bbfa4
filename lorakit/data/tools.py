"""What an assistant may call and what it calls, as chat templates take it: transformers' and OpenAI's form.

Read are OpenAI's ``tools`` and ``tool_calls`` (and its older ``functions`` and ``function_call``), ShareGPT's
``function_call`` messages, and any of them as JSON in a text, which data sets of fixed columns keep them in.
"""

import json
from collections.abc import Mapping
from typing import Any

from lorakit.errors import DataError

TOOLS, CALLS = ("tools", "functions"), ("tool_calls", "function_call")
"""Fields of a row that say what may be called, and of a message that say what is."""


def tools_of(row: Mapping[str, Any], where: str) -> str:
    """A JSON list of what a row's assistant may call; empty where there is nothing. Raises DataError."""
    field = next((field for field in TOOLS if row.get(field)), None)
    listed = [] if field is None else _list(row[field], field, where)
    functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in listed]
    for function in functions:
        _name(function, str(field), where)
    tools = [{"type": "function", "function": function} for function in functions]
    return as_json(tools) if tools else ""


def calls_of(item: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """What a message calls. Raises DataError."""
    field = next((field for field in CALLS if item.get(field)), None)
    return [] if field is None else as_calls(item[field], field, where)


def as_calls(value: Any, field: str, where: str) -> list[dict[str, Any]]:
    """Calls from a list of them, one, or JSON; arguments in JSON are taken apart, as templates write them anew."""
    calls = []
    for call in _list(value, field, where):
        function = call["function"] if isinstance(call.get("function"), dict) else call
        given = (function[key] for key in ("arguments", "parameters") if function.get(key) is not None)
        arguments: Any = next(given, {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments.strip() or "{}")
            except (ValueError, RecursionError) as error:
                raise DataError(f"the arguments of a call are no JSON: {error}", where=where) from error
        made = {"type": "function", "function": {"name": _name(function, field, where), "arguments": arguments}}
        calls.append({"id": call["id"], **made} if call.get("id") else made)
    return calls


def as_json(value: Any) -> str:
    """What a data set of columns has besides, such as dates, as text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def names(listed: str) -> tuple[str, ...]:
    """The names in what ``tools_of`` gave, or a list of calls in JSON."""
    return tuple(str(one["function"]["name"]) for one in json.loads(listed or "[]"))


def _list(value: Any, field: str, where: str) -> list[Mapping[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{field!r} is no JSON: {error}", where=where) from error
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"{field!r} should be a list of objects", where=where)
    return value


def _name(function: Mapping[str, Any], field: str, where: str) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise DataError(f"{field!r} has one without a name", where=where)
    return name
