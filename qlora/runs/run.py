"""The only assembler: recipe or run folder in, finished work out.

    train     recipe → resolve → data → plan → base → method → evaluate → steps → adapter → evaluate → report
    resume    run folder → the same from its newest checkpoint
    plan, preview, evaluate, merge, chat: the parts of it that people ask for alone

Every room is called from here and none calls this one. What a run leaves behind is in the README, file by file.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import Signals as Signal
from typing import Any, Literal

import torch

from qlora.recipe import Recipe
from qlora.data import Data, Preview, Prompt, load_data
from qlora.machine.device import (
    bytes_text,
    dtype_name,
    peak_memory_bytes,
    resolve_compute_dtype,
    resolve_device,
    total_memory_bytes,
)
from qlora.files.strangers import MAX_OURS, Fault, read_object
from qlora.files.durable import (
    clear_leftovers,
    expanded,
    file_written_aside,
    folder_written_aside,
    seal,
    sync,
    write_json,
)
from qlora.errors import RunError, Stopped, listed, redacted, visible
from qlora.evaluation import HeldOut, answers, score
from qlora.export import Merged
from qlora.export import export_adapter as write_adapter
from qlora.export import merge as merge_files
from qlora.runs.folder import (
    TEMPLATE,
    adapter_folder,
    check_base,
    check_data,
    clear,
    device_here,
    differences,
    environment_of,
    full_disk_said,
    open_run,
    read_adapter,
    require_free,
    shown,
    taken,
    template_of,
    with_changes,
)
from qlora.files.lock import run_lock
from qlora.methods import AdaptedModel, apply_method
from qlora.methods.files import load_adapter, save_portable
from qlora.model import load_base
from qlora.model.tokenizer import load_tokenizer, with_new_tokens
from qlora.planning.plan import Plan, amount, plan
from qlora.reporting import write_report
from qlora.training import MetricsLog, Progress, Trainer
from qlora.training import checkpoint as checkpoints
from qlora.training.rehearsal import Rehearsal
from qlora.training.stopping import Signals, stoppable


@dataclass(frozen=True)
class Generation:
    """A held-out prompt and its answers; ``after`` is None until training ends."""

    prompt: str
    expected: str
    before: str | None
    after: str | None = None


@dataclass(frozen=True)
class Run:
    """A run on disk, and what was measured."""

    folder: Path
    steps: int
    trainable_parameters: int
    before: HeldOut | None
    after: HeldOut | None
    generations: list[Generation] = field(default_factory=list)
    report: Path | None = None
    seconds: float = 0.0
    peak_memory_bytes: int = 0


def preview(recipe: Recipe, count: int = 2) -> list[Preview]:
    """The first ``count`` training examples as the model sees them."""
    data = _load_data(recipe)
    return [data.preview(index) for index in range(min(count, data.report.train.examples))]


def train(recipe: Recipe, quiet: bool = False) -> Run:
    """Train a recipe from the start and leave a run folder behind.

    Everything that can be wrong with the input is found before the folder is made. Raises InputError, DoesNotFitError,
    or Stopped after a signal, with a checkpoint saved.
    """
    folder = expanded(recipe.folder or "runs/run")
    with full_disk_said(folder, "train it again"), _kernels_kept():
        return _train(recipe, folder, quiet)


def _train(recipe: Recipe, folder: Path, quiet: bool) -> Run:
    begin = time.perf_counter()
    if folder.is_dir():  # said now, not after minutes of loading
        with taken(folder, recipe.overwrite):
            pass
    else:
        require_free(folder, recipe.overwrite)
    _use_threads(recipe)
    say = _speaker(quiet)
    data = _load_data(recipe)
    say(str(data.report))
    planned = plan(recipe)
    for sentence in planned.why:
        say(sentence)
    # a run's own recipe must not replace the run when it is trained again
    resolved = planned.recipe.model_copy(update={"overwrite": False})
    device = _limited(resolve_device(resolved.device.name), resolved)
    prompts = _prompts(data, resolved)
    model = _load_model(resolved, device, quiet)
    trainer = Trainer(model, data, resolved.training, folder, resolved.memory)
    model.prepare(trainer.batches())
    rehearsal = trainer.rehearse() if resolved.memory.rehearse else None
    if rehearsal is not None:
        for sentence in (*rehearsal.notes, f"{rehearsal} {bytes_text(planned.memory.total)} were predicted."):
            say(sentence)

    with taken(folder, recipe.overwrite), stoppable(f"qlora resume {shown(folder)}") as signals:
        clear(folder)
        with file_written_aside(folder / "recipe.yaml") as aside:
            aside.write_bytes(resolved.to_yaml().encode())  # as the digest has it, also where lines end otherwise
        write_json(folder / "plan.json", redacted(_plan_values(planned, data, trainer, rehearsal)))
        # last: from here on there is a run that can be resumed
        write_json(folder / "environment.json", environment_of(resolved, data, model.base.folder, model.device))
        with full_disk_said(folder, f"go on with: qlora resume {shown(folder)}"):
            return _go_on(resolved, folder, model, data, trainer, signals, prompts, begin, quiet)


def resume(folder: str | Path, *overrides: str, quiet: bool = False) -> Run:
    """Continue a run from its newest checkpoint that is whole, as if it had never stopped.

    ``overrides`` are ``section.key=value`` of settings that change memory, speed or safety alone; they hold for this call.
    Raises RunError when the folder is no run or another process trains in it, and when its recipe or data are not those
    that it began with; RecipeError for an override that would make it another run.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        open_run(folder)  # which says what is wrong
    with full_disk_said(folder, f"go on with: qlora resume {shown(folder)}"), run_lock(folder), _kernels_kept():
        return _resume(folder, overrides, quiet)


