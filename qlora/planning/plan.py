"""The plan: a recipe resolved for this machine or for another card, what it takes, and whether that fits.

    recipe ─► device and dtypes ─► skeleton with its method ─► memory by kind ─► fits? ─► resolved recipe
                                                              └► with a budget: the fastest arrangement that fits
    survey: the same, with the ladder of arrangements, seconds a step, and the largest batch and context

No weight is read: config.json and shapes are enough. Knows every room's shapes through a skeleton; must not know a run
folder or train anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.errors import DoesNotFitError, RecipeError
from qlora.machine.cards import CARDS, Card, card, parse_memory
from qlora.machine.device import (
    DTYPES,
    bytes_text,
    dtype_name,
    free_disk,
    require_disk,
    resolve_compute_dtype,
    resolve_device,
    total_memory_bytes,
)
from qlora.methods import METHODS, apply_method
from qlora.methods.files import portable_bytes
from qlora.model.checkpoint import commit_of, find_model
from qlora.model.skeleton import skeleton_base
from qlora.planning.accounting import Account, account_of, count_parameters
from qlora.planning.ladder import Arrangement, Arranger, Target
from qlora.planning.memory import Estimate
from qlora.planning.speed import Rates, measure, rates_of
from qlora.recipe import Recipe, parts_of
from qlora.residence.cache import cache_folder_of
from qlora.residence.load import cached_bytes

REST = 16 * 1024**2  # metrics, evaluation and report


@dataclass(frozen=True)
class Plan:
    """What a recipe comes down to."""

    recipe: Recipe
    """With every ``auto`` resolved."""
    target: Target
    """What it was planned for."""
    account: Account
    """What the method trains, and what that takes on disk."""
    chosen: Arrangement
    disk_bytes: int
    """What the run folder will hold at most."""
    why: list[str]

    @property
    def memory(self) -> Estimate:
        """What it takes, by kind."""
        return self.chosen.needed

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
            f"{model.name}: {self.parameters:,} parameters, {model.quantization}, {model.compute_dtype} on {self.target.name}",
            f"{trains}, in {' and '.join(sorted({part.adapter_dtype for part in parts_of(method)}))}",
            str(self.memory),
            *stored,
            f"  {'run folder at most':<20}{bytes_text(self.disk_bytes):>12}",
            *self.why,
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Survey:
    """A plan with all that could be chosen instead."""

    plan: Plan
    ladder: list[Arrangement]
    """From the fastest to the smallest."""
    most_rows: int | None
    """That go through a layer at once and still fit, at the recipe's length."""
    longest_context: int | None
    """Tokens in one row that still fit."""
    fits: bool
    """Whether the recipe fits as it stands, or chooses its arrangement itself."""

    def __str__(self) -> str:
        plan, target = self.plan, self.plan.target
        lines = [str(plan)]
        if plan.chosen.seconds is not None and target.rates is not None:
            rate = plan.chosen.tokens_per_second or 0.0
            low, high = (
                plan.chosen.seconds.expected * rate / end for end in (plan.chosen.seconds.high, plan.chosen.seconds.low)
            )
            lines.append(f"{plan.chosen.seconds}: {rate:,.0f} tokens/s ({low:,.0f} to {high:,.0f}) by these rates:")
            lines.append(str(target.rates))
        rows = "not one" if self.most_rows is None else f"{self.most_rows:,}"
        context = "none" if self.longest_context is None else f"{self.longest_context:,} tokens"
        length = plan.recipe.data.max_length
        lines.append(
            f"Largest that fits in this arrangement: {rows} rows of {length:,} tokens at once; a row of {context}."
        )
        lines.append("From the fastest arrangement to the smallest:")
        lines += [f"  {line}" for line in ladder_lines(self.ladder, target, plan.chosen)]
        return "\n".join(lines)


def ladder_lines(ladder: list[Arrangement], target: Target, chosen: Arrangement | None = None) -> list[str]:
    """A line a rung: its memory on the device and beside it, its speed, whether it fits, and what it changes."""
    lines = []
    for one in ladder:
        speed = "" if one.tokens_per_second is None else f"{one.tokens_per_second:>9,.0f} tokens/s"
        beside = f" + {bytes_text(one.needed.host_total):>10} host" if target.device.type != "cpu" else ""
        fits = "fits" if not target.lacking(one.needed) else "    "
        mark = "→" if chosen is not None and one.changes == chosen.changes else " "
        lines.append(f"{mark} {fits} {bytes_text(one.needed.total):>10}{beside}{speed}  {one}")
    return lines


