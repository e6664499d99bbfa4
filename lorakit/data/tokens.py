"""Examples to tokens with labels: the one render path of training, evaluation and generation.

A chat is rendered whole and tokenized once. A token that touches an assistant's turn, as ``turns`` finds it, is
labelled, up to and with the stop token.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lorakit.data.chat import Chat, Completion, Example, Message
from lorakit.data.encoder import Encoder
from lorakit.data.templates import ChatTemplate, find_template
from lorakit.data.turns import Span, check_tools, find_turns
from lorakit.errors import DataError, ModelError

QUESTION_SHARE = 4
"""A question is cut down to max_tokens / 4 characters at least before the answer's end is cut."""


@dataclass(frozen=True)
class Encoded:
    """One training row."""

    tokens: np.ndarray
    """int32 [T]"""
    labels: np.ndarray
    """bool [T]: whether the token is learned, predicted from those before it."""
    where: str
    cut: int = 0
    """Tokens that max_tokens took away."""
    alone: bool = False
    """Whether it is the chat up to an earlier answer, because the template rewrites that one later in the chat."""
    opened: bool = False
    """Whether the template opens an answer that is asked for with more than stands before this one."""

    @property
    def count(self) -> int:
        """Labelled tokens that have one before them."""
        return int(self.labels[1:].sum())


