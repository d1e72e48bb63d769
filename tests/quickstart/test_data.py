"""The quickstart's data: what a message says is what its JSON says, and what is held out cannot be known by heart."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.quickstart.data import DAYS, OCCASIONS, PEOPLE, QUESTION, WORDINGS, records, said

TRAIN, HELD_OUT = (
    [(record["prompt"].removeprefix(QUESTION), json.loads(record["completion"])) for record in map(json.loads, part)]
    for part in records()
)
CLOCK = r"(1?\d(?::\d\d)?) (am|pm|in the morning|in the afternoon|in the evening)"
NUMBERS = ["twelve", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]


def test_it_has_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        command = [sys.executable, "-c", "from qlora.quickstart.data import write_data; write_data()"]
        subprocess.run(command, check=True, cwd=tmp_path / seed, env={**os.environ, "PYTHONHASHSEED": seed})
    made = [
        [(tmp_path / seed / "data/quickstart" / f"{name}.jsonl").read_text("utf-8").splitlines() for seed in ("1", "2")]
        for name in ("train", "held_out")
    ]
    for (one, other), ours in zip(made, records(), strict=True):
        assert one == other == ours


def test_of_what_is_held_out_training_has_neither_occasion_nor_person_nor_moment() -> None:
    for field in ("what", "who"):
        trained = {str(fields[field]).lower() for _, fields in TRAIN} - {"none"}
        held_out = {str(fields[field]).lower() for _, fields in HELD_OUT} - {"none"}
        assert not trained & held_out
        assert not [word for word in held_out if any(re.search(rf"\b{word}\b", text, re.I) for text, _ in TRAIN)]
    moments = [{(fields["day"], fields["time"]) for _, fields in part} for part in (TRAIN, HELD_OUT)]
    assert not moments[0] & moments[1]
    assert not set(OCCASIONS[0]) & set(OCCASIONS[1])
    assert not set(PEOPLE[0]) & set(PEOPLE[1])


def test_a_third_of_what_is_held_out_is_in_new_words() -> None:
    patterns = [re.sub(r"\\{\w+\\}", ".*", re.escape(wording)) for wording in WORDINGS[1]]
    new = [any(re.fullmatch(pattern, text) for pattern in patterns) for text, _ in HELD_OUT]
    assert 0.2 < sum(new) / len(new) < 0.5
    assert not [text for text, _ in TRAIN for pattern in patterns if re.fullmatch(pattern, text)]


@pytest.mark.parametrize("part", [TRAIN, HELD_OUT], ids=["train", "held out"])
def test_the_fields_are_what_the_message_says(part: list[tuple[str, dict[str, object]]]) -> None:
    assert len({text for text, _ in part}) == len(part)
    for text, fields in part:
        assert list(fields) == ["what", "who", "day", "time", "minutes"]
        assert str(fields["what"]) in text.lower()
        assert (f"with {fields['who']}" in text) == (fields["who"] is not None)
        assert fields["day"] in DAYS
        assert str(fields["day"]) in text
        assert (", for " in text) == (fields["minutes"] is not None)
    assert {type(fields["who"]) for _, fields in part} == {type(fields["minutes"]) for _, fields in part} - {int} | {
        str
    }


def test_every_way_of_saying_a_time_is_that_time() -> None:
    """Read back by a reader of its own."""
    draw, ways = random.Random(1), set()
    for hour in range(8, 21):
        for minute in (0, 15, 30, 45):
            for text in {said(hour, minute, draw) for _ in range(30)}:
                assert understood(text) == (hour, minute), text
                ways.add(re.sub(r"\d+|" + "|".join(NUMBERS), "N", text))
    assert {
        "N:N",
        "N pm",
        "N:N in the morning",
        "half past N in the evening",
        "quarter past N in the afternoon",
    } <= ways


def understood(text: str) -> tuple[int, int]:
    if re.fullmatch(r"\d+:\d\d", text):
        return int(text.split(":")[0]), int(text.split(":")[1])
    for word, minute in (("quarter past ", 15), ("half past ", 30), ("", 0)):
        if text.startswith(word) and text.removeprefix(word).split()[0] in NUMBERS:
            hour, part = text.removeprefix(word).split(" ", 1)
            text = f"{NUMBERS.index(hour) or 12}:{minute:02} {part}"
    match = re.fullmatch(CLOCK, text)
    assert match, text
    hour, _, minutes = match[1].partition(":")
    return int(hour) % 12 + 12 * (match[2] in ("pm", "in the afternoon", "in the evening")), int(minutes or 0)
