"""Train and resume: recipe or run folder in, finished run folder out.

    train     recipe ─► data ─► plan ─► base + method ─► rehearsal ─► folder ─┐
    resume    folder ─► recipe ─► data ─► base + method ─► newest checkpoint ─┴► measure ─► steps ─► adapter ─► measure ─► report

Everything that can be wrong with the input is found before a folder is made.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from signal import Signals as Signal
from statistics import median

from qlora.errors import NonFiniteError, PackingError, RunError, Stopped, counted, listed, redacted
from qlora.evaluation.score import HeldOut
from qlora.evaluation.tasks.result import Result
from qlora.files.durable import clear_leftovers, expanded, folder_written_aside, keep_apart, seal, sync, write_json
from qlora.files.lock import run_lock
from qlora.machine.device import DTYPES, resolve_device
from qlora.machine.disk import bytes_text, duration_text
from qlora.machine.processes import here
from qlora.methods.files import save_portable
from qlora.model.checkpoint import open_checkpoint
from qlora.model.tokenizer import TEMPLATE
from qlora.planning.continued import continued
from qlora.planning.plan import Plan, plan
from qlora.planning.rates import matrix_rate
from qlora.planning.rows import load_recipe_data, with_head
from qlora.recipe import Recipe
from qlora.reporting import write_report
from qlora.residence.owned import all_here
from qlora.residence.placement import by_main
from qlora.runs.bases import Bases
from qlora.runs.folder import (
    check_data,
    clear,
    device_here,
    exports_in,
    full_disk_said,
    lengthen,
    open_base,
    open_run,
    require_checkpoint,
    shown,
    steps_of,
    taken,
    with_changes,
)
from qlora.runs.session import (
    NOTHING_HELD_OUT,
    Generation,
    Run,
    Session,
    damaged_evaluation,
    decided_by_main,
    kernels_kept,
    limited,
    load_model,
    measured,
    read_evaluation,
    speaker,
    stop_at,
    use_threads,
    with_threads,
    write_evaluation,
)
from qlora.runs.tasks import keep_base, open_tasks, score_base, score_tasks, write_table
from qlora.training import checkpoint as checkpoints
from qlora.training.log import Progress
from qlora.training.loop import Trainer
from qlora.training.record import differences, launcher, recorded
from qlora.training.reference import rows_at_once
from qlora.training.rehearsal import Rehearsal
from qlora.training.stopping import Signals, stoppable
from qlora.training.tracking import require_trackers, tracking


def train(recipe: Recipe, quiet: bool = False, bases: Bases | None = None) -> Run:
    """Train a recipe from the start and leave a run folder behind. Of several processes all call it (``machine/processes.py``):
    the main one writes, measures and speaks, and the others take the steps along.

    ``bases``: where the base comes from and stays afterwards, for runs that follow each other in one process.

    Raises InputError, DoesNotFitError, or Stopped after a signal, with a checkpoint saved.
    """
    folder, processes = expanded(recipe.folder or "runs/run"), here()
    if _begun_before(folder):
        return resume(folder, quiet=quiet, bases=bases)
    quiet = quiet or not processes.main
    if recipe.method.from_ is not None and expanded(recipe.method.from_).resolve() == folder.resolve():
        origin, folder = folder, Path(processes.once(lambda: str(_beside(folder))))
        recipe = recipe.model_copy(update={"folder": str(folder), "overwrite": False})
        speaker(quiet)(f"More of the run in '{origin}', in a folder of its own: '{folder}'.")
    # taken now, so that no other process loads a model for the same folder
    ours = taken(folder, recipe.overwrite) if processes.main else nullcontext()
    with full_disk_said(folder, "train it again"), kernels_kept(), ours:
        session, planned, rate = _packed_or_by_length(recipe, folder, quiet, bases or Bases())
        session.rehearsal = _rehearse(session, planned)
        with stoppable(f"qlora resume {shown(folder)}") as signals:
            if processes.main:
                clear(folder)
                write_json(folder / "plan.json", redacted(_plan_values(planned, rate, session)))
            session.trainer.begin()
            if session.recipe.method.from_ is not None:
                session.trainer.save()  # from here on, the run needs the old adapter no more
            with full_disk_said(folder, f"go on with: qlora resume {shown(folder)}"), _tracked(session):
                return _finish(session, signals, bases)


def resume(folder: str | Path, *overrides: str, quiet: bool = False, bases: Bases | None = None) -> Run:
    """Continue a run from its newest checkpoint that is whole, as if it had never stopped.

    ``overrides`` are ``section.key=value`` of settings that change memory, speed or safety alone; they hold for this call.
    Raises RunError when the folder is no run or another process trains in it, and when its recipe or data are not those
    that it began with; RecipeError for an override that would make it another run.
    """
    folder, processes = Path(folder), here()
    quiet = quiet or not processes.main
    if not (folder / "recipe.yaml").is_file():
        open_run(folder)  # which says what is wrong
    lock = run_lock(folder) if processes.main else nullcontext()
    with full_disk_said(folder, f"go on with: qlora resume {shown(folder)}"), lock, kernels_kept():
        session = _old_session(folder, overrides, quiet, bases or Bases())
        session.trainer.begin()
        with stoppable(f"qlora resume {shown(folder)}") as signals, _tracked(session):
            return _finish(session, signals, bases)


def _begun_before(folder: Path) -> bool:
    """Whether torchrun starts this run again after one of its processes ended, and what it began is in ``folder``."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or here().size == 1:
        return False
    return bool(here().once(lambda: "begun" if recorded(folder, "started_by") == launcher() else ""))