class Renderer:
    """A tokenizer with its template: ``encode`` for training, ``prompt`` for generation.

    ``template`` is a name or file for ``find_template``, given in ``setting``, or one found already.

    Raises ModelError for a tokenizer without character offsets, or a template that does not fit it.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | ChatTemplate | None,
        max_tokens: int,
        setting: str = "data.chat_template",
    ) -> None:
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer gives no character offsets", hint="one with tokenizer.json does")
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token")
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._encoder = Encoder(tokenizer)
        self._given, self._setting = template, setting
        self._template: ChatTemplate | None = None
        self._marks = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        empty = tokenizer("", add_special_tokens=True)["input_ids"]
        self._adds_bos = bool(empty) and empty[0] == tokenizer.bos_token_id
        self._stops: frozenset[int] | None = None

    @property
    def template(self) -> ChatTemplate:
        """Looked for at the first chat, since plain text needs none."""
        if self._template is None:
            given = self._given
            if not isinstance(given, ChatTemplate):
                given = find_template(self.tokenizer, given, self._setting)
            self._template = given
        return self._template

    def stops(self, *, chat: bool) -> frozenset[int]:
        """Tokens that end an answer: the end of text, and in a chat the mark that the template puts after a turn."""
        ends = frozenset({int(self.tokenizer.eos_token_id)})
        if not chat:
            return ends
        if self._stops is None:
            tail, _ = self._encoder.encode(self.template.after_answer())
            marks = [token for token in tail.tolist() if token in self._marks.values()]
            self._stops = ends | frozenset(marks[:1])
        return self._stops

    def prompt(self, prompt: str | Sequence[Message]) -> list[int]:
        """Tokens to generate from: raw text, or messages with an assistant's turn opened."""
        if isinstance(prompt, str):
            return self._with_bos(self._encoder.encode(prompt)[0].tolist())
        self._refuse_marks(prompt)
        text = self.template.render(prompt, answer_next=True)
        return self._with_bos(self._encoder.encode(text)[0].tolist())

    def encode(self, example: Example) -> list[Encoded]:
        """The rows of an example, each of at most ``max_tokens``: one, but for long plain text, which is cut in pieces,
        and chats whose answers the template rewrites.

        Raises DataError, with the example's place, for a row without any label, a template that refuses it or does
        not keep to its own prefix, and a message that contains the tokenizer's special tokens.
        """
        try:
            if isinstance(example, Chat):
                rows = self._chat(example)
            elif example.plain:
                rows = self._pieces(example)
            else:
                rows = [self._completion(example)]
        except DataError as error:
            raise DataError(error.reason, where=error.where or example.where, hint=error.hint) from error
        if not any(row.count for row in rows):
            hint = "what comes before the answer fills data.max_tokens" if any(row.cut for row in rows) else ""
            raise DataError("no label is left: all its tokens are masked", where=example.where, hint=hint)
        return [row for row in rows if row.count]

    def _with_bos(self, tokens: list[int]) -> list[int]:
        """Exactly one BOS where the tokenizer wants one, whether or not the template wrote it."""
        bos = self.tokenizer.bos_token_id
        return [bos, *tokens] if self._adds_bos and tokens[:1] != [bos] else tokens

    def _refuse_marks(self, messages: Sequence[Message]) -> None:
        for message in messages:
            for mark in self._marks:
                if any(mark in text for text in (*message.texts, message.calls, message.answers, message.tools)):
                    reason = f"the {message.role}'s message contains the special token {mark!r}"
                    raise DataError(reason, hint="write it otherwise; data.on_bad: skip leaves such chats out")

    def _labelled(self, text: str, spans: Sequence[Span], *, add_end: bool, where: str) -> Encoded:
        """Tokenize once and label what touches a span; ``add_end`` sees to it that it ends with the end's token."""
        found, places = self._encoder.encode(text)
        tokens, labels = found.tolist(), np.zeros(len(found), bool)
        for span in spans:
            labels |= (places[:, 1] > span.start) & (places[:, 0] < span.end)
        if add_end and tokens[-1:] != [self.tokenizer.eos_token_id]:
            tokens, labels = [*tokens, self.tokenizer.eos_token_id], np.append(labels, True)
        whole = self._with_bos(tokens)
        labels = np.concatenate([np.zeros(len(whole) - len(tokens), bool), labels])
        return Encoded(np.array(whole, np.int32), labels, where)

    def _whole_chat(self, messages: Sequence[Message], where: str) -> tuple[Encoded, Sequence[int]]:
        """The chat at any length, and the learned turns that have no label in it since the template rewrites them."""
        turns = find_turns(self.template, messages)
        row = replace(self._labelled(turns.text, turns.spans, add_end=False, where=where), opened=turns.opened)
        stops, tokens, labels = self.stops(chat=True), row.tokens, row.labels
        starts = np.flatnonzero(labels & ~np.concatenate([[False], labels[:-1]]))
        for start in starts:
            end = start + (int(np.argmin(labels[start:])) if not labels[start:].all() else len(labels) - start)
            ends = [i for i in range(start, end) if int(tokens[i]) in stops]
            if ends:
                labels[ends[-1] + 1 : end] = False
            elif end == len(labels):
                tokens, labels = np.append(tokens, np.int32(self.tokenizer.eos_token_id)), np.append(labels, True)
        return replace(row, tokens=tokens, labels=labels), turns.rewritten

    def _chat(self, chat: Chat) -> list[Encoded]:
        """The chat up to its last learned answer, and up to each that it leaves unlearned."""
        self._refuse_marks(chat.messages)
        check_tools(self.template, chat.messages)
        last = max(i for i, message in enumerate(chat.messages) if message.role == "assistant" and message.learned)
        messages = chat.messages[: last + 1]  # nothing learned sees what comes behind
        whole, rewritten = self._whole_chat(messages, chat.where)
        rows = [self._fitted(whole, messages)]
        for turn in rewritten:
            upto = [*(replace(message, learned=False) for message in messages[:turn]), messages[turn]]
            rows.append(replace(self._fitted(self._whole_chat(upto, chat.where)[0], upto), alone=True))
        return rows

    def _fitted(self, row: Encoded, messages: Sequence[Message]) -> Encoded:
        """Too long: the oldest turns go, then the end of the last question, at last the end of the answer."""
        full = len(row.tokens)
        if full <= self.max_tokens:
            return row
        messages = self._drop_turns(messages)
        if not self._fits(messages):
            messages = self._shorten_question(messages)
        row, _ = self._whole_chat(messages, row.where)
        size = min(len(row.tokens), self.max_tokens)
        return replace(row, tokens=row.tokens[:size], labels=row.labels[:size], cut=full - size)

    def _fits(self, messages: Sequence[Message]) -> bool:
        return len(self._whole_chat(messages, "")[0].tokens) <= self.max_tokens

    def _drop_turns(self, messages: Sequence[Message]) -> list[Message]:
        """The system message and the most turns, from a user's on, that fit; the last exchange at least."""
        system = [message for message in messages[:1] if message.role == "system"]
        rest = list(messages[len(system) :])
        starts = [i for i, message in enumerate(rest) if message.role == "user"] or [0]

        def fits(number: int) -> bool:
            return self._fits(system + rest[starts[number] :])

        first, step = len(starts) - 1, 1
        while first >= step and fits(first - step):  # from the end, where long chats are quickly told
            first, step = first - step, 2 * step
        lowest = max(0, first - step + 1)
        return system + rest[starts[lowest + bisect_left(range(lowest, first), True, key=fits)] :]

    def _shorten_question(self, messages: list[Message]) -> list[Message]:
        asked = [i for i, message in enumerate(messages) if message.role == "user"]
        if not asked:
            return messages
        place, question = asked[0], messages[asked[0]].content

        def shortened(size: int) -> list[Message]:
            return [*messages[:place], replace(messages[place], content=question[:size]), *messages[place + 1 :]]

        floor = min(len(question), self.max_tokens // QUESTION_SHARE)
        gone = bisect_left(
            range(len(question) - floor),
            True,
            key=lambda cut: self._fits(shortened(len(question) - cut)),
        )
        return shortened(len(question) - gone)

    def _completion(self, row: Completion) -> Encoded:
        """Too long: the prompt's beginning goes, at last the completion's end."""
        text = row.prompt + row.completion
        found = self._labelled(text, [Span(len(row.prompt), len(text))], add_end=True, where=row.where)
        over = len(found.tokens) - self.max_tokens
        if over <= 0:
            return found
        head = 1 if self._adds_bos else 0
        prompt = int(np.argmax(found.labels)) - head
        gone = min(over, max(0, prompt - self.max_tokens // QUESTION_SHARE))
        keep = np.r_[0:head, head + gone : self.max_tokens + gone]
        return replace(found, tokens=found.tokens[keep], labels=found.labels[keep], cut=over)

    def _pieces(self, row: Completion) -> list[Encoded]:
        """Plain text in consecutive pieces; each has the last token of the one before, so that none goes unlearned."""
        text = row.completion
        found = self._labelled(text, [Span(0, len(text))], add_end=True, where=row.where)
        pieces, start = [], 0
        while start == 0 or start + 1 < len(found.tokens):
            part = slice(start, start + self.max_tokens)
            pieces.append(replace(found, tokens=found.tokens[part], labels=found.labels[part]))
            start += self.max_tokens - 1
        return pieces
