"""The command line: a verb, a recipe or a run folder, and ``section.key=value`` overrides.

Says what ``run`` returns, for people, and turns every error into one sentence and an exit status. Nothing heavy is
imported before it is needed, so that ``qlora doctor`` runs where torch does not.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from qlora.errors import InputError, QloraError, disk_is_full, first_line, nearest, redacted, visible

USAGE = """qlora VERB RECIPE-or-RUN [section.key=value …]

  plan      RECIPE                 what it takes in memory and on disk, how long a step takes, what else would fit
  preview   RECIPE [count=2]       examples as the model sees them, trained tokens marked
  train     RECIPE                 train, evaluate, report; overwrite=true replaces an old run
  resume    RUN                    go on from the newest checkpoint [training.micro_batch_size=1 and the like]
  evaluate  RUN                    held-out loss and answers, measured now
  chat      RUN                    talk to the trained model
  export    RUN merged             a plain 16-bit model [out=FOLDER base=original dtype=fp16 overwrite=true]
  export    RUN adapter            the adapter as plain LoRA, which every server loads [out=FOLDER overwrite=true]
  report    RUN                    write report.html from the run's files
  doctor                           is this machine ready?
  recipe                           every value of a recipe, with its default and meaning

A recipe is a YAML file (quickstart.yaml); a run is the folder that train leaves (runs/quickstart).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 a defect, 2 input, 3 does not fit, 130 and 143 signals."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("help", "--help", "-h"):
        print(USAGE, end="")
        return 0 if words else 2
    _quiet_libraries()
    stopped: list[int] = []
    try:
        with _lasting_errors(), _terminated(stopped):
            return _status(words, stopped)
    except KeyboardInterrupt:  # once more, while the first was told
        return _stopped(stopped)


def _status(words: list[str], stopped: list[int]) -> int:
    """Run the command; every error becomes one sentence. ``stopped``: the signals that ended it."""
    try:
        if words[0] not in VERBS:
            raise InputError(
                f"'{words[0]}' is not a verb of qlora.{nearest(words[0], VERBS)} The verbs are {', '.join(VERBS)}."
            )
        return VERBS[words[0]](words[1:]) or 0
    except QloraError as error:
        print(f"qlora: {visible(error)}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("qlora: stopped; nothing that was saved is lost.", file=sys.stderr)
        return _stopped(stopped)
    except BrokenPipeError:  # | head
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at exit)
        return 0
    except OSError as error:
        if disk_is_full(error):
            return _full(error)
        print(f"qlora: {visible(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if _out_of_memory(error):
            print(
                f"qlora: Out of memory ({visible(first_line(error))}); lower training.micro_batch_size or data.max_length, or set "
                "training.accumulation=micro_batch_major.",
                file=sys.stderr,
            )
            return 3
        if disk_is_full(error):  # safetensors has an exception of its own
            return _full(error)
        print(visible(traceback.format_exc()), end="", file=sys.stderr)
        print("qlora: this is a defect of qlora; please report it with the lines above.", file=sys.stderr)
        return 1


def _plan(words: list[str]) -> int:
    recipe = _recipe("plan", words)  # first, here and below: a slip of the pen need not wait for torch
    from qlora.planning.plan import survey

    found = survey(recipe)
    print(visible(redacted(str(found))))
    return 0 if found.fits else 3


def _preview(words: list[str]) -> None:
    count = _take(words, "count") or "2"
    if not count.isdecimal() or not int(count):
        raise InputError(f"count is '{count}'; expected a whole number from 1.")
    recipe = _recipe("preview", words)
    from rich.console import Console

    from qlora.runs import run

    console = Console(soft_wrap=True)
    for example in run.preview(recipe, int(count)):
        console.print(example if console.is_terminal else str(example), markup=False, highlight=False)
        console.print()


def _train(words: list[str]) -> None:
    recipe = _recipe("train", words)
    from qlora.runs import run

    _summary(run.train(recipe))


def _resume(words: list[str]) -> None:
    folder = _run("resume", words[:1])
    from qlora.runs import run

    _summary(run.resume(folder, *words[1:]))


def _evaluate(words: list[str]) -> None:
    folder = _run("evaluate", words)
    from qlora.runs import run

    _summary(run.evaluate(folder))


def _export(words: list[str]) -> None:
    options = {name: _take(words, name) for name in ("out", "base", "dtype", "overwrite")}
    target = words.pop(1) if len(words) > 1 else None
    if target not in ("merged", "adapter"):
        raise InputError(
            f"qlora export RUN {target or '…'}: expected 'merged', a plain 16-bit model, or 'adapter', a plain LoRA adapter."
        )
    if target == "adapter" and (extra := next((key for key in ("base", "dtype") if options[key]), None)):
        raise InputError(f"qlora export RUN adapter takes out and overwrite, but found '{extra}={options[extra]}'.")
    folder = _run("export", words)
    for name, allowed in (
        ("base", ("dequantized", "original")),
        ("dtype", ("bf16", "fp16", "fp32")),
        ("overwrite", ("true", "false")),
    ):
        if options[name] not in (None, *allowed):
            raise InputError(f"{name} is '{options[name]}'; expected {' or '.join(allowed)}.")
    from qlora.machine.device import bytes_text
    from qlora.runs import run

    if target == "adapter":
        place = options["out"] or f"{folder}/portable"
        why = run.export_adapter(folder, place, overwrite=options["overwrite"] == "true")
        print(f"Adapter: {place} ({why or 'plain LoRA in the layout of PEFT'})")
        return
    chosen: dict[str, Any] = {key: value for key, value in options.items() if value and key in ("base", "dtype")}
    merged = run.merge(folder, options["out"], overwrite=options["overwrite"] == "true", **chosen)
    print(
        f"Merged model: {merged.folder} ({merged.tensors} tensors, {bytes_text(merged.bytes)}, {merged.adapted} adapted)"
    )
    try:
        difference = run.compare_merged(folder, merged)
    except QloraError as error:  # the export is done and whole; only the comparison is not
        print(f"Its logits were not compared with the adapter model's: {error}")
        return
    print(
        f"In plain transformers, on {difference.prompts} held-out prompts: logits differ by at most "
        f"{difference.largest:.3g} (of {difference.largest_logit:.3g}), {difference.divergence:.2g} nats a token, "
        f"the same next token at {difference.same_choice:.1%} of the positions."
    )


def _report(words: list[str]) -> None:
    from qlora.reporting import write_report

    print(write_report(_run("report", words)))


def _chat(words: list[str]) -> None:
    folder = _run("chat", words)
    from qlora.chat import talk

    talk(folder)


def _doctor(words: list[str]) -> int:
    from qlora.doctor import examine, exit_status, print_findings

    if words:
        raise InputError(f"qlora doctor takes nothing more, but found '{' '.join(words)}'.")
    findings = examine()
    print_findings(findings)
    return exit_status(findings)


def _reference(words: list[str]) -> None:
    if words:
        raise InputError(f"qlora recipe takes nothing more, but found '{' '.join(words)}'.")
    from qlora.recipe import reference

    print(reference(), end="")


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "plan": _plan,
    "preview": _preview,
    "train": _train,
    "resume": _resume,
    "evaluate": _evaluate,
    "chat": _chat,
    "export": _export,
    "report": _report,
    "doctor": _doctor,
    "recipe": _reference,
}


