"""An adapter on disk: PEFT's layout, ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT reads what is written here with every key consumed, and what PEFT saved is read here, unless it asks for something
that this package does not do: that is refused by name, because an adapter that is half understood loads without an error
and answers wrongly. Knows the two files; must not know formulas or training.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import regex
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora import recipe as config
from qlora.errors import MethodError, RunError, listed, redacted
from qlora.files.durable import file_written_aside, sync
from qlora.files.strangers import MAX_JSON, Fault, json_object, read_bytes, shown
from qlora.methods.base import METHODS, AdaptedModel, apply_method
from qlora.methods.layout import PREFIX, Fields, Layout, padded, same_weight
from qlora.methods.lora import any_transposed, plain_config
from qlora.methods.new_tokens import DELTA, NewTokensLayout
from qlora.methods.planted import unplanted
from qlora.methods.targets import linears_of, matches, pattern_value, peft_targets, target_names
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.names import OnLoad
from qlora.model.tensor_file import Header, read_header, read_tensors
from qlora.recipe.reading import MOST_MISTAKES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_LAYOUT = "0.18.0"  # the PEFT release whose layout is written; later ones read it too

METHOD_STATE = "method.safetensors"  # what a resumed run needs beside the adapter; most methods need nothing
MAX_CONFIG_VALUES = 200_000  # in adapter_config.json: AdaLoRA's has one for every rank of every target
OURS = "QLORA"  # the peft_type of what PEFT has no method for; PEFT refuses it by name
SECTION = "qlora_method"  # the key under which such a config holds the recipe's method section
FINGERPRINT = "base_fingerprint"  # in the metadata of the weights: which base the adapter was trained on

EXTRAS = ("modules", "new_tokens")
"""Methods that PEFT's config of a LoRA has fields for."""
WITH_EXTRAS = ("LORA", "ADALORA")

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

# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def save_adapter(model: AdaptedModel, folder: str | Path) -> None:
    """Write the adapter into ``folder``; an adapter that is there already is replaced, other files are left alone.

    Each file is written aside, flushed to the disk and renamed, the config last: a crash leaves no half-written file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for method in model.methods:
        method.layout.save_beside(Path(folder))
    _write(
        Path(folder),
        model.adapter_state(),
        adapter_config(model),
        known_base(model.base),
        model.method_state(),
        OnLoad(model.base.model),
    )


def why_not_portable(model: AdaptedModel) -> str | None:
    """Why the adapter is no plain LoRA that every server loads, and what to do; None where it is."""
    whys = [why for method in model.methods if (why := method.layout.why_not_portable()) is not None]
    if not whys and len(model.methods) > 1:
        return "Several methods together are no plain LoRA; export the run merged"
    names = OnLoad(model.base.model)
    if not whys and (lost := [path for path in model.planted if names.written(path) is None]):
        return f"PEFT takes {listed(lost, 2)} for other modules while it loads them, and leaves them out; export the run merged"
    return whys[0] if whys else None


def save_portable(
    model: AdaptedModel, folder: str | Path, renamed: Callable[[str], str] | None = None, onto: nn.Module | None = None
) -> str | None:
    """Write the adapter as what every server loads: plain LoRA of one rank, alpha = r, the scaling inside B, no extras.

    Smaller ranks are filled up with zeros. Returns None, or, where the method is no LoRA, why it is not and what to do;
    the adapter is written as ``save_adapter`` does then. For ``onto``, a model of another class than the base's, ``renamed`` gives
    a module's path there; MethodError where that is no LoRA.
    """
    if (why := why_not_portable(model)) is not None:
        if renamed is not None:
            raise MethodError(f"{why}; keys=text is for plain LoRA alone.")
        save_adapter(model, folder)
        return why
    method = model.methods[0]
    pairs = method.layout.pairs()
    if renamed is not None:
        pairs = {renamed(path): pair for path, pair in pairs.items()}
    paths = model.paths if onto is None else [path for path, _ in onto.named_modules()]
    save_pairs(
        folder,
        pairs,
        peft_targets(pairs, paths, mixture=anatomy.is_mixture(model.base.model)),
        about_base(model),
        known_base(model.base),
        method.section.dropout,
        any_transposed(method.planted),
        OnLoad(model.base.model if onto is None else onto),
    )
    return None


def portable_bytes(model: AdaptedModel) -> int:
    """What ``save_portable`` writes in tensors: fp32 and of one rank for plain LoRA, else the adapter with its state."""
    if why_not_portable(model) is not None:
        written = [*model.adapter_state().values(), *model.method_state().values()]
        return sum(values.numel() * values.dtype.itemsize for values in written)
    pairs = model.methods[0].layout.pairs().values()
    r = max((len(lora_A) for lora_A, _ in pairs), default=0)
    return sum(4 * r * (lora_A.shape[1] + lora_B.shape[0]) for lora_A, lora_B in pairs)


def save_pairs(
    folder: str | Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    targets: Fields,
    about: Fields,
    base_fingerprint: str | None,
    dropout: float = 0.0,
    transposed: bool = False,
    names: OnLoad | None = None,
) -> None:
    """Write ``pairs`` (A [r, in], B [out, r] by module path; ΔW = B A) as one plain LoRA of their largest rank.

    ``targets`` are PEFT's fields whose names reach exactly these paths; ``about`` are the config's fields that name the base,
    ``base_fingerprint`` is what ``known_base`` or ``recorded_base`` gave, ``transposed`` says that some of the base's
    weights are stored as [in, out] (GPT-2), and by ``names`` tensors are called what PEFT finds their place by.
    """
    r = max(len(lora_A) for lora_A, _ in pairs.values())
    tensors = {}
    for path, (lora_A, lora_B) in pairs.items():
        tensors[f"{PREFIX}{path}.lora_A.weight"] = padded(lora_A, r, lora_A.shape[1])
        tensors[f"{PREFIX}{path}.lora_B.weight"] = padded(lora_B, lora_B.shape[0], r)
    values = {**about, "peft_type": "LORA", **plain_config(r, targets, dropout, transposed)}
    _write(Path(folder), tensors, values, base_fingerprint, {}, names)


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    values: Fields,
    base_fingerprint: str | None,
    state: Mapping[str, Tensor],
    names: OnLoad | None,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if names is not None and values["peft_type"] == "LORA":
        tensors = {_renamed(key, lambda path: names.written(path) or path): held for key, held in tensors.items()}
    known = {FINGERPRINT: base_fingerprint} if base_fingerprint is not None else {}
    with file_written_aside(folder / WEIGHTS) as aside:
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, aside, metadata={"format": "pt", **known})
        _sort_metadata(aside)
    if state:
        with file_written_aside(folder / METHOD_STATE) as aside:
            save_file({k: v.cpu().contiguous() for k, v in state.items()}, aside)
    else:
        (folder / METHOD_STATE).unlink(missing_ok=True)
    with file_written_aside(folder / CONFIG) as aside:
        # PEFT sorts its keys; in a section of ours the order of a pattern's names counts
        text = json.dumps(values, indent=2, sort_keys=SECTION not in values)
        aside.write_text(text + "\n", encoding="utf-8")
    sync(folder)


def _renamed(key: str, name: Callable[[str], str]) -> str:
    """A tensor's ``key`` with the path that ``name`` gives for its module's; only what belongs to LoRA is renamed by PEFT."""
    path, mark, rest = key.removeprefix(PREFIX).partition(".lora_")
    return f"{PREFIX}{name(path)}{mark}{rest}" if mark else key


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it as it comes, and equal runs give equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def adapter_config(model: AdaptedModel) -> Fields:
    """What ``adapter_config.json`` says: PEFT's own fields where PEFT has the method, else ours."""
    extras = [method for method in model.methods if method.section.name in EXTRAS]
    mains = [method for method in model.methods if method not in extras]
    if len(mains) == 1 and mains[0].layout.peft_type in WITH_EXTRAS:
        together = [*mains, *sorted(extras, key=lambda method: EXTRAS.index(method.section.name))]
    elif len(model.methods) == 1 and model.methods[0].layout.peft_type is not None:
        together = model.methods
    else:
        return {
            **about_base(model),
            "peft_type": OURS,
            SECTION: model.section.model_dump(mode="json", exclude={"from_"}),
        }
    values = {**about_base(model), "peft_type": together[0].layout.peft_type}
    for method in together:
        values |= method.layout.peft_config(model.paths)
    return values


