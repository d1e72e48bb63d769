"""An adapter on disk: PEFT's layout, ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT reads what is written here with every key consumed, and what PEFT saved is read here, unless it asks for something
that this package does not do: that is refused by name, because an adapter that is half understood loads without an error
and answers wrongly. Knows the two files; must not know formulas or training.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora import recipe as config
from qlora.errors import MethodError, RunError, listed, redacted
from qlora.files.durable import file_written_aside, sync
from qlora.files.strangers import MAX_JSON, Fault, json_object, read_bytes, shown
from qlora.methods.base import METHODS, AdaptedModel, apply_method
from qlora.methods.lora import LoraMethod, any_transposed
from qlora.methods.method import PREFIX
from qlora.methods.targets import matches, pattern_value, target_names
from qlora.model.checkpoint import fingerprint
from qlora.model.load import Base
from qlora.model.tensor_file import read_header, read_tensors
from qlora.recipe.reading import MOST_MISTAKES

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_LAYOUT = "0.18.0"  # the PEFT release whose layout is written; later ones read it too

METHOD_STATE = "method.safetensors"  # what a resumed run needs beside the adapter; most methods need nothing
MAX_CONFIG_VALUES = 200_000  # in adapter_config.json: AdaLoRA's has one for every rank of every target
OURS = "QLORA"  # the peft_type of what PEFT has no method for; PEFT refuses it by name
SECTION = "qlora_method"  # the key under which such a config holds the recipe's method section
FINGERPRINT = "base_fingerprint"  # in the metadata of the weights: which base the adapter was trained on

# What may stand in a config without changing the result once the weights are loaded.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "revision", "task_type",
}  # fmt: skip
TASKS = ("CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION", None)


def save_adapter(model: AdaptedModel, folder: str | Path) -> None:
    """Write the adapter into ``folder``; an adapter that is there already is replaced, other files are left alone.

    Each file is written aside, flushed to the disk and renamed, the config last: a crash leaves no half-written file.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for method in model.methods:
        method.save_beside(Path(folder))
    _write(Path(folder), model.adapter_state(), adapter_config(model), known_base(model.base), model.method_state())


def save_portable(model: AdaptedModel, folder: str | Path) -> str | None:
    """Write the adapter as what every server loads: plain LoRA of one rank, alpha = r, the scaling inside B, no extras.

    Smaller ranks are filled up with zeros. Returns None, or, where the method is no LoRA, why it is not and what to do;
    the adapter is written as ``save_adapter`` does then.
    """
    why = next((why for method in model.methods if (why := method.why_not_portable()) is not None), None)
    if why is None and len(model.methods) > 1:
        why = "Several methods together are no plain LoRA; export the run merged"
    if why is not None:
        save_adapter(model, folder)
        return why
    method = model.methods[0]
    pairs = method.pairs()
    save_pairs(
        folder,
        pairs,
        target_names(pairs, model.paths),
        about_base(model),
        known_base(model.base),
        method.section.dropout,
        any_transposed(method.planted),
    )
    return None


def portable_bytes(model: AdaptedModel) -> int:
    """What ``save_portable`` writes in tensors: fp32 and of one rank for plain LoRA, else the adapter with its state."""
    if len(model.methods) > 1 or model.methods[0].why_not_portable() is not None:
        written = [*model.adapter_state().values(), *model.method_state().values()]
        return sum(values.numel() * values.dtype.itemsize for values in written)
    pairs = model.methods[0].pairs().values()
    r = max((len(lora_A) for lora_A, _ in pairs), default=0)
    return sum(4 * r * (lora_A.shape[1] + lora_B.shape[0]) for lora_A, lora_B in pairs)


def save_pairs(
    folder: str | Path,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    targets: list[str],
    about: Mapping[str, Any],
    base_fingerprint: str | None,
    dropout: float = 0.0,
    transposed: bool = False,
) -> None:
    """Write ``pairs`` (A [r, in], B [out, r] by module path; ΔW = B A) as one plain LoRA of their largest rank.

    ``targets`` are the names that reach exactly these paths; ``about`` are the config's fields that name the base,
    ``base_fingerprint`` is what ``known_base`` or ``recorded_base`` gave, and ``transposed`` says that some of the base's
    weights lie as [in, out] (GPT-2).
    """
    r = max(len(lora_A) for lora_A, _ in pairs.values())
    tensors = {}
    for path, (lora_A, lora_B) in pairs.items():
        room = r - len(lora_A)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = nn.functional.pad(lora_A, (0, 0, 0, room))
        tensors[f"{PREFIX}{path}.lora_B.weight"] = nn.functional.pad(lora_B, (0, room))
    values = {**about, "peft_type": "LORA", **LoraMethod.plain_config(r, targets, dropout, transposed)}
    _write(Path(folder), tensors, values, base_fingerprint, {})