def plan(recipe: Recipe) -> Plan:
    """Resolve a recipe for this machine and estimate what it takes, from configuration and shapes; no weight is read.

    With ``memory.budget`` the arrangement is chosen here: the fastest that fits. Raises DoesNotFitError, with the table and
    the smallest change that would do, when it is more than this machine has free, in memory or on the disk.
    """
    device = resolve_device(recipe.device.name)
    dtype = resolve_compute_dtype(device, recipe.model.compute_dtype)
    resolved, why = resolve(recipe, device)
    return _plan(resolved, why, _here(resolved, device, dtype, rates=recipe.memory.budget is not None), dtype)[0]


def survey(recipe: Recipe) -> Survey:
    """A plan for this machine, or for the card or the amount of memory in ``device.memory``, with the whole ladder.

    Nothing of what does not fit is refused where there is an arrangement that does: the fastest of these is planned then,
    and ``why`` says so.
    """
    elsewhere = recipe.device.memory is not None and recipe.device.name != "cpu"
    if elsewhere:
        target, dtype, resolved, why = card_elsewhere(recipe)
    else:
        device = resolve_device(recipe.device.name)
        dtype = resolve_compute_dtype(device, recipe.model.compute_dtype)
        resolved, why = resolve(recipe, device)
        target = _here(resolved, device, dtype, rates=True)
    planned, arranger = _plan(resolved, why, target, dtype, choose=True)
    asked = resolved.memory.budget is not None or not planned.chosen.changes
    rows, context = arranger.most_rows(planned.chosen), arranger.longest_context(planned.chosen)
    return Survey(planned, arranger.ladder(), rows, context, asked)


def _plan(
    resolved: Recipe, why: list[str], target: Target, dtype: torch.dtype, choose: bool = False
) -> tuple[Plan, Arranger]:
    """The plan for ``target``. ``choose``: another arrangement is taken where the recipe's own does not fit."""
    base = skeleton_base(resolved.model, torch.device("meta"), dtype)
    parameters = count_parameters(base.model)
    adapted = apply_method(base, resolved.method)
    account = account_of(adapted, parameters, resolved.training.optimizer)
    arranger = Arranger(adapted, resolved, target)
    asked = arranger.look()
    lacking = target.lacking(asked.needed)
    if resolved.memory.budget is not None or (lacking and choose):
        chosen = arranger.fastest()
        if chosen is None:
            raise DoesNotFitError(_refusal(asked, arranger, account))
        if resolved.memory.budget is None:
            why.append(
                f"As the recipe stands it does not fit ({'; '.join(lacking)}). The fastest arrangement that does: {chosen}"
            )
        else:
            why.append(f"For a budget of {bytes_text(target.free)}, the fastest arrangement that fits is: {chosen}")
    elif lacking:
        raise DoesNotFitError(_refusal(asked, arranger, account))
    else:
        chosen = asked
    why.append(_fits(chosen.needed, target))
    final = chosen.recipe.model_copy(update={"memory": chosen.recipe.memory.model_copy(update={"budget": None})})
    checkpoints = account.checkpoint_bytes * (resolved.training.keep_checkpoints + 1)
    disk = checkpoints + portable_bytes(adapted) + REST
    if not choose:
        require_disk(Path(resolved.folder or "."), disk, "The run folder")
    return Plan(final, target, account, chosen, disk, why), arranger


def _fits(needed: Estimate, target: Target) -> str:
    """One sentence."""
    if not target.free:
        return "The free memory of this device is not known, so the estimate was not checked against it."
    host = f", and {bytes_text(needed.host_total)} of host memory" if target.device.type != "cpu" else ""
    return f"About {bytes_text(needed.total)} of the {bytes_text(target.free)} that are free on {target.name} will be needed{host}."


