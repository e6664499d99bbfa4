"""Chat templates by name, for tokenizers that bring none, and the one way from messages to text."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from lorakit.data.chat import Message
from lorakit.errors import DataError, ModelError


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


def find_template(tokenizer: Any, name: str | None) -> str:
    """The Jinja source: the tokenizer's own (``name`` None), one of ``NAMED``, or a ``.jinja`` file's.

    Raises ModelError when the tokenizer has none or lacks a mark of the named one, DataError for an unknown name.
    """
    if name is None:
        if not isinstance(tokenizer.chat_template, str):
            reason = "the tokenizer has no chat template" if not tokenizer.chat_template else "several chat templates"
            raise ModelError(reason, where="data.chat_template", hint=f"name one: {', '.join(NAMED)}, or a .jinja file")
        return tokenizer.chat_template
    if name in NAMED:
        missing = [mark for mark in NAMED[name].marks if mark not in tokenizer.get_added_vocab()]
        if missing:
            raise ModelError(
                f"the tokenizer has no {' '.join(missing)}, which {name} needs", where="data.chat_template"
            )
        return NAMED[name].source
    if not name.endswith(".jinja") or not Path(name).is_file():
        raise DataError(
            f"no template {name!r}", where="data.chat_template", hint=f"{', '.join(NAMED)}, or a .jinja file's path"
        )
    return Path(name).read_text(encoding="utf-8")


def render(tokenizer: Any, template: str, messages: Sequence[Message], *, answer_next: bool) -> str:
    """The chat as text, BOS included where the template writes it; ``answer_next`` opens an assistant's turn.

    Raises DataError when the template refuses the messages (roles that do not take turns, say).
    """
    rows = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                rows, chat_template=template, tokenize=False, add_generation_prompt=answer_next
            )
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses it: {error}") from error