def about_base(model: AdaptedModel) -> Fields:
    """The fields of PEFT's config that name the base and the task."""
    return {
        "peft_version": PEFT_LAYOUT,
        "task_type": "CAUSAL_LM" if model.base.tokenizer is not None else None,
        "base_model_name_or_path": redacted(model.base.name),
        "revision": model.base.revision,
        "inference_mode": True,
    }


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_adapter(model: AdaptedModel | Base, folder: str | Path) -> AdaptedModel:
    """Read the adapter in ``folder`` into an adapted model, or plant it in a bare base first.

    Raises MethodError when the files are missing, damaged, ask for what is not supported, or do not fit this model; a bare
    base is left bare then.
    """
    folder = Path(folder)
    base, paths = (model, model.paths) if isinstance(model, Base) else (model.base, model.paths)
    section, state = read_adapter_config(folder), read_method_state(folder)
    found = at_home(read_adapter_tensors(folder), base.model, paths)
    _check_base(base, folder)
    recorded = section
    section, tensors = _with_embeddings(base, section, found, folder)
    what = f"The adapter in '{folder}'"
    if isinstance(model, AdaptedModel):
        if section != recorded and len(config.parts_of(section)) > len(config.parts_of(model.section)):
            raise MethodError(
                f"{what} brings along a changed embedding or head, or new rows of one, of which its {CONFIG} says nothing, so that "
                "no run can be planned that goes on from it. Merge it into its base (PEFT: merge_and_unload, then "
                "save_pretrained), and begin from that model without method.from."
            )
        _check_same(model.section, section, model.planted, folder)
        _load(model, tensors, state, what)
        return model
    adapted = apply_method(model, _present(model, section, tensors, folder), values_follow=True)
    try:
        _load(adapted, tensors, state, what)
    except BaseException:  # memory that does not suffice, or Ctrl-C
        adapted.remove()
        raise
    return adapted


