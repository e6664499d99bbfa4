"""Chat templates by name, for tokenizers that bring none, and the one way from messages to text.

A tokenizer's template is untrusted: it runs in a process of its own, which ``lorakit.data.template_worker`` bounds.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.data import template_worker
from lorakit.data.bounded import Bounded
from lorakit.data.chat import Message
from lorakit.errors import DataError, ModelError, RecipeError
from lorakit.storage.checks import read_text


@dataclass(frozen=True)
class Template:
    source: str
    marks: tuple[str, ...]
    """Pieces that the tokenizer must know as one token each."""


NAMED = {
    "chatml": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama2": Template(
        "{% set first = messages[0]['role'] == 'system' %}"
        "{% for m in (messages[1:] if first else messages) %}"
        "{% if m['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
        "{{ raise_exception('llama2 takes a user and an assistant in turn, behind a system message') }}{% endif %}"
        "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' }}"
        "{% if first and loop.first %}{{ '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' }}{% endif %}"
        "{{ m['content'] + ' [/INST]' }}{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}",
        (),
    ),
    "llama3": Template(
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
}


def named_source(name: str | None) -> str | None:
    """The source of a template that is not the tokenizer's own: of ``NAMED``, or a file's; None for any other name.

    Raises ModelError for a file that is no text.
    """
    if name in NAMED:
        return NAMED[name].source
    return read_text(Path(name)) if name is not None and _is_file(name) else None


def _is_file(name: str) -> bool:
    return name.endswith(".jinja") and Path(name).is_file()


def find_template(tokenizer: Any, name: str | None, setting: str) -> "ChatTemplate":
    """The tokenizer's own template (``name`` None), one of ``NAMED``, or a ``.jinja`` file's.

    Raises ModelError when the tokenizer has none or lacks a mark of the named one, RecipeError for an unknown name;
    ``setting`` is where the user names it.
    """
    if name is None:
        own = tokenizer.chat_template
        if isinstance(own, dict):  # others are for tools and documents
            own = own.get("default")
        if not isinstance(own, str):
            reason = (
                "several chat templates, none of them the default" if tokenizer.chat_template else "no chat template"
            )
            hint = f"name one: {', '.join(NAMED)}, or a .jinja file"
            raise ModelError(f"the tokenizer has {reason}", where=setting, hint=hint)
        return ChatTemplate(tokenizer, own, str(tokenizer.name_or_path) or "the tokenizer")
    if name in NAMED:
        missing = [mark for mark in NAMED[name].marks if mark not in tokenizer.get_added_vocab()]
        if missing:
            raise ModelError(f"the tokenizer has no {' '.join(missing)}, which {name} needs", where=setting)
    source = named_source(name)
    if source is None:
        hint = f"{', '.join(NAMED)}, or a .jinja file's path"
        raise RecipeError(f"no template {name!r}", where=setting, hint=hint)
    return ChatTemplate(tokenizer, source, name)


class ChatTemplate:
    """A template's Jinja ``source`` with a tokenizer's special tokens; ``name`` stands in errors.

    Its process is started at the first rendering and ends with this object, or with the process that holds it.
    """

    def __init__(self, tokenizer: Any, source: str, name: str) -> None:
        self.name = name
        self._tokens = dict(tokenizer.special_tokens_map)
        self._process = Bounded(template_worker.__file__, lambda: source, template_worker.SECONDS)

    def render(self, messages: Sequence[Message], *, answer_next: bool) -> str:
        """The chat as text, BOS included where the template writes it; ``answer_next`` opens an assistant's turn.

        Raises DataError when the template refuses the messages (roles that do not take turns, say) or fails on them,
        ModelError when it takes more time or memory than a template may.
        """
        table = {
            **self._tokens,
            "messages": [_as_table(message) for message in messages],
            "tools": json.loads(messages[0].tools or "null") if messages else None,
            "documents": None,
            "add_generation_prompt": answer_next,
        }
        limits = f"{template_worker.SECONDS} seconds or {template_worker.MEGABYTES} MB"
        answer = self._process.ask(table) or {"over": f"took more than {limits}, and was stopped"}
        if "refused" in answer:
            raise DataError(f"the chat template refuses it: {answer['refused']}")
        if "over" in answer:
            raise ModelError(f"the chat template {answer['over']}", where=self.name, hint="name another one")
        return str(answer["text"])

    def after_answer(self) -> str:
        """What stands behind an assistant's message. Raises ModelError for a template that fails on a question and its
        answer, or leaves the answer out."""
        try:
            text = self.render([Message("user", "question"), Message("assistant", "answer")], answer_next=False)
        except DataError as error:
            raise ModelError(error.reason, where=self.name, hint="name another one") from error
        if "answer" not in text:
            reason = "the chat template leaves an assistant's message out"
            raise ModelError(reason, where=self.name, hint="name another one")
        return text[text.rindex("answer") + len("answer") :]


def _as_table(message: Message) -> dict[str, Any]:
    table: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        table["reasoning_content"] = message.reasoning
    if message.calls:
        table["tool_calls"] = json.loads(message.calls)
    return {**table, **json.loads(message.answers or "{}")}
