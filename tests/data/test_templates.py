"""Chat templates: rendered as transformers renders them, and stopped when they take more than a template may."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from typing import ClassVar

import psutil
import pytest

from lorakit.data.chat import Message
from lorakit.data.templates import NAMED, ChatTemplate, find_template
from lorakit.errors import DataError, ModelError
from tests.tiny import CHATML, tiny_tokenizer

TURNS = [Message("system", "Be <brief>."), Message("user", "거꾸로 🙂?"), Message("assistant", "An 'answer' & more.\n")]
FEATURES = {
    "chatml": CHATML,
    "named": NAMED["llama2"].source,
    "blocks are trimmed": "{% for m in messages %}\n  {% if m.role == 'user' %}\n  {{ m.content }}\n  {% endif %}\n"
    "{% endfor %}",
    "white space": "{%- for m in messages -%}\n {{- m['content'] | trim + '\n' -}} \n{%- endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% break %}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.role %}{% endfor %}{{ ns.n }} {{ ns.last }}",
    "tojson": "{{ messages | tojson }} {{ messages | tojson(indent=4) }} {{ messages[0] | tojson(sort_keys=true) }}",
    "dict": "{{ dict(a=1, b='x') }} {{ dict(messages[0], role='y')['role'] }}",
    "macro": "{% macro turn(m) %}[{{ m.role }}] {{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token is defined }}",
    "absent": "{{ tools is none }} {{ documents is none }} {{ custom is defined }} {{ add_generation_prompt }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }} {{ messages[1:] | length }} "
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "text": "{{ messages[2].content.split(' ')[-1] }}|{{ messages[2].content.strip() }}|{{ '%s!' | format('x') }}",
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def template(tokenizer, source):
    return ChatTemplate(tokenizer, source, "some/model")


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("answer_next", [False, True])
def test_renders_as_transformers_does(tokenizer, name, answer_next):
    rows = [{"role": m.role, "content": m.content} for m in TURNS]
    expected = tokenizer.apply_chat_template(
        rows, chat_template=FEATURES[name], tokenize=False, add_generation_prompt=answer_next
    )
    assert template(tokenizer, FEATURES[name]).render(TURNS, answer_next=answer_next) == expected


def test_the_date_is_always_the_same(tokenizer):
    """Or a run resumed on another day would train on other tokens."""
    assert template(tokenizer, "{{ strftime_now('%d %b %Y') }}").render(TURNS, answer_next=False) == "26 Jul 2024"


REFUSED = {
    "{{ raise_exception('roles must take turns') }}": "roles must take turns",
    "{{ messages[0].nothing.at_all }}": "has no attribute",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'a' + 1 }}": "TypeError",
    "{% for %}": "Expected",
    "{{ messages.append(1) }}": "unsafe",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ namespace(__class__=1) }}": "__class__",
    "{% set ns = namespace() %}{% set ns._x = 1 %}": "_x",
    "{% include '/etc/passwd' %}": "no loader",
    "{{ range.__globals__.keys() }}": "unsafe",
    "{{ raise_exception.__globals__.keys() }}": "unsafe",
    "{{ cycler.__init__.__globals__.os.system('true') }}": "unsafe",
}


@pytest.mark.parametrize("source", REFUSED)
def test_refuses(tokenizer, source):
    with pytest.raises(DataError, match="the chat template refuses it") as caught:
        template(tokenizer, source).render(TURNS, answer_next=False)
    assert REFUSED[source] in str(caught.value)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
HOSTILE = {
    "nested loops": f"{LOOPS}{{% endfor %}}{{% endfor %}}{{% endfor %}}",
    "loops whose filter is never true": "{% for a in range(99999) if range(99999) | sum < 0 %}{% endfor %}",
    "a power": "{% set x = messages | length %}{{ x ** (7 ** 12) }}",
    "a power at compile time": "{{ 10 ** 1000000000 }}",
    "a long string": "{{ 'a' * 10000000000 }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling blocks": "{% set a %}xxxxxxxx{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 60,
    "a list": "{{ [0] * 10000000000 }}",
    "a width": "{{ '%10000000000d' % 1 }}",
    "another width": "{{ '{:10000000000}'.format(1) }}",
    "a method's width": "{{ 'a'.ljust(10000000000) }}",
    "a filter's width": "{{ 'a' | center(10000000000) }}",
    "replacement": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "filler": "{{ range(9) | batch(10000000000, 'x') | list }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a range": "{{ range(10000000000) | list }}",
    "depth": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a long text": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
}


@pytest.mark.fault(32)
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", HOSTILE)
def test_stops_a_hostile_template(tokenizer, name):
    made, text = template(tokenizer, HOSTILE[name]), ""
    with pytest.raises(ModelError, match="the chat template") as caught:
        text = made.render(TURNS, answer_next=False)
    assert not text
    assert caught.value.where == "some/model"


def test_a_template_that_is_hostile_to_one_chat_only(tokenizer):
    """Two turns are answered, three are not; the next chat is answered again, from any thread."""
    made = template(tokenizer, f"{{% if messages | length > 2 %}}{HOSTILE['nested loops']}{{% endif %}}fine")
    assert made.render(TURNS[:2], answer_next=False) == "fine"
    with pytest.raises(ModelError, match="took more than"):
        made.render(TURNS, answer_next=False)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(made.render(TURNS[:2], answer_next=False))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["fine"] * 4


def children():
    return {child.pid for child in psutil.Process().children()}


def test_its_process_ends_with_it(tokenizer):
    before = children()
    made = template(tokenizer, CHATML)
    assert not children() - before
    made.render(TURNS, answer_next=False)
    assert len(children() - before) == 1
    del made
    gc.collect()
    assert not children() - before


RUN = """\
import os, sys
from lorakit.data.chat import Message
from lorakit.data.templates import ChatTemplate
class Tokenizer:
    special_tokens_map = {{}}
