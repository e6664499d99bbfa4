"""Rows to chats: six layouts of training rows read into one form.

``messages``    {"messages": [{"role": "user", "content": "..."}, ...]}, OpenAI's, tools and their calls too
``sharegpt``    {"conversations": [{"from": "human", "value": "..."}, ...]}
``alpaca``      {"instruction": "...", "input": "...", "output": "..."}, or a question and an answer by other names
``completion``  {"prompt": "...", "completion": "..."}, raw text without a template, or two lists of messages
``text``        {"text": "..."}
``squad``       {"context", "question", "answers"}, or SQuAD's and KorQuAD's nested {"paragraphs": [{"qas": ...}]}
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorakit.data.records import Record
from lorakit.data.tools import as_calls, as_json, calls_of, tools_of
from lorakit.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "ipython": "tool",
}  # fmt: skip


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    learned: bool = True
    """Whether an assistant's message is trained on (OpenAI's ``weight: 0`` says no)."""
    reasoning: str = ""
    """What an assistant thought before it answered (``reasoning_content``), for templates that write it."""
    calls: str = ""
    """What an assistant calls: a JSON list of tool calls."""
    answers: str = ""
    """Of a tool's message: a JSON object with the call that it answers, and the tool's name."""
    tools: str = ""
    """What may be called in the chat: a JSON list, the same in each of its messages."""

    @property
    def texts(self) -> tuple[str, ...]:
        """All that the template has to write, in order."""
        return (self.reasoning, self.content) if self.reasoning else (self.content,)


@dataclass(frozen=True)
class Chat:
    """A conversation for the chat template: at least one assistant message is learned."""

    messages: tuple[Message, ...]
    where: str


@dataclass(frozen=True)
class Completion:
    """Raw text: ``completion`` is learned, ``prompt`` is not. Plain text is a completion of nothing."""

    prompt: str
    completion: str
    where: str

    @property
    def plain(self) -> bool:
        """Plain text may be cut into pieces anywhere."""
        return not self.prompt


Example = Chat | Completion
Parser = Callable[[Mapping[str, Any], str], Example]


def parse(record: Record, layout: str) -> Example:
    """The example in a row (of ``unfold``'s).

    ``layout`` is a key of ``PARSERS`` (``tell`` finds it). Raises DataError with the row's place: a field missing,
    empty or of the wrong type, an unknown role, nothing to learn.
    """
    return PARSERS[layout](record.row, record.where)


def unfold(record: Record) -> Iterator[Record]:
    """A nested SQuAD row as one row a question, named by its id too; any other row as it is."""
    row, where = record
    if not isinstance(row.get("paragraphs"), list):
        yield record
        return
    for paragraph in _list(row, "paragraphs", where):
        context = _text(paragraph, "context", where)
        for question in _list(paragraph, "qas", where):
            place = f"{where} ({question['id']})" if question.get("id") else where
            yield Record({**question, "context": context}, place)


def tell(record: Record) -> str:
    """The layout of a row, from its fields. Raises DataError when none fits."""
    fields = {key for key, value in record.row.items() if value is not None}
    for layout, needed in SIGNS:
        if needed <= fields:
            return layout
    raise DataError(
        f"no known layout has the fields {', '.join(sorted(map(str, fields))) or '(none)'}",
        where=record.where,
        hint="known: " + "; ".join(f"{layout} ({', '.join(sorted(needed))})" for layout, needed in SIGNS),
    )


def _text(row: Mapping[str, Any], field: str, where: str, *, empty: bool = False) -> str:
    if field not in row or row[field] is None:
        raise DataError(f"the field {field!r} is {'null' if field in row else 'missing'}", where=where)
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{field!r} should be text, is {type(value).__name__}", where=where)
    if not empty and not value.strip():
        raise DataError(f"{field!r} is empty", where=where)
    return value


def _list(row: Mapping[str, Any], field: str, where: str) -> list[Mapping[str, Any]]:
    """A list of objects; an array of a data set counts."""
    value = row.get(field)
    if value is None:
        raise DataError(f"the field {field!r} is missing", where=where)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise DataError(f"{field!r} should be a list of objects", where=where)
    return value


def _chat(messages: list[Message], where: str) -> Chat:
    if not any(message.role == "assistant" and message.learned for message in messages):
        raise DataError("no assistant message to learn from: every label would be masked", where=where)
    return Chat(tuple(messages), where)


def _message(item: Mapping[str, Any], where: str, *, learned: bool = True) -> Message:
    """OpenAI's {"role", "content"} or ShareGPT's {"from", "value"}."""
    said, content = ("from", "value") if "from" in item else ("role", "content")
    name = _text(item, said, where)
    if name not in ROLES:
        raise DataError(f"unknown role {name!r}", where=where, hint=f"known: {', '.join(ROLES)}")
    if isinstance(item.get(content), list):
        parts = [_text(part, "text", where) for part in _list(item, content, where)]
        item = {**item, content: "".join(parts)}
    calls = as_calls(item.get(content), name, where) if name == "function_call" else calls_of(item, where)
    if calls and ROLES[name] != "assistant":
        raise DataError("a call of another role than the assistant's", where=where)
    if name == "function_call" or (calls and item.get(content) is None):
        item = {**item, content: ""}
    weight = item["weight"] if item.get("weight") is not None else 1
    if weight not in (0, 1):
        raise DataError(f"a message's weight is 0 or 1, not {weight!r}", where=where)
    role = ROLES[name]
    answer = role == "assistant"
    chosen = learned and weight == 1 and item.get("train") is not False
    thoughts = _text(item, "reasoning_content", where) if _said(item, "reasoning_content") else ""
    if thoughts and not answer:
        raise DataError("'reasoning_content' of another role than the assistant's", where=where)
    said = _text(item, content, where, empty=bool(calls) or not answer)
    reply = {key: item[key] for key in ("tool_call_id", "name") if role == "tool" and item.get(key)}
    return Message(
        role,
        said,
        not answer or chosen,
        thoughts,
        as_json(calls) if calls else "",
        as_json(reply) if reply else "",
    )


def _conversation(row: Mapping[str, Any], field: str, where: str) -> Example:
    """A list of messages, behind the row's own system prompt if it has one."""
    messages = [_message(item, where) for item in _list(row, field, where)]
    system = _system(row, where)
    if system and messages and messages[0].role == "system":
        if messages[0] != system[0]:
            raise DataError("the row and its first message are two different system prompts", where=where)
        system = []
    return _chat(_with_tools([*system, *messages], row, where), where)


def _with_tools(messages: list[Message], row: Mapping[str, Any], where: str) -> list[Message]:
    tools = tools_of(row, where)
    return [replace(message, tools=tools) for message in messages] if tools else messages


def _messages(row: Mapping[str, Any], where: str) -> Example:
    return _conversation(row, "messages", where)


def _sharegpt(row: Mapping[str, Any], where: str) -> Example:
    return _conversation(row, "conversations", where)


def _system(row: Mapping[str, Any], where: str) -> list[Message]:
    """A row's own system prompt, if it has one."""
    field = next((field for field in ("system", "system_prompt") if _said(row, field)), None)
    return [Message("system", _text(row, field, where))] if field else []


def _said(row: Mapping[str, Any], field: str) -> bool:
    """Whether an optional field has anything but blanks."""
    value = row.get(field)
    return bool(value.strip()) if isinstance(value, str) else value is not None


def _alpaca(row: Mapping[str, Any], where: str) -> Example:
    """Dolly has a ``context`` for the input; LLaMA-Factory's ``history`` has earlier [question, answer] pairs."""
    asked = next((field for field in ("instruction", "question", "prompt", "input") if field in row), "instruction")
    answered = next((field for field in ("output", "response", "answer") if field in row), "output")
    question = _text(row, asked, where)
    for more in ("input", "context"):
        if more != asked and _said(row, more):
            question += "\n\n" + _text(row, more, where)
    answer = _text(row, answered, where)
    earlier: list[Message] = []
    for pair in row.get("history") or []:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise DataError("'history' should be a list of [question, answer]", where=where)
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    return _chat([*_system(row, where), *earlier, Message("user", question), Message("assistant", answer)], where)


def _completion(row: Mapping[str, Any], where: str) -> Example:
    if isinstance(row.get("prompt"), list):
        prompt = [_message(item, where, learned=False) for item in _list(row, "prompt", where)]
        messages = [*prompt, *(_message(item, where) for item in _list(row, "completion", where))]
        return _chat(_with_tools(messages, row, where), where)
    return Completion(_text(row, "prompt", where, empty=True), _text(row, "completion", where), where)


def _plain(row: Mapping[str, Any], where: str) -> Example:
    return Completion("", _text(row, "text", where), where)


def _squad(row: Mapping[str, Any], where: str) -> Example:
    """Answers are [{"text": ...}] in the files, {"text": [...]} in the hub's data sets; the first one counts."""
    question = f"{_text(row, 'context', where)}\n\n{_text(row, 'question', where)}"
    answers = row.get("answers")
    if isinstance(answers, dict):
        answers = [{"text": answer} for answer in answers.get("text") or []]
    if not answers:
        raise DataError("the question has no answer", where=where, hint="on_bad: skip leaves such questions out")
    answer = _text(_list({"answers": answers}, "answers", where)[0], "text", where)
    return _chat([Message("user", question), Message("assistant", answer)], where)


PARSERS: dict[str, Parser] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "completion": _completion,
    "text": _plain,
    "squad": _squad,
}
SIGNS: tuple[tuple[str, frozenset[str]], ...] = (
    ("messages", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("squad", frozenset({"context", "question", "answers"})),
    ("alpaca", frozenset({"instruction", "output"})),
    ("completion", frozenset({"prompt", "completion"})),
    ("text", frozenset({"text"})),
    ("alpaca", frozenset({"instruction", "response"})),
    ("alpaca", frozenset({"question", "answer"})),
    ("alpaca", frozenset({"question", "response"})),
    ("alpaca", frozenset({"prompt", "response"})),
    ("alpaca", frozenset({"input", "output"})),
)