def _refusal(asked: Arrangement, arranger: Arranger, account: Account) -> str:
    """What is lacking, the table, and the smallest change that would do; ``account`` is known all the same."""
    target = arranger.target
    ladder = arranger.ladder()
    fitting = arranger.fastest(ladder)
    lacking = "; ".join(target.lacking(asked.needed)) or "the budget is smaller than that"
    if fitting is not None:
        do = f"Set memory.budget=auto, or this yourself: {fitting} ({bytes_text(fitting.needed.total)})."
    else:
        smallest = (
            f" The smallest arrangement needs {bytes_text(ladder[-1].needed.total)} of it: {ladder[-1]}."
            if ladder
            else ""
        )
        do = (
            f"No arrangement fits.{smallest} Lower data.max_length, take a smaller model, or stop what else is running."
        )
    return (
        f"About {bytes_text(asked.needed.total)} are needed on {target.name}, of whose {bytes_text(target.total)} "
        f"{bytes_text(target.free)} are free ({lacking}):\n{asked.needed}\n{account}\n{do}"
    )


def _here(recipe: Recipe, device: torch.device, dtype: torch.dtype, rates: bool) -> Target:
    """This machine: what is free counts, and no more than the recipe allows."""
    free, total = total_memory_bytes(device)
    for limit in (recipe.device.memory, recipe.memory.budget):
        if limit not in (None, "auto"):
            free = min(free or total or amount(str(limit)), amount(str(limit)))
    host, _ = total_memory_bytes(torch.device("cpu"))
    if recipe.device.host_memory is not None:
        allowed = parse_memory(recipe.device.host_memory)
        host = min(host or allowed, allowed)
    cache = cache_folder_of(recipe.memory)
    # what is in the file cache already is not written again
    disk = free_disk(cache) + cached_bytes(recipe.model, dtype, device, recipe.memory)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
    found = measure(device, dtype, cache) if rates else None
    return Target(name, device, free, total, host, disk, found)


def card_elsewhere(recipe: Recipe) -> tuple[Target, torch.dtype, Recipe, list[str]]:
    """(What is planned for, its compute dtype, the resolved recipe, why) for the card in ``device.memory``, here or not: by name,
    or by its memory alone."""
    wanted = str(recipe.device.memory)
    known: Card | None = None if wanted[-1:] in "Bb" and wanted[:1].isdigit() else card(wanted)
    memory = known.memory if known else parse_memory(wanted)
    dtype = DTYPES[
        recipe.model.compute_dtype if recipe.model.compute_dtype != "auto" else known.dtype if known else "bf16"
    ]
    resolved, why = resolve(recipe, torch.device("cuda", 0), dtype)
    here: Rates | None = measure(torch.device("cpu"), torch.float32, cache_folder_of(recipe.memory))
    host, _ = total_memory_bytes(torch.device("cpu"))
    if recipe.device.host_memory is not None:
        host = parse_memory(recipe.device.host_memory)
    else:
        why.append(
            f"Host memory is taken to be this machine's ({bytes_text(host)} are free); device.host_memory=64GiB says otherwise."
        )
    free = memory
    if recipe.memory.budget not in (None, "auto"):
        free = min(free, parse_memory(str(recipe.memory.budget)))
    name = known.name if known else f"a GPU of {wanted}"
    rates = rates_of(known, here) if known else None
    if known is None:
        why.append(f"Seconds are predicted for named cards alone: {', '.join(CARDS)}.")
    target = Target(name, torch.device("cuda", 0), free, memory, host, free_disk(cache_folder_of(recipe.memory)), rates)
    return target, dtype, resolved, why


def amount(text: str) -> int:
    """Bytes of ``24GiB``, or of a card's name. Raises RecipeError for what is neither."""
    try:
        return parse_memory(text)
    except RecipeError:
        return card(text).memory


def resolve(recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None) -> tuple[Recipe, list[str]]:
    """The recipe with every ``auto`` decided for ``device``, and a sentence for each decision.

    ``dtype`` is what a device computes in that is not here to be asked.
    """
    why = []
    here = dtype is None
    if dtype is None:
        dtype = resolve_compute_dtype(device, recipe.model.compute_dtype)
    if recipe.device.name == "auto" and here:
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