made = ChatTemplate(Tokenizer(), "{source}", "x")
made.render([Message("user", "a")], answer_next=False)
print(made._process.process.pid, flush=True)
sys.stdin.read()
"""


def test_its_process_ends_with_a_killed_run():
    code = RUN.format(source="{{ messages }}")
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(run.stdout.readline()))
    os.kill(worker.pid, signal.SIGTERM)  # as a batch system sends it to all of a job
    time.sleep(0.1)
    assert worker.is_running()
    run.kill()
    run.communicate()
    worker.wait(timeout=10)


def test_a_file_named_by_the_recipe_and_the_tokenizers_own(tokenizer, tmp_path):
    path = tmp_path / "x.jinja"
    path.write_text("{{ 'a' * 10 ** 10 }}")
    with pytest.raises(ModelError) as caught:
        find_template(tokenizer, str(path), "data.chat_template").render(TURNS, answer_next=False)
    assert caught.value.where == str(path)


class Plain:
    special_tokens_map: ClassVar[dict[str, str]] = {}


def test_a_process_that_was_killed_meanwhile_is_started_again():
    made = ChatTemplate(Plain(), "{{ messages[0].content }}", "x")
    assert made.render([Message("user", "a")], answer_next=False) == "a"
    os.kill(made._process.process.pid, signal.SIGKILL)
    made._process.process.wait()
    assert made.render([Message("user", "b")], answer_next=False) == "b"


def test_one_that_is_killed_at_work_is_not_taken_for_a_hostile_template():
    made = ChatTemplate(Plain(), "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "x")

    def kill():
        while made._process.process is None:
            time.sleep(0.01)
        time.sleep(1)
        made._process.process.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(DataError, match=r"template_worker.* was killed"):
        made.render([Message("user", "a")], answer_next=False)
    killer.join()


def test_it_is_deaf_from_the_beginning_to_what_stops_the_run():
    """A batch system tells all processes of a job, also one that has only begun."""
    code = """
import os, signal
from lorakit.data.bounded import Bounded
from lorakit.data import template_worker
asked = Bounded(template_worker.__file__, lambda: "{{ messages }}", 5)
start = asked._start
def started():
    process = start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(process.pid, number)
    return process
asked._start = started
print(asked.ask({"messages": "heard", "add_generation_prompt": False}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heard" in done.stdout
    assert done.stderr == ""
