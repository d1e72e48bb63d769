"""``qlora init``: a recipe for a model, data and a card, written with what it comes to.

    model, data ─► lengths ─► row length, held-out share, batch, epochs ─► planned for the card ─► a commented recipe
                                    ▲                                          │
                                    └────────── shorter, until it fits ────────┘

Everything that it chooses stands in the recipe and can be changed there. Knows the plan and the data; must not train.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.errors import DoesNotFitError, InputError, counted, listed, nearest
from qlora.files.durable import expanded, from_here, require_writable
from qlora.machine.cards import amount, parse_memory
from qlora.machine.disk import bytes_text, duration_text
from qlora.model.hub import require_model
from qlora.recipe import Recipe
from qlora.runs.first import look_at_recipe

if TYPE_CHECKING:
    from qlora.data.load import Data
    from qlora.model.checkpoint import Checkpoint
    from qlora.planning.plan import Plan

QUESTIONS = {
    "model": "Which model? A folder, or its name on the hub (Qwen/Qwen3-8B)",
    "data": "Which data? A file or folder (my.jsonl), or its name on the hub",
    "card": "Which card? Its name or memory (4090, 24GiB); nothing for this machine",
    "epochs": "How many times through the data? Nothing for a proposal",
    "out": "Where shall the recipe go? Nothing for a file called like the data",
}
OPTIONS = (*QUESTIONS, "host_memory", "overwrite")
LEAST = 128  # tokens, below which no shorter row is tried
WHOLE = 0.99  # of the examples fit into a row
SHORTEST, LONGEST, TEXT, FULL = 512, 2**17, 2048, 2048
"""Tokens of a row: below the first a step holds too little; above the second nothing is looked at; raw text is cut to the third; so
many as the last keep a card busy, in one row or several."""
ROWS = 40  # that a short text is cut into at least, so that there is something to hold out and some steps to take
STEPS = 20  # below which a batch is halved
HELD_OUT, FEWEST, MOST = 0.05, 10, 200
"""The share that is held out, and how many records that is at least and at most."""


@dataclass(frozen=True)
class Draft:
    """A recipe, and what there is to say of its values, by key."""

    recipe: Recipe
    why: Mapping[str, str]
    plan: Plan
    about: Sequence[str] = ()
    """What the data come to, and what of them is not read."""


def init(words: Sequence[str]) -> str:
    """Write the recipe that ``words`` ask for, as ``model=X data=my.jsonl card=4090``; what is missing is asked in a terminal.

    Further words are values of the recipe. Returns what there is to say. Raises InputError for what cannot be used.
    """
    options, overrides = _options(words)
    if not {"model", "data"} <= options.keys():
        _ask(options)
    out = Path(options.get("out") or f"{_stem(options['data'])}.yaml")
    if out.suffix not in (".yaml", ".yml"):
        raise InputError(f"out is '{out}'; expected the name of a recipe, as mine.yaml.")
    if out.exists() and options.get("overwrite") != "true":
        raise InputError(f"'{out}' is there already; choose another name (out=…), or replace it (overwrite=true).")
    require_writable(out.parent, "choose another folder (out=…)")
    _check("epochs", options.get("epochs", ""))
    card = options.get("card") or None
    if card is not None:
        amount(card)
    if options.get("host_memory"):
        parse_memory(options["host_memory"])
    look_at_recipe(Recipe.from_dict(_begun(options, out, overrides), *overrides, source="what was given"))
    made = drafted(options, out, overrides)
    text = written(made, out, command=_command(options, overrides))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    lines = [line.removeprefix("# ") for line in text.splitlines()[2:] if line.startswith("# ")]
    following = [f"qlora {verb} {shlex.quote(str(out))}" for verb in ("preview", "plan", "train")]
    return "\n".join([f"Recipe: {out}", *lines, "Next:", *(f"    {line}" for line in following)])


def _options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(init's own options by name, the values of a recipe)."""
    named = [(word.partition("=")[0].replace("-", "_"), word) for word in words]
    own = {name: word.partition("=")[2] for name, word in named if name in OPTIONS and "=" in word}
    others = [word for name, word in named if name not in own]
    counts = Counter(name for name, word in named if name in own)
    if twice := [name for name, count in counts.items() if count > 1]:
        more = " Of several files name their folder or a pattern, as 'data/*.jsonl'." if twice == ["data"] else ""
        raise InputError(f"{listed(twice)} is given {counts[twice[0]]} times; expected it once.{more}")
    if strange := [word for word in others if "." not in word.partition("=")[0]]:
        raise InputError(
            f"'{strange[0]}' is nothing that qlora init takes; expected {', '.join(OPTIONS)}, or section.key=value."
            f"{nearest(strange[0].partition('=')[0], OPTIONS)}"
        )
    return own, others


