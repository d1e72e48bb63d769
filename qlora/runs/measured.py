"""What a run becomes in each form it may be shipped in, measured on its held-out answers before one is chosen.

    held-out rows ─► the trained model ─────────────────────────────┐
                 ├─► merged into either base, in 16 bits            ├─► loss, divergence, same choice, paired errors
                 └─► each of these in NF4 again or in a GGUF type,   ┘
                     and what lies there

All go side by side, a layer at a time, so nothing is written for it and one layer of each is dense. Only linears of layers
differ: all else is the trained model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora.data.batches import collate
from qlora.data.packing import Row
from qlora.errors import MethodError, QloraError, RunError, counted
from qlora.evaluation.divergence import Divergence, mean_with_error
from qlora.evaluation.score import plus_minus
from qlora.export.gguf import stands_for
from qlora.export.gguf_models import Converted
from qlora.export.nf4 import linears_of
from qlora.export.source import Source
from qlora.export.verify import GgufFile
from qlora.files.durable import write_text
from qlora.machine.device import total_memory_bytes, trim_heap
from qlora.methods.base import AdaptedModel
from qlora.methods.modules import TrainedModule
from qlora.model import anatomy
from qlora.model.checkpoint import Checkpoint
from qlora.model.config import FOUR_BIT
from qlora.model.load import packed_tensors, turned
from qlora.model.loss import IGNORE_INDEX, head_of
from qlora.model.names import packed_parts
from qlora.model.nf4 import FrozenLinear, Linear4bit, dequantised, features, quantised
from qlora.model.walk import Walk, standing
from qlora.planning.rows import load_recipe_data
from qlora.runs.evaluate import load_run
from qlora.runs.folder import check_data, open_base, open_run, read_adapter

ANSWERS = 32  # that are compared, whole rows of them
WeightOf = Callable[[str, nn.Module], Tensor]
"""The weight [out, in] that a form has for the linear at a path, which stands there in the trained model."""


FORMS = "forms.md"
"""The table in the run folder."""


@dataclass(frozen=True)
class Form:
    """One line of the table: a form of the run's model, against the model as it was trained."""

    name: str
    found: Divergence

    def __str__(self) -> str:
        found, more = self.found, plus_minus(*self.found.difference)
        return (
            f"| {self.name:<28} | {found.loss:6.4f} | {more:>17} | {found.divergence:8.2g} | {found.same_choice:6.1%} |"
        )


def table(forms: Sequence[Form]) -> str:
    """A line on what was measured, and a table in Markdown."""
    where = (
        f"On {counted(forms[0].found.tokens, 'token')} of what is held out (qlora evaluate measures all of it), by the linears of the layers; "
        "all else computes as in training:"
    )
    heading = f"| {'':<28} | {'loss':>6} | {'more than trained':>17} | {'KL':>8} | {'top-1':>6} |"
    return "\n".join([where, "", heading, "|---|--:|--:|--:|--:|", *map(str, forms)])


def judged(form: Form) -> str:
    """Whether a form is good: no more loss than the trained model within two standard errors. What to do where it is not."""
    more, error = form.found.difference
    if more <= 0 or more <= 2 * error < math.inf:
        return "That is good: no more held-out loss than the trained model, within two standard errors."
    return (
        f"That costs {plus_minus(more, error).removeprefix('+')} nats a token. Where it is too much, export in 16 bits (merged for=serving), as GGUF in "
        "8 bits, or the adapter alone."
    )


@dataclass(frozen=True)
class Subject:
    """A run whose exports are measured: its trained model, the stream of its merged tensors, and its rows."""

    model: AdaptedModel
    source: Source
    train: Sequence[Row]
    held_out: Sequence[Row]
    """Whole rows, spread evenly, of ``ANSWERS`` examples or a few more."""

    @property
    def unmeasured(self) -> str:
        """Why its exports cannot be measured, or nothing."""
        if self.source.rearranged:
            return "its checkpoint has experts or fused weights, and plain linears alone are followed layer by layer."
        return "" if self.held_out else "the run holds nothing out (data.held_out or held_out_fraction)."


