"""An adapter on disk: PEFT's layout, ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT reads what is written here with every key consumed, and what PEFT saved is read here, unless it asks for something
that this package does not do: that is refused by name, because an adapter that is half understood loads without an error
and answers wrongly. Knows the two files; must not know formulas or training.
"""

from __future__ import annotations

import glob
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlora import config
from qlora.errors import MethodError, RunError, listed
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.load import Base

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_LAYOUT = "0.18.0"  # the PEFT release whose layout is written; later ones read it too

# What may stand in a config without changing the result once the weights are loaded. PiSSA, OLoRA, CorDA and LoftQ as
# initialisations are not among them: they change the base as well.
HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "layers_pattern", "megatron_core", "peft_version",
    "qalora_group_size", "revision",
}  # fmt: skip
READ = {"lora_alpha", "lora_dropout", "r", "target_modules", "use_rslora"}
ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
}


def save_adapter(model: AdaptedModel, folder: str | Path) -> None:
    """Write the adapter into ``folder``; an adapter that is there already is replaced, other files are left alone.

    Each file is written aside, flushed to the disk and renamed, the config last: a crash leaves no half-written file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: values.cpu().contiguous() for key, values in model.adapter_state().items()}
    with _written_aside(folder / WEIGHTS) as aside:
        save_file(tensors, aside, metadata={"format": "pt"})
    with _written_aside(folder / CONFIG) as aside:
        aside.write_text(json.dumps(adapter_config(model), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(folder)


def load_adapter(model: AdaptedModel | Base, folder: str | Path) -> AdaptedModel:
    """Read the adapter in ``folder`` into an adapted model, or plant it in a bare base first.

    Raises MethodError when the files are missing, damaged, ask for what is not supported, or do not fit this model; a bare
    base is left bare then.
    """
    section, tensors = read_adapter_config(folder), read_adapter_tensors(folder)
    if isinstance(model, AdaptedModel):
        here, there = model.method.alpha / model.method.r, section.alpha / section.r
        if not math.isclose(here, there):
            raise MethodError(
                f"The adapter in '{folder}' is scaled by alpha/r = {there:g}, this model by {here:g}; "
                "use the method section that it was trained with."
            )
        model.load_adapter_state(tensors)
        return model
    adapted = apply_method(model, section)
    try:
        adapted.load_adapter_state(tensors)
    except MethodError:
        adapted.remove()
        raise
    return adapted


def adapter_config(model: AdaptedModel) -> dict[str, Any]:
    """What ``adapter_config.json`` says of a LoRA adapter."""
    section = model.method
    return {
        "peft_type": "LORA",
        "peft_version": PEFT_LAYOUT,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.base.name,
        "revision": model.base.revision,
        "inference_mode": True,
        "r": section.r,
        "lora_alpha": int(section.alpha) if section.alpha == int(section.alpha) else section.alpha,
        "lora_dropout": section.dropout,
        "target_modules": model.target_modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def read_adapter_config(folder: str | Path) -> config.LoRA:
    """The method section that an adapter was made with.

    rsLoRA's scale, alpha/√r, becomes an ordinary alpha. Raises MethodError naming every field that is set to something
    that is not supported.
    """
    values = _read_config(Path(folder))
    refused = {
        key: value
        for key, value in values.items()
        if (value not in ONLY[key] if key in ONLY else key not in HARMLESS | READ and value)
    }
    if "peft_type" not in values:
        refused["peft_type"] = None
    if refused:
        raise MethodError(
            f"'{Path(folder) / CONFIG}' sets {listed([f'{key}={value!r:.60}' for key, value in refused.items()], 8)}, "
            "which is not supported; expected a plain LoRA adapter of a causal language model."
        )
    targets = values.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        raise MethodError(
            f"'{Path(folder) / CONFIG}' has target_modules='{targets:.60}', a pattern; expected a list of module names."
        )
    r, alpha = values.get("r"), values.get("lora_alpha")
    if values.get("use_rslora") and isinstance(r, int) and isinstance(alpha, int | float):
        alpha = alpha * math.sqrt(r)
    fields = {"r": r, "alpha": alpha, "dropout": values.get("lora_dropout", 0.0), "target_modules": targets}
    try:
        return config.LoRA.model_validate(
            {**fields, "target_modules": targets if isinstance(targets, str) else _tuple(targets)}
        )
    except pydantic.ValidationError as error:
        wrong = {str(item["loc"][0]): item["msg"] for item in error.errors()}
        names = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
        raise MethodError(
            f"'{Path(folder) / CONFIG}' cannot be used: "
            + "; ".join(f"{names.get(key, key)} is {fields.get(key)!r:.60} ({text})" for key, text in wrong.items())
            + "."
        ) from None


def read_adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, by PEFT's keys. Raises MethodError when they are missing or damaged."""
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        pickle = " (adapter_model.bin is a pickle, which is never read)" if path.with_suffix(".bin").is_file() else ""
        raise MethodError(f"There is no {WEIGHTS} in '{folder}'{pickle}; expected an adapter folder in PEFT's layout.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise MethodError(
            f"'{path}' is damaged ({error}); save the adapter again or use an earlier checkpoint."
        ) from None


@contextmanager
def folder_written_aside(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` to write into; when the block ends well it is flushed and takes its place.

    When the block fails, what was written is deleted and ``folder`` is as it was. Raises RunError when ``folder`` holds
    something already and ``overwrite`` is off.
    """
    folder = Path(folder)
    if folder.is_file():
        raise RunError(f"'{folder}' is a file; expected the name of a new folder.")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise RunError(f"'{folder}' is there already and not empty; choose another folder or delete it first.")
    aside = folder.absolute().with_name(f".{folder.absolute().name}.writing-{os.getpid()}")
    old = aside.with_name(f".{folder.absolute().name}.old-{os.getpid()}")
    clear_leftovers(aside.parent, folder.absolute().name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in sorted(aside.rglob("*")):
            _sync(path)
        _sync(aside)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    _sync(folder.absolute().parent)
    shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(parent: str | Path, name: str = "*") -> None:
    """Delete what a killed ``folder_written_aside`` left in ``parent`` for the folder ``name``, or for any folder.

    An old folder that was moved out of the way, and has no successor, is put back. Living writers are left alone.
    """
    for path in Path(parent).glob(f".{name if name == '*' else glob.escape(name)}.*-*"):
        whole, _, number = path.name.rpartition("-")
        stem, _, kind = whole[1:].rpartition(".")
        if not path.is_dir() or not number.isdecimal() or kind not in ("writing", "old") or _lives(int(number)):
            continue
        if kind == "old" and not path.with_name(stem).exists():
            path.rename(path.with_name(stem))
        else:
            shutil.rmtree(path, ignore_errors=True)


def _lives(process: int) -> bool:
    """Whether there is a process by that number (other than this one, which knows what it writes)."""
    if os.name == "nt":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, PermissionError):
        pass
    return True


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    aside = path.with_name(f".{path.name}.writing")
    try:
        yield aside
        _sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or a folder's entries are on the disk."""
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MethodError(f"There is no {CONFIG} in '{folder}'; expected an adapter folder in PEFT's layout.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MethodError(f"'{path}' cannot be read ({error}); expected an adapter folder in PEFT's layout.") from None
    if not isinstance(values, dict):
        raise MethodError(f"'{path}' holds {type(values).__name__}; expected a JSON object.")
    return values


def _tuple(value: Any) -> Any:
    """A list as a tuple, sorted because PEFT writes a set; anything else as it is, for the schema to refuse."""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(sorted(value))
    return value
