"""A process of its own in which a chat template runs: it comes with a model, and may do anything that Jinja can.

jinja2's sandbox keeps a template from Python's internals, but not from looping for ever or from filling the memory.
Here the operating system does: each rendering has ``SECONDS`` of processor time, all of them ``MEGABYTES``, and no
file or socket can be opened. ``lorakit.data.templates`` starts this file as a script, with the seconds as its argument.
It reads the template, then the variables of each rendering, a JSON document a line, and answers with {"text": ...},
{"refused": ...} or {"over": ...}.
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

SECONDS, MEGABYTES, LONGEST = 5, 512, 10_000_000
"""Processor time of one rendering, memory of the process, characters of a text."""
TODAY = datetime(2024, 7, 26)
"""The date for templates that ask for today's: the one that LLaMA 3's fall back to. With the real one, a run resumed
tomorrow would train on other tokens."""


class Generation(Extension):
    """``{% generation %}`` marks an assistant's text; what is in it is rendered as if the tag were not there."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return str(caller())


class _Namespace(Namespace):
    def __setitem__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


def _namespace(*tables: Any, **values: Any) -> Namespace:
    space = _Namespace()
    for name, value in dict(*tables, **values).items():
        space[name] = value
    return space


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(value: Any, **options: Any) -> str:
    """Without jinja2's HTML escapes, as every chat template expects."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def environment() -> ImmutableSandboxedEnvironment:
    """The names and settings that transformers gives to a chat template."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _json
    made.globals |= {
        "raise_exception": _refuse,
        "strftime_now": TODAY.strftime,
        "dict": lambda *tables, **values: dict(*tables, **values),
        "namespace": _namespace,
    }
    return made


def _limit() -> None:
    """After a rendering with an escape and an error, for which modules are imported that cannot be later."""
    with suppress(ZeroDivisionError):
        environment().from_string("{{ '\\n' | wordwrap }}{{ 1 / 0 }}").render()
    _lower(resource.RLIMIT_AS, MEGABYTES * 2**20)
    _lower(resource.RLIMIT_NOFILE, 3)


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _answers(template: str, tables: Iterator[str], seconds: int) -> Iterator[dict[str, str]]:
    made = environment()
    compiled = None
    for table in tables:
        _lower(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)  # SIGXCPU ends the process
        try:
            compiled = compiled or made.from_string(template)
            text = compiled.render(json.loads(table))
            yield {"text": text} if len(text) <= LONGEST else {"over": f"gives a text of {len(text)} characters"}
        except (MemoryError, RecursionError, OverflowError) as error:
            yield {"over": f"is stopped: {type(error).__name__} {error}".strip()}
        except TemplateError as error:
            yield {"refused": str(error)}
        except Exception as error:  # a template may cause any: TypeError, ZeroDivisionError, KeyError
            yield {"refused": f"{type(error).__name__}: {error}"}


def main() -> None:
    _limit()
    template = json.loads(sys.stdin.readline() or '""')
    for answer in _answers(template, iter(sys.stdin.readline, ""), int(sys.argv[1])):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
