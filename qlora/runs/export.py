"""Export: a run's adapter merged into its base, or alone, and how far what was exported is from what was trained.

run folder ─► adapter + base ─► merged (plain safetensors)  ─► compared with the trained model on held-out text
                            ├─► the adapter as plain LoRA
                            └─► either as a GGUF file
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from qlora.errors import DiffersError, RunError, listed
from qlora.export.adapter import export_adapter as write_adapter
from qlora.export.gguf import Written, export_gguf_adapter
from qlora.export.gguf import export_gguf as write_gguf
from qlora.export.gguf_models import Converted
from qlora.export.gguf_tokenizer import require_known
from qlora.export.llama_cpp import LlamaCpp
from qlora.export.merged import Merged, changed_since
from qlora.export.merged import merge as merge_files
from qlora.export.nf4 import export_nf4 as write_nf4
from qlora.export.programs import Verdict, commands, programs
from qlora.export.source import Source
from qlora.export.verify import GgufFile, verify, verify_adapter, verify_gguf
from qlora.files.durable import SEAL, damage, expanded
from qlora.machine.device import release_memory, resolve_compute_dtype, total_memory_bytes
from qlora.methods.files import CONFIG, read_about_base
from qlora.model import anatomy
from qlora.model.checkpoint import MERGE, Checkpoint, open_checkpoint
from qlora.model.config import is_wrapper
from qlora.model.load import end_tokens as known_ends
from qlora.model.loss import head_of, hidden_states
from qlora.planning.rows import load_recipe_data
from qlora.recipe import LoRA, Recipe, parts_of
from qlora.reporting.card import write_card
from qlora.runs.evaluate import load_run
from qlora.runs.folder import (
    check_data,
    device_here,
    end_tokens,
    export_folder,
    full_disk_said,
    open_base,
    open_run,
    read_adapter,
    require_language_model,
    template_of,
)
from qlora.runs.measured import Form, lying_in, measured, merged_into, spread, subject, widen

Some = TypeVar("Some")
CLOSE = 0.02  # nats a token between a model and its merge in 16 bits: ten times what rounding was seen to make of it
WORSE = 0.1  # nats a token of held-out loss that a model in other weights may have more


@dataclass(frozen=True)
class Difference:
    """How far the merged model's logits are from the adapter model's, on held-out text."""

    examples: int
    largest: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    divergence: float
    """Mean Kullback-Leibler divergence, in nats per token, or per example of a classifier."""
    same_choice: float
    """Share of positions at which both choose the same token, or of examples with the same class."""
    classifies: bool = False
    same: bool = True
    """Whether it should be the trained model: a merge into the weights that were trained on, in 8 bits or more."""

    def told(self, program: str) -> str:
        """The numbers, and whether they are good."""
        if self.divergence <= CLOSE:
            judged = f"That is good: up to {CLOSE} nats is rounding."
        elif self.same:
            judged = f"Above {CLOSE} nats is more than rounding: it answers otherwise than what was trained."
        else:
            judged = (
                "It is not meant to be the same: its weights are not those that were trained on. How well it answers, its held-out loss says; "
                "the trained model itself comes from for=serving, or from GGUF in 8 bits with base=dequantized."
            )
        unit, choice, places = (
            ("example", "class", "examples") if self.classifies else ("token", "next token", "positions")
        )
        return (
            f"In {program}, on {self.examples} held-out examples: logits differ by at most {self.largest:.3g} (of "
            f"{self.largest_logit:.3g}), {self.divergence:.2g} nats per {unit}, the same {choice} at "
            f"{self.same_choice:.1%} of the {places}. {judged}"
        )


@dataclass(frozen=True)
class _Opened:
    """What of a run is exported: its recipe, its base, its chat template, and the tokens that end its answers."""

    folder: Path
    recipe: Recipe
    base: Checkpoint
    template: str | None
    ends: tuple[int, ...]

    def export(self, place: Path, write: Callable[[Path], Some]) -> Some:
        """Have ``write`` make what goes into ``place`` of the run's adapter."""
        with full_disk_said(place, "export it again"):
            return read_adapter(self.folder, write)


