"""First: what can be wrong with a command and costs nothing to find, before torch is imported and a model is loaded.

    recipe ─► its numbers ─► its names of models, data and files ─► its run folder ─► the hub, asked once for what is not here
    run    ─► its recipe ─► what may change in it ─► its lock ─► is there anything left to do?

What is said here is said in the words of the rooms that would meet it later; these still check all of it. Knows names, paths
and the hub; must not know torch, nor import what does.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qlora.data.files import ending, unpacker
from qlora.data.labelled import read_labelled
from qlora.data.parsing import parse
from qlora.data.sources import data_files, is_here, read_records
from qlora.errors import DataError, MethodError, ModelError, RecipeError, RunError
from qlora.evaluation.tasks.presets import named_kind
from qlora.files.durable import expanded, from_here, require_writable
from qlora.files.lock import run_lock
from qlora.machine.cards import amount, is_memory, parse_memory
from qlora.model.hub import ask_hub, data_set_cached, require_model
from qlora.recipe import DataSection, Recipe
from qlora.runs.folder import finished, open_run, require_checkpoint, require_free, shown, taken, with_changes
from qlora.training.tracking import require_trackers

SMALL = 4 * 1024**2
"""Bytes of text that are read twice, so that a slip in them is said at once: less than half a second."""
PACKED = 10
"""What a byte of a packed file is counted as: JSON lines unpack to 5 to 30 times their size."""
LINES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")


def look_at_recipe(recipe: Recipe, trains: bool = False, reads: bool = True, begun: bool = False) -> None:
    """Raise InputError for what a run of ``recipe`` would be refused for. ``trains``: it needs its run folder; ``reads``: its data;
    ``begun``: it goes on, on whatever device there is."""
    _memory(recipe)
    if not begun:
        _device(recipe.device.name)
    require_trackers(recipe.tracking)
    if recipe.model.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise RecipeError(
            "model.attention is flash_attention_2, whose package flash-attn is not installed here; set model.attention=auto, which "
            "needs none."
        )
    if recipe.method.from_ is not None and not (place := expanded(recipe.method.from_)).is_dir():
        raise MethodError(
            f"method.from is '{place}', where there is no folder; expected that of a run or of an adapter.{from_here(place)}"
        )
    asked = _data(recipe) if reads else []
    folder = expanded(recipe.folder or "runs/run")
    more_of_it = recipe.method.from_ is not None and expanded(recipe.method.from_).resolve() == folder.resolve()
    if trains and _main() and not more_of_it:  # which gets a folder of its own
        look_at_folder(folder, recipe.overwrite)
        if recipe.memory.tier == "disk" and recipe.memory.cache:
            cache = expanded(recipe.memory.cache)
            if not cache.is_dir() or not any(cache.iterdir()):  # one that is filled is only read
                require_writable(cache, "choose another folder (memory.cache=…)")
    require_model(recipe.model.name, recipe.model.revision)
    for source in asked:
        if problem := ask_hub(source, "dataset", None):
            raise DataError(f"The data set '{source}' {problem}.{from_here(source)}")


def look_at_folder(folder: Path, overwrite: bool) -> None:
    """Raise RunError where no run may be made in ``folder``, or another process trains in it."""
    require_free(folder, overwrite)
    if not folder.is_dir():
        require_writable(folder, "choose another folder (folder=runs/…)")
        return
    require_writable(folder, "make it writable, or choose another (folder=runs/…)")
    with taken(folder, overwrite):
        pass


def look_at_run(folder: Path, changes: Sequence[str] = (), trains: bool = False, reads: bool = True) -> str | None:
    """Raise InputError for what ``folder`` would be refused for as a run; ``trains``: to go on with it, with ``changes``.

    Returns a sentence when it is to go on and there is nothing left to do.
    """
    if (folder / "recipe.yaml").is_file() and not trains and not _has_adapter(folder):
        with run_lock(folder) if _main() else nullcontext():  # which says where it is being trained
            raise RunError(f"Nothing was trained in '{folder}' yet; do that first: qlora resume {shown(folder)}")
    begun, _ = open_run(folder)
    recipe = begun
    if trains:
        recipe = with_changes(recipe, changes, folder)
        require_writable(folder, "make it writable")
        if _main():
            with run_lock(folder):
                pass
        require_checkpoint(folder)
        if (steps := finished(folder, recipe)) is not None:
            return (
                f"The run in '{folder}' is finished: its {steps:,} steps are taken and measured, so there is nothing to resume. "
                f"{'Measure it: qlora evaluate' if recipe.objective.classifies else 'Talk to it: qlora chat'} {shown(folder)}; or train on from it: qlora train {shown(folder / 'recipe.yaml')} "
                f"method.from={shown(folder)} folder=runs/…"
            )
    try:
        look_at_recipe(recipe, reads=reads, begun=True)
    except ModelError:
        if (place := expanded(recipe.model.name)).is_absolute() and not place.exists():
            raise ModelError(
                f"The model of this run is gone: there is no folder '{place}'. Where it was moved, leave a link in its old place: ln -s "
                f"NEW {shlex.quote(str(place))}"
            ) from None
        raise
    return None


def _main() -> bool:
    """Whether this process makes the run folder: of several the first, unless torchrun starts again what lies there already."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"