def _resume(folder: Path, overrides: Sequence[str], quiet: bool) -> Run:
    begin = time.perf_counter()
    recipe, environment = open_run(folder)
    begun, recipe = recipe, with_changes(recipe, overrides, folder)
    for place in (folder, folder / "checkpoints"):
        clear_leftovers(place)
    _use_threads(recipe)
    data = _load_data(recipe)
    check_data(data, environment, folder)
    check_base(recipe, environment, folder)
    say, device = _speaker(quiet), _limited(device_here(recipe), recipe)
    if changed := differences(recipe, environment, device):
        say(f"The run began elsewhere ({listed(changed, 12)}): it goes on, but not bit for bit any more.")
    if recipe != begun:
        say("What was given for this call may change the order of sums: the run goes on, perhaps not bit for bit.")
    found = checkpoints.find(folder / "checkpoints")
    prompts = _prompts(data, recipe)
    model = _load_model(recipe, device, quiet, values_follow=bool(found))
    trainer = Trainer(model, data, recipe.training, folder, recipe.memory)
    if found:
        for sentence in checkpoints.load_newest(trainer, folder / "checkpoints"):
            say(sentence)
    else:
        model.prepare(trainer.batches())
    say(f"Going on after step {trainer.step_number} of {trainer.total_steps}.")
    MetricsLog(folder / "metrics.jsonl").rewind(trainer.step_number)
    with stoppable(f"qlora resume {shown(folder)}") as signals:
        return _go_on(recipe, folder, model, data, trainer, signals, prompts, begin, quiet)


