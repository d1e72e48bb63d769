"""What a PEFT adapter's config asks for, as a method section of a recipe.

A field that asks for something that this package does not do is refused by name, because an adapter that is half understood
loads without an error and answers wrongly. Knows PEFT's fields; must not know a model or any formula.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import regex

from qlora import recipe as config
from qlora.errors import MethodError, listed
from qlora.files.strangers import shown
from qlora.methods.base import METHODS
from qlora.methods.files import CONFIG, EXTRAS, OURS, SECTION, WEIGHTS, WITH_EXTRAS, header_of, read_config
from qlora.methods.layout import PREFIX, Fields, Layout
from qlora.methods.targets import matches
from qlora.recipe.reading import MOST_MISTAKES

# Fields by which PEFT chooses among what target_modules reach. What came of it, the names of the tensors say.
CHOOSING = ("exclude_modules", "layers_to_transform", "ensure_weight_tying")
CHOSEN = re.compile(rf"{re.escape(PREFIX)}(.+)\.(?:lora_A|lora_A\.weight|lora_embedding_A|ia3_l)")
MOST_SECONDS = 5.0  # for a stranger's regular expressions, which may be made to take for ever
MOST_SIGNS = 1_000  # of one of them

# What may stand in a config without changing the result once the weights are loaded. Those of a beginning or of memory in
# training count only beside other fields, which are looked at.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "inference_mode", "layers_pattern",
    "loftq_config", "lora_ga_config", "megatron_config", "megatron_core", "merge_weights", "peft_type", "peft_version",
    "qalora_group_size", "revision", "task_type", "velora_config", *CHOOSING,
}  # fmt: skip
TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None)


def read_adapter_config(folder: str | Path) -> Any:
    """The method section that an adapter was made with.

    Raises MethodError naming every field that is set to something that is not supported.
    """
    folder = Path(folder)
    path, values = folder / CONFIG, read_config(folder)
    kind = values.get("peft_type")
    if kind == OURS:
        return section_from(values.get(SECTION), path, {})
    layouts = _layouts(values)
    if not layouts:
        kinds = {method.layout_class.peft_type for method in METHODS.values()} - {None}
        raise MethodError(
            f"'{path}' sets peft_type={shown(kind)}, which is not supported; expected {listed(sorted(map(str, kinds)), 12)}."
        )
    if wrong := [said for key, value in values.items() if (said := refused(key, value, layouts)) is not None]:
        raise MethodError(f"'{path}' sets {listed(wrong, 8)}, which is not supported; expected a plain {kind} adapter.")
    values = _by_tensors(values, folder)
    main, *others = layouts
    parts = [main.section_of(values, folder)]
    parts += [part for other in others if (part := other.section_of(values, folder)) is not None]
    return section_from(parts if len(parts) > 1 else parts[0], path, values)


def _by_tensors(values: Fields, folder: Path) -> Fields:
    """``values`` with plain names for what PEFT chooses by patterns, numbers of layers or ties.

    The names of the file's tensors say what was chosen. Raises MethodError where there is no such file, or none of these.
    """
    kind, targets = values.get("peft_type"), values.get("target_modules")
    if kind not in (*WITH_EXTRAS, "IA3"):
        return values
    asking = [key for key in CHOOSING if type(values.get(key)) is int or values.get(key)]  # layer 0 is one too
    asking += [key for key in ("target_modules", "feedforward_modules") if isinstance(values.get(key), str)]
    saved = values.get("modules_to_save")
    if targets is None or (isinstance(targets, list) and isinstance(saved, list) and any(t in saved for t in targets)):
        asking.append("target_modules")  # PEFT adapts nothing that it trains whole
    shapes = {}
    if (folder / WEIGHTS).is_file():
        found = {CHOSEN.fullmatch(key): entry.shape for key, entry in header_of(folder).entries.items()}
        shapes = {match[1]: shape for match, shape in found.items() if match is not None}
    if asking and not shapes:
        said = listed([f"{key}={shown(values.get(key))}" for key in asking])
        raise MethodError(
            f"'{folder / CONFIG}' sets {said}, and there is no {WEIGHTS} beside it with tensors of an adapter, whose names "
            "would say what that is; expected an adapter folder in PEFT's layout."
        )
    if asking:
        values = {**values, "target_modules": sorted(shapes)}
        if kind == "IA3":  # what rescales the input is a row
            values["feedforward_modules"] = sorted(path for path, shape in shapes.items() if shape[0] == 1)
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if kind == "LORA" and values.get(key) and shapes]
    return {**values, **{key: _resolved(values[key], shapes, folder / CONFIG) for key in patterns}}


def _resolved(pattern: Any, paths: Iterable[str], config_path: Path) -> Any:
    """PEFT's rank or alpha pattern, whose keys are regular expressions, as names; without those that no target needs.

    Example: ``{"layers\\.[01]\\..*q_proj": 8}`` → ``{"model.layers.0.self_attn.q_proj": 8, …}``
    """
    if not isinstance(pattern, dict):
        return pattern  # for the schema to refuse
    end, first, rules = time.monotonic() + MOST_SECONDS, {}, {}
    try:
        for key in pattern:
            # a count is compiled to as many copies, in memory
            copies = math.prod(max(int(number), 1) for number in re.findall(r"[{,]\s*(\d+)", key[:MOST_SIGNS]))
            if len(key) > MOST_SIGNS or copies > MOST_SIGNS or time.monotonic() > end:
                raise TimeoutError
            rules[key] = regex.compile(rf"(.*\.)?({key})$")
        for path in paths:
            found = (key for key, rule in rules.items() if rule.match(path, timeout=max(end - time.monotonic(), 0)))
            first[path] = next(found, None)
    except (regex.error, RecursionError, OverflowError) as error:
        raise MethodError(
            f"'{config_path}' has a pattern that is no regular expression ({shown(str(error))}); correct it, or save the "
            "adapter again."
        ) from None
    except TimeoutError:
        raise MethodError(
            f"'{config_path}' has patterns that are too long, or take more than {MOST_SECONDS:g} s to match; write plain module "
            "names there."
        ) from None
    used = {key: value for key, value in pattern.items() if key in first.values()}
    if all(next((key for key in used if matches(key, path)), None) == key for path, key in first.items()):
        return used
    return {path: pattern[key] for path, key in first.items() if key is not None}


def _layouts(values: Fields) -> list[type[Layout]]:
    """Whose fields a config has: its method's first, then those of the methods that may stand beside it."""
    kind = values.get("peft_type")
    known = [method.layout_class for method in METHODS.values() if kind and method.layout_class.peft_type == kind]
    mains = [layout for layout in known if layout.is_of(values)][:1]
    return [*mains, *(METHODS[name].layout_class for name in EXTRAS if mains and kind in WITH_EXTRAS)]


