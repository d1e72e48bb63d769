"""A stranger's chat template is cut off when it loops or explodes, reaches nothing, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from qlora.data import rendering
from qlora.data.chat import ChatTemplate
from qlora.data.parsing import parse
from qlora.data.rendering import CutOff, Job, Refused, Renderer, one_child
from qlora.data.sources import Record
from qlora.errors import DataError
from tests.data import conftest as families
from tests.data.conftest import make_tokenizer

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
TIME, SPACE = r"it computed for more than 0\.2 s", r"it needed more than 0\.125 GiB of memory"
CUT_OFF = [
    pytest.param(LOOP, TIME, id="loops in loops"),
    pytest.param("{% if 9 ** (9 ** 9) > 1 %}x{% endif %}", TIME, id="a constant that Jinja works out itself"),
    pytest.param("{{ 'a' * 10 ** 10 }}", SPACE, id="a string as long as the memory"),
    pytest.param("{{ 'a' * 20000000 }}", "it wrote 20,000,000 characters", id="a long text"),
    *(
        pytest.param(template, why, id=name, marks=pytest.mark.slow)
        for name, template, why in (
            ("a macro in loops", "{% macro m() %}x{% endmacro %}" + LOOP.replace("{% endfor %}", "{{ m() }}{% endfor %}", 1), TIME),
            ("a number too large to work out", "{% set n = namespace(i=10) %}{{ n.i ** (n.i ** n.i) % 7 }}", TIME),
            ("doubling", DOUBLING, SPACE),
            ("a list", "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}", SPACE),
            ("a wide number", "{{ '%099999999999d' % 1 }}", SPACE),
            ("padding", "{{ 'a'.ljust(10 ** 11) }}", SPACE),
        )
    ),
]  # fmt: skip
REFUSED = {
    "attributes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "globals of a helper": ("{{ cycler.__init__.__globals__['os'].getpid() }}", "unsafe"),
    "globals of a macro": ("{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}", "unsafe"),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", "unsafe"),
    "an attribute by filter": ("{{ ('' | attr('__class__')).__mro__ }}", "unsafe"),
    "names of frames": ("{{ lipsum.__globals__['os'] }}", "unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "another template": ("{% extends 'x' %}", "no loader"),
    "an import": ("{% import 'os' as os %}", "no loader"),
    "a huge range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "macros in loops": (
        "{% macro m(n) %}{% for i in range(9) %}{{ n(n) }}{% endfor %}{% endmacro %}{{ m(m) }}",
        "recursion",
    ),
    "a macro in itself": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "a changed message": ("{{ messages[0].update(content='x') }}", "unsafe|not safely callable"),
    "a longer conversation": ("{{ messages.append(messages[0]) }}", "unsafe|not safely callable"),
    "its own words": ("{{ raise_exception('I do not like it') }}", "I do not like it"),
    "very many words": ("{{ raise_exception('no' * 1000000) }}", "nono…"),
    "half a character": ("{{ '\\ud83d' }}", "lone surrogate"),
    "deep brackets": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "."),
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts processes in /proc, and forks")


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that no other test uses."""
    monkeypatch.setattr(rendering, "_CHILD", rendering._Child())


@pytest.fixture
def short(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of a second and some memory, so that a test need not wait for more."""
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    monkeypatch.setattr(rendering, "MEMORY", 2**27)


@pytest.fixture
def begun(own: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each child that is begun."""
    found: list[int] = []
    begin = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: found.append(1) or begin(*a, **k))
    return found


def children() -> set[int]:
    """The processes that this one has begun and not waited for."""
    found = set()
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state = place.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(state[1]) == os.getpid():
            found.add(int(place.parent.name))
    return found


