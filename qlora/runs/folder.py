"""The run folder: what lies in it, by which names, and how it is opened, cleared and written.

What each file holds is in docs/run-folder.md. Knows files; must not know models or how steps are taken. Nothing heavy is
imported before it is needed, so that the command line can look here before it waits for torch (``first.py``).
"""

from __future__ import annotations

import copy
import hashlib
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qlora.errors import DoesNotFitError, QloraError, RecipeError, RunError, disk_is_full, first_line, listed
from qlora.files.durable import (
    clear_leftovers,
    damage,
    delete_folder,
    expanded,
    file_written_aside,
    from_here,
    is_leftover,
    sha256_of,
    write_json,
)
from qlora.files.lock import LOCK, run_lock
from qlora.files.strangers import MAX_OURS, Fault, JsonObject, read_object
from qlora.recipe import Recipe, TrainingSection
from qlora.recipe.methods import parts_of

if TYPE_CHECKING:
    import torch

    from qlora.data.load import Data
    from qlora.model.checkpoint import Checkpoint

Some = TypeVar("Some")
# What a run may go on with otherwise than it began: it changes memory, speed or safety, and never which numbers are meant.
CHANGEABLE = (
    "device.name", "device.threads", "device.memory", "device.deterministic", "memory.layers", "memory.tier",
    "memory.slots", "memory.embedding", "memory.head", "memory.layer_inputs", "memory.mlp_tile", "memory.cache",
    "training.micro_batch_size", "training.recompute", "training.accumulation", "training.loss_chunk", "training.not_finite",
    "training.skip_limit", "training.save_every", "training.keep_checkpoints", "tracking",
)  # fmt: skip
LENGTH = ("training.epochs", "training.steps")
"""What a run may become longer by, for good, where its steps do not depend on how many there are."""
NOT_BEGUN = {LOCK, "recipe.yaml", "plan.json"}  # what there is before environment.json says that a run has begun
RUN_FILES = (
    "recipe.yaml",
    "plan.json",
    "metrics.jsonl",
    "reference",
    "checkpoints",
    "adapter",
    "evaluation.json",
    "tasks",
    "tasks.json",
    "environment.json",
    "method.json",
    "report.html",
)

EXPORTS = {"merged": "merged", "nf4": "nf4", "adapter": "portable", "gguf": "gguf-{}", "gguf-adapter": "gguf-adapter"}
"""The folders in a run's that exports go into, by their form; of a GGUF file, with its type."""


def export_folder(folder: Path, form: str, out: str | Path | None = None, kind: str = "q8_0") -> Path:
    """Where an export goes: ``out``, or its own place in the run's folder."""
    return expanded(out) if out is not None else folder / EXPORTS[form].replace("{}", kind)


def lying_at(folder: Path, source: str | Path) -> Path:
    """Where an export lies that is called ``source``: in the run folder, or anywhere."""
    return folder / source if (folder / source).exists() else expanded(source)


def to_publish(folder: Path, source: str | None) -> Path:
    """The folder to publish of a run: ``source``, in the run or anywhere, or the one that was exported."""
    if source is not None:
        place = lying_at(folder, source)
        if not place.is_dir():
            raise RunError(f"There is no folder '{source}' to publish, in '{folder}' or elsewhere.{from_here(source)}")
        return place
    found = exports_in(folder)
    if len(found) == 1:
        return found[0]
    there = (
        f"Of '{folder}' {listed([path.name for path in found])} were exported"
        if found
        else f"Nothing of '{folder}' was exported yet"
    )
    advice = (
        f"say which of them: from={found[0].name}"
        if found
        else f"do that first, as in: qlora export {shown(folder)} merged"
    )
    raise RunError(f"{there}; {advice}")


def open_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """(recipe, environment) of a run folder. Raises RunError when it is none, or when its recipe was edited."""
    path = folder / "recipe.yaml"
    if path.is_file() and not _began(folder):
        raise RunError(
            f"The run in '{folder}' was stopped before it began; train it: qlora train RECIPE folder={shown(folder)} "
            "overwrite=true"
        )
    if not path.is_file() or not (folder / "environment.json").is_file():
        raise RunError(
            f"'{folder}' is no run folder (no recipe.yaml and environment.json in it); expected what train made."
        )
    environment = told(folder / "environment.json")
    if "recipe_sha256" not in environment:
        raise RunError(f"'{folder / 'environment.json'}' is damaged; put it back from a copy, or train the run anew.")
    # two of them where making it longer was broken off
    if sha256_of(path) not in (environment.get("recipe_sha256"), environment.get("recipe_sha256_before")):
        raise RunError(
            f"'{path}' was changed after the run began; put it back, or train it anew: qlora train {shown(path)} folder=runs/…"
        )
    return Recipe.from_yaml(path), environment