def _go_on(
    recipe: Recipe,
    folder: Path,
    model: AdaptedModel,
    data: Data,
    trainer: Trainer,
    signals: Signals,
    prompts: list[Prompt],
    begin: float,
    quiet: bool,
) -> Run:
    """From a trainer at any step to a finished run folder."""
    log, settings, say = MetricsLog(folder / "metrics.jsonl"), recipe.evaluation, _speaker(quiet)
    held_out = data.held_out[: settings.held_out_rows]
    try:
        measured = read_object(folder / "evaluation.json", MAX_OURS) or {}
    except Fault:
        raise _damaged(folder) from None
    before, generations = _read_evaluation(measured, folder)
    if measured and len(generations) != len(prompts):
        raise _damaged(folder)

    def held_out_now(step: int) -> HeldOut:
        result = score(model, held_out, trainer.micro_batch_size, trainer.way.loss_chunk)
        log.write(
            {
                "step": step,
                "held_out_loss": result.loss,
                "held_out_perplexity": result.perplexity,
                "held_out_target_tokens": result.target_tokens,
            }
        )
        return result

    alone = all(method.why_not_disabled() is None for method in model.methods)
    if not measured and (held_out or prompts) and alone:  # after a step, full fine-tuning has no base left to measure
        log.rewind_held_out(0)  # of a run that was killed in the middle of this
        with model.disabled():
            if held_out:
                say("Measuring the held-out loss before training …")
                before = held_out_now(0)
                say(f"Held-out loss before: {before.loss:.4f}")
            generations = [
                Generation(prompt.text, prompt.answer, answer)
                for prompt, answer in zip(prompts, _answer(model, prompts, settings.max_new_tokens), strict=True)
            ]
        write_json(folder / "evaluation.json", _evaluation_values(before, None, generations))

    training = recipe.training
    watched = list(data.files)

    def save() -> Path:
        sync(log.path)  # the lines of the steps that the checkpoint counts as done
        for file in [file for file in watched if file.change()]:
            watched.remove(file)  # say it once
            progress.say(
                f"'{file.name}' {file.change()} since this run read it: the run goes on with what it read, but can only be "
                "resumed once that is put back."
            )
        return trainer.save()

    signals.wait = True
    with Progress(trainer.total_steps, trainer.step_number, quiet) as progress:
        for step in trainer:
            log.write(step.metrics())
            progress.show(step)
            last = step.number == trainer.total_steps
            if held_out and settings.every and step.number % settings.every == 0 and not last:
                progress.say(f"Held-out loss after step {step.number}: {held_out_now(step.number).loss:.4f}")
            if last or (training.save_every and step.number % training.save_every == 0):
                save()
            if signals.arrived:
                place = save()
                raise Stopped(
                    f"{Signal(signals.arrived).name} arrived before step {step.number} of {trainer.total_steps} ended; the "
                    f"state is in '{place}'. Go on with: qlora resume {shown(folder)}",
                    signals.arrived,
                )
    signals.wait = False
    if signals.arrived:  # after the last look at it
        raise KeyboardInterrupt
    with folder_written_aside(folder / "adapter", overwrite=True) as aside:
        if why := save_portable(model, aside):
            say(f"The adapter is saved in its own form. {why}.")
        if data.template is not None:
            (aside / TEMPLATE).write_text(data.template.text, encoding="utf-8")
        seal(aside)
    if found := model.report():
        write_json(folder / "method.json", redacted(found))
    after = None
    if held_out:
        say("Measuring the held-out loss after training …")
        log.rewind_held_out(trainer.step_number)
        after = held_out_now(trainer.step_number)
    texts = _answer(model, prompts, settings.max_new_tokens)
    generations = generations or [Generation(prompt.text, prompt.answer, None) for prompt in prompts]
    generations = [
        Generation(old.prompt, old.expected, old.before, text) for old, text in zip(generations, texts, strict=True)
    ]
    if held_out or prompts:
        write_json(folder / "evaluation.json", _evaluation_values(before, after, generations))
    report = write_report(folder)
    return Run(
        folder=folder,
        steps=trainer.step_number,
        trainable_parameters=model.count_trainable(),
        before=before,
        after=after,
        generations=generations,
        report=report,
        seconds=time.perf_counter() - begin,
        peak_memory_bytes=peak_memory_bytes(model.device),
    )


def evaluate(folder: str | Path, quiet: bool = False) -> Run:
    """Held-out loss and answers of a run's adapter, measured now; the run folder stays as it is."""
    begin = time.perf_counter()
    folder = Path(folder)
    recipe, environment = open_run(folder)
    data = _load_data(recipe)
    check_data(data, environment, folder)
    if not data.held_out:
        raise RunError(
            f"The recipe of '{folder}' holds nothing out; evaluate needs data.held_out or held_out_fraction."
        )
    prompts = data.held_out_prompts(recipe.evaluation.prompts)
    model = load_run(folder, quiet)
    rows = data.held_out[: recipe.evaluation.held_out_rows]
    after = score(model, rows, recipe.training.micro_batch_size, recipe.training.loss_chunk)
    texts = _answer(model, prompts, recipe.evaluation.max_new_tokens)
    generations = [Generation(p.text, p.answer, None, text) for p, text in zip(prompts, texts, strict=True)]
    return Run(
        folder=folder,
        steps=0,
        trainable_parameters=model.count_trainable(),
        before=None,
        after=after,
        generations=generations,
        seconds=time.perf_counter() - begin,
        peak_memory_bytes=peak_memory_bytes(model.device),
    )