def _has_adapter(folder: Path) -> bool:
    return (folder / "adapter").is_dir() or any((folder / "checkpoints").glob("[0-9]*"))


def uneven(recipe: Recipe) -> str | None:
    """A sentence where a step's rows are not so many whole micro-batches: no other result, but time lost."""
    rows, at_once = recipe.training.batch_size, recipe.training.micro_batch_size
    if at_once >= rows or rows % at_once == 0:
        return None
    near = max(number for number in range(1, at_once) if rows % number == 0)
    return (
        f"training.batch_size={rows} is no multiple of training.micro_batch_size={at_once}: each step ends with a micro-batch of "
        f"{rows % at_once}, which takes time and changes no result; training.micro_batch_size={near} or training.batch_size="
        f"{rows + at_once - rows % at_once} fit."
    )


def _memory(recipe: Recipe) -> None:
    """Raise RecipeError for a card or an amount of memory that is none."""
    if recipe.device.host_memory is not None:
        parse_memory(recipe.device.host_memory)
    if recipe.device.memory is not None:
        amount(recipe.device.memory)
        if recipe.device.name == "cpu" and not is_memory(recipe.device.memory):
            raise RecipeError(
                f"device.memory is {recipe.device.memory}, a card, and device.name is cpu; set device.name=auto to plan for that card, or "
                "give the memory of this machine that may be taken, as in 24GiB."
            )


def _device(name: str) -> None:
    """Raise RecipeError for a GPU where torch was built without any; whether there is one, only torch knows."""
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return
    if name.startswith("cuda") and torch.endswith("+cpu"):
        raise RecipeError(
            f"device.name is '{name}', but the torch that is installed here ({torch}) is the build without CUDA; install torch from PyPI, "
            "or use 'auto' or 'cpu'."
        )


def _data(recipe: Recipe) -> list[str]:
    """Raise DataError for data that are missing or, if they are few, that cannot be read. Returns the hub ids to ask for."""
    section = recipe.data
    files, elsewhere = _files((*section.sources, *section.held_out_sources))
    if section.chat_template is not None and not (place := expanded(section.chat_template)).is_file():
        raise DataError(f"There is no chat template '{place}' (data.chat_template).{from_here(place)}")
    for task in recipe.evaluation.tasks:
        named_kind(task)
        try:
            _, others = _files((task.data,) if task.data else ())
        except DataError as error:
            raise DataError(f"The task '{task.name}' cannot be read. {error}") from None
        elsewhere |= others
    if not elsewhere and all(ending(file) in LINES for file in files) and sum(map(_size, files)) < SMALL:
        _read(section, recipe.objective.pairs, recipe.objective.classifies)
    return [name for name in sorted(elsewhere) if not data_set_cached(name)]


def _files(sources: Iterable[str]) -> tuple[list[Path], set[str]]:
    """(the files that are here, the names that may be data sets of the hub). Raises DataError for what is neither."""
    here: list[Path] = []
    elsewhere: set[str] = set()
    for name in (name for source in sources for name in data_files(source) or [source]):
        if is_here(name):
            here.append(expanded(name))
        else:
            elsewhere.add(name)
    return here, elsewhere


def _size(file: Path) -> int:
    return os.path.getsize(file) * (PACKED if unpacker(file) else 1)


def _read(section: DataSection, pairs: bool, classifies: bool) -> None:
    """Raise DataError where records cannot be read, as ``load_data`` would."""
    if classifies:
        read_labelled(read_records(section.train, limit=section.limit), section)
        if section.held_out is not None:
            read_labelled(read_records(section.held_out), section)
        return
    how = section.columns, section.on_bad_record, section.labels, pairs
    train = parse(read_records(section.train, limit=section.limit), section.form, *how)
    train.bad.settle()
    if section.held_out is not None:
        parse(read_records(section.held_out), train.form, *how, train.read_as).bad.settle()
