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
from transformers import PreTrainedTokenizerBase

from qlora.errors import DoesNotFitError, ModelError, RecipeError, counted, listed
from qlora.files.html import as_text
from qlora.machine.cards import AMPERE, CARDS, WORKSPACE, Card, amount, card, parse_memory, several, workspace_bytes
from qlora.machine.device import (
    DTYPES,
    capability,
    dtype_name,
    resolve_compute_dtype,
    resolve_device,
    total_memory_bytes,
)
from qlora.machine.disk import bytes_text, duration_text, free_disk, require_disk
from qlora.machine.processes import here
from qlora.methods.base import METHODS, apply_method
from qlora.methods.files import portable_bytes
from qlora.methods.targets import left_out
from qlora.model import anatomy
from qlora.model.attention import keep_apart
from qlora.model.base import count_parameters
from qlora.model.checkpoint import Checkpoint, open_checkpoint
from qlora.model.config import quantised_again
from qlora.model.kernels import fuse
from qlora.model.skeleton import skeleton_base
from qlora.planning.accounting import Account, account_of
from qlora.planning.continued import Origin, continued
from qlora.planning.ladder import Arrangement, Arranger, Target, changed
from qlora.planning.memory import Estimate
from qlora.planning.rates import faster_in_bf16, measure, measure_disk, rates_of
from qlora.planning.rows import Reading, read, with_known_head, with_packing
from qlora.planning.shapes import Dense, dense_of
from qlora.planning.speed import step_seconds
from qlora.recipe import NewTokens, Recipe, parts_of
from qlora.residence.cache import cache_folder_of
from qlora.residence.load import cached_bytes, refuse_shared
from qlora.residence.placement import resident_layers
from qlora.residence.spread import require_several
from qlora.training.passage import asked_at_boundary

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
    dense: Dense | None
    """What of the base stays in 16 or 32 bits; None where nothing is quantised."""
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
    def flops_per_token(self) -> float:
        """Of a step of full rows, forward, loss and backward, with what is recomputed."""
        return sum(one.flops for one in self.chosen.work) / self.chosen.tokens

    @property
    def checkpoint_bytes(self) -> int:
        """What one checkpoint holds."""
        return self.account.checkpoint_bytes

    def _repr_html_(self) -> str:
        return as_text(str(self))

    def __str__(self) -> str:
        model, method = self.recipe.model, self.recipe.method
        trains, *stored = str(self.account).splitlines()
        lines = [
            f"{model.name}: {self.parameters:,} parameters, {model.quantization}, {model.compute_dtype} on {self.target.name}",
            f"{trains}, in {' and '.join(sorted({part.adapter_dtype for part in parts_of(method)}))}",
            str(self.memory),
            *([] if self.dense is None else [str(self.dense)]),
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
    """From the fastest to the smallest; empty where it was not asked for."""
    most_rows: int | None
    """That go through a layer at once and still fit, at the recipe's length."""
    longest_context: int | None
    """Tokens in one row that still fit."""
    fits: bool
    """Whether the recipe fits as it stands, or chooses its arrangement itself."""
    reading: Reading
    """What its data come to."""

    def __str__(self) -> str:
        plan, target = self.plan, self.plan.target
        lines, seconds, reference = [self.summary, str(plan)], None, None
        if plan.chosen.seconds is not None and target.rates is not None:
            of_step, tokens = plan.chosen.seconds, plan.chosen.tokens
            rate, low, high = (target.processes * tokens / end for end in (of_step.expected, of_step.high, of_step.low))
            lines.append(f"{of_step}: {rate:,.0f} tokens/s ({low:,.0f} to {high:,.0f}) by these rates:")
            lines.append(str(target.rates))
            seconds = of_step.expected * self._share
            if plan.recipe.objective.refers:
                reference = step_seconds([plan.chosen.work.forward], target.rates).expected * self._share
        lines.append(self.reading.said(seconds, reference))
        if not self.ladder:
            return "\n".join(lines)
        rows = "not one" if self.most_rows is None else f"{self.most_rows:,}"
        context = "none" if self.longest_context is None else f"{self.longest_context:,} tokens"
        length, sides = plan.recipe.data.max_length, "pairs of " if plan.recipe.objective.pairs else ""
        lines.append(
            f"Largest that fits in this arrangement: {rows} rows of {sides}{length:,} tokens at once; a row of {sides}{context}."
        )
        lines.append("From the fastest arrangement to the smallest:")
        lines += [f"  {line}" for line in ladder_lines(self.ladder, target, plan.chosen)]
        return "\n".join(lines)

    @property
    def _share(self) -> float:
        """What part of a full step's tokens the steps have, on average."""
        report = self.reading.report
        return 1.0 if report is None else self.plan.chosen.share(report.train.tokens, report.train.rows)

    @property
    def summary(self) -> str:
        """What people ask first: ``300 records → 27 rows → 2 epochs = 54 steps ≈ 20 min, evaluation ≈ 3 min, 9.80 GiB of 23.5 GiB``."""
        recipe, chosen, reading = self.plan.recipe, self.plan.chosen, self.reading
        needed = bytes_text(chosen.needed.total)
        free = self.plan.target.free
        memory = f"{needed} of {bytes_text(free)} on {self.plan.target.name}" if free else needed
        if reading.report is None:
            return f"{recipe.model.name}: {memory}"
        training, counts, held_out = recipe.training, reading.report.train, reading.report.held_out
        length = "" if training.steps else f"{counted(training.epochs, 'epoch')} = "
        said = f"{counted(counts.records, 'record')} → {counted(counts.rows, 'row')} → {length}{counted(reading.steps, 'step')}"
        if chosen.seconds is None:
            return f"{said}, {memory}"
        each = chosen.seconds.expected
        said += f" {'≈' if reading.packed else '≤'} {duration_text(reading.steps * each * self._share)}"
        if held_out.tokens:
            every = recipe.evaluation.every
            times = 2 + ((reading.steps - 1) // every if every else 0)
            # forward is a third of a step's arithmetic
            said += f", evaluation ≈ {duration_text(times * held_out.tokens * each / chosen.tokens / 3)}"
        return f"{said}, {memory}"


def ladder_lines(ladder: list[Arrangement], target: Target, chosen: Arrangement | None = None) -> list[str]:
    """A line a rung: its memory on the device and beside it, its speed, whether it fits, and what it changes. Of rungs that do not
    differ in what is shown the first is shown, or the one that is chosen."""
    lines = dict[str, str]()
    for one in ladder:
        speed = "" if one.seconds is None else f"{target.processes * one.tokens / one.seconds.expected:>9,.0f} tokens/s"
        beside = f" + {bytes_text(one.needed.host_total):>10} host" if target.device.type != "cpu" else ""
        fits = "fits" if not target.lacking(one.needed) else "    "
        mark = "→" if chosen is not None and one.changes == chosen.changes else " "
        figures = f"{fits} {bytes_text(one.needed.total):>10}{beside}{speed}"
        if mark == "→" or figures not in lines:
            lines[figures] = f"{mark} {figures}  {one}"
    return list(lines.values())


def plan(recipe: Recipe, checkpoint: Checkpoint | None = None) -> Plan:
    """Resolve a recipe for this machine and estimate what it takes, from configuration and shapes; no weight is read.

    With ``memory.budget`` the arrangement is chosen here: the fastest that fits. Raises DoesNotFitError, with the table and
    the smallest change that would do, when it is more than this machine has free, in memory or on the disk. ``checkpoint``
    is the recipe's, where it was opened before.
    """
    if recipe.memory.spread:
        require_several()
    recipe, origin = continued(recipe)
    checkpoint, budget = checkpoint or open_checkpoint(recipe.model, weights=False), recipe.memory.budget is not None
    planned, _ = _plan(checkpoint, *_here(recipe, checkpoint, rates=budget), choose=budget, origin=origin)
    require_disk(Path(planned.recipe.folder or "."), planned.disk_bytes, "The run folder")
    return planned


def timed(recipe: Recipe, elsewhere: bool = False) -> Plan:
    """The plan for this machine, or ``elsewhere`` for the card in ``device.memory``, with the seconds of a step: a survey without
    what else would fit."""
    recipe, origin = continued(recipe)
    checkpoint = open_checkpoint(recipe.model, weights=False)
    at = card_elsewhere(recipe, checkpoint) if elsewhere else _here(recipe, checkpoint, rates=True)
    return _plan(checkpoint, *at, choose=True, origin=origin)[0]


def survey(recipe: Recipe, table: bool = True) -> Survey:
    """A plan for this machine, or for the card or the amount of memory in ``device.memory``; with ``table`` also the whole ladder
    and the largest that fits, which takes most of the time.

    Nothing of what does not fit is refused where there is an arrangement that does: the fastest of these is planned then,
    and ``why`` says so.
    """
    recipe, origin = continued(recipe)
    checkpoint = open_checkpoint(recipe.model, weights=False)
    elsewhere = recipe.device.memory is not None and recipe.device.name != "cpu"
    target, resolved, why = card_elsewhere(recipe, checkpoint) if elsewhere else _here(recipe, checkpoint, rates=True)
    why = [str(origin), *why] if origin is not None else why
    planned, arranger = _plan(checkpoint, target, resolved, why, choose=True, origin=origin)
    fits = resolved.memory.budget is not None or not planned.chosen.changes
    reading = read(recipe, checkpoint)
    if not table:
        return Survey(planned, [], None, None, fits, reading)
    rows, context = arranger.most_rows(planned.chosen), arranger.longest_context(planned.chosen)
    return Survey(planned, arranger.ladder(), rows, context, fits, reading)


def _plan(
    checkpoint: Checkpoint, target: Target, resolved: Recipe, why: list[str], choose: bool, origin: Origin | None
) -> tuple[Plan, Arranger]:
    """The plan for ``target``. ``choose``: another arrangement is taken where the recipe's own does not fit."""
    budget = resolved.memory.budget is not None
    if again := quantised_again(checkpoint, resolved.model):
        why.append(again)
    dtype = DTYPES[resolved.model.compute_dtype]
    base = skeleton_base(resolved.model, torch.device("meta"), dtype, checkpoint, _tokenizer(resolved, checkpoint))
    if anatomy.sees_ahead(base.model):
        raise ModelError(
            f"In this {anatomy.kind(base.model)} model a token sees what follows it, so it would be trained to copy what it is to "
            "predict. Take another model."
        )
    if resolved.memory.layers != "resident" and not resolved.trains_every_weight:
        layers = anatomy.layers(base.model)
        if len(resident_layers(resolved.memory.layers, len(layers))) < len(layers):
            refuse_shared(base.model, layers, checkpoint.name)
    if resolved.model.attention == "auto":
        keep_apart(base.model, dtype, target.capability)
    # kernels that do not run on this machine are not planned for another one either
    here = target.device.type == "cpu" or torch.cuda.is_available()
    fuse(base.model, dtype, target.capability, target.device if here else None)
    parameters, dense = count_parameters(base.model), dense_of(base.model)
    if base.towers:
        numbers, held = sum(base.towers.values()), [tower for tower, size in base.towers.items() if size]
        why.append(
            f"Of this {type(base.model).__name__} the language model alone is loaded and trained, on text: "
            f"{listed(held)} ({numbers:,} numbers, {bytes_text(2 * numbers)} in 16 bits) are left in their files, and a merge "
            "copies them."
            if held
            else f"Of this {type(base.model).__name__} the checkpoint holds the language model alone."
        )
    adapted = apply_method(base, resolved.method)
    if origin is not None:
        origin.check(adapted)
    for wanted in {getattr(part, "target_modules", ()) for part in parts_of(resolved.method)}:
        why += left_out(adapted.model, wanted)
    if anatomy.is_mixture(base.model):
        why.append("The routers of its experts are frozen, and no loss that balances experts is added.")
        if (checkpoint.config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes":
            why.append(
                f"Its experts, which the checkpoint has in 16 bits, are packed to {resolved.model.quantization} here."
            )
    if left := [path for method in adapted.methods for path in method.left_out]:
        why.append(f"Left out of all-linear, since they are narrower than method.r: {listed(left, 3)}.")
    account = account_of(adapted, parameters, resolved.training.optimizer)
    arranger = Arranger(adapted, resolved, target)
    there = asked_at_boundary(resolved.memory, resolved.memory.layers != "resident")
    if there and (whole := arranger.kept_whole):
        raise RecipeError(
            f"The recipe asks for {listed(there)}, which works at the recompute boundary of the layers. But there can be none: "
            f"{whole}. Leave it out."
        )
    asked = arranger.look()
    lacking = target.lacking(asked.needed)
    if resolved.training.recompute == "auto" and not (budget or lacking):
        decided = arranger.recipe.training
        whole = None if arranger.keeps else arranger.kept_whole
        layered = decided.recompute == "all" and decided.layer_major
        faster = (
            "a layer's weights are then dequantised once a step, which saves more here than keeping activations would"
        )
        reason = whole or (faster if layered else "activations are kept in as many layers as memory allows")
        why.append(f"training.recompute is {decided.recompute}, with {decided.accumulation} accumulation: {reason}.")
    chosen: Arrangement | None = asked
    if budget or lacking:
        chosen = arranger.fastest() if choose else None
    if chosen is None:
        raise DoesNotFitError(_refusal(asked, arranger, account))
    if budget:
        why.append(f"For a budget of {bytes_text(target.free)}, the fastest arrangement that fits is: {chosen}")
    elif lacking:
        why.append(
            f"As the recipe stands it does not fit ({'; '.join(lacking)}). The fastest arrangement that does: {chosen}"
        )
    why.append(_fits(chosen.needed, target))
    if target.processes > 1:
        why.append(_of_each(chosen, resolved.training.batch_size, target))
    final = changed(chosen.recipe, {"memory.budget": None, "training.batch_size": resolved.training.batch_size})
    checkpoints = account.checkpoint_bytes * (resolved.training.keep_checkpoints + 1)
    return Plan(final, target, account, dense, chosen, checkpoints + portable_bytes(adapted) + REST, why), arranger


def _tokenizer(recipe: Recipe, checkpoint: Checkpoint) -> PreTrainedTokenizerBase | None:
    """Where new tokens are to be trained, what says which rows they are; without one they are taken to be added at the end."""
    if not any(isinstance(part, NewTokens) for part in parts_of(recipe.method)):
        return None
    try:
        return checkpoint.tokenizer
    except ModelError:  # a configuration alone is enough for a plan
        return None


def _fits(needed: Estimate, target: Target) -> str:
    """One sentence."""
    if not target.free:
        return "The free memory of this device is not known, so the estimate was not checked against it."
    host = f", and {bytes_text(needed.host_total)} of host memory" if target.device.type != "cpu" else ""
    return f"About {bytes_text(needed.total)} of the {bytes_text(target.free)} that are free on {target.name} will be needed{host}."


def _of_each(chosen: Arrangement, rows: int, target: Target) -> str:
    """What there is to know of several processes."""
    share, memory = chosen.recipe.training.batch_size, chosen.recipe.memory
    said = f"Of {target.processes} processes each takes at most {share} of a step's {rows} rows; memory and seconds are one's."
    if chosen.recipe.trains_every_weight:
        if memory.spread:
            return f"{said} Of its layers each keeps its share: weights, gradients, masters and moments."
        return (
            f"{said} Each keeps the masters and moments of its share of the weights, and all weights and gradients; "
            "memory.layers=streamed memory.tier=processes spreads these too."
        )
    parts = chosen.needed.device.get("layer_parts", 0)
    if not (parts and memory.spread):
        return f"{said} Every one holds the whole base; memory.layers=streamed memory.tier=processes spreads its layers over all."
    others = parts * (target.processes - 1)
    return (
        f"{said} Layers are spread over all: {bytes_text(others)} less on each, and as much comes from the others each time the step "
        "goes up or down through the layers."
    )


def _refusal(asked: Arrangement, arranger: Arranger, account: Account) -> str:
    """What is lacking, the table, and the smallest change that would do; ``account`` is known all the same."""
    target = arranger.target
    ladder = arranger.ladder()
    fitting = arranger.fastest(ladder)
    lacking = "; ".join(target.lacking(asked.needed)) or "the budget is smaller than that"
    if fitting is not None:
        do = f"Set memory.budget=auto, or this yourself: {fitting} ({bytes_text(fitting.needed.total)})."
    else:
        smallest = "".join(
            f" The smallest arrangement needs {bytes_text(one.needed.total)} of it: {one}." for one in ladder[-1:]
        )
        do = (
            f"No arrangement fits.{smallest} {'Raise memory.budget, lower' if asked.recipe.memory.budget not in (None, 'auto') else 'Lower'} data.max_length, "
            "take a smaller model, or stop what else is running."
        )
    return (
        f"About {bytes_text(asked.needed.total)} are needed on {target.name}, of whose {bytes_text(target.total)} "
        f"{bytes_text(target.free)} are free ({lacking}):\n{asked.needed}\n{account}\n{do}"
    )


def _here(recipe: Recipe, checkpoint: Checkpoint, rates: bool) -> tuple[Target, Recipe, list[str]]:
    """(This machine, with no more than the recipe allows; the resolved recipe; why). ``rates``: its speed is measured."""
    device = resolve_device(recipe.device.name)
    dtype = _compute_dtype(recipe, device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "this machine"
    why = []
    if recipe.device.name == "auto":
        why.append(f"device.name is {device.type}: {name if gpu else 'no CUDA device was found'}.")
    resolved, reasons = resolve(recipe, device, dtype, checkpoint)
    free, total = total_memory_bytes(device)
    for limit in (recipe.device.memory, recipe.memory.budget):
        if limit not in (None, "auto"):
            free = min(free or total or amount(str(limit)), amount(str(limit)))
    host, _ = total_memory_bytes(torch.device("cpu"))
    if recipe.device.host_memory is not None:
        allowed = parse_memory(recipe.device.host_memory)
        host = min(host or allowed, allowed)
    sharing = here().local_size  # this machine's memory
    host, free = host // sharing, free if gpu else free // sharing
    cache = cache_folder_of(recipe.memory)
    # what is in the file cache already is not written again
    disk = free_disk(cache) + cached_bytes(resolved.model, dtype, device, recipe.memory, checkpoint)
    measured = measure(device, dtype, cache) if rates else None
    has = capability(device)
    workspace = workspace_bytes(has) if gpu else 0
    return (
        Target(name, device, free, total, host, disk, measured, workspace, has, here().size, sharing),
        resolved,
        [*why, *reasons],
    )


def _compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What a run computes in. On a CPU ``auto`` looks what it is good at; full fine-tuning moves the weights themselves, to
    which bf16's three digits would lose most steps."""
    whole = recipe.trains_every_weight
    if recipe.model.compute_dtype == "auto" and device.type == "cpu" and not whole and faster_in_bf16():
        return torch.bfloat16
    return resolve_compute_dtype(device, recipe.model.compute_dtype)


def card_elsewhere(recipe: Recipe, checkpoint: Checkpoint) -> tuple[Target, Recipe, list[str]]:
    """(The card in ``device.memory``, here or not, by name or by its memory alone; the resolved recipe; why)."""
    processes, wanted = several(str(recipe.device.memory))
    known: Card | None = None if wanted[-1:] in "Bb" and wanted[:1].isdigit() else card(wanted)
    memory = known.memory if known else parse_memory(wanted)
    asked, computes = recipe.model.compute_dtype, known.dtype if known else "bf16"
    dtype = DTYPES[computes if asked == "auto" else asked]
    resolved, why = resolve(recipe, torch.device("cuda", 0), dtype, checkpoint)
    host, _ = total_memory_bytes(torch.device("cpu"))
    if recipe.device.host_memory is not None:
        host = parse_memory(recipe.device.host_memory)
    else:
        why.append(
            f"Host memory is taken to be this machine's ({bytes_text(host)} are free); device.host_memory=64GiB says otherwise."
        )
    if known is None:
        why.append(f"Seconds are predicted for named cards alone: {', '.join(CARDS)}.")
    cache = cache_folder_of(recipe.memory)
    budget = recipe.memory.budget
    target = Target(
        name=("" if processes == 1 else f"each of {processes} × ") + (known.name if known else f"a GPU of {wanted}"),
        device=torch.device("cuda", 0),
        free=memory if budget in (None, "auto") else min(memory, parse_memory(str(budget))),
        total=memory,
        host_free=host // processes,
        disk_free=free_disk(cache),
        rates=rates_of(known, measure_disk(cache)[0]) if known else None,
        workspace=known.workspace if known else WORKSPACE,
        capability=known.capability if known else AMPERE,
        processes=processes,
        sharing=processes,
    )
    return target, resolved, why


def resolve(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, checkpoint: Checkpoint
) -> tuple[Recipe, list[str]]:
    """The recipe with every ``auto`` decided for ``device``, which computes in ``dtype``, and a sentence for each decision.

    Nothing is asked of the device: it need not be here.
    """
    recipe, unknown = with_known_head(recipe, checkpoint)
    why, name = list(filter(None, [unknown])), dtype_name(dtype)
    if recipe.model.compute_dtype == "auto":
        reasons = {"bf16": "the hardware has it", "fp16": "this GPU has no bf16", "fp32": "the default on CPUs"}
        why.append(f"model.compute_dtype is {name}: {reasons[name]}.")
    if recipe.training.optimizer.startswith("paged") and device.type == "cpu":
        why.append("The paged optimizer is not paged here: its state is in host memory anyway.")
    parts = []
    for part in parts_of(recipe.method):
        trained = METHODS[part.name].trained_dtype(part.adapter_dtype, device, dtype)
        parts.append(part.model_copy(update={"adapter_dtype": dtype_name(trained)}))
    method = recipe.method.model_copy(update={"parts": tuple(parts)}) if len(parts) > 1 else parts[0]
    recipe, by_length = with_packing(recipe, checkpoint)
    why += filter(None, [by_length])
    decided = {"model.compute_dtype": name, "model.revision": checkpoint.revision}
    resolved = changed(recipe, {**decided, "device.name": str(device) if here().size == 1 else device.type})
    return resolved.model_copy(update={"method": method}), why