def _opened(folder: str | Path) -> _Opened:
    folder = Path(folder)
    recipe, environment = open_run(folder)
    base = open_base(recipe, environment, folder)
    return _Opened(folder, recipe, base, template_of(recipe, folder, base), end_tokens(recipe, folder, base))


def merge(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    base: Literal["dequantized", "original"] = "dequantized",
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16",
    overwrite: bool = False,
) -> Merged:
    """Merge a run's adapter into its base: plain safetensors in ``out`` (``RUN/merged`` when left out).

    One tensor in memory at a time. ``base="dequantized"`` merges into the weights that the adapter was trained beside,
    ``"original"`` into the checkpoint's own.
    """
    run, place = _opened(folder), export_folder(Path(folder), "merged", out)
    section = run.recipe.model
    return run.export(
        place,
        lambda adapter: merge_files(
            run.base.folder,
            adapter,
            place,
            quantization=section.quantization,
            double_quant=section.double_quant,
            compute_dtype=section.compute_dtype,
            base=base,
            dtype=dtype,
            overwrite=overwrite,
            trust_remote_code=section.trust_remote_code,
            chat_template=run.template,
            ends=run.ends,
            checkpoint=run.base,
        ),
    )


def export_adapter(
    folder: str | Path, out: str | Path, *, overwrite: bool = False, keys: Literal["whole", "text"] = "whole"
) -> str | None:
    """Write a run's adapter, or its newest checkpoint's, into ``out`` as plain LoRA, which every server loads.

    ``keys``: of a multimodal base, for the ``whole`` class or for that of its ``text`` model alone.

    Returns None, or why the method is no plain LoRA; its own form is written then.
    """
    run, out = _opened(folder), expanded(out)
    return run.export(
        out,
        lambda adapter: write_adapter(
            run.recipe.model, run.base, adapter, out, overwrite, chat_template=run.template, keys=keys
        ),
    )