def _ask(options: dict[str, str]) -> None:
    """Ask in the terminal for what was not given; an answer that cannot be used is told, and asked for again."""
    if not sys.stdin.isatty():
        missing = [name for name in ("model", "data") if name not in options]
        raise InputError(
            f"qlora init needs {' and '.join(f'--{name}' for name in missing)}: qlora init --model Qwen/Qwen3-8B --data my.jsonl --card 4090"
        )
    for name, question in QUESTIONS.items():
        while name not in options:
            answer = _answer(f"{question}: ")
            try:
                _check(name, answer)
            except InputError as error:
                print(error)
                continue
            options[name] = answer


def _answer(question: str) -> str:
    print(question, end="", flush=True)
    if not (line := sys.stdin.readline()):
        raise InputError("The answers ended before a recipe was written; give --model and --data instead.")
    return line.strip()


def _check(name: str, answer: str) -> None:
    if name == "model":
        require_model(answer)
    elif name == "data" and not answer:
        raise InputError("Data is needed: a file or folder of examples, or a data set of the hub.")
    elif name == "data" and not expanded(answer).exists() and "/" not in answer:
        raise InputError(f"There is no '{answer}'.{from_here(answer)}")
    elif name == "card" and answer:
        amount(answer)
    elif name == "epochs" and answer and not (answer.isdecimal() and int(answer)):
        raise InputError(f"epochs is '{answer}'; expected a whole number of at least 1.")


