"""What a run folder says of its run: ``recipe.yaml`` and ``environment.json``, written before the first step.

    recipe, data, base, device ─► begin ─► recipe.yaml, environment.json ─► qlora resume, export, report take the folder

The fingerprints tell a continuation from another run. Knows what is compared; must not know how a folder is opened,
cleared or locked.
"""

from __future__ import annotations

import hashlib
import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from qlora.data.load import Data
from qlora.errors import RecipeError, RunError, disk_is_full
from qlora.files.durable import file_written_aside, write_json
from qlora.files.strangers import MAX_OURS, Fault, read_object
from qlora.machine.device import dtype_name, versions
from qlora.machine.processes import here
from qlora.methods.base import AdaptedModel
from qlora.model.attention import attention_of
from qlora.model.base import Base
from qlora.model.kernels import fused
from qlora.recipe import Classification, DeviceSection, MemorySection, Recipe, TokensObjective, TrainingSection

ENVIRONMENT = "environment.json"
RECIPE = "recipe.yaml"


def begin(folder: Path, recipe: Recipe, data: Data, base: Base, more: Mapping[str, object]) -> None:
    """Write what says that there is a run of ``recipe`` in ``folder``; the environment last, since from then on there is one.

    ``more`` goes into the environment.
    A folder of the same recipe is left as it is. Raises RunError when it holds another one's run.
    """
    text = recipe.to_yaml().encode()  # as the digest has it, also where lines end otherwise
    if (folder / ENVIRONMENT).is_file():
        if recorded(folder, "recipe_sha256") == digest(text) or _same_recipe(folder, recipe):
            return
        raise RunError(
            f"There is a run of another recipe in '{folder}'; choose another folder, or delete it if it is not needed."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_written_aside(folder / RECIPE) as aside:
            aside.write_bytes(text)
    except OSError as error:
        if disk_is_full(error):
            raise
        raise RunError(f"The run folder '{folder}' cannot be written ({error}); choose another.") from None
    write_json(folder / ENVIRONMENT, {**environment_of(recipe, data, base), **more})


def _same_recipe(folder: Path, recipe: Recipe) -> bool:
    """Whether the recipe there, which an older release may have written with other keys, says the same."""
    try:
        return Recipe.from_yaml(folder / RECIPE) == recipe
    except RecipeError:
        return False


def recorded(folder: Path, key: str) -> object:
    """What ``environment.json`` says of the run in ``folder``; None where there is none, or that cannot be read."""
    try:
        return (read_object(folder / ENVIRONMENT, MAX_OURS) or {}).get(key)
    except Fault:
        return None


def recipe_of(
    model: AdaptedModel, data: Data, training: TrainingSection, memory: MemorySection, folder: Path
) -> Recipe | None:
    """The recipe of parts that were put together in Python; None where one of them did not come from a section.

    Raises RecipeError when the data was split by another seed than the recipe can say.
    """
    base = model.base
    if base.section is None or data.section is None:
        return None
    if data.section.held_out_fraction and data.seed != training.seed:
        raise RecipeError(
            f"What is held out was drawn by the seed {data.seed}, but training.seed is {training.seed}, by which a resumed run "
            "would draw it again; give load_data that seed."
        )
    return Recipe(
        model=base.section.model_copy(update={"compute_dtype": dtype_name(base.compute_dtype)}),
        method=model.section,
        data=data.section,
        objective=Classification() if data.classes else TokensObjective(),
        training=training,
        memory=memory,
        device=DeviceSection(name=str(base.device)),
        folder=str(folder),
    )


def environment_of(recipe: Recipe, data: Data, base: Base) -> dict[str, object]:
    """What ``environment.json`` holds: versions, device, and the fingerprints that ``resume`` compares."""
    return {
        "versions": versions(),
        "device_name": device_text(base.device),
        "attention": attention_of(base.model),
        "kernels": fused(base.model),
        "data_fingerprint": data.fingerprint,
        "base_fingerprint": base.checkpoint.fingerprint if base.checkpoint else None,
        "recipe_sha256": digest(recipe.to_yaml().encode()),
        "data_files": {file.name: file.sha256 for file in data.files},
        **({"processes": here().size, "started_by": launcher()} if here().size > 1 else {}),
        **_git_state(),
    }


def launcher() -> str:
    """The program that started this process: torchrun, which is the same one when it starts a run again."""
    return f"{socket.gethostname()} {os.getppid()}"


def differences(recipe: Recipe, environment: Mapping[str, object], base: Base) -> list[str]:
    """In what this machine differs from the one that the run began on, as ``torch 2.12.0, now 2.13.0``."""
    known = environment.get("versions")
    before = {"device": recipe.device.name, "hardware": environment.get("device_name")}
    before |= {
        "processes": environment.get("processes", 1),
        "attention": environment.get("attention"),
        "fused kernels": environment.get("kernels") or {},
    }
    before |= known if isinstance(known, dict) else {}
    now: dict[str, object] = {"device": str(base.device), "hardware": device_text(base.device)}
    now |= {
        "processes": here().size,
        "attention": attention_of(base.model),
        "fused kernels": fused(base.model),
        **versions(),
    }
    return [f"{name} {before.get(name)}, now {value}" for name, value in now.items() if before.get(name) != value]


def device_text(device: torch.device) -> str:
    """The device as ``environment.json`` names it. A CPU's sums depend on its instructions and its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"CPU ({kind}), {torch.get_num_threads()} threads"


def digest(content: bytes) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def _git_state() -> dict[str, object]:
    """The commit that the current folder is at, and whether files were changed since; nothing known outside of a checkout."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {"git_commit": commit or None, "git_changed": None if changes is None or not commit else bool(changes)}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