def told(path: Path) -> JsonObject:
    """What a file of a run's folder says; nothing where it is missing or damaged."""
    try:
        return read_object(path, MAX_OURS) or {}
    except Fault:
        return {}


def require_language_model(folder: Path, what: str) -> None:
    """Raise RunError where the run in ``folder`` trained a classifier, which has no answers for ``what`` to give."""
    if open_run(folder)[0].objective.classifies:
        raise RunError(
            f"The run in '{folder}' trained a classifier, and {what} is for models that answer in text. Measure it: qlora evaluate "
            f"{shown(folder)}; take it away for AutoModelForSequenceClassification: qlora export {shown(folder)} merged"
        )


def with_changes(recipe: Recipe, overrides: Sequence[str], folder: Path) -> Recipe:
    """The run's recipe with ``section.key=value`` overrides. Raises RecipeError where one would make it another run."""
    changed = Recipe.from_dict(recipe.model_dump(mode="json"), *overrides, source="what was given to resume")
    before, after = _by_key(recipe), _by_key(changed)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if strange := [key for key in keys if key not in (*CHANGEABLE, *LENGTH)]:
        raise RecipeError(
            f"{listed(strange)} cannot change within a run: going on would be no continuation. A resumed run may change "
            f"{listed(CHANGEABLE, 99)}, and at a constant rate {' or '.join(LENGTH)}; for anything else train anew: qlora train "
            f"{shown(folder / 'recipe.yaml')} folder=runs/…"
        )
    if any(key in LENGTH for key in keys):
        changed = changed.model_copy(update={"training": _longer(recipe, changed.training, folder)})
    return changed


def _longer(recipe: Recipe, asked: TrainingSection, folder: Path) -> TrainingSection:
    """What ``asked`` for more steps than the run in ``folder`` began with, which then are the first ones of a longer run: only
    at a constant rate does a step not depend on how many there are, once the warm-up keeps its own number of them.

    Raises RecipeError where they would depend on it, or no more are asked for.
    """
    steps, why = steps_of(recipe, folder), None
    key = "training.epochs" if asked.steps is None else "training.steps"
    if recipe.training.schedule != "constant":
        why = f"its learning rate follows a {recipe.training.schedule} schedule over the steps it began with"
    elif any(part.name == "adalora" for part in parts_of(recipe.method)):
        why = "AdaLoRA spreads its ranks over the steps it began with"
    if why or steps is None:
        why = why or "no plan.json says how many steps an epoch has"
        raise RecipeError(
            f"{key} cannot change within this run: {why}. More of it is a new run that goes on from this one's "
            f"adapter: qlora train {shown(folder / 'recipe.yaml')} method.from={shown(folder)} "
            f"{key}={getattr(asked, key.removeprefix('training.'))}"
        )
    total = steps_of(recipe.model_copy(update={"training": asked}), folder) or 0
    if total <= steps:
        raise RecipeError(
            f"The run in '{folder}' has {steps:,} steps, and {key} would make them {total:,}; expected more than it has."
        )
    return asked.model_copy(update={"warmup_fraction": round(recipe.training.warmup_fraction * steps) / total})


def steps_of(recipe: Recipe, folder: Path) -> int | None:
    """How many steps ``recipe``, which that of the run in ``folder`` is or becomes, has in all; None where the folder does not say
    how many an epoch has."""
    if recipe.training.steps is not None:
        return recipe.training.steps
    epoch = told(folder / "plan.json").get("steps_per_epoch")
    return recipe.training.epochs * epoch if isinstance(epoch, int) else None


