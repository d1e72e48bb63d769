"""The docstrings are the same every time, and what it says it is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.quickstart.docstrings import first_paragraph

WRITE = [sys.executable, "-c", "from qlora.quickstart.docstrings import write_data; write_data()"]


def make(folder: Path, hash_seed: str, command: list[str] = WRITE) -> list[Path]:
    """Both files, written into ``folder`` by a process of its own."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    subprocess.run(command, check=True, cwd=folder, capture_output=True, env=environment)
    return [folder / "data/docstrings" / name for name in ("train.jsonl", "held_out.jsonl")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make(tmp_path_factory.mktemp("once"), "1")


def conversations(path: Path) -> list[tuple[str, str]]:
    """(question, answer) of each line; fails on any other form."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        (user, assistant) = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        found.append((user["content"], assistant["content"]))
    return found


def test_it_has_the_same_bytes_twice(made: list[Path], tmp_path: Path) -> None:
    again = make(tmp_path, "2")
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in again]
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["held_out.jsonl", "train.jsonl"]


def test_it_is_about_3500_pairs_with_a_twentieth_held_out(made: list[Path]) -> None:
    train, held_out = map(conversations, made)
    assert 3300 <= len(train) + len(held_out) <= 3900
    assert abs(len(held_out) / (len(train) + len(held_out)) - 0.05) < 0.001
    questions = dict(train + held_out)
    assert questions["What does `shutil.copytree` do in Python?"] == (
        "Recursively copy a directory tree and return the destination directory."
    )
    assert questions["What does `len` do in Python?"] == "Return the number of items in a container."
    assert questions["What is `fractions.Fraction` in Python?"].startswith("This class implements rational numbers.")


def test_it_shares_nothing_between_its_files(made: list[Path]) -> None:
    (train_questions, train_answers), (questions, answers) = (zip(*conversations(path), strict=True) for path in made)
    assert not set(train_questions) & set(questions)

    def words(texts: tuple[str, ...]) -> set[str]:
        return {" ".join(re.findall(r"\w+", text.casefold())) for text in texts}

    assert not words(train_answers) & words(answers)
    assert len(words(train_answers)) == len(train_answers)


def test_answers_are_single_sentences_of_a_fit_length(made: list[Path]) -> None:
    for path in made:
        for question, answer in conversations(path):
            assert re.fullmatch(r"What (does `[\w.]+` do|is `[\w.]+`) in Python\?", question)
            assert 20 <= len(answer) <= 301
            assert answer == " ".join(answer.split())
            assert answer[0].isupper()
            assert answer[-1] in ".!?"
            assert not re.search(r"at 0x[0-9a-f]{8,}", answer), "an address differs from process to process"


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("f(x) -> int\n\nReturn the number\nof things.\n\nMore.", "Return the number of things."),
        ("f(x)\nf(x, y)\n\n    Return the number of things", "Return the number of things."),
        ("Do what is asked\n    of this function.\n    ", "Do what is asked of this function."),
        ("Return one of the following:\n\n- a\n- b", None),
        ("Too short.", None),
        ("Long. " * 60, None),
        ("f(x) is a sentence that\nis cut off by its first line.", None),
        ("Alias for field number 0", None),
        ("", None),
        (None, None),
    ],
)
def test_first_paragraph(docstring: str | None, expected: str | None) -> None:
    assert first_paragraph(docstring) == expected


def test_it_refuses_stripped_docstrings(tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        make(tmp_path, "1", [sys.executable, "-OO", *WRITE[1:]])
    assert b"InputError: Python runs with -OO" in failed.value.stderr
    assert list(tmp_path.iterdir()) == []