@dataclass(frozen=True)
class Difference:
    """How far the merged model's logits are from the adapter model's, on held-out text."""

    prompts: int
    largest: float
    """Largest absolute difference of a logit."""
    largest_logit: float
    divergence: float
    """Mean Kullback-Leibler divergence a token, in nats."""
    same_choice: float
    """Share of positions at which both choose the same token."""


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
    folder = Path(folder)
    recipe, environment = open_run(folder)
    section = recipe.model
    source, template = check_base(recipe, environment, folder), template_of(recipe, folder)
    place = expanded(out) if out is not None else folder / "merged"
    with full_disk_said(place, "export it again"):
        return read_adapter(
            folder,
            lambda adapter: merge_files(
                source,
                adapter,
                place,
                quantization=section.quantization,
                double_quant=section.double_quant,
                compute_dtype=section.compute_dtype,
                base=base,
                dtype=dtype,
                overwrite=overwrite,
                trust_remote_code=section.trust_remote_code,
                chat_template=template,
            ),
        )


def export_adapter(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> str | None:
    """Write a run's adapter, or its newest checkpoint's, into ``out`` as plain LoRA, which every server loads.

    Returns None, or why the method is no plain LoRA; its own form is written then.
    """
    folder, out = Path(folder), expanded(out)
    recipe, environment = open_run(folder)
    base, template = check_base(recipe, environment, folder), template_of(recipe, folder)
    with full_disk_said(out, "export it again"):
        return read_adapter(
            folder, lambda adapter: write_adapter(recipe.model, base, adapter, out, overwrite, chat_template=template)
        )


def compare_merged(folder: str | Path, merged: Merged, count: int = 20) -> Difference:
    """Logits of the merged model in plain transformers against the adapter model's, on ``count`` held-out prompts.

    Raises RunError, with the reason, where that cannot be measured here.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = Path(folder)
    recipe, environment = open_run(folder)
    data = _load_data(recipe)
    check_data(data, environment, folder)
    prompts = [prompt.ids for prompt in data.held_out_prompts(count)]
    if not prompts:
        raise RunError("the run has no held-out text.")
    device = device_here(recipe)
    dtype = resolve_compute_dtype(device, recipe.model.compute_dtype)
    free, _ = total_memory_bytes(device)
    if free and merged.bytes / merged.dtype.itemsize * dtype.itemsize > free / 2:
        raise RunError(f"in {dtype_name(dtype)} it would take more than half of the {bytes_text(free)} that are free.")

    def logits_of(network: Any) -> list[torch.Tensor]:
        with torch.no_grad():
            batches = [torch.tensor([ids], device=device) for ids in prompts]
            return [network(ids, use_cache=False).logits[0].float().cpu() for ids in batches]

    expected = logits_of(load_run(folder, quiet=True).model)
    logging.disable_progress_bar()
    try:
        plain: Any = AutoModelForCausalLM.from_pretrained(
            merged.folder, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code
        )
    except Exception as error:
        raise RunError(f"transformers does not load '{merged.folder}': {error}") from error
    found = logits_of(plain.to(device).eval())
    largest = scale = divergence = 0.0
    same = positions = 0
    for logits, reference in zip(found, expected, strict=True):
        largest = max(largest, (logits - reference).abs().max().item())
        scale = max(scale, reference.abs().max().item())
        ours, theirs = reference.log_softmax(-1), logits.log_softmax(-1)
        divergence += (ours.exp() * (ours - theirs)).sum().item()
        same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        positions += len(reference)
    return Difference(len(prompts), largest, scale, divergence / positions, same / positions)


def load_run(folder: str | Path, quiet: bool = False) -> AdaptedModel:
    """The base of a run with its trained adapter, or that of its newest checkpoint."""
    folder = Path(folder)
    recipe, environment = open_run(folder)
    adapter = adapter_folder(folder)
    _use_threads(recipe)
    check_base(recipe, environment, folder)
    device = _limited(device_here(recipe), recipe)
    if adapter.parent.name != "checkpoints":  # the form for others: what it says of itself counts, not the recipe
        return load_adapter(load_base(recipe.model, device, progress=not quiet, memory=recipe.memory), adapter)
    model = _load_model(recipe, device, quiet, values_follow=True)
    return read_adapter(folder, lambda place: load_adapter(model, place), adapter)


def chat_tokenizer(folder: str | Path) -> Any:
    """The run's tokenizer with the chat template that the run was trained with; without one for a run on raw text."""
    recipe, _ = open_run(Path(folder))
    tokenizer = _tokenizer(recipe)
    tokenizer.chat_template = template_of(recipe, Path(folder))
    return tokenizer


def _tokenizer(recipe: Recipe) -> Any:
    """The tokenizer of a recipe's model, with the tokens that its method adds."""
    return with_new_tokens(load_tokenizer(recipe.model), recipe.method)


def _load_data(recipe: Recipe) -> Data:
    return load_data(recipe.data, _tokenizer(recipe), recipe.training.seed, recipe.method.virtual_tokens)


def _load_model(recipe: Recipe, device: torch.device, quiet: bool, values_follow: bool = False) -> AdaptedModel:
    """``values_follow``: an adapter will be loaded, so its first values need not be worked out."""
    base = load_base(recipe.model, device, progress=not quiet, memory=recipe.memory)
    return apply_method(base, recipe.method, recipe.training.seed, values_follow=values_follow)


def _answer(model: AdaptedModel, prompts: list[Prompt], max_new_tokens: int) -> list[str]:
    return answers(model, [prompt.ids for prompt in prompts], max_new_tokens)


def _read_evaluation(values: dict[str, Any], folder: Path) -> tuple[HeldOut | None, list[Generation]]:
    """(held out before, generations) from ``evaluation.json``; (None, []) before it is written."""
    try:
        before = values.get("held_out", {}).get("before")
        generations = [Generation(**item) for item in values.get("generations", [])]
        return (HeldOut(**before) if before else None), generations
    except (AttributeError, TypeError):
        raise _damaged(folder) from None


def _damaged(folder: Path) -> RunError:
    place = folder / "evaluation.json"
    return RunError(f"'{place}' is damaged; delete it, and what it holds is measured again, or train the run anew.")


def _limited(device: torch.device, recipe: Recipe) -> torch.device:
    """``device``, of whose memory this process takes no more than the recipe allows from here on (a CPU has no such limit),
    and with kernels that give the same bits every time where the recipe asks for them."""
    if recipe.device.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch asks for it, before cuBLAS begins
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    limit = recipe.device.memory
    if limit is not None and device.type == "cuda":
        _, total = total_memory_bytes(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, amount(limit) / total), device)
    return device


