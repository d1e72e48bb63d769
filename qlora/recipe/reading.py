"""Reading: a YAML file and overrides become values, and what pydantic finds in them becomes sentences.

    recipe.yaml ► values, and the line of every key ┐
    section.key=value, --section.key=value ─────────┴► merged ► validated, or every mistake with its key and its line

Knows YAML, and how pydantic names a place; must not know which sections a recipe has: it is given the class.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pydantic
from pydantic_core import ErrorDetails

from qlora.errors import RecipeError, nearest
from qlora.files.durable import from_here
from qlora.files.strangers import MAX_RECIPE, Fault, JsonObject, Lines, read_bytes, shown, yaml_values
from qlora.recipe.schema import Section, sections_of

DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
DEEPEST = 8  # parts of an override's key: method.0.rank_pattern and a module's name
MOST_MISTAKES = 10  # that one message names
# pydantic's kinds of mistakes that a plainer word says; the others' own words follow "expected"
EXPECTED = {
    "int_parsing": "a whole number", "int_type": "a whole number", "int_from_float": "a whole number",
    "float_parsing": "a number", "float_type": "a number", "bool_parsing": "true or false", "bool_type": "true or false",
    "string_type": "text", "list_type": "a list", "tuple_type": "a list", "dict_type": "'key: value' lines",
    "model_type": "a section of 'key: value' lines", "model_attributes_type": "a section of 'key: value' lines",
}  # fmt: skip

# What other programs call a key: Hugging Face's Trainer and TRL, PEFT, Axolotl, Unsloth, mlx-lm, and people in a hurry.
ELSEWHERE = {
    "training.learning_rate": "lr rate learn_rate", "training.epochs": "num_train_epochs num_epochs n_epochs epoch",
    "training.steps": "max_steps iters num_steps total_steps", "training.batch_size": "bs batch global_batch_size gradient_accumulation_steps",
    "training.micro_batch_size": "micro_batch per_device_train_batch_size train_batch_size mbs", "training.optimizer": "optim",
    "training.schedule": "lr_scheduler lr_scheduler_type scheduler", "training.warmup_fraction": "warmup warmup_ratio warmup_steps",
    "training.weight_decay": "wd decay", "training.max_grad_norm": "grad_clip clip gradient_clipping", "training.seed": "random_state",
    "training.recompute": "grad_checkpoint use_gradient_checkpointing", "training.save_every": "save_steps save_interval",
    "training.keep_checkpoints": "save_total_limit", "evaluation.every": "eval_steps eval_every steps_per_eval",
    "data.max_length": "max_seq_length max_seq_len sequence_len seq_len seq_length cutoff_len context_length block_size model_max_length",
    "data.train": "dataset datasets path train_file dataset_name dataset_path file", "data.packing": "sample_packing pack",
    "data.held_out": "valid validation eval eval_dataset test val", "data.held_out_fraction": "val_set_size test_size eval_fraction",
    "data.limit": "max_samples max_train_samples", "data.form": "format type dataset_format", "method.r": "rank lora_r lora_rank",
    "method.alpha": "lora_alpha", "method.dropout": "lora_dropout", "method.target_modules": "targets target lora_target_modules",
    "model.name": "model_name model_name_or_path base_model model_id pretrained", "model.quantization": "load_in_4bit quant quantize bits",
    "model.compute_dtype": "dtype torch_dtype bf16 fp16 precision", "model.attention": "attn_implementation flash_attention flash_attn",
    "folder": "output_dir out output save_dir run_name adapter_path", "device.memory": "gpu card vram", "memory.budget": "max_memory",
}  # fmt: skip

Read = TypeVar("Read", bound=Section)
Place: TypeAlias = JsonObject | list[Any]


def read_file(path: Path, what: str = "recipe") -> tuple[JsonObject, Lines]:
    """What a recipe, or ``what`` else, holds, and the line of every key. Raises RecipeError."""
    if path.suffix.lower() in DATA and path.is_file():
        raise RecipeError(
            f"'{path}' is a file of data, by its name; expected a recipe (YAML), which this writes: "
            f"qlora init --model MODEL --data {shlex.quote(str(path))}"
        )
    try:
        text = read_bytes(path, MAX_RECIPE).decode("utf-8")
    except FileNotFoundError:
        raise RecipeError(
            f"There is no {what} at '{path}'; expected the path of a YAML file.{from_here(path)}"
        ) from None
    except (OSError, ValueError) as error:
        raise RecipeError(f"'{path}' cannot be read ({error}); expected a YAML file in UTF-8.") from None
    try:
        values, lines = yaml_values(text)
    except Fault as fault:
        raise RecipeError(f"'{path}' cannot be used: {fault}; expected sections of 'key: value' lines.") from None
    if not isinstance(values, dict):
        found = (
            "nothing" if values is None else "a list" if isinstance(values, list) else f"nothing but {shown(values)}"
        )
        raise RecipeError(f"'{path}' holds {found}; expected sections such as 'model:' and 'data:'.")
    return values, lines


def validated(recipe: type[Read], values: JsonObject, overrides: Sequence[str], source: str, lines: Lines) -> Read:
    """``values`` with ``overrides`` as a recipe. Raises RecipeError naming every mistake, with its line in ``source``."""
    if other := [recipe.mistaken[key] for key in values if key in recipe.mistaken and key not in recipe.model_fields]:
        raise RecipeError(f"'{source}' is {other[0]}.")
    places: dict[tuple[str, ...], int | None] = dict(lines)
    for override in overrides:
        path, values = _overridden(recipe, values, override)
        places[path] = None  # its value no longer stands in the file
    try:
        return recipe.model_validate(values)
    except pydantic.ValidationError as error:
        count = error.error_count()
        mistakes = [_sentence(recipe, item, places) for item in error.errors(include_url=False)[:MOST_MISTAKES]]
        if count > MOST_MISTAKES:
            mistakes.append(f"and {count - MOST_MISTAKES:,} more.")
        many = f"{count:,} mistakes in {source}:" if count > 1 else f"{source}:"
        raise RecipeError("\n  ".join([many, *mistakes]) if count > 1 else f"{many} {mistakes[0]}") from None


def _overridden(recipe: type[Section], values: JsonObject, override: str) -> tuple[tuple[str, ...], JsonObject]:
    """The key's path in one ``section.key=value``, and ``values`` with it."""
    key, equals, text = override.removeprefix("--").partition("=")
    path = key.strip().split(".")
    said = shown(override)
    if equals and not text.strip():
        raise RecipeError(f"{said} gives no value; leave it out, or write {key.strip()}=null for none.")
    if not equals or not all(path) or len(path) > DEEPEST:
        raise RecipeError(f"{said} is not an override; expected section.key=value, as in training.epochs=2.")
    try:
        value, _ = yaml_values(text)
    except Fault as fault:
        raise RecipeError(f"The value in {said} cannot be used: {fault}; quote text, as in key='\"…\"'.") from None
    return tuple(path), with_value(recipe, values, path, value, said)