def _packed_or_by_length(recipe: Recipe, folder: Path, quiet: bool, bases: Bases) -> tuple[Session, Plan, float]:
    """A session, of examples that share no rows where only the loaded model shows that they cannot."""
    try:
        return _new_session(recipe, folder, quiet, bases)
    except PackingError as error:
        if recipe.data.packing != "auto":
            raise
        why = str(error)
    speaker(quiet)(f"{why} data.packing is auto, so that is done now.")
    data = recipe.data.model_copy(update={"packing": "by_length"})
    return _new_session(recipe.model_copy(update={"data": data}), folder, quiet, bases)


def _new_session(recipe: Recipe, folder: Path, quiet: bool, bases: Bases) -> tuple[Session, Plan, float]:
    """Everything loaded and planned for the first step, and the device's matrix rate in FLOP/s; nothing is written yet."""
    say = speaker(quiet)
    require_trackers(recipe.tracking)
    use_threads(recipe)
    recipe = with_threads(recipe, folder, say)
    use_threads(recipe)
    recipe, origin = continued(recipe)
    if origin is not None:
        keep_apart(folder, origin.folder)
        say(str(origin))
    checkpoint = open_checkpoint(recipe.model, weights=False)
    data = load_recipe_data(recipe, checkpoint)
    say(str(data.report))
    if not data.held_out:
        say(f"Warning: {NOTHING_HELD_OUT}.")
    tasks = open_tasks(recipe, data)
    recipe = with_head(recipe, data.classes)
    planned = plan(recipe, checkpoint)
    for sentence in planned.why:
        say(sentence)
    # a run's own recipe must not replace the run when it is trained again
    resolved = decided_by_main(planned.recipe.model_copy(update={"overwrite": False}))
    device = limited(resolve_device(resolved.device.name), resolved)
    rate = matrix_rate(device, DTYPES[resolved.model.compute_dtype])  # now, while the device is empty
    prompts = data.held_out_prompts(resolved.evaluation.prompts)  # before a model is loaded: rendering begins a process
    checkpoint = checkpoint.with_weights()
    if origin is not None:
        origin.check_base(checkpoint)
    model = load_model(resolved, checkpoint, device, quiet, bases, values_follow=origin is not None)
    if data.template is not None and (ends := stop_at(model, data.template.end_tokens)):
        say(ends)
    if origin is not None:
        origin.load(model)
    trainer = Trainer(model, data, folder=folder, recipe=resolved)
    if origin is None:
        model.prepare(trainer.batches())
    else:
        trainer.environment["continued_from"] = origin.as_dict()
    return Session(resolved, folder, data, prompts, model, trainer, say, quiet, tasks), planned, rate