def _load(model: AdaptedModel, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    if state or any(method.layout.needs_state for method in model.methods):
        model.load_state(tensors, state, what)
    else:
        model.load_adapter_state(tensors, what)


def read_about_base(folder: str | Path) -> Fields:
    """The fields of the adapter's ``adapter_config.json`` that name the base and the task, as ``about_base`` gives them."""
    values = _read_config(Path(folder))
    named = {key: values.get(key) for key in ("base_model_name_or_path", "revision", "task_type")}
    return {**named, "peft_version": PEFT_LAYOUT, "inference_mode": True}


def read_linears(folder: str | Path) -> tuple[str, ...]:
    """The linears that the adapter's ``adapter_config.json`` names by their weights: see ``peft_targets``."""
    return linears_of(_read_config(Path(folder)).get("target_parameters") or ())


def read_adapter_config(folder: str | Path) -> Any:
    """The method section that an adapter was made with.

    Raises MethodError naming every field that is set to something that is not supported.
    """
    folder = Path(folder)
    path, values = folder / CONFIG, _read_config(folder)
    kind = values.get("peft_type")
    if kind == OURS:
        return _section(values.get(SECTION), path, {})
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
    return _section(parts if len(parts) > 1 else parts[0], path, values)


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
        found = {CHOSEN.fullmatch(key): entry.shape for key, entry in _header(folder).entries.items()}
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


def _section(found: Any, path: Path, values: Mapping[str, Any]) -> Any:
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


def _check_base(base: Base, folder: Path) -> None:
    """Raise MethodError when the adapter in ``folder`` says that it was trained on another base."""
    here, recorded = known_base(base), recorded_base(folder)
    if None not in (here, recorded) and here != recorded:
        raise MethodError(
            f"The adapter in '{folder}' was trained on another base than '{base.name}' (other configuration, tokenizer or "
            "tensors); load the base that it was trained on."
        )


def known_base(base: Base) -> str | None:
    """The base's fingerprint; None for a model that came from no folder."""
    return base.checkpoint.fingerprint if base.checkpoint is not None and base.names is not None else None


def recorded_base(folder: str | Path) -> str | None:
    """The fingerprint of the base that the adapter in ``folder`` was trained on; None where other software wrote it."""
    return _header(Path(folder)).metadata.get(FINGERPRINT)


def _header(folder: Path) -> Header:
    """What the tensors' file says of itself. Raises MethodError when it is damaged."""
    path = folder / WEIGHTS
    try:
        return read_header(path)
    except (OSError, Fault) as error:
        raise MethodError(
            f"'{path}' is damaged ({error}); save the adapter again or use an earlier checkpoint."
        ) from None


def _present(base: Base, section: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """``section`` without the target names that nothing in ``base`` is called: PEFT's lists often serve many families.

    Raises MethodError when the adapter has tensors for one of these names.
    """
    paths = [path for path, _ in base.model.named_modules()]
    every = set(paths)
    names = {name for part in config.parts_of(section) for name in _named_modules(part)}
    absent = {name for name in names if not any(matches(name, path) for path in paths)}
    if strange := sorted(name for name in absent if any(f".{name}." in key for key in tensors)):
        raise MethodError(
            f"The adapter in '{folder}' was trained on another base than '{base.name}': it adapts {listed(strange)}, which "
            "nothing there is called; load the base that it was trained on."
        )
    parts = []
    for part in config.parts_of(section):
        wanted = getattr(part, "target_modules", None)
        kept = tuple(name for name in wanted if name not in absent) if isinstance(wanted, tuple) else ()
        if set(kept) <= every:  # as the tensors' names give them
            kept = tuple(target_names(kept, paths))
        parts.append(part.model_copy(update={"target_modules": kept}) if kept and kept != wanted else part)
    return section.model_copy(update={"parts": tuple(parts)}) if section.name == "combined" else parts[0]


def _with_embeddings(
    base: Base, section: Any, tensors: Mapping[str, Tensor], folder: Path
) -> tuple[Any, Mapping[str, Tensor]]:
    """``section`` and ``tensors`` where the embedding and the head stand in the file as well, as PEFT saves them resized.

    A weight that is the base's own is left out, with rows that were cut off; one that changed is a module that was trained
    whole, and rows behind the base's are new tokens. Raises MethodError for a changed weight of another size.
    """
    parts, model = list(config.parts_of(section)), base.model
    named = [name for part in parts if part.name == "modules" for name in part.modules]
    ends = [unplanted(module) for module in (anatomy.embedding(model), anatomy.head(model)) if module is not None]
    paths = [path for path, module in model.named_modules() if any(unplanted(module) is end for end in ends)]
    whole = {path: f"{PREFIX}{path}.weight" for path in paths if f"{PREFIX}{path}.weight" in tensors}
    whole = {path: key for path, key in whole.items() if not any(matches(name, path) for name in named)}
    if not whole or any(part.name in ("full", "new_tokens") for part in parts):
        return section, tensors
    kept, changed, rows = dict(tensors), {}, set()
    for path, key in whole.items():
        theirs, ours = kept.pop(key), _weight_of(base, path, paths)
        common = min(len(theirs), len(ours))
        same = same_weight(theirs[:common], ours[:common]) and not ours.is_meta
        if theirs.shape == ours.shape and not same:
            changed[path] = tensors[key]
        elif theirs.shape[1:] != ours.shape[1:] or not same:
            raise MethodError(
                f"The adapter in '{folder}' brings along a trained {path} of {len(theirs):,} rows, and that of '{base.name}' "
                f"has {len(ours):,}; resize the vocabulary of that base and save it, then use the adapter on that."
            )
        elif len(theirs) > len(ours):
            rows.add((len(ours), len(theirs)))
            kept[f"{PREFIX}{path}.token_adapter.{DELTA}"] = theirs[len(ours) :]
    found: list[Any] = []
    if changed:
        tied = tuple(paths) if len({id(unplanted(model.get_submodule(path)).weight) for path in paths}) == 1 else ()
        for path in {*changed, *tied}:  # what is tied changed with the other
            kept[f"{PREFIX}{path}.weight"] = changed.get(path, next(iter(changed.values())))
        found.append({"name": "modules", "modules": [*named, *sorted({*changed, *tied})]})
    if rows:
        ids = sorted({number for first, end in rows for number in range(first, end)})
        found.append(NewTokensLayout.section_of({"trainable_token_indices": ids}, folder))
    if not found:
        return section, kept
    return _section(
        [*(part for part in parts if part.name != "modules" or not changed), *found], folder / CONFIG, {}
    ), kept


def _weight_of(base: Base, path: str, paths: list[str]) -> Tensor:
    """The weight of the embedding or head at ``path``; where only shapes were loaded, from the checkpoint if it has it."""
    weight = unplanted(base.model.get_submodule(path)).weight
    assert isinstance(weight, Tensor)
    if not weight.is_meta or base.checkpoint is None:
        return weight
    names = [(base.names or {}).get(f"{other}.weight") for other in (path, *paths)]  # a tied one is there once
    name = next((name for name in names if name is not None), None)
    return weight if name is None else base.checkpoint.read(name)


def _named_modules(part: Any) -> tuple[str, ...]:
    """The module names that a single method's section lists."""
    fields = [getattr(part, field, ()) for field in ("target_modules", "feedforward_modules", "modules")]
    return tuple(name for field in fields if isinstance(field, tuple) for name in field)


def _check_same(here: Any, there: Any, paths: Iterable[str], folder: Path) -> None:
    """Raise MethodError when an adapter's section would compute something else than the model's, planted at ``paths``."""
    ours, theirs = config.parts_of(here), config.parts_of(there)
    same_names = sorted(part.name for part in ours) == sorted(part.name for part in theirs)
    if not same_names:
        raise MethodError(
            f"The adapter in '{folder}' is {' and '.join(p.name for p in theirs)}, this model has "
            f"{' and '.join(p.name for p in ours)}; use the method section that it was trained with."
        )
    for part, other in zip(sorted(ours, key=kind_of), sorted(theirs, key=kind_of), strict=True):
        keys: tuple[str, ...] = ("alpha", "initial_r", "rslora", "scale", "form", "activation")
        if {"pissa", "loftq"} & {getattr(part, "init", None), getattr(other, "init", None)}:
            keys += ("init", "loftq_iterations")  # the frozen weights depend on them; elsewhere only A's first values
        for key in keys:
            if getattr(part, key, None) != getattr(other, key, None):
                raise MethodError(
                    f"The adapter in '{folder}' has {key}={getattr(other, key)}, this model {key}={getattr(part, key)}; "
                    "use the method section that it was trained with."
                )
        patterns = [getattr(section, "alpha_pattern", {}) for section in (part, other)]
        if apart := [p for p in paths if len({pattern_value(pattern, p, 0) for pattern in patterns}) > 1]:
            raise MethodError(
                f"The adapter in '{folder}' has another alpha_pattern than this model, for {listed(apart, 3)}; use the "
                "method section that it was trained with."
            )
        if part.name == "new_tokens" and [token for token in other.tokens if token in part.tokens] != [*part.tokens]:
            raise MethodError(
                f"The adapter in '{folder}' has the new tokens {listed(other.tokens)}, this model {listed(part.tokens)}; use "
                "the method section that it was trained with."
            )


def kind_of(part: Any) -> tuple[str, str]:
    """What distinguishes the parts of a section: only bottlenecks may be there several times, in different forms."""
    return part.name, getattr(part, "form", "")


def read_method_state(folder: str | Path) -> dict[str, Tensor]:
    """What a checkpoint holds beside the adapter; empty for most methods. Raises MethodError when it is damaged."""
    path = Path(folder) / METHOD_STATE
    if not path.is_file():
        return {}
    try:
        return read_tensors(path)
    except (Fault, OSError) as error:
        raise MethodError(f"'{path}' is damaged ({error}); use an earlier checkpoint.") from None


def read_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, by PEFT's keys. Raises MethodError when they are missing or damaged."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickle = " (adapter_model.bin is a pickle, which is never read)" if path.with_suffix(".bin").is_file() else ""
        raise MethodError(f"There is no {WEIGHTS} in '{folder}'{pickle}; expected an adapter folder in PEFT's layout.")
    try:
        return read_tensors(path)
    except (Fault, OSError) as error:
        raise MethodError(
            f"'{path}' is damaged ({error}); save the adapter again or use an earlier checkpoint."
        ) from None


def at_home(
    tensors: Mapping[str, Tensor], model: nn.Module, paths: Iterable[str] | None = None
) -> Mapping[str, Tensor]:
    """``tensors`` by the names that ``model`` has for its modules, where a file has those of old checkpoints: PEFT finds their place
    by them. ``paths`` are all of the model's, where something is planted in it."""
    known = {path for path, _ in model.named_modules()} if paths is None else {*paths}
    names: list[OnLoad] = []  # made where it is needed

    def home(path: str) -> str:
        if path.replace(".base_layer", "") in known:
            return path
        names.extend([] if names else [OnLoad(model)])
        return found if (found := names[0].arrives(path)) in known else path

    return {_renamed(key, home): values for key, values in tensors.items()}


def keep_apart(out: Path, *sources: Path) -> None:
    """Raise RunError when ``out`` is, or holds, a folder that is being read: overwriting must never delete that."""
    for source in sources:
        if source.resolve() == out.resolve() or out.resolve() in source.resolve().parents:
            raise RunError(f"'{out}' holds '{source}', which is being read; choose another folder for the result.")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        return json_object(read_bytes(path, MAX_JSON), most=MAX_CONFIG_VALUES)
    except FileNotFoundError:
        raise MethodError(f"There is no {CONFIG} in '{folder}'; expected an adapter folder in PEFT's layout.") from None
    except (OSError, Fault) as error:
        raise MethodError(f"'{path}' cannot be read ({error}); expected an adapter folder in PEFT's layout.") from None


def _tuples(value: Any, field: str = "") -> Any:
    """Lists of names as tuples, sorted because PEFT writes sets; anything else as it is, for the schema to refuse.

    The order of new ``tokens`` is that of their ids, and is kept.
    """
    if isinstance(value, dict):
        return {key: _tuples(item, key) if isinstance(item, list) else item for key, item in value.items()}
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value if field == "tokens" else sorted(value))
    return [_tuples(item) for item in value] if isinstance(value, list) else value