def subject(folder: Path) -> Subject:
    """The run in ``folder``, opened."""
    recipe, environment = open_run(folder)
    base = open_base(recipe, environment, folder)
    data = load_recipe_data(recipe, base)
    check_data(data, environment, folder)
    model = load_run(folder, quiet=True)
    source = read_adapter(folder, lambda adapter: Source(base, recipe.model, adapter, model.device))
    each = sum(len(row.examples) for row in data.held_out) / max(1, len(data.held_out))
    rows = spread(data.held_out, round(ANSWERS / max(1.0, each))) if data.held_out else []
    return Subject(model, source, data.train, [chosen_alone(row) for row in rows] if data.pairs else rows)


def chosen_alone(row: Row) -> Row:
    """A row of pairs whose rejected answers carry no loss: that these are less likely than before is what was learned."""
    labels = row.labels.copy()
    for begin, end in row.spans()[1::2]:
        labels[begin:end] = IGNORE_INDEX
    return replace(row, labels=labels)


def widen(model: AdaptedModel) -> bool:
    """Have a model on a CPU compute in fp32 with the weights that it has, where memory allows; whether it does.

    Two ways to round 16 bits would be told as a difference.
    """
    free, _ = total_memory_bytes(model.device)
    linears = [module for module in model.model.modules() if isinstance(module, FrozenLinear)]
    bytes_more = 4 * sum(linear.in_features * linear.out_features for linear in linears)
    if model.device.type != "cpu" or model.base.placement is not None or bytes_more > free / 2:
        return False
    model.model.float()
    for module in model.model.modules():
        if isinstance(module, TrainedModule):
            module.widen()
    for linear in linears:
        linear.kept = {torch.float32: linear.dequantise(linear.compute_dtype).float()}
        linear.compute_dtype = torch.float32
    return True


def best_base(folder: Path, type: str | None = None) -> tuple[str, str]:
    """(the base to merge into where nobody says what for, why): measured, where both are at hand.

    ``type``: of a GGUF file; without it in 16 bits, and in NF4 again beside. The original base where it has less loss by twice
    the error of the paired difference, but for preferences. Else the weights that the adapter was trained beside, which give the trained model.
    """
    recipe, _ = open_run(folder)
    if recipe.model.quantization not in FOUR_BIT:
        return "dequantized", ""
    try:
        run = subject(folder)
        if run.source.empty.scheme.prequantised:
            return "dequantized", ""
        if run.unmeasured:
            raise RunError(run.unmeasured)
        kinds = (type,) if type else (None, "nf4")
        forms = measured(
            run.model,
            run.source,
            {f"{base}, {HOW.get(kind, kind)}": merged_into(run.source, base, kind) for base in WHY for kind in kinds},
            run.held_out,
        )
    except MethodError:  # which cannot be merged, into neither
        raise
    except QloraError as error:
        return "dequantized", (
            f"Which base suits was not measured: {error} Merged into the weights that the adapter was trained beside, which "
            "is the trained model in 16 bits, and loses what it learned when it is quantised to 4 bits again (for=quantising)."
        )
    found = table(forms)
    if type is None:
        write_text(folder / FORMS, found + "\n")
    rows = {form.name: form.found.differences for form in forms}
    trained_on, original = (rows[f"{base}, {HOW.get(kinds[0], kinds[0])}"] for base in WHY)
    more, uncertain = mean_with_error([ours - theirs for ours, theirs in zip(original, trained_on, strict=True)])
    # the loss of chosen answers is not what preferences are learned by: there the trained model itself is wanted
    base = "original" if more < -2 * uncertain and not recipe.objective.pairs else "dequantized"
    return base, f"{found}\nMerged into the {base} base: {WHY[base]}"