def _old_session(folder: Path, overrides: Sequence[str], quiet: bool, bases: Bases) -> Session:
    """Everything loaded as the run's newest whole checkpoint has it."""
    say = speaker(quiet)
    first, environment = open_run(folder)
    recipe = with_changes(first, overrides, folder)
    length = {key: getattr(recipe.training, key) for key in ("epochs", "steps", "warmup_fraction")}
    begun, first = first, first.model_copy(update={"training": first.training.model_copy(update=length)})
    require_trackers(recipe.tracking)
    for place in (folder, folder / "checkpoints") if here().main else ():
        clear_leftovers(place)
    use_threads(recipe)
    checkpoint = open_base(recipe, environment, folder)
    data = load_recipe_data(recipe, checkpoint)
    check_data(data, environment, folder)
    device = limited(device_here(recipe), recipe)
    if recipe != first:
        say("What was given for this call may change the order of sums: the run goes on, perhaps not bit for bit.")
    found = checkpoints.find(folder / "checkpoints")
    if not found and recipe.method.from_ is not None:
        raise RunError(
            f"The run in '{folder}' goes on from another adapter and has no checkpoint that holds it; train it again: qlora "
            f"train {shown(folder / 'recipe.yaml')} overwrite=true"
        )
    require_checkpoint(folder)
    prompts, tasks = data.held_out_prompts(recipe.evaluation.prompts), open_tasks(recipe, data)
    model = load_model(recipe, checkpoint, device, quiet, bases, values_follow=bool(found))
    if changed := differences(recipe, environment, model.base):
        say(f"The run began elsewhere ({listed(changed, 12)}): it goes on, but not bit for bit any more.")
    if data.template is not None:
        stop_at(model, data.template.end_tokens)
    trainer = Trainer(model, data, recipe.training, folder, recipe.memory, recipe=first)
    if found:
        for sentence in trainer.load_newest():
            say(sentence)
    else:
        model.prepare(trainer.batches())
    if first != begun and here().main:
        old, total = steps_of(begun, folder), trainer.total_steps
        lengthen(first, folder, total)
        warm = round(first.training.warmup_fraction * total)
        kept = f" The first {warm:,} stay its warm-up." if warm else ""
        say(f"This run is of {total:,} steps from now on; it was of {old:,}.{kept}")
        if stale := exports_in(folder):
            say(
                f"Of the shorter run are still: {listed([path.name for path in stale], 9)}; export them again when this one is done."
            )
    say(f"Going on after step {trainer.step_number} of {trainer.total_steps}.")
    return Session(recipe, folder, data, prompts, model, trainer, say, quiet, tasks)


def _rehearse(session: Session, planned: Plan) -> Rehearsal | None:
    if not session.recipe.memory.rehearse:
        return None
    rehearsal = session.trainer.rehearse()
    pieces = " Steps of other lengths may take a quarter more, in pieces." if session.model.device.type == "cpu" else ""
    for sentence in (*rehearsal.notes, f"{rehearsal} {bytes_text(planned.memory.total)} were predicted.{pieces}"):
        session.say(sentence)
    return rehearsal


@contextmanager
def _tracked(session: Session) -> Iterator[None]:
    """Inside, what is written into ``metrics.jsonl`` goes to the recipe's trackers too."""
    if session.trainer.log is None:  # another process writes it
        yield
        return
    with tracking(session.recipe, session.folder, session.trainer.step_number, session.say) as session.log.also:
        yield


def _finish(session: Session, signals: Signals, bases: Bases | None) -> Run:
    """From a trainer at any step to a finished run folder: all processes take the steps, the main one does the rest."""
    layers = session.model.base.placement
    session.trainer.prepare(session.say)
    before = by_main(layers, lambda: _before(session, bases or Bases()))
    signals.wait = True
    if session.trainer.step_number < session.trainer.total_steps:
        session.say(_ahead(session))
    try:
        _take_steps(session, signals)
    except NonFiniteError:
        if here().main:
            write_report(session.folder)
        raise
    signals.wait = False
    if signals.arrived:  # after the last look at it
        raise KeyboardInterrupt
    run = by_main(layers, lambda: _after(session, *before) if before else None)
    if bases is not None:
        bases.give_back(session.recipe, session.model)
    return run or session.result(None, None, [], [], None)


