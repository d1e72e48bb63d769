"""A stranger's chat template is cut off when it loops or explodes, reaches nothing, and leaves no process behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora.data import rendering, sandbox
from qlora.data.chat import ChatTemplate
from qlora.data.formats import parse
from qlora.data.rendering import CutOff, Job, Refused, Renderer
from qlora.data.sources import Record
from qlora.errors import DataError
from tests.data import conftest as families
from tests.data.conftest import make_tokenizer

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}"
ENDLESS = {
    "loops in loops": LOOP,
    "a macro in loops": "{% macro m() %}x{% endmacro %}" + LOOP.replace("{% endfor %}", "{{ m() }}{% endfor %}", 1),
    "a number too large to work out": "{% set n = namespace(i=10) %}{{ n.i ** (n.i ** n.i) % 7 }}",
    "a constant that Jinja works out itself": "{% if 9 ** (9 ** 9) > 1 %}x{% endif %}",
}
EXPLODING = {
    "a string as long as the memory": "{{ 'a' * 10 ** 10 }}",
    "doubling": DOUBLING,
    "a list": "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
    "a wide number": "{{ '%099999999999d' % 1 }}",
    "padding": "{{ 'a'.ljust(10 ** 11) }}",
    "a long text": "{{ 'a' * 20000000 }}",
}
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
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of a second and some memory, so that a test need not wait for more."""
    monkeypatch.setattr(rendering, "SECONDS", 0.2)
    monkeypatch.setattr(rendering, "MEMORY", 2**27)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One item for each child that is forked."""
    found: list[int] = []
    fork = rendering._forked
    monkeypatch.setattr(rendering, "_forked", lambda: found.append(1) or fork())
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


def conversations(count: int) -> Any:
    return parse([Record({"messages": TALK}, "a.jsonl", "line", n) for n in range(1, count + 1)]).conversations


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_that_computes_for_ever_is_cut_off(name: str) -> None:
    before = children()
    with Renderer(ENDLESS[name], {}) as renderer:
        with pytest.raises(CutOff, match=r"it computed for more than 0\.2 s"):
            renderer.text(TALK)
        assert renderer._child is None
    assert children() == before


@pytest.mark.parametrize("name", EXPLODING)
def test_a_template_that_grows_without_end_is_cut_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MEMORY", 2**27)
    with pytest.raises(CutOff, match=r"it needed more than 0\.125 GiB of memory|it wrote 20,000,000 characters"):
        Renderer(EXPLODING[name], {}).text(TALK)


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_may_not_do(name: str) -> None:
    template, reason = REFUSED[name]
    with Renderer(template, {}) as renderer:
        with pytest.raises(Refused, match=reason) as caught:
            renderer.text(TALK)
        assert len(str(caught.value)) <= 501
        child = renderer._child
        with pytest.raises(Refused):  # the same child answers the next request
            renderer.text(TALK)
        assert renderer._child is child


def test_messages_are_the_callers_own() -> None:
    """What a template does to its messages, if a sandbox ever let it, happens to a copy."""
    talk = [dict(message) for message in TALK]
    text = Renderer("{% for m in messages %}{% set m = 'x' %}{% endfor %}{{ messages[0].content }}", {}).text(talk)
    assert text == "Hi"
    assert talk == TALK


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("when", ["true", "messages | length > 1"])
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
@pytest.mark.parametrize("group", [1, 64])
def test_the_record_at_which_a_template_is_cut_off_is_named(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora.data.chat._GROUP", group)
    talk = [Record({"messages": TALK}, "a.jsonl", "line", n) for n in range(1, 8)]
    talk[4] = Record({"messages": [{"role": "user", "content": "loop"}, TALK[1]]}, "a.jsonl", "line", 5)
    template = f"{{% if messages[0].content == 'loop' %}}{LOOP}{{% endif %}}" + families.CHATML
    chat = ChatTemplate(make_tokenizer(template))
    before = children()
    with pytest.raises(DataError, match=r"was stopped at line 5 of 'a\.jsonl' as it computed"):
        chat.encode(parse(talk).conversations, "assistant")
    assert children() == before
    assert len(chat.encode(parse(talk[:4]).conversations, "assistant")) == 4  # another child


def test_one_child_for_all_conversations_and_none_afterwards(begun: list[int]) -> None:
    before, handles = children(), len(os.listdir("/proc/self/fd"))
    chat = ChatTemplate(make_tokenizer())
    assert len(begun) == 1
    chat.encode(conversations(300), "assistant")
    assert len(begun) == 2
    assert children() == before
    assert len(os.listdir("/proc/self/fd")) == handles


def test_a_child_that_died_is_said() -> None:
    with Renderer("{{ messages[0].content }}", {}) as renderer:
        assert renderer.text(TALK) == "Hi"
        os.kill(renderer._child.number, signal.SIGINT)  # type: ignore[union-attr]
        assert renderer.text(TALK) == "Hi"  # Ctrl-C is the parent's to answer
        os.kill(renderer._child.number, signal.SIGKILL)  # type: ignore[union-attr]
        with pytest.raises(CutOff, match=r"its process ended \(signal 9\)"):
            renderer.text(TALK)
        assert renderer.text(TALK) == "Hi"


def test_the_child_can_reach_no_file_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the sandbox: what a template could do if it escaped to Python."""
    (tmp_path / "held").touch()
    held = os.open(tmp_path / "held", os.O_WRONLY)
    attempts: list[Callable[[], object]] = [
        lambda: os.open("/etc/passwd", os.O_RDONLY),
        lambda: os.open(tmp_path / "held", os.O_WRONLY | os.O_TRUNC),
        lambda: os.open(tmp_path, os.O_RDONLY),
        socket.socket,
        os.pipe,
        lambda: os.write(held, b"x"),
        lambda: os.write(1, b"x") and os.read(0, 1),
    ]

    def escaped(*_: Any, **__: Any) -> tuple[str, list[Any]]:
        found = []
        for attempt in attempts:
            try:
                found.append(repr(attempt()))
            except OSError as error:
                found.append(errno.errorcode[error.errno or 0])
        return " ".join(found), []

    sandbox.prepare()
    monkeypatch.setattr(sandbox, "render", escaped)
    found = Renderer("", {}).text(TALK)
    os.close(held)
    assert found == "EMFILE EMFILE EMFILE EMFILE EMFILE EBADF b''"
    assert (tmp_path / "held").read_bytes() == b""


