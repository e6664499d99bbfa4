"""Build chats from the docstrings of Python's standard library: question, what does X do; answer, its first paragraph.

    python recipes/python-help/make_chats.py [FOLDER]

writes FOLDER/python-help.jsonl and FOLDER/python-help-held-out.jsonl (default: runs/data), in the ``messages`` layout.
The held-out questions are about functions and classes that no training row is about. The same Python version gives the
same files. Only modules that are safe to import are looked at, and no two rows have the same answer.
"""

import hashlib
import importlib
import inspect
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MODULES = """
builtins abc argparse array ast asyncio base64 bdb binascii bisect bz2 calendar cmath cmd code codecs codeop
collections collections.abc colorsys compileall concurrent.futures configparser contextlib contextvars copy copyreg
csv ctypes dataclasses datetime decimal difflib dis doctest email email.message email.policy email.utils enum errno
faulthandler filecmp fileinput fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib gzip hashlib
heapq hmac html html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib importlib.abc
importlib.machinery importlib.metadata importlib.resources importlib.util inspect io ipaddress itertools json keyword
linecache locale logging logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder multiprocessing
multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc numbers operator os os.path pathlib
pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats py_compile pyclbr pydoc queue quopri
random re reprlib runpy sched secrets select selectors shelve shlex shutil signal site smtplib socket socketserver
sqlite3 ssl stat statistics string stringprep struct subprocess symtable sys sysconfig tabnanny tarfile tempfile
textwrap threading time timeit token tokenize trace traceback tracemalloc types typing unicodedata unittest
unittest.mock urllib.error urllib.parse urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser
wsgiref.handlers wsgiref.headers wsgiref.util xml.dom.minidom xml.etree.ElementTree xml.sax.handler xml.sax.saxutils
xmlrpc.client xmlrpc.server zipapp zipfile zipimport zlib zoneinfo
"""

QUESTIONS = (
    "What does {name} do?",
    "What is {name} for?",
    "Explain {name} in Python.",
    "I found {name} in some Python code. What does it do?",
    "What does Python's {name} do?",
    "In Python, what is {name}?",
)
HELD_OUT = 96
ASKED_IN_RECIPE = ("math.gcd", "os.path.isdir", "shutil.rmtree", "heapq.heappush", "random.shuffle", "textwrap.dedent")
"""Always held out: the recipe's sample prompts ask about the first four."""
SHORTEST, LONGEST = 20, 600


def members(module_name: str) -> Iterator[tuple[str, Any]]:
    """Public functions and classes of a module by the name a user would write, then the methods of its classes."""
    try:
        module = importlib.import_module(module_name)
    except ImportError:
        print(f"{module_name} is not part of this Python", file=sys.stderr)
        return
    prefix = "" if module_name == "builtins" else f"{module_name}."
    public = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    classes = []
    for name in sorted(set(public)):
        value = getattr(module, name, None)
        home = getattr(value, "__module__", None) or module_name
        if callable(value) and home.partition(".")[0].lstrip("_") in (*sys.stdlib_module_names, "builtins"):
            yield f"{prefix}{name}", value
            if inspect.isclass(value) and not issubclass(value, BaseException):
                classes.append((name, value))
    for name, value in classes:
        for method in sorted(vars(value)):
            if not method.startswith("_"):
                yield f"{prefix}{name}.{method}", inspect.getattr_static(value, method)


def first_paragraph(value: Any) -> str | None:
    """The docstring's first paragraph on one line, or None when it would make no good answer."""
    doc = value.__doc__ if isinstance(getattr(value, "__doc__", None), str) else None
    if doc is None:
        return None
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    if re.match(r"[\w.]+\(", paragraphs[0]):
        lines = paragraphs[0].split("\n")
        signature = next((n for n, line in enumerate(lines) if line.rstrip().endswith(")") or "->" in line), 0)
        paragraphs = ["\n".join(lines[signature + 1 :]), *paragraphs[1:]]
    text = " ".join(next((p for p in paragraphs if p.strip()), "").split())
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "").replace("`", "")
    text = text.removesuffix(":")
    odd = re.search(r"<|\|>|>>>|::|[{}\\]|:param|\*\*|@|__\w+__|^\w+\(|--|Alias for field|deprecated", text)
    if odd or not SHORTEST <= len(text) <= LONGEST or not text[0].isupper() or text.count(" ") < 2:
        return None
    return text if text[-1] in ".!?)" else f"{text}."


def rank(name: str) -> str:
    """A fixed order without pattern."""
    return hashlib.sha256(name.encode()).hexdigest()


def chats() -> dict[str, dict[str, Any]]:
    """A row by name; of several names with the same answer the first stays."""
    found: dict[str, dict[str, Any]] = {}
    answers: set[str] = set()
    for module in MODULES.split():
        for name, value in members(module):
            answer = first_paragraph(value)
            if answer is None or answer.lower() in answers or name in found:
                continue
            answers.add(answer.lower())
            number = 0 if name in ASKED_IN_RECIPE else int(rank(name)[:8], 16) % len(QUESTIONS)
            question = QUESTIONS[number].format(name=name)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            found[name] = {"messages": messages}
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/data")
    folder.mkdir(parents=True, exist_ok=True)
    rows = chats()
    asked = [name for name in ASKED_IN_RECIPE if name in rows]
    others = sorted((name for name in rows if name not in asked), key=rank)
    apart = {*asked, *others[: HELD_OUT - len(asked)]}
    for file, names in (
        ("python-help.jsonl", [n for n in rows if n not in apart]),
        ("python-help-held-out.jsonl", [n for n in rows if n in apart]),
    ):
        lines = [json.dumps(rows[name], ensure_ascii=False) + "\n" for name in names]
        (folder / file).write_text("".join(lines), encoding="utf-8")
        print(f"{folder / file}: {len(lines)} chats")


if __name__ == "__main__":
    main()