def with_value(recipe: type[Section], values: JsonObject, path: Sequence[str], value: object, said: str) -> JsonObject:
    """``values`` with ``value`` at the key's ``path``; ``said`` is how it was given. Raises RecipeError."""
    changed = _with(_without_its_other_name(recipe, values, path), path, value, said)
    assert isinstance(changed, dict)
    return changed


def _without_its_other_name(recipe: type[Section], values: JsonObject, path: Sequence[str]) -> JsonObject:
    """``values`` without what they say of the key at ``path`` by its former name, by the one it has now, or in another way."""
    field = recipe.model_fields.get(path[0])
    inside = values.get(path[0])
    if field is None or not isinstance(inside, dict):
        return values
    for section in sections_of(field.annotation).values():
        for name, (key, _) in section.former.items():
            if path[1:] in ([name], [key]):
                inside = {other: value for other, value in inside.items() if other not in (name, key)}
        for key, other in section.instead.items():
            if path[1:] == [key]:
                inside = {name: value for name, value in inside.items() if name != other}
    return {**values, path[0]: inside}


def _with(place: Place, path: Sequence[str], value: object, said: str) -> Place:
    """A copy of ``place`` with ``value`` at ``path``, whose parts are keys, and numbers from 0 in lists such as several methods."""
    part, *rest = path
    if isinstance(place, list) and (not part.isdecimal() or len(part) > 9 or int(part) >= len(place)):
        raise RecipeError(f"{said} names {shown(part)} in a list of {len(place)}; expected a number from 0.")
    if rest:
        inside = place[int(part)] if isinstance(place, list) else place.get(part)
        if inside is None and isinstance(place, dict):
            inside = {}  # a section without a key reads as null
        if not isinstance(inside, dict | list):
            raise RecipeError(f"{said} goes into {shown(part)}, which is a single value and not a section.")
        value = _with(inside, rest, value, said)
    if isinstance(place, list):
        return [*place[: int(part)], value, *place[int(part) + 1 :]]
    return {**place, part: value}