def _begun(options: Mapping[str, str], out: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """What does not depend on the data."""
    apart = any(one.startswith("data.held_out=") for one in overrides)
    return {
        "folder": f"runs/{out.stem}",
        "model": {"name": options["model"], "quantization": "nf4"},
        "method": {"name": "lora", "r": 16, "alpha": 32},
        "data": {"train": options["data"], **({} if apart else {"held_out_fraction": HELD_OUT})},
    }


def drafted(options: Mapping[str, str], out: Path, overrides: Sequence[str]) -> Draft:
    """The recipe for the options, by its data, as long a row as fits on the card."""
    from qlora.model.anatomy import position_limit
    from qlora.model.checkpoint import open_checkpoint
    from qlora.planning.rows import load_recipe_data

    values = _begun(options, out, overrides)
    checkpoint = open_checkpoint(Recipe.from_dict(values, *overrides).model, weights=False)
    longest = min(position_limit(checkpoint.model_config()) or LONGEST, LONGEST)
    lengths, records, is_text = _looked_at(values, overrides, checkpoint, longest)
    length = min(row_length(lengths, is_text), longest)
    # of raw text in few documents pieces are held out, not whole ones
    parts = sum(lengths) // length if is_text and records < 1 / HELD_OUT else records
    values["data"] |= {"held_out_fraction": held_out_share(parts)} if "held_out_fraction" in values["data"] else {}
    while True:
        values["data"] |= {"max_length": length}
        recipe = Recipe.from_dict(values, *overrides)
        try:
            return _planned(values, overrides, options, load_recipe_data(recipe, checkpoint), lengths, records, is_text)
        except DoesNotFitError:
            if length <= LEAST or recipe.data.max_length != length:
                raise
            length //= 2


def _looked_at(
    values: Mapping[str, Any], overrides: Sequence[str], checkpoint: Checkpoint, longest: int
) -> tuple[list[int], int, bool]:
    """(tokens of every example, at most ``longest``; records; whether it is raw text)."""
    from qlora.planning.rows import load_recipe_data

    whole = (f"data.max_length={longest}", "data.held_out_fraction=0", "data.held_out=null", "data.packing=true")
    data = load_recipe_data(Recipe.from_dict(dict(values), *overrides, *whole), checkpoint)
    lengths = [end - begin for row in data.train for begin, end in row.spans()]
    return lengths, data.report.train.records, data.report.form == "text"


def row_length(lengths: Sequence[int], is_text: bool) -> int:
    """Tokens of a row that holds 99 % of the examples whole, in steps of 64; of raw text, so many that there are ``ROWS`` of them."""
    if is_text:
        return min(TEXT, max(64, max(lengths)), max(LEAST, 64 * (sum(lengths) // ROWS // 64)))
    enough = sorted(lengths)[math.ceil(WHOLE * len(lengths)) - 1]
    return max(SHORTEST, 64 * math.ceil(enough / 64))


def held_out_share(records: int) -> float:
    """The part of the records, or of pieces of text, to hold out: 5 %, but 10 to 200 of them, and never more than a fifth; 0 where one is more than that."""
    wanted = min(max(HELD_OUT * records, FEWEST), MOST)
    return float(f"{min(wanted / records, 0.2):.2g}") if records >= 5 else 0.0


def _planned(
    values: dict[str, Any],
    overrides: Sequence[str],
    options: Mapping[str, str],
    data: Data,
    lengths: Sequence[int],
    records: int,
    is_text: bool,
) -> Draft:
    """The recipe with what depends on the number of rows, and its plan. Raises DoesNotFitError."""
    from qlora.data.batches import steps_per_epoch

    rows, examples = len(data.train), len(lengths)
    batch = 16 if rows >= 200 else 8 if rows >= 50 else 4
    much, some = (rows >= 200, False) if is_text else (examples >= 10_000, examples >= 2_000)
    epochs = int(options.get("epochs") or (1 if much else 2 if some else 3))
    while batch > 1 and epochs * rows < STEPS * batch:
        batch //= 2
    steps = epochs * steps_per_epoch(rows, batch)
    card = options.get("card") or None
    values = with_training(values, card is not None or _has_gpu(), batch, epochs, steps)
    recipe, made = fitted(values, overrides, lambda recipe: plan_for(recipe, card, options.get("host_memory")))
    steps = recipe.training.steps or recipe.training.epochs * steps_per_epoch(rows, recipe.training.batch_size)
    train, held = data.report.train, data.report.held_out
    whole = 1 - (train.truncated + held.truncated) / max(1, train.examples + held.examples)
    seconds = made.chosen.seconds
    time = (
        f", about {duration_text(steps * seconds.expected * made.chosen.share(train.tokens, rows))}"
        if seconds is not None
        else ""
    )
    about = "raw text is split into rows of so many tokens"
    if not is_text:
        about = f"holds {whole:.1%} of the examples whole; the longest has at most {train.lengths[-1][0]:,} tokens"
    share = recipe.data.held_out_fraction
    pieces = is_text and share > 0 and records < 1 / share
    apart = counted(held.examples, "piece") if pieces else counted(held.records, "record")
    why = {
        "data.max_length": about,
        "data.held_out_fraction": f"{apart} never trained on; loss and answers are measured there"
        if held.records
        else "so few records that none is held out; whether training helps cannot be known",
        "training.epochs": counted(steps, "step"),
        **reasons(made),
    }
    counts = (
        f"{counted(records, 'record')}, {apart if pieces else f'{held.records:,} of them'} held out → {counted(rows, 'row')} → "
        f"{counted(steps, 'step')} of {counted(recipe.training.batch_size, 'row')}{time}."
    )
    return Draft(recipe, why, made, [counts, *(f"Of the data: {note}." for note in data.report.notes)])


def fitted(values: Mapping[str, Any], overrides: Sequence[str], plan: Callable[[Recipe], Plan]) -> tuple[Recipe, Plan]:
    """The recipe as it stands where that fits; else one that has the fastest arrangement that does chosen when it trains."""
    recipe = Recipe.from_dict(dict(values), *overrides, source="what was given")
    made = plan(recipe)
    if made.chosen.changes and recipe.memory.budget is None:
        recipe = Recipe.from_dict({**values, "memory": {"budget": "auto"}}, *overrides)
    return recipe, made


def with_training(values: Mapping[str, Any], gpu: bool, batch: int, epochs: int, steps: int) -> dict[str, Any]:
    """The values with how it is trained, and measured some five times on the way."""
    training = {
        "epochs": epochs,
        "batch_size": batch,
        "micro_batch_size": max(1, min(batch, FULL // values["data"]["max_length"])),
        "learning_rate": 2e-4,
        "schedule": "cosine",
        **({"optimizer": "paged_adamw_8bit"} if gpu else {}),
        "save_every": max(10, steps // 10),
    }
    evaluation = {"every": steps // 5 if steps >= 50 else 0, "held_out_rows": 100, "prompts": 3}
    return {**values, "training": training, "evaluation": evaluation}


def plan_for(recipe: Recipe, card: str | None, host_memory: str | None) -> Plan:
    """The plan for a card that need not be here, or for this machine. Raises DoesNotFitError."""
    from qlora.planning.plan import timed

    device = {"memory": card, "host_memory": host_memory}
    there = recipe.model_copy(update={"device": recipe.device.model_copy(update=device)})
    return timed(there if card or host_memory else recipe, elsewhere=card is not None)


def reasons(plan: Plan) -> dict[str, str]:
    """What there is to say of values that do not depend on the data."""
    return {
        "method.r": "the rank of the adapter",
        "training.learning_rate": "of LoRA on a base of up to 30 billion parameters; half of it above",
        "training.micro_batch_size": "rows that go through the model at once",
        "memory.budget": f"the fastest arrangement that fits when it trains; as planned: {plan.chosen}",
    }


def written(draft: Draft, out: Path, command: str, needs: str = "") -> str:
    """The recipe's file: the command that trains it, what it is and needs, and every value with why."""
    plan, recipe = draft.plan, draft.recipe
    memory, host = plan.memory.total, plan.memory.host_total
    beside = f" and {bytes_text(host)} of host memory" if plan.target.device.type != "cpu" else ""
    head = [
        f"qlora train {shlex.quote(str(out))}",
        "",
        f"Fine-tunes {recipe.model.name} ({_many(plan.parameters)} parameters) in 4 bits. Made by:",
        command,
        f"Needs {needs or plan.target.name}: {bytes_text(memory)} of its {bytes_text(plan.target.free)}{beside}, as planned; "
        f"{bytes_text(plan.disk_bytes)} of disk for the run.",
        *draft.about,
    ]
    lines = [f"# {line}".rstrip() for line in head]
    values = recipe.model_dump(mode="json", exclude_unset=True, by_alias=True)
    for section in ("folder", *(name for name in values if name != "folder")):
        lines += ["", *_section(section, values[section], draft.why)]
    return "\n".join(lines) + "\n"


def _many(count: int) -> str:
    """``8.2 billion``, ``135 million``."""
    return f"{count / 1e9:.3g} billion" if count >= 1e9 else f"{count / 1e6:.3g} million"


def _section(name: str, value: Any, why: Mapping[str, str]) -> list[str]:
    if not isinstance(value, dict):
        return [f"{name}: {_yaml(value)}"]
    lines = [f"{name}:"]
    for key, inside in sorted(value.items(), key=lambda item: item[0] not in ("name", "train")):
        reason = why.get(f"{name}.{key}")
        lines.append(f"  {key}: {_yaml(inside)}" + (f" # {reason}" if reason else ""))
    return lines


def _yaml(value: Any) -> str:
    """A value in YAML, whose flow style JSON is: a name without quotes where it needs none."""
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_.~/][\w./~-]*", value) and value.lower() not in _WORDS:
        return value
    if isinstance(value, float) and 0 < abs(value) < 1e-2:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, ensure_ascii=False)


_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", "~", "."}


def _command(options: Mapping[str, str], overrides: Sequence[str]) -> str:
    own = [
        f"--{name.replace('_', '-')} {shlex.quote(value)}"
        for name, value in options.items()
        if value and name != "overwrite"
    ]
    return " ".join(["qlora init", *own, *map(shlex.quote, overrides)])


def _stem(data: str) -> str:
    """``data/my.jsonl`` → ``my``."""
    return re.sub(r"[^\w-]+", "-", Path(data).name.partition(".")[0]).strip("-") or "recipe"


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
