"""The plan: a recipe resolved for this machine, what it takes, and whether that fits; no weight is read.

Knows every room's shapes through a skeleton; must not know a run folder or train anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.config import Recipe
from qlora.device import bytes_text, dtype_name, require_disk, resolve_compute_dtype, resolve_device
from qlora.memory import Estimate, check, estimate
from qlora.methods import apply_method
from qlora.methods.lora import adapter_dtype
from qlora.model import Base
from qlora.model.nf4 import FrozenLinear
from qlora.model.shards import commit_of, find_model
from qlora.model.skeleton import load_skeleton

REST = 16 * 1024**2  # metrics, evaluation and report


@dataclass(frozen=True)
class Plan:
    """What a recipe comes down to on this machine."""

    recipe: Recipe
    """With every ``auto`` resolved."""
    parameters: int
    trainable_parameters: int
    memory: Estimate
    checkpoint_bytes: int
    disk_bytes: int
    """What the run folder will hold at most."""
    why: list[str]

    def __str__(self) -> str:
        model, method = self.recipe.model, self.recipe.method
        lines = [
            f"{model.name}: {self.parameters:,} parameters, {model.quantization}, {model.compute_dtype} on "
            f"{self.recipe.device.name}",
            f"{method.name}: {self.trainable_parameters:,} trainable parameters "
            f"({self.trainable_parameters / self.parameters:.2%}) in {method.adapter_dtype}",
            str(self.memory),
            f"  on disk{bytes_text(self.disk_bytes):>25}, {bytes_text(self.checkpoint_bytes)} a checkpoint",
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
    model = load_skeleton(section, dtype)
    parameters = _count_parameters(model)
    meta = torch.device("meta")
    base = Base(
        model, None, Path(), section.name, section.revision, section.quantization, section.double_quant, meta, dtype
    )
    adapted = apply_method(base, resolved.method)
    memory = estimate(adapted, resolved.training, resolved.data.max_length, device, resolved.data.packing)
    why.append(check(memory, device, resolved.training))
    state = memory.adapter + memory.optimizer
    disk = state * (resolved.training.keep_checkpoints + 1) + memory.adapter + REST
    require_disk(Path(resolved.folder or "."), disk, "The run folder")
    return Plan(resolved, parameters, adapted.count_trainable(), memory, state, disk, why)


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
    adapters = adapter_dtype(recipe.method.adapter_dtype, device, dtype)
    if recipe.training.optimizer.startswith("paged") and device.type == "cpu":
        why.append("The paged optimizer is not paged here: its state is in host memory anyway.")
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(
                update={"compute_dtype": dtype_name(dtype), "revision": commit or recipe.model.revision}
            ),
            "method": recipe.method.model_copy(update={"adapter_dtype": dtype_name(adapters)}),
            "device": recipe.device.model_copy(update={"name": str(device)}),
        }
    ), why


def _count_parameters(model: torch.nn.Module) -> int:
    """Numbers in the model, packed ones counted one by one, shared ones once."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, FrozenLinear))
    return packed + sum(p.numel() for p in model.parameters())