def _sentence(recipe: type[Section], item: ErrorDetails, lines: Mapping[tuple[str, ...], int | None]) -> str:
    """One pydantic error as a sentence: the key, its line, what was found, what was expected.

    ``lines`` has None for a key that was given as an override.
    """
    path, owner = _place(recipe, item["loc"])
    key = shown(".".join(path) or "the recipe")
    line = lines.get(tuple(path), 0)
    place = " (an override)" if line is None else f" (line {line})" if line else ""
    match item["type"]:
        case "extra_forbidden":
            keys = [field.alias or name for name, field in owner.model_fields.items()]
            hint = nearest(path[-1], keys) or f" The keys there are {', '.join(keys)}."
            if len(path) == 1 and (inside := _sections_with(recipe, path[0])):
                hint = f" Did you mean {' or '.join(inside)}?"
            elif ours := known_elsewhere(recipe, path):
                hint = f" Did you mean '{ours}'?"
            return f"{key}{place} is not a known key.{hint}"
        case "union_tag_invalid":
            known = [name for name in sections_of(owner.model_fields[path[0]].annotation) if name != "combined"]
            tag = str(item["ctx"]["tag"])
            return f"'{'.'.join(path)}.name' is {shown(tag)}; expected one of {', '.join(known)}.{nearest(tag, known)}"
        case "union_tag_not_found":
            several = ", or a list of such" if path[0] == "method" else ""
            return f"{key}{place} is {shown(item['input'])}; expected a section with a name{several}."
        case "missing" if path[-1].isdecimal() and len(path) > 1:
            return f"{shown('.'.join(path[:-1]))} has no value number {int(path[-1]) + 1}; expected one."
        case "too_long":
            return (
                f"{key}{place} has {item['ctx']['actual_length']} values; expected at most {item['ctx']['max_length']}."
            )
        case "too_short":
            return f"{key}{place} has {item['ctx']['actual_length']} values; expected at least {item['ctx']['min_length']}."
        case "missing":
            return f"{key} is missing; it has no default."
        case "string_pattern_mismatch":
            extra = owner.model_fields[path[-1]].json_schema_extra
            assert isinstance(extra, dict)
            return f"{key}{place} is {shown(item['input'])}; expected {extra['expected']}."
        case "value_error":
            return f"{key}{place} {item['ctx']['error']}."
        case kind if kind in EXPECTED:
            return f"{key}{place} is {shown(item['input'])}; expected {EXPECTED[kind]}."
        case _:
            expected = item["msg"].removeprefix("Input should be ")
            return f"{key}{place} is {shown(item['input'])}; expected {expected[0].lower()}{expected[1:]}."


def known_elsewhere(recipe: type[Section], path: Sequence[str]) -> str | None:
    """``['training', 'lr']`` → 'learning_rate', ``['lr']`` → 'training.learning_rate': the key that others call so."""
    called = path[-1].lower().replace("-", "_")
    key = next((key for key, names in ELSEWHERE.items() if called in names.split()), None)
    if key is None or key.partition(".")[0] not in recipe.model_fields:
        return None
    section, _, name = key.rpartition(".")
    return name if [section] == list(path[:-1]) else key


def _sections_with(recipe: type[Section], key: str) -> list[str]:
    """``steps`` → ['training.steps']: where a key that stands outside of all sections would be one."""
    return [
        f"{name}.{key}"
        for name, field in recipe.model_fields.items()
        if any(key in section.model_fields for section in sections_of(field.annotation).values())
    ]


def _place(recipe: type[Section], loc: tuple[str | int, ...]) -> tuple[list[str], type[Section]]:
    """pydantic's place of a mistake → (the key's path in the recipe, the section that it stands in).

    pydantic puts the tried branch of a union behind the key: ('data', 'train', 'str') is data.train, and ('method',
    'combined', 'parts', 0, 'lora', 'r') is method.0.r.
    """
    path: list[str] = []
    owner, inside = recipe, {"": recipe}
    for part in loc:
        if path == ["method"] and part == "one":
            continue
        if len(inside) > 1 and str(part) in inside:  # a union's tag
            inside = {"": inside[str(part)]}
            continue
        section = inside.get("")
        if isinstance(part, int):  # a place in a list, as of tasks
            path.append(str(part))
            continue
        if section is None:
            continue
        if path == ["method"] and part == "parts":
            inside = sections_of(section.model_fields["parts"].annotation)
            continue
        owner = section
        path.append(str(part))
        field = section.model_fields.get(str(part))
        inside = sections_of(field.annotation) if field else {}
    return path, owner
