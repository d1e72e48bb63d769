"""Reading an adapter into a base: what its tensors are on this model, and whether they belong there.

What PEFT saved is read here as what was written here is. Knows adapted models and the two files; must not know training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qlora import recipe as config
from qlora.errors import MethodError, listed
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import CONFIG, known_base, read_adapter_tensors, read_method_state, recorded_base, renamed_key
from qlora.methods.layout import PREFIX, same_weight
from qlora.methods.new_tokens import DELTA, NewTokensLayout
from qlora.methods.peft_config import read_adapter_config, section_from
from qlora.methods.planted import unplanted
from qlora.methods.targets import matches, pattern_value, target_names
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.names import OnLoad


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

    return {renamed_key(key, home): values for key, values in tensors.items()}


def _load(model: AdaptedModel, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    if state or any(method.layout.needs_state for method in model.methods):
        model.load_state(tensors, state, what)
    else:
        model.load_adapter_state(tensors, what)


def _check_base(base: Base, folder: Path) -> None:
    """Raise MethodError when the adapter in ``folder`` says that it was trained on another base."""
    here, recorded = known_base(base), recorded_base(folder)
    if None not in (here, recorded) and here != recorded:
        raise MethodError(
            f"The adapter in '{folder}' was trained on another base than '{base.name}' (other configuration, tokenizer or "
            "tensors); load the base that it was trained on."
        )


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
    return section_from(
        [*(part for part in parts if part.name != "modules" or not changed), *found], folder / CONFIG, {}
    ), kept


def _weight_of(base: Base, path: str, paths: list[str]) -> Tensor:
    """The weight of the embedding or head at ``path``; where only shapes were loaded, from the checkpoint if it has it."""
    weight: Any = unplanted(base.model.get_submodule(path)).weight
    if not weight.is_meta or base.checkpoint is None:
        return weight
    names = [(base.names or {}).get(f"{other}.weight") for other in (path, *paths)]  # a tied one is there once
    name = next((name for name in names if name is not None), None)
    return weight if name is None else base.checkpoint.read(name)


def _named_modules(part: Any) -> tuple[str, ...]:
    """The module names that a single method's section lists."""
    if getattr(part, "labels", ()):  # the head of a classifier, which the base lacks
        return ()
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