def test_ctrl_c_ends_the_child_and_reaches_the_parent() -> None:
    mine, theirs = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with Renderer(LOOP, {}) as renderer:
                os.write(theirs, str(renderer._started().number).encode())  # type: ignore[attr-defined]
                renderer.text(TALK)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(1)
    child = int(os.read(mine, 20))
    time.sleep(0.3)
    os.killpg(parent, signal.SIGINT)  # as a terminal does: to both
    assert os.waitstatus_to_exitcode(os.waitpid(parent, 0)[1]) == 130
    assert not lives(child)


@pytest.mark.parametrize("template", ["{{ messages[0].content }}", LOOP], ids=["waiting", "rendering"])
def test_a_child_ends_with_a_parent_that_was_killed(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1.0)
    mine, theirs = os.pipe()
    parent = os.fork()
    if parent == 0:
        with Renderer(template, {}) as renderer:
            os.write(theirs, str(renderer._started().number).encode())  # type: ignore[attr-defined]
            renderer.text(TALK)
            time.sleep(60)
    child = int(os.read(mine, 20))
    time.sleep(0.2)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(200):
        if not lives(child):
            return
        time.sleep(0.1)
    pytest.fail("the child outlived its parent")


def test_a_process_forked_off_begins_its_own_child() -> None:
    with Renderer("{{ messages[0].content }}", {}) as renderer:
        renderer.text(TALK)
        number = os.fork()
        if number == 0:
            fine = renderer.text(TALK[1:]) == "Hello"
            renderer._end()
            os._exit(0 if fine else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0
        assert renderer.text(TALK) == "Hi"


def test_a_child_begun_anew_renders_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of systems that do not fork."""
    template, tools = families.GENERATION, [{"type": "function", "function": {"name": "f"}}]
    jobs = [Job(TALK, tools, [(2, False), (1, True)])]
    here = Renderer(template, {"bos_token": "<s>"}).render(jobs, mark_answers=True)
    monkeypatch.setattr(rendering, "_forked", rendering._begun)
    renderer = Renderer(template, {"bos_token": "<s>"})
    assert renderer.render(jobs, mark_answers=True) == here
    process = renderer._child.process  # type: ignore[union-attr]
    assert renderer.text(TALK) == here[0][0].text
    assert renderer._child.process is process  # type: ignore[union-attr]
    assert process.poll() is None
    del renderer
    gc.collect()
    assert process.returncode == -signal.SIGKILL
    (text, answers), (_, none) = here[0]
    assert [text[begin:end] for begin, end in answers] == ["Hello<|end|>"]
    assert none == []


def test_a_long_text_of_a_long_record_is_no_explosion() -> None:
    talk = [{"role": "user", "content": "ü" * 9_000_000}, {"role": "assistant", "content": "a" * 9_000_000}]
    assert len(Renderer("{{ messages[0].content + messages[1].content }}", {}).text(talk)) == 18_000_000


def test_garbage_of_the_parent_is_none_of_the_childs(tmp_path: Path) -> None:
    """A temporary folder in a reference cycle: who collects it deletes it."""

    place = tmp_path / "held"
    place.touch()

    class Held:
        def __del__(self) -> None:
            place.unlink()

    thresholds = gc.get_threshold()
    gc.set_threshold(100_000, 1000, 1000)  # collected by whoever makes that many objects: the child
    try:
        held = Held()
        held.itself = held  # type: ignore[attr-defined]
        del held
        tools = [{}] * 200_000
        assert Renderer("{{ tools | length }}", {}).render([Job(TALK, tools, [(2, False)])])[0][0].text == "200000"
        assert place.exists()
    finally:
        gc.set_threshold(*thresholds)
    gc.collect()
    assert not place.exists()
