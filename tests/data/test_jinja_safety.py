"""Chat templates as hostile programs: each is stopped in bounded time and memory, in any thread, and nothing else is.

The memory test runs in a process of its own with a limit on its address space, so a template that got through would die
there rather than here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from luthier.data import jinja_watch
from luthier.data.conversation import Turn
from luthier.data.jinja_chat import render_chat
from luthier.data.jinja_limits import LIMIT, LimitedEnvironment
from luthier.data.jinja_watch import RunawayError, within_limit
from luthier.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
TURNS = (Turn("user", "hi"), Turn("assistant", "yes"))
ENDLESS = (
    "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
)


def grow(first: str, step: str, shown: str = "{{ ns.x }}") -> str:
    """A template that makes `ns.x` from itself sixty times over."""
    loop = f"{{% for i in range(60) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={first}) %}}{loop}{shown}"


TOO_LARGE = {
    "times": "{{ 'a' * 10**10 }}",
    "times from the left": "{{ 10000000000 * 'a' }}",
    "a list": "{{ [0] * 10**10 }}",
    "a power": "{{ 10**(10**10) }}",
    "squares": grow("3", "ns.x * ns.x"),
    "doubling by +": grow("'a'", "ns.x + ns.x"),
    "doubling by ~": grow("'a'", "ns.x ~ ns.x"),
    "doubling a list": grow("[1]", "ns.x + ns.x"),
    "lists of lists": grow("[1]", "[ns.x, ns.x]"),
    "compared, not written": grow("(1,)", "(ns.x, ns.x)", "{{ ns.x == (ns.x, 1) }}"),
    "dicts of dicts": grow("{}", "{1: ns.x, 2: ns.x}"),
    "namespaces": "{% set a = namespace() %}{% set a.x = [a] * 1000 %}{{ a }}",
    "arguments": "{% macro f() %}{{ f(varargs, varargs) }}{% endmacro %}{{ f(1) }}",
    "a macro's text": "{% macro f(x) %}{{ f(x ~ x) }}{% endmacro %}{{ f('a') }}",
    "center": "{{ 'a'|center(10**10) }}",
    "center, known when compiled": "{{ 'a'|center(10000000000) }}",
    "a method": "{{ 'a'.ljust(10000000000) }}",
    "zeros": "{{ 'a'.zfill(10000000000) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a format with a star": "{{ '%*d' % (10000000000, 1) }}",
    "a format's field": "{{ '{:>10000000000}'.format(1) }}",
    "a format's nested field": "{{ '{:{}}'.format(1, 10000000000) }}",
    "the filter format": "{{ '%10000000000d'|format(1) }}",
    "replace": grow("'aa'", "ns.x.replace('a', ns.x)"),
    "the filter replace": grow("'aa'", "ns.x|replace('a', ns.x)"),
    "join": grow("'ab'", "ns.x.join([ns.x] * 1000)"),
    "the filter join": grow("'ab'", "([ns.x] * 1000)|join(ns.x)"),
    "a lazy join": "{{ (range(99999)|map('center', 900000))|join }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "indent": "{{ 'a\nb'|indent(10**10) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "slice": "{{ [1]|slice(10**9)|list }}",
    "sum": "{{ ([[1] * 1000] * 4000)|sum(start=[]) }}",
    "round": "{{ 1|round(10**9, 'ceil') }}",
    "tojson": "{{ {'a': [1]}|tojson(indent=10**9) }}",
    "bytes": "{{ (5).to_bytes(10**10, 'big') }}",
    "escapes of escapes": grow("'\"'", "ns.x|tojson"),
    "a date of a long format": "{{ strftime_now('%999999999d' ~ 'x' * 999999) }}",
    "a date many times": "{{ strftime_now('%c' * 999999) }}",
    "a block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 10000000 ~ i }}{% endfor %}{% endset %}",
    "much written": "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "much of the same": "{% set x = 'a' * 9999999 %}{% for a in range(99999) %}{{ x }}{% endfor %}",
}
REFUSED = {
    "range": ("{% for i in range(10**9) %}a{% endfor %}", "Range too big"),
    "raises": ("{{ raise_exception('not today') }}", "refuses the conversation: not today"),
    "a class": ("{{ ''.__class__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "its ancestors": ("{{ ''.__class__.__mro__ }}", "reaches for what no template may"),
    "by a filter": ("{{ (''|attr('__class__')).__mro__ }}", "reaches for what no template may"),
    "by a subscript": ("{{ ''['__class__'] }}", "reaches for what no template may"),
    "by a format": ("{{ '{0.__class__}'.format(1) }}", "reaches for what no template may"),
    "by a format map": ("{{ '{a.__class__}'.format_map({'a': 1}) }}", "reaches for what no template may"),
    "a function's globals": ("{{ raise_exception.__globals__ }}", "reaches for what no template may"),
    "changes what it is given": ("{{ messages.append(1) }}", "access to attribute 'append' of 'list'"),
    "an endless macro": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "a block in itself": ("{% block a %}{{ self.a() }}{% endblock %}", "recursion"),
    "deep loops": ("{% for a in 'a' %}" * 30 + "{% endfor %}" * 30, "cannot be compiled: too many"),
    "deep brackets": ("{{ " + "(" * 999 + "1" + ")" * 999 + " }}", "cannot be compiled"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a wrong codec": ("{{ 'a'.encode('nope') }}", "unknown encoding"),
    "not jinja": ("{% if %}", "not valid jinja"),
}


def message_of(source: str) -> str:
    with pytest.raises(DataError) as caught:
        render_chat(source, TURNS, generation_prompt=False, special={})
    return caught.value.message


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_why(name: str) -> None:
    source, reason = REFUSED[name]
    assert reason in message_of(source)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ raise_exception('no ' * 99999) }}", "the chat template refuses the conversation: no no "),
        ("{% " + "a" * 99999 + " %}", "the chat template is not valid jinja: Encountered unknown tag 'aaa"),
        ("{{ ''['__class__' * 9999] }}{{ 'a' | attr('b' * 99999) + 1 }}", "the chat template "),
    ],
)
def test_what_a_template_says_is_told_shortly(source: str, said: str) -> None:
    """It is told of every row."""
    message = message_of(source)
    assert message.startswith(said)
    assert len(message) < 600


@pytest.mark.parametrize("form", ["%999999999d", "%999999999d" * 23, "%Y" * 128])
def test_the_widths_of_a_dates_format_are_bounded(form: str) -> None:
    """By Python, which gives a format up that makes more than 256 times its length."""
    made = render_chat(f"{{{{ strftime_now('{form}') }}}}", TURNS, generation_prompt=False, special={})
    assert len(made) <= 2**17


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit on memory is Linux's")
def test_what_would_grow_without_bound_is_stopped_in_little_memory() -> None:
    program = (  # with half a gigabyte more than it has after its imports
        "import pathlib, resource\n"
        "from tests.data.test_jinja_safety import TOO_LARGE, message_of\n"
        "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])\n"
        "limit = pages * resource.getpagesize() + 2**29\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "for name, source in TOO_LARGE.items():\n"
        "    found = message_of(source)\n"
        "    assert 'grows without bound' in found, (name, found)\n"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stderr[-3000:]


def test_a_template_that_loops_for_ever_is_stopped_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_watch, "CPU_SECONDS", 0.5)
    messages: list[str] = []

    def work() -> None:
        messages.append(message_of(ENDLESS))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    messages.append(message_of(ENDLESS))
    # The thread that was stopped goes on, and so does what it renders next.
    assert render_chat("{{ messages[0].content }}", TURNS, generation_prompt=False, special={}) == "hi"
    for thread in threads:
        thread.join(60)
    assert len(messages) == 3
    assert all("does not come to an end within" in message for message in messages)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_that_was_forked_is_watched_too() -> None:
    program = (
        "import os, sys\n"
        "from tests.data.test_jinja_safety import ENDLESS, TURNS, message_of\n"
        "from luthier.data import jinja_watch\n"
        "jinja_watch.CPU_SECONDS = 0.2\n"
        "assert 'does not come to an end' in message_of(ENDLESS)\n"  # the parent's watchdog is awake
        "child = os.fork()\n"
        "found = message_of(ENDLESS)\n"
        "assert 'does not come to an end' in found\n"
        "if child:\n"
        "    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert found.returncode == 0, found.stderr[-3000:]


def test_a_thread_that_computes_long_but_in_short_calls_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jinja_watch, "CPU_SECONDS", 0.1)
    end = time.thread_time() + 1.3  # two looks of the watchdog, and then some
    count = 0
    while time.thread_time() < end:
        count += within_limit(sum, range(100))
    assert count


def test_a_call_that_waits_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine busy with other things gives the thread no time: that is not the template's fault.
    monkeypatch.setattr(jinja_watch, "CPU_SECONDS", 0.1)
    inside, go_on = threading.Event(), threading.Event()
    known: list[jinja_watch._Watched] = []

    def wait(given: str) -> str:
        inside.set()
        go_on.wait(60)
        return given

    def work() -> None:
        known.append(jinja_watch._here.watched)
        assert within_limit(wait, "given") == "given"

    thread = threading.Thread(target=work)
    thread.start()
    assert inside.wait(60)
    for _ in range(3):
        known[0].clock -= 1000.0  # long ago by the clock
        known[0].look()
    assert not known[0].fired
    go_on.set()
    thread.join(60)


def test_an_exception_that_comes_late_is_raised_inside_or_not_at_all() -> None:
    watched = jinja_watch._here.watched
    done = threading.Event()

    def fire() -> None:  # the watchdog's shot, as often as can be, so that many fall on the end of a call
        while not done.is_set():
            with watched.lock:
                if watched.call:
                    watched.fire(1.0)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    firing = threading.Thread(target=fire)
    firing.start()
    stopped = rounds = outside = 0
    try:
        while rounds < 20_000 or stopped < 100:
            rounds += 1
            try:
                within_limit(sum, range(rounds % 50))
            except RunawayError:
                stopped += 1
            outside += len([1 for _ in range(20)])  # an exception here fails the test
    finally:
        sys.setswitchinterval(before)
        done.set()
        firing.join()
    assert outside == 20 * rounds
    assert watched.call == 0


WORDS = st.sampled_from(["a", "Paris ", "\n", "{{", "<|eot_id|>", "é"])
CONTENTS = st.lists(WORDS, max_size=5).map("".join)
EXPRESSIONS = (
    "m.content + m.role + '!'", "m.content ~ 3 ~ loop.index", "m.content * 3", "'%s|%5.1f' % (m.content, 2)",
    "m.content | replace('a', 'bb') | center(40)", "m.content.replace('a', '').split('P') | join(', ')",
    "'{:>9}{}'.format(m.role, 1234567)", "[m.content, {'a': (1, 2)}, none, true]", "messages | tojson(indent=2)",
    "messages | map(attribute='content') | list", "messages | selectattr('role', 'equalto', 'user') | list | length",
    "2 ** 10 + 7 % 3 - 3 * 4", "[1, 2] + [3]", "m | items | list", "dict(a=m.content)", "[3, 1] | sort | sum",
    "m.content | indent(4) | upper | e", "range(3) | batch(2, '-') | list", "(m.content, 1)[0] is string",
    "'a'.join([m.role, m.content])", "m.content | wordwrap(5)", "1.26 | round(1)", "messages[1:] == messages",
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(EXPRESSIONS), min_size=1, max_size=4), st.lists(CONTENTS, min_size=1, max_size=3))
def test_ordinary_templates_render_as_in_the_plain_sandbox(expressions: list[str], contents: list[str]) -> None:
    body = "".join(f"[{{{{ {expression} }}}}]" for expression in expressions)
    macro = "{% macro f(x, y=2) %}<{{ x ~ y }}{{ varargs }}>{% endmacro %}"
    block = "{% set kept %}{{ f(m.content, 3, m.role) }}{% endset %}{{ kept | trim }}"
    source = macro + "{% for m in messages %}" + body + block + "{% endfor %}"
    turns = [Turn("user", content) for content in contents]
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    plain.filters["tojson"] = LimitedEnvironment().filters["tojson"]
    ours = LimitedEnvironment(trim_blocks=True, lstrip_blocks=True)
    ours.limit()
    assert ours.template(source).render(messages=messages) == plain.from_string(source).render(messages=messages)


def test_a_long_row_is_written() -> None:
    content = "word " * (LIMIT // 50)
    found = render_chat("{{ messages[0].content | trim | replace('o', '0') }}", [Turn("user", content)],
                        generation_prompt=False, special={})  # fmt: skip
    assert found == content.strip().replace("o", "0")