HOW = {None: "16 bits", "nf4": "in NF4 again"}
WHY = {
    "dequantized": "it is the trained model, for 16 bits or 8 (for=quantising: what may be quantised to 4 bits, or trained on).",
    "original": "it has less held-out loss, and is what it is when it is quantised again (for=serving: the trained model itself).",
}


def spread(rows: Sequence[Any], count: int) -> list[Any]:
    """``count`` rows, but one at least, spread evenly over ``rows``."""
    count = min(len(rows), max(1, count))
    return [rows[place * len(rows) // count] for place in range(count)]


def merged_into(source: Source, base: str, kind: str | None = None) -> WeightOf:
    """A merge into that base, in bf16; ``kind``: that in ``nf4`` as a loader does it, or the merge in a GGUF type."""
    names = {target: name for name, target in source.names.items()}
    dtype = torch.bfloat16 if kind in HOW else torch.float32

    def weight(path: str, linear: nn.Module) -> Tensor:
        values = source.tensor(names[f"{path}.weight"], dtype, requantise=base == "dequantized")
        values = turned(linear, values).contiguous()
        if kind is None:
            return values
        return dequantised(*quantised(values, "nf4", True)) if kind == "nf4" else stands_for(values, kind)

    return weight


def lying_in(folder: Path | GgufFile, source: Source) -> WeightOf:
    """An export that was written: in 16 bits, as bitsandbytes packed it, or a GGUF file."""
    if isinstance(folder, GgufFile):
        file, converted = folder, Converted(source.model.config.get_text_config())
        return lambda path, linear: file.linear(f"{path}.weight", converted).to(source.device)
    checkpoint = Checkpoint(folder, str(folder))
    names = {target: name for name, target in source.names.items()}

    def weight(path: str, linear: nn.Module) -> Tensor:
        name, (outputs, inputs) = names[f"{path}.weight"], features(linear)
        if not packed_parts(name, checkpoint):
            return turned(linear, checkpoint.read(name).to(source.device))
        packed = Linear4bit.empty(
            inputs, outputs, bias=False, quant_type="nf4", double_quant=True, compute_dtype=torch.bfloat16
        )
        packed.place_quantised(packed_tensors(checkpoint, name), source.device)
        return packed.dequantise(torch.bfloat16)

    return weight


def dense_linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    """A plain linear that computes in ``dtype`` with these values."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return linear


def measured(model: AdaptedModel, source: Source, forms: Mapping[str, WeightOf], rows: Sequence[Row]) -> list[Form]:
    """Each of ``forms`` against the trained ``model`` on ``rows``, the model itself first."""
    widen(model)
    batches = [collate([row], 0) for row in rows]
    labels = [batch["labels"][0].to(model.device) for batch in batches]
    given = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    walk, head = Walk(model.model, given), head_of(model.model)
    paths = anatomy.path_of(model.model, walk.layers)
    states = {name: list(walk.first) for name in forms}
    for number, layer in enumerate(walk.layers):
        linears = linears_of(layer, bool(source.quantised))
        for name, weight_of in forms.items():
            instead: dict[str, nn.Module] = {
                path: dense_linear(
                    weight_of(f"{paths}.{number}.{path}", linear),
                    source.bias(f"{paths}.{number}.{path}"),
                    walk.first[0].dtype,
                )
                for path, linear in linears.items()
            }
            with standing(layer, instead):
                states[name] = [walk.visit(number, batch, hidden) for batch, hidden in enumerate(states[name])]
            del instead
        trim_heap()
    found = {"trained": Divergence()} | {name: Divergence() for name in forms}
    for batch, reference in enumerate(walk.last):
        found["trained"].add(reference[0], reference[0], labels[batch], head)
        for name, hidden in states.items():
            found[name].add(walk.behind(batch, hidden[batch])[0], reference[0], labels[batch], head)
    return [Form(name, one) for name, one in found.items()]