def _write(
    folder: Path,
    tensors: Mapping[str, Tensor],
    values: dict[str, Any],
    base_fingerprint: str | None,
    state: Mapping[str, Tensor],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
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


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it as it comes, and equal runs give equal bytes."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def load_adapter(model: AdaptedModel | Base, folder: str | Path) -> AdaptedModel:
    """Read the adapter in ``folder`` into an adapted model, or plant it in a bare base first.

    Raises MethodError when the files are missing, damaged, ask for what is not supported, or do not fit this model; a bare
    base is left bare then.
    """
    folder = Path(folder)
    section, tensors, state = read_adapter_config(folder), read_adapter_tensors(folder), read_method_state(folder)
    _check_base(model if isinstance(model, Base) else model.base, folder)
    what = f"The adapter in '{folder}'"
    if isinstance(model, AdaptedModel):
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
    if state or _needs_state(model):
        model.load_state(tensors, state, what)
    else:
        model.load_adapter_state(tensors, what)


def _needs_state(model: AdaptedModel) -> bool:
    return any(method.needs_state for method in model.methods)


def adapter_config(model: AdaptedModel) -> dict[str, Any]:
    """What ``adapter_config.json`` says: PEFT's own fields where PEFT has the method, else ours."""
    methods = {method.section.name: method for method in model.methods}
    extras = {name: methods[name] for name in ("modules", "new_tokens") if name in methods}
    mains = [method for name, method in methods.items() if name not in extras]
    if len(mains) == 1 and mains[0].peft_type in ("LORA", "ADALORA") and len(methods) == len(model.methods):
        values = mains[0].peft_config(model.paths)
        for method in extras.values():
            values |= method.peft_config(model.paths)
        return {**about_base(model), "peft_type": mains[0].peft_type, **values}
    if len(model.methods) == 1 and model.methods[0].peft_type is not None:
        only = model.methods[0]
        return {**about_base(model), "peft_type": only.peft_type, **only.peft_config(model.paths)}
    return {**about_base(model), "peft_type": OURS, SECTION: model.section.model_dump(mode="json")}


def about_base(model: AdaptedModel) -> dict[str, Any]:
    """The fields of PEFT's config that name the base and the task."""
    return {
        "peft_version": PEFT_LAYOUT,
        "task_type": "CAUSAL_LM" if model.base.tokenizer is not None else None,
        "base_model_name_or_path": redacted(model.base.name),
        "revision": model.base.revision,
        "inference_mode": True,
    }


def read_about_base(folder: str | Path) -> dict[str, Any]:
    """The fields of the adapter's ``adapter_config.json`` that name the base and the task, as ``about_base`` gives them."""
    values = _read_config(Path(folder))
    named = {key: values.get(key) for key in ("base_model_name_or_path", "revision", "task_type")}
    return {**named, "peft_version": PEFT_LAYOUT, "inference_mode": True}


def read_adapter_config(folder: str | Path) -> Any:
    """The method section that an adapter was made with.

    Raises MethodError naming every field that is set to something that is not supported.
    """
    path = Path(folder) / CONFIG
    values = _read_config(Path(folder))
    kind = values.get("peft_type")
    if kind == OURS:
        return _section(values.get(SECTION), path, {})
    kinds = [method for method in METHODS.values() if method.peft_type == kind and kind is not None]
    chosen = next((method for method in kinds if method.is_of(values)), None)
    if chosen is None:
        known = sorted({method.peft_type for method in METHODS.values() if method.peft_type})
        raise MethodError(
            f"'{path}' sets peft_type={shown(kind)}, which is not supported; expected {listed(known, 12)}."
        )
    extras = [METHODS[name] for name in ("modules", "new_tokens") if kind in ("LORA", "ADALORA")]
    only = {**chosen.only, "task_type": TASKS}
    read = set(chosen.read).union(*(extra.read for extra in extras))
    refused = {
        key: value
        for key, value in values.items()
        if (value not in only[key] if key in only else key not in HARMLESS | read and value)
    }
    if refused:
        raise MethodError(
            f"'{path}' sets {listed([f'{_key(key)}={shown(value)}' for key, value in refused.items()], 8)}, "
            f"which is not supported; expected a plain {kind} adapter."
        )
    targets = values.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear" and kind != "TRAINABLE_TOKENS":
        raise MethodError(f"'{path}' has target_modules={shown(targets)}, a pattern; expected a list of module names.")
    parts = [chosen.section_of(values, Path(folder))]
    parts += [section for extra in extras if (section := extra.section_of(values, Path(folder))) is not None]
    return _section(parts if len(parts) > 1 else parts[0], path, values)


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
    return fingerprint(base.folder) if base.names is not None else None


def recorded_base(folder: str | Path) -> str | None:
    """The fingerprint of the base that the adapter in ``folder`` was trained on; None where other software wrote it."""
    path = Path(folder) / WEIGHTS
    try:
        return read_header(path).metadata.get(FINGERPRINT)
    except (OSError, Fault) as error:
        raise MethodError(
            f"'{path}' is damaged ({error}); save the adapter again or use an earlier checkpoint."
        ) from None


def _present(base: Base, section: Any, tensors: Mapping[str, Tensor], folder: Path) -> Any:
    """``section`` without the target names that nothing in ``base`` is called: PEFT's lists often serve many families.

    Raises MethodError when the adapter has tensors for one of these names.
    """
    paths = [path for path, _ in base.model.named_modules()]
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
        parts.append(part.model_copy(update={"target_modules": kept}) if kept and kept != wanted else part)
    return section.model_copy(update={"parts": tuple(parts)}) if section.name == "combined" else parts[0]


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
    for part, other in zip(sorted(ours, key=_kind), sorted(theirs, key=_kind), strict=True):
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


def _kind(part: Any) -> tuple[str, str]:
    """What tells the parts of a section apart: only bottlenecks may be there several times, in different forms."""
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