def _before(session: Session, bases: Bases) -> tuple[HeldOut | None, list[Generation], dict[str, Result]]:
    """(held-out loss, answers, results of the tasks) before the next step."""
    measured, generations = _measure_before(session, bases)
    base = bases.once(
        ("tasks", *((task.name, task.settings, *(item.id for item in task.items)) for task in session.tasks)),
        lambda: score_base(session.model, session.tasks, session.folder, session.quiet),
    )
    keep_base(base, session.folder)
    return measured, generations, base


def _after(session: Session, before: HeldOut | None, generations: list[Generation], base: dict[str, Result]) -> Run:
    """The adapter handed over, measured beside what was ``before``, and the report."""
    _hand_over(session)
    folder, after = session.folder, None
    if session.data.held_out:
        session.say("Measuring the held-out loss after training …")
        session.log.rewind_held_out(session.trainer.step_number)
        after = _held_out(session, session.trainer.step_number)
    asked = generations or [Generation(prompt.text, prompt.answer, None) for prompt in session.prompts]
    generations = [
        Generation(old.prompt, old.expected, old.before, text)
        for old, text in zip(asked, session.answers(), strict=True)
    ]
    if after is not None or generations:
        write_evaluation(folder, before, after, generations)
    name = f"{session.trainer.step_number:06d}"  # the checkpoint's
    trained = score_tasks(session.model, session.tasks, folder, name, session.quiet)
    rows = write_table(folder, base, trained)
    return session.result(before, after, generations, rows, write_report(folder))


def _measure_before(session: Session, bases: Bases) -> tuple[HeldOut | None, list[Generation]]:
    """Held-out loss and answers of the base alone, or of the adapter that a run goes on from: measured already, or now."""
    measured = read_evaluation(session.folder)
    if measured is not None:
        if len(measured[1]) != len(session.prompts):
            raise damaged_evaluation(session.folder)
        return measured
    before, generations = None, list[Generation]()
    # after a step, full fine-tuning has no base left to measure
    alone = all(method.why_not_disabled() is None for method in session.model.methods)
    continues = session.recipe.method.from_ is not None
    if (session.data.held_out or session.prompts) and (session.trainer.step_number == 0 if continues else alone):
        session.log.rewind_held_out(0)  # of a run that was killed in the middle of this
        with nullcontext() if continues else session.model.disabled():
            if session.data.held_out:
                session.say("Measuring the held-out loss before training …")
                recipe = session.recipe
                known = ("held out", session.data.fingerprint, recipe.evaluation.held_out_rows, recipe.objective)
                # a classifier's head is no part of the base
                alone = not (continues or recipe.objective.classifies)
                before = _held_out(session, 0, bases if alone else None, known)
                session.say(f"Held-out loss before: {before.loss:.4f}")
            generations = [
                Generation(prompt.text, prompt.answer, answer)
                for prompt, answer in zip(session.prompts, session.answers(), strict=True)
            ]
        write_evaluation(session.folder, before, None, generations)
    return before, generations


def _held_out(session: Session, step: int, bases: Bases | None = None, known: tuple[object, ...] = ()) -> HeldOut:
    """Measure the held-out loss, or take what ``bases`` know of the base alone on these rows, and write it down."""
    rows = session.data.held_out[: session.recipe.evaluation.held_out_rows]
    way = session.trainer.state.way

    def now() -> HeldOut:
        trainer = session.trainer
        at_once = rows_at_once(trainer.state) if session.recipe.objective.pairs else way.micro_batch_size
        return measured(trainer.objective, rows, trainer.reference, at_once, way.loss_chunk)

    result = now() if bases is None else bases.once(known, now)
    told = {name: value for name, value in asdict(result).items() if name not in ("rows", "preferences", "classes")}
    told |= asdict(result.preferences) if result.preferences else {}
    told |= {name: value for name, value in asdict(result.classes).items() if name != "each"} if result.classes else {}
    session.log.write({"step": step} | {f"held_out_{name}": value for name, value in told.items()})
    return result


def _beside(folder: Path) -> Path:
    """The first of ``folder-2``, ``folder-3``, … that is not there."""
    return next(place for number in count(2) if not (place := folder.with_name(f"{folder.name}-{number}")).exists())


