"""The quickstart's data: what a message says is what its JSON says, and what is held out cannot be known by heart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora.quickstart.data import ABOUT, DAYS, PEOPLE, QUESTION, WORDINGS, records

TRAIN, HELD_OUT = (
    [(record["prompt"].removeprefix(QUESTION), json.loads(record["completion"])) for record in map(json.loads, part)]
    for part in records()
)


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
    for held_out in (
        {str(fields["what"]).split()[0] for _, fields in HELD_OUT},
        {str(fields["who"]) for _, fields in HELD_OUT if fields["who"]},
    ):
        assert len(held_out) > 10
        assert not [word for word in held_out if any(re.search(rf"\b{word}\b", text, re.I) for text, _ in TRAIN)]
    moments = [{(fields["day"], fields["time"]) for _, fields in part} for part in (TRAIN, HELD_OUT)]
    assert not moments[0] & moments[1]
    assert not set(ABOUT[0]) & set(ABOUT[1])
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
        assert str(fields["what"]) in text
        assert (f"with {fields['who']}" in text) == (fields["who"] is not None)
        assert fields["day"] in DAYS
        assert re.search(rf"\b(?<!Not ){fields['day']}\b(?! but)", text.replace(f"from {fields['day']}", ""))
        assert f"{fields['time']}" in text
        assert (", for " in text) == (fields["minutes"] is not None)
        assert fields["minutes"] is None or f", for {fields['minutes']} minutes" in text
    assert {type(fields["who"]) for _, fields in part} == {type(fields["minutes"]) for _, fields in part} - {int} | {
        str
    }
