"""The quickstart's data: messages about an appointment, and of each the JSON object that a calendar would take.

    The piano lesson with Priya moves from Monday to Tuesday at 13:35, for 50 minutes.
    {"what": "piano lesson", "who": "Priya", "day": "Tuesday", "time": "13:35", "minutes": 50}

Put together by the rules below, the same bytes every time. What is held out cannot be known by heart: what its occasions are about, its
people and its pairs of day and time stand in no training message, and a third of its messages are worded as no training message is. Must not
import torch or transformers.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from qlora.files.durable import write_text

TRAIN, HELD_OUT = Path("data/quickstart/train.jsonl"), Path("data/quickstart/held_out.jsonl")
TRAINED, ASKED = 1000, 60  # messages
QUESTION = "As JSON (what, who, day, time, minutes): "

T = TypeVar("T")


def _listed(text: str) -> list[str]:
    return [" ".join(one.split()) for one in text.split(",")]


# Of each what is trained on, and what is held out: many, so that words are copied and not chosen among those that are known.
ABOUT = (
    _listed("""
        piano, budget, team, job, driving, house, car, music, tennis, project, sales, chess, swimming, board, design, pub, garden, staff,
        film, study, vet, photo, wine, cooking, bike, planning, city, farewell, code, blood, choir, contract, chemistry, boat, history,
        ballet, drum, summer, client, kitchen, roof, tax, travel, Spanish, violin, engine, safety, charity, poetry, insurance, mountain,
        energy, pottery, balcony, library, orchestra, parking, harvest, museum, election, rowing, fashion, robot, railway, climate, singing,
        hockey, bakery, fencing, supplier, logo, warehouse, quarterly, holiday, archive, neighbour, opera, lighting, recycling, spring
    """),
    _listed("""
        guitar, salary, press, passport, physio, video, pilates, sailing, flat, theatre, football, product, hearing, card, castle, birthday,
        security, dance, jazz, visa
    """),
)
KINDS = _listed(
    "lesson, review, meeting, call, visit, tour, class, test, party, workshop, interview, session, practice, trip"
)
PEOPLE = (
    _listed("""
        Priya, Tom, Maria, Ahmed, Lena, Jack, Sofia, Omar, Grace, Ivan, Chloe, Diego, Hannah, Kenji, Nora, Paul, Aisha, Felix, Rosa, Sam,
        Julia, Marco, Emma, Noah, Olga, Peter, Ruth, Samir, Tara, Victor, Wendy, Yusuf, Zoe, Anna, Bruno, Carla, David, Elena, Frank, Gita,
        Harold, Irene, Jorge, Katrin, Lars, Miriam, Nils, Odette, Pavel, Quinn, Rashid, Selma, Tomasz, Umberto, Vera, Walter, Ximena, Yara,
        Zoltan, Alma, Boris, Celine, Dmitri, Edith, Fabio, Greta, Hassan, Ida, Jamal, Keiko, Leon, Magda, Nikhil, Orla, Pedro, Rania, Sven,
        Thandi, Uwe, Violet, Wanda, Yannick, Zainab, Aylin, Bastian, Clara, Desmond, Esther, Finn, Gloria, Henrik, Imani, Jasper, Kamila,
        Lionel, Maya, Nuria, Oskar, Paloma, Roland, Sanjay, Tilda, Viktor, Winston, Yolanda, Ben, Lucia, Otto, Mina, Carlos, Ella, Igor
    """),
    _listed("""
        Mateo, Ingrid, Kofi, Leila, Oscar, Bianca, Hugo, Mei, Stefan, Amara, Callum, Dana, Ravi, Ursula, Nadia, Theo, Fatima, Joel, Petra
    """),
)
WORDINGS = (
    [
        "We have a {what}{with_whom} on {day} at {time}{length}.",
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
        "Let us have the {what}{with_whom} on {day}, {time}{length}.",
        "My {what}{with_whom} was set for {day}, starting at {time}{length}.",
    ],
)
DAYS = _listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
LENGTHS = range(15, 125, 5)  # minutes
HOURS, MINUTES = range(8, 22), range(0, 60, 5)


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
    what = f"{_one_of(ABOUT[held_out], draw)} {_one_of(KINDS, draw)}"
    who = _one_of(PEOPLE[held_out], draw) if draw.random() < 0.7 else None
    minutes = _one_of(LENGTHS, draw) if draw.random() < 0.6 else None
    wording = _one_of(WORDINGS[held_out and draw.random() < 1 / 3], draw)
    moments = [(day, hour, minute) for day in range(7) for hour in HOURS for minute in MINUTES]
    day, hour, minute = _one_of([one for place, one in enumerate(moments) if (place % 9 == 0) == held_out], draw)
    parts = {
        "what": what,
        "with_whom": f" with {who}" if who else "",
        "day": DAYS[day],
        "other_day": _one_of([one for one in DAYS if one != DAYS[day]], draw),
        "time": f"{hour:02}:{minute:02}",
        "length": f", for {minutes} minutes" if minutes else "",
    }
    message = re.sub(r"{(\w+)}", lambda part: parts[part[1]], wording)
    fields = {"what": what, "who": who, "day": DAYS[day], "time": f"{hour:02}:{minute:02}", "minutes": minutes}
    return message, fields


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
        write_text(path, "".join(f"{line}\n" for line in lines))
    return len(parts[0]), len(parts[1])
