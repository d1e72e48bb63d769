"""The plan: a recipe resolved for this machine, what it takes, and whether that fits; no weight is read.

Knows every room's shapes through a skeleton; must not know a run folder or train anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.accounting import Account, account_of, count_parameters
from qlora.config import Recipe, parts_of
from qlora.device import bytes_text, dtype_name, require_disk, resolve_compute_dtype, resolve_device
from qlora.errors import DoesNotFitError
from qlora.memory import Estimate, check, estimate
from qlora.methods import METHODS, apply_method
from qlora.methods.files import portable_bytes
from qlora.model.load import skeleton_base
from qlora.model.shards import commit_of, find_model

REST = 16 * 1024**2  # metrics, evaluation and report


@dataclass(frozen=True)
class Plan:
    """What a recipe comes down to on this machine."""

    recipe: Recipe
    """With every ``auto`` resolved."""
    account: Account
    """What the method trains, and what that takes on disk."""
    memory: Estimate
    disk_bytes: int
    """What the run folder will hold at most."""
    why: list[str]

    @property
    def parameters(self) -> int:
        """Numbers in the base."""
        return self.account.parameters

    @property
    def trainable_parameters(self) -> int:
        """Numbers that train."""
        return self.account.trainable_parameters

    @property
    def checkpoint_bytes(self) -> int:
        """What one checkpoint holds."""
        return self.account.checkpoint_bytes

    def __str__(self) -> str:
        model, method = self.recipe.model, self.recipe.method
        trains, *stored = str(self.account).splitlines()
        lines = [
            f"{model.name}: {self.parameters:,} parameters, {model.quantization}, {model.compute_dtype} on "
            f"{self.recipe.device.name}",
            f"{trains}, in {' and '.join(sorted({part.adapter_dtype for part in parts_of(method)}))}",
            str(self.memory),
            *stored,
            f"  {'run folder at most':<20}{bytes_text(self.disk_bytes):>12}",
            *self.why,
        ]
        return "\n".join(lines)


def plan(recipe: Recipe) -> Plan:
    """Resolve a recipe and estimate what it takes, from configuration and shapes; no weight is read.

    Raises DoesNotFitError, with the table, when it is more than this machine has free, in memory or on the disk.
    """
    device = resolve_device(recipe.device.name)
    resolved, why = resolve(recipe, device)
    dtype = resolve_compute_dtype(device, resolved.model.compute_dtype)
    section = resolved.model
    base = skeleton_base(section, torch.device("meta"), dtype)
    parameters = count_parameters(base.model)
    adapted = apply_method(base, resolved.method)
    memory = estimate(adapted, resolved.training, resolved.data.max_length, device, resolved.data.packing)
    account = account_of(adapted, parameters, resolved.training.optimizer)
    try:
        why.append(check(memory, device, resolved.training))
    except DoesNotFitError as error:  # what would be trained is known all the same
        raise DoesNotFitError(f"{error}\n{account}") from None
    checkpoints = account.checkpoint_bytes * (resolved.training.keep_checkpoints + 1)
    disk = checkpoints + portable_bytes(adapted) + REST
    require_disk(Path(resolved.folder or "."), disk, "The run folder")
    return Plan(resolved, account, memory, disk, why)


def resolve(recipe: Recipe, device: torch.device) -> tuple[Recipe, list[str]]:
    """The recipe with every ``auto`` decided for ``device``, and a sentence for each decision."""
    why = []
    dtype = resolve_compute_dtype(device, recipe.model.compute_dtype)
    if recipe.device.name == "auto":
        found = torch.cuda.get_device_name(device) if device.type == "cuda" else "no CUDA device was found"
        why.append(f"device.name is {device.type}: {found}.")
    if recipe.model.compute_dtype == "auto":
        reasons = {"bf16": "this GPU has it in hardware", "fp16": "this GPU has no bf16", "fp32": "the fastest on CPUs"}
        why.append(f"model.compute_dtype is {dtype_name(dtype)}: {reasons[dtype_name(dtype)]}.")
    section = recipe.model
    folder = find_model(section.name, section.revision, weights=False, trust_remote_code=section.trust_remote_code)
    commit = commit_of(folder)
    parts = tuple(
        part.model_copy(
            update={"adapter_dtype": dtype_name(METHODS[part.name].trained_dtype(part.adapter_dtype, device, dtype))}
        )
        for part in parts_of(recipe.method)
    )
    method = recipe.method.model_copy(update={"parts": parts}) if len(parts) > 1 else parts[0]
    if recipe.training.optimizer.startswith("paged") and device.type == "cpu":
        why.append("The paged optimizer is not paged here: its state is in host memory anyway.")
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"compute_dtype": dtype_name(dtype), "revision": commit or recipe.model.revision}
            ),
            "method": method,
            "device": recipe.device.model_copy(update={"name": str(device)}),
        }
    ), why
