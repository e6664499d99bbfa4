"""A process of its own in which a base's tokenizer runs: its regular expressions come with the model.

A pattern can be written so that a page takes it days, a chain of replacements so that a letter fills the memory, and a
panic of the library's is not even an Exception. Here the operating system bounds them. ``lorakit.data.encoder`` starts
this file as a script, with the seconds as its argument. It reads a tokenizer, then one text after another, a JSON
document a line, and answers with {"tokens": ..., "places": ...}, {"refused": ...} or {"over": ...}. Numbers are int32,
in base64.
"""

import base64
import json
import resource
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from tokenizers import Tokenizer

SECONDS, CHARACTERS_A_SECOND, LOADED_A_SECOND = 5, 20_000, 1_000_000
"""Processor time of a text, and more for a long one and for loading: a usual tokenizer takes a twentieth of it."""
MEGABYTES, BYTES_A_CHARACTER = 4096, 2_000
"""Memory of the process: beside the tokenizer's own, what a long text takes."""


def _limit(seconds: int, characters: int, loaded: int) -> None:
    """Bounds for the next answer. SIGXCPU ends the process."""
    seconds += characters // CHARACTERS_A_SECOND + loaded // LOADED_A_SECOND
    _lower(resource.RLIMIT_CPU, int(time.process_time()) + 1 + seconds)
    _lower(resource.RLIMIT_AS, MEGABYTES * 2**20 + characters * BYTES_A_CHARACTER)


def _lower(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _load(told: dict[str, Any]) -> Tokenizer:
    tokenizer = Tokenizer.from_str(told["tokenizer"])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = told["split"]
    return tokenizer


def _packed(numbers: Iterable[int]) -> str:
    return base64.b64encode(array("i", numbers)).decode()


def _answers(first: str, lines: Iterator[str], seconds: int) -> Iterator[dict[str, str]]:
    tokenizer = None
    for line in lines:
        _limit(seconds, len(line), 0 if tokenizer else len(first))
        try:
            tokenizer = tokenizer or _load(json.loads(first))
            found = tokenizer.encode(json.loads(line), add_special_tokens=False)
            yield {"tokens": _packed(found.ids), "places": _packed(chain.from_iterable(found.offsets))}
        except MemoryError:
            yield {"over": "out of memory"}
        except Exception as error:
            yield {"refused": str(error)}
        except BaseException as error:  # a panic
            yield {"over": str(error)}


def main() -> None:
    first = sys.stdin.readline()
    for answer in _answers(first, iter(sys.stdin.readline, ""), int(sys.argv[1])):
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