def export_gguf(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    type: str = "q8_0",
    base: Literal["dequantized", "original"] = "dequantized",
    adapter: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write a run's merged model, or with ``adapter`` its adapter alone, as GGUF into ``out``.

    ``out`` is ``RUN/gguf-TYPE`` or ``RUN/gguf-adapter`` when left out. ``type`` and ``base`` are the merged model's.
    """
    require_gguf(folder)
    run = _opened(folder)
    place = export_folder(run.folder, "gguf-adapter" if adapter else "gguf", out, type)
    section = run.recipe.model
    if adapter:
        return run.export(place, lambda found: export_gguf_adapter(section, run.base, found, place, overwrite))
    return run.export(
        place,
        lambda found: write_gguf(
            run.base.folder,
            found,
            place,
            section=section,
            type=type,
            base=base,
            overwrite=overwrite,
            chat_template=run.template,
            ends=run.ends,
            checkpoint=run.base,
        ),
    )


def require_gguf(folder: str | Path) -> None:
    """Raise RunError or ModelError where there can be no GGUF file of a run's model, which costs nothing to find."""
    require_language_model(Path(folder), "GGUF")
    base = _opened(folder).base
    Converted(base.model_config().get_text_config())
    require_known(base.tokenizer)


def loaded_by(folder: str | Path, adapter: str | Path) -> list[Verdict]:
    """Which programs load the exported ``adapter`` of a run, and how."""
    base = open_checkpoint(open_run(Path(folder))[0].model, weights=False)
    return programs(expanded(adapter), bool(anatomy.text_config(base.model_config()).tie_word_embeddings))


def write_card_of(
    folder: str | Path, out: str | Path, form: str, told: Sequence[str] = (), verdicts: Sequence[Verdict] = ()
) -> Path:
    """Write the model card of what a run exported as ``form`` into ``out``; ``verdicts``: of an adapter's programs."""
    base = open_checkpoint(open_run(Path(folder))[0].model, weights=False)
    shell = commands(verdicts)
    opened = (base_of(out), base.tokenizer.pad_token_id) if form == "adapter" else None
    return write_card(Path(folder), expanded(out), form, base_folder=base.folder, told=told, shell=shell, opened=opened)


def export_nf4(
    folder: str | Path, out: str | Path | None = None, *, overwrite: bool = False
) -> tuple[Merged, list[Form]]:
    """Write a run's model in bitsandbytes' NF4 into ``out`` (``RUN/nf4`` when left out), and measure what was written.

    The table has the trained model, the merge into the weights it was trained beside in NF4 again, and this; it is empty
    where nothing is held out.
    """
    require_language_model(Path(folder), "export to NF4")
    run, place = _opened(folder), export_folder(Path(folder), "nf4", out)
    merged = run.export(
        place,
        lambda adapter: write_nf4(
            run.base,
            adapter,
            place,
            section=run.recipe.model,
            overwrite=overwrite,
            chat_template=run.template,
            ends=run.ends,
        ),
    )
    found = subject(run.folder)
    if found.unmeasured:
        return merged, []
    forms = {
        "dequantized, in NF4 again": merged_into(found.source, "dequantized", "nf4"),
        "this NF4": lying_in(place, found.source),
    }
    return merged, measured(found.model, found.source, forms, found.held_out)


def base_of(adapter: str | Path) -> str:
    """What an exported adapter calls its base."""
    return str(read_about_base(expanded(adapter))["base_model_name_or_path"])


def stands_apart(folder: str | Path) -> str | None:
    """What to know of an adapter that was trained beside quantised weights that no base has, not even quantised; None of others."""
    recipe, _ = open_run(Path(folder))
    loras = [part for part in parts_of(recipe.method) if isinstance(part, LoRA)]
    gave_up = [
        part.init for part in loras if part.init == "pissa" or (part.init == "loftq" and part.loftq_iterations > 1)
    ]
    if not gave_up or recipe.model.quantization == "none":
        return None
    return (
        f"With method.init={gave_up[0]} it was trained beside quantised weights that gave a part up, which no base has: on the base, in "
        "16 bits or 4, it is near what was trained and not the same. The trained model itself: qlora export RUN merged for=serving"
    )


def foreign_ends(folder: str | Path) -> list[str]:
    """The tokens that end a run's answers and are no ends by the base's own files, which is what generates with an adapter."""
    run = _opened(folder)
    new = [end for end in run.ends if end not in known_ends(run.base)]
    return list(run.base.tokenizer.convert_ids_to_tokens(new))


def in_transformers(folder: Path, place: Path, count: int = 20) -> Difference | None:
    """Logits of an exported model in plain transformers against the adapter model's, on ``count`` held-out examples, whole.

    None where it would take more than half of the free memory: ``check`` goes layer by layer. Raises RunError, with the
    reason, where nothing can be measured, and DiffersError where a merge that should be the trained model is further from
    it than ``CLOSE``.
    """
    recipe, examples = _examples(folder, count)
    device, exported = device_here(recipe), Checkpoint(place, str(place))
    trained = load_run(folder, quiet=True)
    widened = widen(trained)
    dtype = torch.float32 if widened else resolve_compute_dtype(device, recipe.model.compute_dtype)
    numbers = sum(math.prod(entry.shape) for entry in exported.entries.values())
    free, _ = total_memory_bytes(device)
    if free and numbers * dtype.itemsize > free / 2:
        return None
    if recipe.classes:
        examples = [ids[:-1] for ids in examples]  # the last stands for the class
        expected = [_class_logits(trained.model, ids, device) for ids in examples]
    else:
        expected = list(_logits(trained.model, examples, device))
    del trained
    release_memory(device)
    network = _plain(place, dtype, recipe.model.trust_remote_code, bool(recipe.classes)).to(device).eval()
    found = _logits(network, examples, device)
    same = exported.merge.get("weights") == "dequantized"
    difference = replace(_difference(found, expected), classifies=bool(recipe.classes), same=same)
    hold(place, same, difference.divergence)
    return difference


def in_llama_cpp(folder: Path, file: GgufFile, count: int = 20) -> Difference:
    """Logits of a GGUF file in llama.cpp against the adapter model's. Raises as ``in_transformers``."""
    recipe, examples = _examples(folder, count)
    opened = LlamaCpp(file.file, context=max(map(len, examples)))
    found = []
    for ids in examples:
        opened.begin()
        found.append(torch.from_numpy(opened.logits(ids)))
    opened.close()
    trained = load_run(folder, quiet=True)
    widen(trained)
    difference = _difference(found, _logits(trained.model, examples, device_here(recipe)))
    difference = replace(difference, same=_is_trained(file))
    hold(file.file, difference.same, difference.divergence)
    return difference


def _examples(folder: Path, count: int) -> tuple[Recipe, list[list[int]]]:
    """A run's recipe and ``count`` of its held-out examples. Raises RunError where nothing is held out."""
    recipe, environment = open_run(folder)
    data = load_recipe_data(recipe, open_checkpoint(recipe.model, weights=False))
    check_data(data, environment, folder)
    every = [row.ids[begin:end].tolist() for row in data.held_out for begin, end in row.spans()]
    if not every:
        raise RunError("the run has no held-out text.")
    return recipe, spread(every, count)


@dataclass(frozen=True)
class Checked:
    """What an export was found to be: its tensors are the run's, and it answers so."""

    tensors: int
    forms: list[Form] = field(default_factory=list)
    """The trained model and the export, measured; empty for adapters, and where ``unmeasured`` says why."""
    opened: Difference | None = None
    """How far the program that was asked for is from the trained model."""
    unmeasured: str = ""


def check(folder: str | Path, place: str | Path | None = None, program: str | None = None) -> Checked:
    """Compare the export in ``place`` with the run: every tensor, what it answers, and how ``program``, llama.cpp, opens it.

    ``place`` is what an export wrote, here or elsewhere, or a GGUF file; ``RUN/merged`` when left out. One tensor, and then one
    layer, is dense at a time. Raises DiffersError where a tensor is not the export's, or where it answers otherwise: a merge into
    the weights that were trained on, in 8 bits or more, by more than ``CLOSE``, any other by more than ``WORSE`` of loss.
    """
    folder, place = Path(folder), expanded(place) if place is not None else Path(folder) / "merged"
    files = [place] if place.suffix == ".gguf" else sorted(place.glob("*.gguf"))
    if len(files) > 1:
        raise RunError(f"'{place}' holds {listed([file.name for file in files])}; say which: from={files[0]}")
    if program is not None and (not files or (place / "adapter.gguf").is_file()):
        raise RunError(f"llama.cpp opens models as GGUF, and '{place}' holds none; check it without program=.")
    file = GgufFile(files[0]) if files else None
    if (place / CONFIG).is_file() or (file is not None and file.said.get("general.type") == "adapter"):
        run, at = _opened(folder), place if file is None else file.file
        read = read_adapter(folder, lambda found: verify_adapter(run.recipe.model, run.base, found, at))
        if file is None and (place / SEAL).is_file() and (why := damage(place)):
            raise DiffersError(f"'{place}' is not what was written ({why}); put that back, or export it again.")
        return Checked(read)
    found = subject(folder)
    if file is None:
        tensors, lying = verify(found.source, place), lying_in(place, found.source)
        same = Checkpoint(place, str(place)).merge.get("weights") == "dequantized"
        if (place / MERGE).is_file() and (other := changed_since(place)):
            raise DiffersError(
                f"'{place}' has other content than was written in {listed(other)}, beside its weights, and may answer otherwise; "
                "put that back, or export it again."
            )
    else:
        run = _opened(folder)
        tensors, lying = verify_gguf(found.source, file, run.template, run.ends), lying_in(file, found.source)
        same = _is_trained(file)
    if why := found.unmeasured:
        return Checked(tensors, unmeasured=why)
    forms = measured(found.model, found.source, {place.name: lying}, found.held_out)
    hold(place, same, forms[1].found.divergence, forms[1].found.difference[0])
    del found
    return Checked(tensors, forms, in_llama_cpp(folder, file) if program and file else None)


def reread(folder: Path, place: Path) -> str:
    """Hold every tensor of a merged model or one in NF4 against the run, but codes of 4 bits; a sentence that says so.

    Raises DiffersError where one is another.
    """
    run = _opened(folder)
    source = read_adapter(folder, lambda adapter: Source(run.base, run.recipe.model, adapter, device_here(run.recipe)))
    return f"Read again: its {verify(source, place)} tensors are those of the run."


def _is_trained(file: GgufFile) -> bool:
    """Whether a GGUF file should be the trained model: merged into the weights that were trained on, in 8 bits or more."""
    kinds = {tensor.tensor_type.name for tensor in file.tensors.values()}
    return file.weights == "dequantized" and kinds <= {"F32", "F16", "BF16", "Q8_0"}


def hold(place: Path, same: bool, divergence: float, more: float = 0.0) -> None:
    """Raise DiffersError where an export is too far from what was trained, in nats a token; ``same``: it should be that."""
    if same and not divergence <= CLOSE:
        raise DiffersError(
            f"'{place}' is {divergence:.2g} nats a token from the trained model; expected at most {CLOSE}. Export it again; if it "
            "stays so, please report it."
        )
    if not more <= WORSE:
        raise DiffersError(
            f"'{place}' has {more:.3f} nats a token more held-out loss than the trained model; expected at most {WORSE}. "
            "Export it in more bits, as merged for=serving or gguf type=q8_0."
        )


def _plain(folder: Path, dtype: torch.dtype, trust_remote_code: bool, classifies: bool) -> nn.Module:
    """The merged model as anyone would load it."""
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMultimodalLM,
        AutoModelForSequenceClassification,
    )
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        maker: Any = AutoModelForMultimodalLM if is_wrapper(config) else AutoModelForCausalLM
        maker = AutoModelForSequenceClassification if classifies else maker
        # expert by expert: its grouped products take no experts of some widths
        model: nn.Module = maker.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, experts_implementation="eager"
        )
    except Exception as error:
        raise RunError(f"transformers does not load '{folder}': {error}") from error
    return model