def lengthen(recipe: Recipe, folder: Path, steps: int) -> None:
    """Make ``recipe``, of more ``steps``, that of the run in ``folder``, which then is not finished: what was measured at its old end
    is not that of its new one. Killed at any moment it leaves a run that goes on."""
    measured = read_object(folder / "evaluation.json", MAX_OURS) or {}
    if "after" in measured.get("held_out", {}) or measured.get("generations"):
        held_out = {key: value for key, value in measured.get("held_out", {}).items() if key != "after"}
        asked = [{**item, "after": None} for item in measured.get("generations", [])]
        write_json(folder / "evaluation.json", {"held_out": held_out, "verdict": None, "generations": asked})
    (folder / "tasks.json").unlink(missing_ok=True)
    text = recipe.to_yaml().encode()
    environment = read_object(folder / "environment.json", MAX_OURS) or {}
    # of the file that lies there: an earlier call that was broken off may have told of another one
    known, new = sha256_of(folder / "recipe.yaml"), hashlib.sha256(text).hexdigest()
    write_json(folder / "plan.json", {**(read_object(folder / "plan.json", MAX_OURS) or {}), "steps": steps})
    write_json(folder / "environment.json", {**environment, "recipe_sha256": new, "recipe_sha256_before": known})
    with file_written_aside(folder / "recipe.yaml") as aside:
        aside.write_bytes(text)


