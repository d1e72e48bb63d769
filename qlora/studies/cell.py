"""One cell: an ordinary run, gone on with where it was stopped, then measured, and told in one file.

    cell ─► train or resume its run folder ─► what was learned, and what it cost ─► results/NAME.json

The file has the layout of PEFT's method comparison (``run_info``, ``train_info``, ``meta_info``), so that its viewer reads it, and
beside that ``study``. Knows run folders; must not know which cells there are.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qlora.errors import QloraError, Stopped, disk_is_full, first_line, redacted
from qlora.files.durable import delete_folder, write_json
from qlora.files.strangers import JsonObject
from qlora.machine.device import forget_peak_memory, peak_memory_bytes, ran_out_of_memory, resolve_device, versions
from qlora.recipe import Recipe
from qlora.reporting.figures import summarise
from qlora.reporting.records import read_records
from qlora.runs.bases import Bases
from qlora.runs.folder import told
from qlora.runs.session import Run
from qlora.runs.train import resume, train
from qlora.studies.measured import measured
from qlora.studies.spec import Cell, StudySection, method_of


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``signal`` is that of a stop, after which the study stops too."""

    cell: str
    error: str = ""
    signal: int = 0


def run_cell(cell: Cell, study: StudySection, folder: Path, bases: Bases, quiet: bool = False) -> Outcome:
    """Run ``cell`` of the study in ``folder`` and write its result, also that of a failure. Raises nothing that a cell can."""
    try:
        _run(cell, study, folder, bases, quiet)
        return Outcome(cell.name)
    except Stopped as error:
        return Outcome(cell.name, str(error), error.exit_status - 128)
    except KeyboardInterrupt:
        return Outcome(cell.name, "stopped before its run began.", 2)
    except Exception as error:
        if disk_is_full(error):  # of no use to any other cell either
            return Outcome(cell.name, f"The disk is full ({first_line(error)}); make room, then go on.", -1)
        known = isinstance(error, QloraError) or ran_out_of_memory(error)
        said = str(error) if known else f"{type(error).__name__}: {first_line(error)}"
    fail(cell, folder, said)
    return Outcome(cell.name, said)


def fail(cell: Cell, folder: Path, said: str) -> None:
    """Write the result of a cell that came to none."""
    values = _told(cell) | {"train_info": {"status": "failed", "metrics": []}}
    values["run_info"]["error_msg"] = redacted(said)
    write_json(folder / "results" / f"{cell.name}.json", values)


def _run(cell: Cell, study: StudySection, folder: Path, bases: Bases, quiet: bool) -> None:
    recipe = cell.in_folder(folder, study.data_root)
    place, device = Path(str(recipe.folder)), resolve_device(recipe.device.name)
    begun, goes_on = time.perf_counter(), (place / "environment.json").is_file()
    before = (summarise(read_records(place)).seconds or 0.0) if goes_on else 0.0
    forget_peak_memory(device)
    run = resume(place, quiet=quiet, bases=bases) if goes_on else train(recipe, quiet=quiet, bases=bases)
    peak = peak_memory_bytes(device)
    values = _told(cell)
    values["run_info"] |= {
        "total_time": before + time.perf_counter() - begun,
        "peft_config": _peft_config(place, recipe),
    }
    values["train_info"] = _train_info(run, place, peak)
    values["study"] |= _learned(run)
    if study.measure and cell.steps is None:
        values["study"] |= measured(place, study.measure, bases)
    write_json(folder / "results" / f"{cell.name}.json", values)
    if (place / "checkpoints").is_dir():  # the adapter is all that anybody goes on from
        delete_folder(place / "checkpoints")


def _told(cell: Cell) -> JsonObject:
    """What is known of a cell before it runs."""
    found = versions()
    return {
        "run_info": {
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "total_time": 0.0,
            "experiment_name": f"{method_of(cell.recipe)}/{cell.name}",
            "peft_branch": "",
            "train_config": _train_config(cell.recipe),
            "peft_config": None,
            "error_msg": "",
        },
        "meta_info": {
            "package_info": {f"{name}-version": version for name, version in found.items()}
            | {"peft-version": None, "datasets-version": found.get("datasets")},
            "system_info": {
                "system": platform.system(),
                "machine": platform.machine(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "N/A",
            },
        },
        "study": {
            "arm": cell.arm,
            "setting": cell.setting,
            "values": dict(cell.values),
            "rate": cell.rate,
            "seed": cell.seed,
            "steps": cell.steps,
            "method": method_of(cell.recipe),
        },
    }


def _peft_config(run: Path, recipe: Recipe) -> JsonObject | None:
    """What PEFT reads of the adapter, without this machine's path of the base; None where there is none."""
    values = told(run / "adapter" / "adapter_config.json")
    return {**values, "base_model_name_or_path": _model_id(recipe)} if values else None


def _model_id(recipe: Recipe) -> str:
    """The base by a name that says the same on other machines: of a folder the last part of its path."""
    name = recipe.model.name
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name


def _train_config(recipe: Recipe) -> JsonObject:
    """A recipe by the names of PEFT's comparison."""
    training = recipe.training
    return {
        "model_id": _model_id(recipe),
        "dtype": recipe.model.compute_dtype,
        "quantization": recipe.model.quantization,
        "max_seq_length": recipe.data.max_length,
        "batch_size": training.batch_size,
        "max_steps": training.steps,
        "epochs": None if training.steps else training.epochs,
        "seed": training.seed,
        "grad_norm_clip": training.max_grad_norm,
        "optimizer_type": training.optimizer,
        "optimizer_kwargs": {"lr": training.learning_rate, "weight_decay": training.weight_decay},
        "lr_scheduler": training.schedule,
    }


def _train_info(run: Run, place: Path, peak: int) -> JsonObject:
    """What it cost, and the curve of its loss. The memory is the most that was held, which is all that is noted."""
    records = read_records(place)
    figures = summarise(records)
    adapter = place / "adapter" / "adapter_model.safetensors"
    curve = [
        {
            "step": step.number,
            "train loss": step.values.get("loss"),
            "tokens / sec": step.values.get("tokens_per_second"),
        }
        for step in records.steps
    ]
    last = {
        "step": figures.steps_done,
        "test accuracy": next((_value(row) for row in run.tasks if row["metric"] in ("accuracy", "exact_match")), None),
        "test loss": run.after.loss if run.after else None,
        "train loss": curve[-1]["train loss"] if curve else None,
        "train samples": figures.steps_done * (records.recipe.training.batch_size if records.recipe else 0),
        "train total tokens": figures.tokens,
    }
    return {
        "accelerator_memory_max": peak,
        "accelerator_memory_reserved_avg": peak,
        "accelerator_memory_reserved_99th": peak,
        "train_time": figures.seconds,
        "tokens_per_second": figures.tokens_per_second,
        "file_size": adapter.stat().st_size if adapter.is_file() else 0,
        "num_trainable_params": run.trainable_parameters,
        "num_total_params": figures.parameters,
        "status": "success",
        "metrics": [*curve, last],
    }


def _learned(run: Run) -> JsonObject:
    """The held-out losses, and the table of tasks."""
    losses = {
        name: None if one is None else asdict(one) for name, one in (("before", run.before), ("after", run.after))
    }
    return losses | {"tasks": list(run.tasks)}


def _value(row: Mapping[str, Any]) -> float | None:
    """What the trained model scored in a row of the table."""
    return None if row["trained"] is None else float(row["trained"]["value"])