@torch.no_grad()
def _logits(network: nn.Module, examples: list[list[int]], device: torch.device) -> Iterator[Tensor]:
    """Of each example [T], its logits [T, V], of a classifier [1, C], in fp32 on the CPU."""
    for ids in examples:
        logits = network(torch.tensor([ids], device=device), use_cache=False).logits.float().cpu()
        yield logits if logits.dim() == 2 else logits[0]


@torch.no_grad()
def _class_logits(network: nn.Module, ids: list[int], device: torch.device) -> Tensor:
    """The logits [1, C] of a classifier that is being trained, in fp32 on the CPU."""
    given = torch.tensor([ids], device=device)
    hidden = hidden_states(network, {"input_ids": given, "position_ids": torch.arange(len(ids), device=device)[None]})
    return head_of(network).logits(hidden[0, -1:]).float().cpu()


def _difference(found: Iterable[Tensor], expected: Iterable[Tensor]) -> Difference:
    largest = scale = divergence = 0.0
    same = positions = examples = 0
    for logits, reference in zip(found, expected, strict=True):
        largest = max(largest, (logits - reference).abs().max().item())
        scale = max(scale, reference.abs().max().item())
        ours, theirs = reference.log_softmax(-1), logits.log_softmax(-1)
        divergence += (ours.exp() * (ours - theirs)).sum().item()
        same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        positions += len(reference)
        examples += 1
    return Difference(examples, largest, scale, divergence / positions, same / positions)