def _by_key(recipe: Recipe) -> dict[str, Any]:
    """A recipe's plain values by ``section.key``."""
    found: dict[str, Any] = {}
    for section, values in recipe.model_dump(mode="json").items():
        found |= (
            {f"{section}.{key}": value for key, value in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    return found


def finished(folder: Path, recipe: Recipe) -> int | None:
    """How many steps the run in ``folder`` took, when there is nothing left to do or to mend in it; None where there is."""
    steps = steps_of(recipe, folder)
    try:
        measured = read_object(folder / "evaluation.json", MAX_OURS) or {}
        after = [item.get("after") for item in measured.get("generations", [])]
    except (AttributeError, Fault):
        return None
    names = [path.name for path in (folder / "checkpoints").glob("*") if path.name.isdecimal()]
    last = max(names, key=int, default="")
    if steps is None or last != f"{steps:06d}" or not (folder / "report.html").is_file():
        return None
    holds_out = recipe.data.held_out is not None or recipe.data.held_out_fraction > 0
    if holds_out and (None in after or "after" not in measured.get("held_out", {})):
        return None
    if recipe.evaluation.tasks and not (folder / "tasks.json").is_file():
        return None
    return None if damage(folder / "adapter") or damage(folder / "checkpoints" / last) else steps


def require_checkpoint(folder: Path) -> None:
    """Raise RunError where a run has its adapter and no checkpoint: from its first step it would be another run over this one."""
    if (folder / "adapter").is_dir() and not any((folder / "checkpoints").glob("[0-9]*")):
        raise RunError(
            f"The checkpoints of '{folder}' are gone, so its steps cannot be gone on with; its adapter is there. Use it (qlora chat "
            f"{shown(folder)}), or train on from it: qlora train {shown(folder / 'recipe.yaml')} method.from={shown(folder)} folder=runs/…"
        )


def check_data(data: Data, environment: dict[str, Any], folder: Path) -> None:
    """Raise RunError when the data are not those that the run in ``folder`` began with."""
    if data.fingerprint != environment.get("data_fingerprint"):
        known = environment.get("data_files")
        known = known if isinstance(known, dict) else {}
        other = [file.name for file in data.files if known.get(file.name, file.sha256) != file.sha256]
        why = f"{listed(other)} has other content" if other else "the same files give other tokens"
        raise RunError(
            f"The data of '{folder}' has changed since the run began ({why}): going on would be no "
            "continuation, and what was held out may have been trained on. Put the old data back, or train anew into "
            "another folder."
        )


def open_base(recipe: Recipe, environment: dict[str, Any], folder: Path) -> Checkpoint:
    """The base's checkpoint. Raises RunError when it is not the one that the run in ``folder`` was trained on."""
    from qlora.model.checkpoint import open_checkpoint

    base = open_checkpoint(recipe.model)
    if base.fingerprint != environment.get("base_fingerprint"):
        raise RunError(
            f"The model in '{base.folder}' is not the one that '{folder}' was trained on (other configuration, tokenizer or "
            "tensors), so its adapter means nothing there. Put the old model back, or train anew."
        )
    return base


def device_here(recipe: Recipe) -> torch.device:
    """The run's device, or the one that ``auto`` means where this machine has no such device."""
    from qlora.machine.device import resolve_device

    try:
        return resolve_device(recipe.device.name)
    except RecipeError:
        return resolve_device("auto")


def template_of(recipe: Recipe, folder: Path, base: Checkpoint) -> str | None:
    """The chat template that the run was trained with, or None for raw text and for a classifier's: it lies beside the finished adapter."""
    from qlora.data.chat import ChatTemplate
    from qlora.model.tokenizer import TEMPLATE

    planned = told(folder / "plan.json").get("data")  # or the template beside the adapter tells as much
    if recipe.objective.classifies or "text" in (
        recipe.data.form,
        planned.get("form") if isinstance(planned, dict) else None,
    ):
        return None
    kept = folder / "adapter" / TEMPLATE
    if kept.is_file():
        try:
            return kept.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RunError(f"'{kept}' is damaged ({error}); write it again: qlora resume {shown(folder)}") from None
    return ChatTemplate(base.tokenizer, recipe.data.chat_template).text


def end_tokens(recipe: Recipe, folder: Path, base: Checkpoint) -> tuple[int, ...]:
    """The tokens that end an answer in the run's chat template; none for raw text, and where the template has none."""
    from qlora.data.chat import ChatTemplate

    text = template_of(recipe, folder, base)
    if text is None:
        return ()
    tokenizer = copy.copy(base.tokenizer)  # a run's template is not the checkpoint's
    several = tokenizer.chat_template
    if not (isinstance(several, dict) and several.get("default") == text):  # else calls may end by the one for tools
        tokenizer.chat_template = text
    return ChatTemplate(tokenizer).end_tokens


def read_adapter(folder: Path, read: Callable[[Path], Some], place: Path | None = None) -> Some:
    """``read`` a run's adapter (at ``place``); a newer one where a run that goes on deleted that checkpoint meanwhile."""
    from qlora.training.checkpoint import adapter_folder

    while True:
        place = place or adapter_folder(folder)
        try:
            return read(place)
        except (QloraError, OSError):
            if place.is_dir():
                raise
            place = None


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise RunError unless a run may be made in ``folder``."""
    if folder.is_file():
        raise RunError(f"'{folder}' is a file; expected the name of a new run folder.")
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    if not _began(folder) and names <= NOT_BEGUN:
        return
    if not overwrite and not (folder / "recipe.yaml").is_file():
        raise RunError(f"'{folder}' holds other files and is no run folder; choose another place (folder=runs/…).")
    if not overwrite:
        raise RunError(
            f"There is something in '{folder}' already. Go on with it (qlora resume {shown(folder)}), choose another place "
            "(folder=runs/…), or replace it (overwrite=true)."
        )
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"'{folder}' is not a run folder, so overwrite=true does not touch it; choose another folder.")


@contextmanager
def taken(folder: Path, overwrite: bool) -> Iterator[None]:
    """Inside, ``folder`` is this process's, for a new run in it; where none began, it is not left behind. Raises RunError when it is
    another's or not free."""
    require_free(folder, overwrite)
    made = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_is_full(error):
            raise
        raise RunError(f"The run folder '{folder}' cannot be made ({error}); choose another (folder=runs/…).") from None
    try:
        with run_lock(folder):
            require_free(folder, overwrite)  # another process may have begun and ended since
            yield
    except BaseException:
        if made and folder.is_dir() and {path.name for path in folder.iterdir()} <= NOT_BEGUN:
            delete_folder(folder)
        raise


@contextmanager
def full_disk_said(folder: Path, advice: str) -> Iterator[None]:
    """Inside, a disk that is full is told by what lies on it, with ``advice``. Raises DoesNotFitError."""
    try:
        yield
    except QloraError:
        raise
    except Exception as error:
        if not disk_is_full(error):
            raise
        place = getattr(error, "filename", None) or folder
        raise DoesNotFitError(
            f"The disk of '{place}' is full, or no file may be that large ({first_line(error)}); what was saved is whole. "
            f"Make room, then {advice}."
        ) from None


def shown(path: Path) -> str:
    """A path as a shell takes it: quoted where it must be."""
    return shlex.quote(str(path))


def clear(folder: Path) -> None:
    """Delete an old run's files, and nothing else that may lie beside them.

    First what says that there is a run, and last what says that it was one: a kill in between leaves neither half a run
    nor a folder that is taken for somebody else's.
    """
    clear_leftovers(folder)
    last = "recipe.yaml"
    for name in (
        "environment.json",
        *(name for name in RUN_FILES if name != last),
        *(path.name for path in exports_in(folder)),
        "tensorboard",
        "wandb",
        "forms.md",
        last,
    ):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            delete_folder(path)
        else:
            path.unlink(missing_ok=True)


def exports_in(folder: Path) -> list[Path]:
    """The folders of exports in a run's."""
    found = [folder / name for name in ("merged", "nf4", "portable") if (folder / name).is_dir()]
    return [*found, *sorted({file.parent for file in folder.glob("gguf-*/*.gguf")})]


def _began(folder: Path) -> bool:
    return (folder / "environment.json").is_file()