def refused(key: str, value: object, layouts: list[type[Layout]]) -> str | None:
    """What a message says of a field that asks for what is not done here, as ``use_dora=True``; None for all others."""
    only = {"task_type": TASKS, **layouts[0].only}
    if key in only and value in only[key]:
        return None
    if key not in only and (not value or key in HARMLESS or any(key in layout.read for layout in layouts)):
        return None
    return f"{_key(key)}={shown(value)}"


_SECTION: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(config.AnyMethod)


def section_from(found: Any, path: Path, values: Mapping[str, Any]) -> Any:
    """``found`` as a validated method section."""
    try:
        return _SECTION.validate_python(config.named(_tuples(found)))
    except (pydantic.ValidationError, TypeError) as error:
        if not isinstance(error, pydantic.ValidationError):
            raise MethodError(f"'{path}' holds no method section ({error}); save the adapter again.") from None
        names = {"alpha": "lora_alpha", "dropout": "lora_dropout"} if values else {}
        wrong = {_field(item["loc"]): item for item in error.errors(include_url=False)}
        mistakes = [
            f"{_key(names.get(key, key))} is {shown(item['input'])} ({item['msg']})" for key, item in wrong.items()
        ]
        several = f"; and {len(mistakes) - MOST_MISTAKES:,} more" if len(mistakes) > MOST_MISTAKES else ""
        raise MethodError(f"'{path}' cannot be used: {'; '.join(mistakes[:MOST_MISTAKES])}{several}.") from None


def _key(key: str) -> str:
    """A field's name for a message: a stranger's may be of any length, and hold what a terminal acts on."""
    return shown(key).strip("'\"")


def _field(place: tuple[int | str, ...]) -> str:
    """The field that pydantic complains of: ``("one", "lora", "rank_pattern", "q_proj")`` → ``rank_pattern.q_proj``."""
    inside = place[4:] if place[:1] == ("combined",) else place[2:]  # in a list: combined, parts, number, name, field
    return ".".join(str(part) for part in inside if "[" not in str(part)) or "the method"  # brackets: a union's branch


def _tuples(value: Any, field: str = "") -> Any:
    """Lists of names as tuples, sorted because PEFT writes sets; anything else as it is, for the schema to refuse.

    The order of new ``tokens`` is that of their ids, and is kept.
    """
    if isinstance(value, dict):
        return {key: _tuples(item, key) if isinstance(item, list) else item for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value if field == "tokens" else sorted(value))
    return [_tuples(item) for item in value] if isinstance(value, list) else value