def _recipe(verb: str, words: list[str]) -> Any:
    from qlora.recipe import Recipe

    if not words:
        raise InputError(f"qlora {verb} needs a recipe: qlora {verb} quickstart.yaml")
    path = Path(words[0])
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; qlora {verb} takes a recipe, such as {path / 'recipe.yaml'}.")
    return Recipe.from_yaml(path, *words[1:])


def _run(verb: str, words: list[str]) -> Path:
    if not words:
        raise InputError(f"qlora {verb} needs a run folder: qlora {verb} runs/quickstart")
    if len(words) > 1:
        raise InputError(f"qlora {verb} takes a run folder and nothing more, but found '{' '.join(words[1:])}'.")
    path = Path(words[0])
    if not path.is_dir():
        raise InputError(
            f"There is no run folder '{path}'; expected one that qlora train made, such as runs/quickstart."
        )
    return path


def _take(words: list[str], name: str) -> str | None:
    """Remove ``name=value`` from the words and return the value."""
    for word in words[1:]:
        if word.startswith(f"{name}="):
            words.remove(word)
            return word.partition("=")[2]
    return None


def _summary(run: Any) -> None:
    """What a run came to, on standard output."""
    from qlora.machine.device import bytes_text

    print(f"\nTrainable parameters   {run.trainable_parameters:,}")
    if run.before and run.after:
        change = run.after.loss / run.before.loss - 1
        print(f"Held-out loss          {run.before.loss:.4f} before, {run.after.loss:.4f} after ({change:+.1%})")
    elif run.after:
        print(f"Held-out loss          {run.after.loss:.4f} (perplexity {run.after.perplexity:.2f})")
    print(f"Time and peak memory   {run.seconds / 60:.1f} min, {bytes_text(run.peak_memory_bytes)}")
    for item in run.generations:
        print(f"\n? {visible(item.prompt)}")
        for name, text in (("expected", item.expected), ("before", item.before), ("after", item.after)):
            if text is not None:
                print(f"  {name + ':':<10}{visible(' '.join(text.split()))}")
    print(f"\nRun folder   {visible(run.folder)}")
    if run.report:
        print(f"Report       {visible(run.report)}")
    print(f"Try next     {_command()} chat {visible(shlex.quote(str(run.folder)))}")


def _command() -> str:
    """How this command is called from here: by its name, or by its path where the shell would not find it."""
    import shutil

    called = Path(sys.argv[0])
    if called.name != "qlora" or shutil.which("qlora"):
        return "qlora"
    return str(called.relative_to(Path.cwd()) if called.is_relative_to(Path.cwd()) else called)


def _full(error: Exception) -> int:
    print(
        f"qlora: The disk is full ({visible(error)}); make room and go on with qlora resume RUN, or begin again.",
        file=sys.stderr,
    )
    return 3


def _stopped(stopped: list[int]) -> int:
    """The exit status after a signal: SIGINT's where nothing was noted."""
    return 128 + (stopped[-1] if stopped else signal.SIGINT)


@contextmanager
def _terminated(stopped: list[int]) -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, so that what is half-written is removed; it is noted in ``stopped``."""

    def note(number: int, frame: Any) -> None:
        stopped.append(number)
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, note)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _lasting_errors() -> Iterator[None]:
    """Inside, work goes on when nobody takes what it says any more: a terminal that was closed, a full disk under a log."""
    stream = sys.stderr
    sys.stderr = cast(TextIO, _Lasting(stream))
    try:
        yield
    finally:
        sys.stderr = stream


class _Lasting:
    """A stream whose failures are nobody's, and to which nothing writes a secret."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(redacted(text))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    if "torch" not in sys.modules:  # qlora doctor runs without it
        return False
    from qlora.machine.device import ran_out_of_memory

    return ran_out_of_memory(error)


def _quiet_libraries() -> None:
    """Other libraries' progress bars and advice; what matters of it is said by qlora."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if hasattr(sys.stdout, "reconfigure"):  # an answer's letters that the terminal lacks are no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")


def entry() -> None:
    """The ``qlora`` command."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