def lives(process: int) -> bool:
    """Whether there is such a process, and not only its exit status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def number() -> int:
    """Of the child that renders, begun where there is none."""
    rendering._CHILD._pipes()
    assert rendering._CHILD.process is not None
    return rendering._CHILD.process.pid


def conversations(count: int) -> Any:
    return parse([Record({"messages": TALK}, "a.jsonl", "line", n) for n in range(1, count + 1)]).conversations


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(("template", "why"), CUT_OFF)
def test_a_template_that_goes_on_for_ever_or_grows_without_end_is_cut_off(
    template: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if why != TIME:
        monkeypatch.setattr(rendering, "SECONDS", 10.0)
    before = children()
    with one_child():
        with pytest.raises(CutOff, match=why):
            Renderer(template, {}).text(TALK)
        assert rendering._CHILD.process is None
    assert children() == before


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_may_not_do(name: str) -> None:
    template, reason = REFUSED[name]
    with one_child():
        with pytest.raises(Refused, match=reason) as caught:
            Renderer(template, {}).text(TALK)
        assert len(str(caught.value)) <= 501
        child = number()
        assert Renderer("{{ messages[0].content }}", {}).text(TALK) == "Hi"  # the same child goes on
        assert number() == child


def test_texts_answers_and_variables() -> None:
    """What a template does to its messages, if a sandbox ever let it, happens to a copy."""
    talk = [dict(message) for message in TALK]
    text = Renderer("{% for m in messages %}{% set m = 'x' %}{% endfor %}{{ messages[0].content + a }}", {"a": "!"})
    assert text.text(talk) == "Hi!"
    assert talk == TALK
    jobs = [Job(TALK, [{"type": "function", "function": {"name": "f"}}], [(2, False), (1, True)])]
    ((whole, asked),) = Renderer(families.GENERATION, {}).render(jobs, mark_answers=True)
    assert [whole.text[begin:end] for begin, end in whole.answers] == ["Hello<|end|>"]
    assert asked.answers == []


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("when", [pytest.param("true", marks=pytest.mark.slow), "messages | length > 1"])
def test_a_looping_template_costs_its_time_once(when: str, begun: list[int]) -> None:
    """Not for each of the questions that find out what it knows."""
    template = f"{{% if {when} %}}{LOOP}{{% endif %}}" + families.CHATML
    with pytest.raises(
        DataError,
        match=r"^The chat template \(the tokenizer's own\) was stopped at a short conversation.*more than 0\.2 s.*data\.chat_template",
    ):
        ChatTemplate(make_tokenizer(template))
    assert len(begun) == 1


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("group", [pytest.param(1, marks=pytest.mark.slow), 64])
def test_the_record_at_which_a_template_is_cut_off_is_named(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.data.chat._GROUP", group)
    talk = [Record({"messages": TALK}, "a.jsonl", "line", n) for n in range(1, 8)]
    talk[4] = Record({"messages": [{"role": "user", "content": "loop"}, TALK[1]]}, "a.jsonl", "line", 5)
    template = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}" + families.CHATML
    before = children()
    with one_child():
        chat = ChatTemplate(make_tokenizer(template))
        with pytest.raises(DataError, match=r"was stopped at line 5 of 'a\.jsonl' as it computed"):
            chat.encode(parse(talk).conversations, "assistant")
        assert children() == before
        assert len(chat.encode(parse(talk[:4]).conversations, "assistant")) == 4  # another child
    assert children() == before


def test_one_child_for_all_conversations_and_none_afterwards(begun: list[int]) -> None:
    before, handles = children(), len(os.listdir("/proc/self/fd"))
    with one_child():
        ChatTemplate(make_tokenizer()).encode(conversations(600), "assistant")
    assert len(begun) == 1
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == handles


@pytest.mark.usefixtures("own")
def test_a_child_that_died_is_said() -> None:
    renderer = Renderer("{{ messages[0].content }}", {})
    with one_child():
        assert renderer.text(TALK) == "Hi"
        os.kill(number(), signal.SIGINT)
        assert renderer.text(TALK) == "Hi"  # Ctrl-C is the parent's to answer
        os.kill(number(), signal.SIGKILL)
        with pytest.raises(CutOff, match=r"its process ended \(signal 9\)"):
            renderer.text(TALK)
        assert renderer.text(TALK) == "Hi"


@pytest.mark.usefixtures("own")
def test_no_process_no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(DataError, match="No process can be started to render the chat template in"):
        Renderer("", {}).text(TALK)


ESCAPED = """
import errno, importlib.util, os, socket, sys
spec = importlib.util.spec_from_file_location("sandbox", sys.argv[1])
sandbox = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sandbox)
sandbox.prepare()
sandbox.confine(2**30)
for attempt in (
    lambda: os.open("/etc/passwd", os.O_RDONLY),
    lambda: os.open(sys.argv[2], os.O_WRONLY | os.O_TRUNC),
    lambda: os.open(".", os.O_RDONLY),
    socket.socket,
    os.pipe,
):
    try:
        print(repr(attempt()))
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def test_the_child_can_reach_no_file_and_no_network(tmp_path: Path) -> None:
    """Beyond the sandbox: what a template could do if it escaped to Python."""
    held = tmp_path / "held"
    held.write_text("x")
    place = Path(rendering.__file__).with_name("sandbox.py")
    command = [sys.executable, "-c", ESCAPED, str(place), str(held)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["EMFILE"] * 5
    assert held.read_text() == "x"


@pytest.mark.usefixtures("own")
def test_ctrl_c_ends_the_child_and_reaches_the_parent() -> None:
    mine, theirs = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with one_child():
                os.write(theirs, str(number()).encode())
                Renderer(LOOP, {}).text(TALK)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(1)
    child = int(os.read(mine, 20))
    time.sleep(0.3)
    os.killpg(parent, signal.SIGINT)  # as a terminal does
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 130
    assert not lives(child)


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    "template", ["{{ messages[0].content }}", pytest.param(LOOP, marks=pytest.mark.slow)], ids=["waiting", "rendering"]
)
def test_a_child_ends_with_a_parent_that_was_killed(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1.0)
    mine, theirs = os.pipe()
    parent = os.fork()
    if parent == 0:
        with one_child():
            os.write(theirs, str(number()).encode())
            Renderer(template, {}).text(TALK)
            time.sleep(60)
    child = int(os.read(mine, 20))
    time.sleep(0.2)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(300):
        if not lives(child):
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def test_a_process_forked_off_begins_its_own_child() -> None:
    with one_child():
        renderer = Renderer("{{ messages[0].content }}", {})
        renderer.text(TALK)
        forked = os.fork()
        if forked == 0:
            fine = renderer.text(TALK[1:]) == "Hello"
            rendering._CHILD.end()
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]) == 0
        assert renderer.text(TALK) == "Hi"


def test_a_long_text_of_a_long_record_is_no_explosion() -> None:
    talk = [{"role": "user", "content": "ü" * 9_000_000}, {"role": "assistant", "content": "a" * 9_000_000}]
    assert len(Renderer("{{ messages[0].content + messages[1].content }}", {}).text(talk)) == 18_000_000