@contextmanager
def _kernels_kept() -> Iterator[None]:
    """Inside, ``device.deterministic`` may choose other kernels; afterwards this process has those that it had."""
    before = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _prompts(data: Data, recipe: Recipe) -> list[Prompt]:
    """What is asked before and after training. Found before a model is loaded: rendering begins a process."""
    return data.held_out_prompts(recipe.evaluation.prompts) if data.held_out else []


def _plan_values(planned: Plan, data: Data, trainer: Trainer, rehearsal: Rehearsal | None) -> dict[str, Any]:
    recipe = planned.recipe
    return {
        "model": {"parameters": planned.parameters, **recipe.model.model_dump(mode="json")},
        "method": {"trainable_parameters": planned.trainable_parameters, **recipe.method.model_dump(mode="json")},
        "data": data.report.as_dict(),
        "steps": trainer.total_steps,
        "steps_per_epoch": trainer.steps_per_epoch,
        "device": recipe.device.name,
        "memory": planned.memory.as_dict(),
        "rehearsal": None if rehearsal is None else asdict(rehearsal),
        "disk": {"checkpoint": planned.checkpoint_bytes, "total": planned.disk_bytes},
        "why": planned.why,
    }


def _evaluation_values(before: HeldOut | None, after: HeldOut | None, generations: list[Generation]) -> dict[str, Any]:
    held_out = {key: asdict(value) for key, value in (("before", before), ("after", after)) if value is not None}
    return {"held_out": held_out, "generations": [asdict(item) for item in generations]}


def _use_threads(recipe: Recipe) -> None:
    if recipe.device.threads:
        torch.set_num_threads(recipe.device.threads)


def _speaker(quiet: bool) -> Any:
    return (lambda text: None) if quiet else (lambda text: print(visible(redacted(text)), file=sys.stderr, flush=True))
