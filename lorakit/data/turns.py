"""An assistant's turns in a rendered chat, whatever its template does.

What a turn adds to the text before it is its span. The spans come from rendering prefixes of the chat, so that any
template will do, marked for generation or not. A template may write an answer otherwise once the chat goes on
(reasoning models leave earlier thoughts out): such a turn is found in the chat up to it alone. Where a template takes
part of the question back once the answer is there (Mistral's writes the system message only into a last question), what
is asked with it stands before the answer all the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lorakit.data.chat import Message
from lorakit.data.templates import ChatTemplate
from lorakit.data.tools import names
from lorakit.errors import DataError


class Span(NamedTuple):
    """Characters of one assistant turn in the rendered text."""

    start: int
    end: int


@dataclass(frozen=True)
class Turns:
    text: str
    """The chat, up to its last answer."""
    spans: tuple[Span, ...]
    """Of the turns that are learned in it."""
    rewritten: tuple[int, ...]
    """The messages that are to be learned, and that the template writes otherwise here."""
    opened: bool
    """Whether the template opens one that is asked for with more than stands before it."""


def find_turns(template: ChatTemplate, messages: Sequence[Message]) -> Turns:
    """The text of messages whose last one is an answer, and where their learned answers are.

    Raises DataError for a template that leaves out some of an answer, or changes what is before the last one.
    """
    return _Chat(template, messages).turns()


def check_tools(template: ChatTemplate, messages: Sequence[Message]) -> None:
    """Raises DataError for a template that leaves out what may be called."""
    if messages[0].tools:
        without = [replace(message, tools="") for message in messages]
        one, other = (template.render(said, answer_next=False) for said in (messages, without))
        if one == other:
            hint = "name a data.chat_template that does, or leave such rows out: data.on_bad: skip"
            raise DataError("the chat template does not write what may be called (tools)", hint=hint)


class _Chat:
    """Messages with their template; what is asked last is rendered once."""

    def __init__(self, template: ChatTemplate, messages: Sequence[Message]) -> None:
        self.template, self.messages, self.last = template, messages, len(messages) - 1
        self.whole = template.render(messages, answer_next=False)
        self.asked_last = self._asked(self.last)
        if not self.whole.startswith(self.asked_last):
            self.whole = self._given_back()

    def turns(self) -> Turns:
        spans, rewritten, opened = [], [], False
        contents = [_squeezed(message.content) for message in self.messages]
        for turn, message in enumerate(self.messages):
            if message.role != "assistant" or not message.learned:
                continue
            before = self.asked_last if turn == self.last else self._asked(turn)
            begin = len(before) if before and self.whole.startswith(before) else None
            if begin is None:
                begin = self._content_begins(turn)
                if begin is not None and _lost(contents[:turn], before, self.whole[:begin]):
                    begin = None
            span = None if begin is None else self._span(turn, before, begin)
            if span is not None:
                opened |= before.startswith(self.whole[: span.start]) and len(before) > span.start
                spans.append(span)
            elif turn < self.last:
                rewritten.append(turn)
            elif all(_squeezed(text) in _squeezed(self.whole) for text in message.texts):
                raise DataError("the chat template changes the text before the last answer once the answer is there")
            else:
                raise self._unlearned()
        return Turns(self.whole, tuple(spans), tuple(rewritten), opened)

    def _asked(self, turn: int) -> str:
        """What an answer is asked for with."""
        return self.template.render(self.messages[:turn], answer_next=True) if turn else ""

    def _span(self, turn: int, before: str, begin: int) -> Span | None:
        """The turn that begins there; None where it is not written as it is when it is the last one."""
        message, whole, after = self.messages[turn], self.whole, self.whole
        if turn < self.last:
            after = self.template.render(self.messages[: turn + 1], answer_next=False)
        # A template may end what it writes with a mark that gives way to the next message.
        end = _shared(whole, after)
        there, called = whole[begin:end], Counter(names(message.calls))
        all_called = all(there.count(name) >= count for name, count in called.items())
        if end < len(after) and not (all_called and all(text.strip() in there for text in message.texts)):
            return None
        # A thought may be opened before the answer, where that is asked for.
        opening = before[before.rfind(self.messages[turn - 1].content.strip()) :] if begin == len(before) else ""
        if not all_called or not all(_squeezed(text) in _squeezed(opening + there) for text in message.texts):
            raise self._unlearned()
        return Span(begin, end)

    def _given_back(self) -> str:
        """The chat with the whole of what is asked before its last answer, if the template takes some of it back."""
        begin = self._content_begins(self.last)
        asked, messages = self.asked_last, self.messages[: self.last]
        said = [_squeezed(message.content) for message in messages if message.role != "assistant"]
        if not _lost(said, asked, self.whole if begin is None else self.whole[:begin]):
            return self.whole
        if begin is None:
            raise DataError("the chat template takes back what was asked once the answer is there")
        if question := messages[-1].content.strip():
            between, ending = self.whole[:begin].rpartition(question)[2], asked.rpartition(question)[2]
            if between.startswith(ending):  # what the template writes before an answer, a blank say, is part of it
                begin -= len(between) - len(ending)
        return asked + self.whole[begin:]

    def _content_begins(self, turn: int) -> int | None:
        """Where a message's content is in the text: at the first character that is another one when the content is.

        For a chat that an assistant begins, whose opening nobody asks for, and for a template that opens an answer
        with more than it writes before one. None when that is not the content's place.
        """
        message = self.messages[turn]
        texts = [text.strip() for text in message.texts]
        changed = ["n" if text[:1] == "y" else "y" for text in texts]
        other = replace(message, content=changed[-1], reasoning=changed[0] if texts[1:] else "")
        others = [*self.messages[:turn], other, *self.messages[turn + 1 :]]
        begin = _shared(self.whole, self.template.render(others, answer_next=False))
        return begin if self.whole[begin:].lstrip().startswith(texts[0]) else None

    def _unlearned(self) -> DataError:
        """Raises ModelError for a template that writes no answer at all."""
        self.template.after_answer()
        reason = "the chat template leaves out or changes some of an answer, which would go unlearned"
        return DataError(reason, hint="a data.chat_template that writes all of it learns all of it")


def _lost(said: Sequence[str], asked: str, there: str) -> bool:
    """Whether one of the squeezed texts stands more often in what is asked than in what is ``there``."""
    asked, there = _squeezed(asked), _squeezed(there)
    return any(asked.count(text) > there.count(text) for text in said if text)


def _squeezed(text: str) -> str:
    """Without blanks, which templates trim."""
    return "".join(text.split())


def _shared(one: str, other: str) -> int:
    """How many characters two texts have in common from their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
