"""The run folder: what lies in it, by which names, and how it is opened, cleared and written.

What each file holds is in the README. Knows files; must not know models or training.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from qlora.config import Recipe
from qlora.data import Data
from qlora.data.chat import ChatTemplate
from qlora.device import resolve_device, versions
from qlora.errors import RecipeError, RunError
from qlora.methods.files import clear_leftovers
from qlora.model.shards import find_model, fingerprint
from qlora.model.tokenizer import load_tokenizer
from qlora.training import checkpoint as checkpoints

TEMPLATE = "chat_template.jinja"
RUN_FILES = (
    "recipe.yaml",
    "plan.json",
    "metrics.jsonl",
    "checkpoints",
    "adapter",
    "evaluation.json",
    "environment.json",
    "method.json",
    "report.html",
)


def open_run(folder: Path) -> tuple[Recipe, dict[str, Any]]:
    """(recipe, environment) of a run folder. Raises RunError when it is none, or when its recipe was edited."""
    path = folder / "recipe.yaml"
    if not path.is_file() or not (folder / "environment.json").is_file():
        raise RunError(
            f"'{folder}' is no run folder (no recipe.yaml and environment.json in it); expected what train made."
        )
    environment = read_json(folder / "environment.json")
    if "recipe_sha256" not in environment:
        raise RunError(f"'{folder / 'environment.json'}' is damaged; put it back from a copy, or train the run anew.")
    if _digest(path.read_bytes()) != environment.get("recipe_sha256"):
        raise RunError(
            f"'{path}' was changed after the run began; put it back, or train it anew: qlora train {path} folder=runs/…"
        )
    return Recipe.from_yaml(path), environment


def check_data(data: Data, environment: dict[str, Any], folder: Path) -> None:
    """Raise RunError when the data are not those that the run in ``folder`` began with."""
    if data.fingerprint != environment.get("data_fingerprint"):
        raise RunError(
            f"The data of '{folder}' has changed since the run began (another fingerprint): going on would be no "
            "continuation, and what was held out may have been trained on. Put the old data back, or train anew into "
            "another folder."
        )


def check_base(recipe: Recipe, environment: dict[str, Any], folder: Path) -> Path:
    """The base's folder. Raises RunError when it is not the one that the run in ``folder`` was trained on."""
    base = find_model(
        recipe.model.name, recipe.model.revision, progress=True, trust_remote_code=recipe.model.trust_remote_code
    )
    if fingerprint(base) != environment.get("base_fingerprint"):
        raise RunError(
            f"The model in '{base}' is not the one that '{folder}' was trained on (other configuration, tokenizer or "
            "tensors), so its adapter means nothing there. Put the old model back, or train anew."
        )
    return base


def device_here(recipe: Recipe) -> torch.device:
    """The run's device, or the one that ``auto`` means where this machine has no such device."""
    try:
        return resolve_device(recipe.device.name)
    except RecipeError:
        return resolve_device("auto")


def template_of(recipe: Recipe, folder: Path) -> str | None:
    """The chat template that the run was trained with, or None for raw text: it lies beside the finished adapter."""
    if "text" in (recipe.data.form, read_json(folder / "plan.json").get("data", {}).get("form")):
        return None
    kept = folder / "adapter" / TEMPLATE
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    return ChatTemplate(load_tokenizer(recipe.model), recipe.data.chat_template).text


def adapter_folder(folder: Path) -> Path:
    """Where a run's adapter lies as it was trained: its newest checkpoint, else ``adapter/``, the form for others."""
    if found := checkpoints.find(folder / "checkpoints"):
        return found[-1]
    if (folder / "adapter" / "adapter_config.json").is_file():
        return folder / "adapter"
    raise RunError(f"'{folder}' has neither an adapter nor a checkpoint yet; train it first: qlora resume {folder}")


def require_free(folder: Path, overwrite: bool) -> None:
    """Raise RunError unless a run may be made in ``folder``."""
    if folder.is_file():
        raise RunError(f"'{folder}' is a file; expected the name of a new run folder.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise RunError(
            f"There is something in '{folder}' already. Go on with it (qlora resume {folder}), choose another place "
            "(folder=runs/…), or replace it (overwrite=true)."
        )
    if not (folder / "recipe.yaml").is_file():
        raise RunError(f"'{folder}' is not a run folder, so overwrite=true does not touch it; choose another folder.")


def clear(folder: Path) -> None:
    """Delete an old run's files, and nothing else that may lie beside them."""
    clear_leftovers(folder)
    for name in (*RUN_FILES, "merged", "portable"):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def environment_of(recipe: Recipe, data: Data, base: Path, device: torch.device) -> dict[str, Any]:
    """What ``environment.json`` holds: versions, device, and the fingerprints that ``resume`` compares."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "versions": versions(),
        "device_name": name,
        "data_fingerprint": data.fingerprint,
        "base_fingerprint": fingerprint(base),
        "recipe_sha256": _digest(recipe.to_yaml().encode()),
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """The commit that the current folder is at, when it is in a git checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write aside and rename, so that the file is whole or absent."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(json.dumps(_finite(values), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    aside.replace(path)


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a perplexity too large for a float becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is none or it is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