def _ahead(session: Session) -> str:
    """How many steps are ahead, and about how long they take: by the run's own steps, or by the one that was rehearsed."""
    trainer, every = session.trainer, session.recipe.evaluation.every
    done, total = trainer.step_number, trainer.total_steps
    seconds = 0.0
    if known := session.told("seconds"):
        seconds = median(known)
    elif session.rehearsal is not None:
        tokens = sum(len(row.ids) for row in trainer.rows) / trainer.steps_per_epoch
        seconds = session.rehearsal.seconds * tokens / session.rehearsal.tokens
    times = total / trainer.steps_per_epoch
    epochs = f"{times:{',.0f' if times >= 100 else '.3g'}} {'epoch' if times == 1 else 'epochs'} of {counted(trainer.steps_per_epoch, 'step')}"
    time = f", about {duration_text((total - done) * seconds)}" if seconds else ""
    evaluations = sum(due(step, every) for step in range(done + 1, total)) + 1
    more = f"; {counted(evaluations, 'held-out evaluation')} on top" if session.data.held_out else ""
    return f"{counted(total - done, 'step')} to go of {total:,} ({epochs}){time}{more}."


def _take_steps(session: Session, signals: Signals) -> None:
    """Every step that is left, with its line, its checkpoint and its evaluation where they are due. Raises Stopped."""
    trainer, recipe, processes = session.trainer, session.recipe, here()
    total, watched = trainer.total_steps, list(session.data.files)

    def save() -> Path:
        if not processes.main:
            return trainer.save()
        sync(session.log.path)  # the lines of the steps that the checkpoint counts as done
        for file in [file for file in watched if file.change()]:
            watched.remove(file)  # say it once
            progress.say(
                f"'{file.name}' {file.change()} since this run read it: the run goes on with what it read, but can only be "
                "resumed once that is put back."
            )
        return trainer.save()

    with Progress(total, trainer.step_number, session.quiet) as progress:
        for step in trainer:
            progress.show(step, trainer.divergence.diverges)
            last = step.number == total
            if session.data.held_out and due(step.number, recipe.evaluation.every) and not last:
                found = by_main(session.model.base.placement, partial(_held_out, session, step.number))
                if found:
                    beside = found.preferences or found.classes
                    more = f", {beside}" if beside else ""
                    progress.say(f"Held-out loss after step {step.number}: {found.loss:.4f}{more}")
            if last or due(step.number, recipe.training.save_every):
                save()
            if arrived := int(max(number for (number,) in processes.gather(signals.arrived))):
                place = save()
                raise Stopped(
                    f"{Signal(arrived).name} arrived before step {step.number} of {total} ended; the state is in "
                    f"'{place}'. Go on with: qlora resume {shown(session.folder)}",
                    arrived,
                )


def due(step: int, every: int) -> bool:
    """Whether something that is done ``every`` so many steps (0: never) is done after ``step``."""
    return every > 0 and step % every == 0


def _hand_over(session: Session) -> None:
    """The adapter in the form for others, the chat template beside it, and what the method found out."""
    with folder_written_aside(session.folder / "adapter", overwrite=True) as aside:
        with all_here(session.model.base.placement):
            why = save_portable(session.model, aside)
        if why:
            session.say(f"The adapter is saved in its own form. {why}.")
        if session.data.template is not None:
            (aside / TEMPLATE).write_text(session.data.template.text, encoding="utf-8")
        seal(aside)
    if found := session.model.report():
        write_json(session.folder / "method.json", redacted(found))


def _plan_values(planned: Plan, rate: float, session: Session) -> dict[str, object]:
    """What ``plan.json`` holds."""
    recipe, trainer = planned.recipe, session.trainer
    return {
        "model": {"parameters": planned.parameters, **recipe.model.model_dump(mode="json")},
        "method": {"trainable_parameters": planned.trainable_parameters, **recipe.method.model_dump(mode="json")},
        "data": session.data.report.as_dict(),
        "steps": trainer.total_steps,
        "steps_per_epoch": trainer.steps_per_epoch,
        "device": recipe.device.name,
        "arithmetic": {"flops_per_token": planned.flops_per_token, "matrix_flops_per_second": rate},
        "memory": planned.memory.as_dict(),
        "not_quantised": planned.dense and {**planned.dense.bytes, "share": planned.dense.share},
        "rehearsal": session.rehearsal and asdict(session.rehearsal),
        "disk": {"checkpoint": planned.checkpoint_bytes, "total": planned.disk_bytes},
        "why": planned.why,
    }
