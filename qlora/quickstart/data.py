"""The quickstart's data: messages about an appointment, and of each the JSON object that a calendar would take.

    Lunch with Priya on Tuesday at half past one in the afternoon, for an hour.
    {"what": "lunch", "who": "Priya", "day": "Tuesday", "time": "13:30", "minutes": 60}

Put together by the rules below, the same bytes every time. What is held out cannot be known by heart: its occasions, its people and
its pairs of day and time stand in no training message, and a third of its messages are worded as no training message is. Must not
import torch or transformers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from qlora.files.durable import file_written_aside

TRAIN, HELD_OUT = Path("data/quickstart/train.jsonl"), Path("data/quickstart/held_out.jsonl")
TRAINED, ASKED = 1000, 60  # messages
QUESTION = "As JSON (what, who, day, time, minutes): "

T = TypeVar("T")


def _listed(text: str) -> list[str]:
    return [" ".join(one.split()) for one in text.split(",")]


# Of each what is trained on, and what is held out.
OCCASIONS = (
    _listed("""
        lunch, breakfast, dinner, coffee, piano lesson, budget review, team meeting, job interview, haircut, dentist visit, phone call,
        yoga class, book club, driving lesson, house viewing, car inspection, music rehearsal, tennis match, project kickoff, sales
        call, flu shot, chess game, swimming lesson, board meeting, design review, pub quiz, garden tour, staff training, film
        night, study group, vet visit, photo shoot, wine tasting, cooking class, bike repair, planning session, city walk, farewell
        party, code review, blood test, choir practice, contract signing, workshop, handover, chemistry exam, boat trip
    """),
    _listed("""
        picnic, guitar lesson, salary review, press meeting, passport renewal, physio visit, video call, pilates class, film club, sailing
        lesson, flat inspection, theatre rehearsal, football match, product launch, hearing test, card game, museum tour, birthday
        party, security audit, dance practice
    """),
)
PEOPLE = (
    _listed("""
        Priya, Tom, Maria, Ahmed, Lena, Jack, Sofia, Omar, Grace, Ivan, Chloe, Diego, Hannah, Kenji, Nora, Paul, Aisha, Felix, Rosa, Sam,
        Julia, Marco, Emma, Noah, Olga, Peter, Ruth, Samir, Tara, Victor, Wendy, Yusuf, Zoe, Anna, Bruno, Carla, David, Elena, Frank, Gita
    """),
    _listed("""
        Mateo, Ingrid, Kofi, Leila, Oscar, Bianca, Hugo, Mei, Stefan, Amara, Callum, Dana, Ravi, Ursula, Nadia, Theo, Fatima, Joel, Petra
    """),
)
WORDINGS = (
    [
        "{What}{with_whom} on {day} at {time}{length}.",
        "{day}, {time}: {what}{with_whom}{length}.",
        "Please book a {what}{with_whom} for {day} at {time}{length}.",
        "Reminder: {what}{with_whom}, {day} at {time}{length}.",
        "The {what}{with_whom} moves from {other_day} to {day} at {time}{length}.",
        "On {day} I have a {what} at {time}{with_whom}{length}.",
        "At {time} on {day} there is the {what}{with_whom}{length}.",
        "Not {other_day} but {day}: {what}{with_whom} at {time}{length}.",
        "I will be at the {what}{with_whom} on {day}. It begins at {time}{length}.",
        "Is {day} at {time} good for the {what}{with_whom}{length}?",
    ],
    [
        "Could you put the {what}{with_whom} into my diary? It is on {day} at {time}{length}.",
        "{other_day} is impossible, so {day} it is: {what}{with_whom} at {time}{length}.",
        "My {what}{with_whom} was set for {day}, starting at {time}{length}.",
    ],
)
DAYS = _listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
LENGTHS = {
    15: ["15 minutes", "a quarter of an hour"],
    30: ["30 minutes", "half an hour"],
    45: ["45 minutes"],
    60: ["an hour", "60 minutes"],
    90: ["90 minutes", "an hour and a half"],
    120: ["two hours", "120 minutes"],
}
HOURS, MINUTES, SPOKEN = range(8, 21), (0, 15, 30, 45), {0: "", 15: "quarter past ", 30: "half past "}
NUMBERS = _listed("twelve, one, two, three, four, five, six, seven, eight, nine, ten, eleven")


def records() -> tuple[list[str], list[str]]:
    """(train, held out) as JSON lines."""
    draw = random.Random(0)
    return _records(False, TRAINED, draw), _records(True, ASKED, draw)


def _records(held_out: bool, count: int, draw: random.Random) -> list[str]:
    answers: dict[str, str] = {}
    while len(answers) < count:
        message, fields = _appointment(held_out, draw)
        answers.setdefault(message, json.dumps(fields))
    return [json.dumps({"prompt": QUESTION + one, "completion": answer}) for one, answer in answers.items()]


def _appointment(held_out: bool, draw: random.Random) -> tuple[str, dict[str, str | int | None]]:
    """A message, and what it says."""
    what, who = _one_of(OCCASIONS[held_out], draw), _one_of(PEOPLE[held_out], draw) if draw.random() < 0.7 else None
    minutes = _one_of(list(LENGTHS), draw) if draw.random() < 0.6 else None
    wording = _one_of(WORDINGS[held_out and draw.random() < 1 / 3], draw)
    moments = [(day, hour, minute) for day in range(7) for hour in HOURS for minute in MINUTES]
    day, hour, minute = _one_of([one for place, one in enumerate(moments) if (place % 9 == 0) == held_out], draw)
    parts = {
        "what": what,
        "What": what.capitalize(),
        "with_whom": f" with {who}" if who else "",
        "day": DAYS[day],
        "other_day": _one_of([one for one in DAYS if one != DAYS[day]], draw),
        "time": said(hour, minute, draw),
        "length": f", for {_one_of(LENGTHS[minutes], draw)}" if minutes else "",
    }
    message = re.sub(r"{(\w+)}", lambda part: parts[part[1]], wording)
    fields = {"what": what, "who": who, "day": DAYS[day], "time": f"{hour:02}:{minute:02}", "minutes": minutes}
    return message, fields


def said(hour: int, minute: int, draw: random.Random) -> str:
    """A time in one of four ways: 13:30, 1:30 pm, 1:30 in the afternoon, half past one in the afternoon."""
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    clock = f"{(hour - 1) % 12 + 1}:{minute:02}".removesuffix(":00")
    ways = [f"{hour}:{minute:02}", f"{clock} {'am' if hour < 12 else 'pm'}", f"{clock} {part}"]
    if minute in SPOKEN:
        ways.append(f"{SPOKEN[minute]}{NUMBERS[hour % 12]} {part}")
    return _one_of(ways, draw)


def _one_of(options: Sequence[T], draw: random.Random) -> T:
    """By ``random`` alone, which gives the same in every version of Python."""
    return options[int(draw.random() * len(options))]


def write_data(train: Path = TRAIN, held_out: Path = HELD_OUT) -> tuple[int, int]:
    """Write both files and return their numbers of records. Raises OSError."""
    return written(records(), train, held_out)


def written(parts: tuple[list[str], list[str]], train: Path, held_out: Path) -> tuple[int, int]:
    """Write lines into both files, whole or not at all, and count them. Raises OSError."""
    for path, lines in zip((train, held_out), parts, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with file_written_aside(path) as aside:
            aside.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(parts[0]), len(parts[1])
