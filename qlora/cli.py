"""The command line: a verb, a recipe or a run folder, and ``section.key=value`` overrides.

A verb is a function, and its docstring is its help. Says what ``runs`` returned, for people, and turns every error into one
sentence and an exit status. Nothing heavy is imported before it is needed, so that ``qlora doctor`` runs where torch does
not, and a slip in a recipe need not wait for torch.
"""

from __future__ import annotations

import inspect
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from qlora.errors import InputError, QloraError, disk_is_full, first_line, nearest, redacted, visible
from qlora.machine import DISTRIBUTION

if TYPE_CHECKING:
    from qlora.recipe import Recipe
    from qlora.runs.session import Run

USAGE = "qlora VERB RECIPE-or-RUN [section.key=value …]"
EXAMPLES = """Examples:
    qlora init --model Qwen/Qwen3-8B --data my.jsonl --card 4090
    qlora train my.yaml training.epochs=2"""
NOTES = """A recipe is a YAML file (quickstart.yaml); a run is the folder that train leaves (runs/quickstart). A value may \
also be written as --section.key=value. More: qlora VERB --help, qlora --version."""

NARROW, WIDEST = 72, 100
"""Letters of a terminal: below the first what a verb does stands under it; text is never wider than the second."""


def init(words: list[str]) -> None:
    """--model X --data FILE [--card CARD]: a recipe that fits, from a look at your data; without them it asks.

    Takes out=mine.yaml, epochs, host_memory=64GiB, overwrite=true, and any value of a recipe; what it chooses stands there with why.

    Examples:
        qlora init --model Qwen/Qwen3-8B --data my.jsonl --card 4090
        qlora init --model models/llama --data my.jsonl --out mine.yaml method.r=32
    """
    from qlora.init import init

    print(visible(init(words)))


def plan(words: list[str]) -> int:
    """RECIPE [table=true]: steps, time, memory and disk; with table also what else would fit. Loads no weights.

    Any value of the recipe may follow; device.memory=4090 (or 24GiB) plans for a GPU you don't have.

    Examples:
        qlora plan mine.yaml
        qlora plan mine.yaml device.memory=4090 device.host_memory=64GiB
    """
    table = _taken(words, "table").get("table", "false")
    if table not in ("true", "false"):
        raise InputError(f"table is '{table}'; expected true or false.")
    recipe = _recipe("plan", words, reads=False)
    from rich.console import Console

    with Console(stderr=True).status("Planning: shapes, a step counted, the data read …"):
        from qlora.planning.plan import survey

        found = survey(recipe, table == "true")
    print(visible(redacted(str(found))))
    return 0 if found.fits else 3


def preview(words: list[str]) -> None:
    """RECIPE [count=2]: examples as the model sees them, trained tokens marked.

    Examples:
        qlora preview mine.yaml
        qlora preview mine.yaml count=5 data.max_length=512
    """
    count = _taken(words, "count").get("count", "2")
    if not count.isdecimal() or not int(count):
        raise InputError(f"count is '{count}'; expected a whole number from 1.")
    recipe = _recipe("preview", words)
    from rich.console import Console

    from qlora.runs.evaluate import preview

    console = Console(soft_wrap=True)
    for example in preview(recipe, int(count)):
        console.print(example if console.is_terminal else str(example), markup=False, highlight=False)
        console.print()


def train(words: list[str]) -> None:
    """RECIPE: train, evaluate, report; overwrite=true replaces an old run.

    Any value of the recipe may follow: training.epochs=2 method.r=8. `qlora recipe` lists them.

    Examples:
        qlora train mine.yaml
        qlora train mine.yaml training.epochs=2 --method.r=8 folder=runs/second
    """
    _join()
    recipe = _recipe("train", words, trains=True)
    from qlora.runs.first import uneven

    if note := uneven(recipe):
        print(note, file=sys.stderr, flush=True)
    from qlora.runs.train import train

    _summary(train(recipe))
    _leave()


def resume(words: list[str]) -> None:
    """RUN: go on from the newest checkpoint.

    Values that concern memory, speed and safety alone may follow, such as training.micro_batch_size=1; and, where the learning rate is
    constant, training.epochs or training.steps, which make the run longer.

    Examples:
        qlora resume runs/mine
        qlora resume runs/mine training.micro_batch_size=1
    """
    _join()
    folder = _run("resume", words[:1])
    from qlora.runs.first import look_at_run

    if done := look_at_run(folder, words[1:], trains=True):
        print(visible(done))
        return
    from qlora.runs.train import resume

    _summary(resume(folder, *words[1:]))
    _leave()


def evaluate(words: list[str]) -> None:
    """RUN: held-out loss, answers and tasks, measured now.

    Examples:
        qlora evaluate runs/mine
        qlora evaluate runs/mine > measured.txt
    """
    folder = _run("evaluate", words)
    from qlora.runs.first import look_at_run

    look_at_run(folder)
    from qlora.runs.evaluate import evaluate

    _summary(evaluate(folder))


def chat(words: list[str]) -> None:
    """RUN: talk to the trained model.

    A question a line, and answers of up to 256 tokens; /new begins a new conversation, /quit leaves.

    Examples:
        qlora chat runs/mine
        echo "What does copytree do?" | qlora chat runs/mine
    """
    folder = _run("chat", words)
    from qlora.runs.first import look_at_run

    look_at_run(folder, reads=False)
    from qlora.chat import talk

    talk(folder)


def export(words: list[str]) -> None:
    """RUN merged|nf4|adapter|gguf|gguf-adapter|check|hub: a model in 16 or 4 bits, or the adapter as plain LoRA; either as GGUF.

    All that write take out=FOLDER and overwrite=true, and leave a model card.
    merged takes dtype=bf16, fp16 or fp32, and for=serving, which is the trained model, or for=quantising, which may be put into 4 bits
    again or trained on (base=dequantized and original say the same); left out, both are measured on what is held out.
    nf4 is what is merged for=quantising, as bitsandbytes packs it.
    adapter takes keys=text, for the class of a multimodal model's language model alone.
    gguf takes base, and type=q8_0 (unless said), f16, bf16, f32, q4_0, or one of llama-quantize's, as q4_k_m.
    check takes from=FOLDER, a merged model or one in nf4 (RUN/merged unless said), and compares it with the run, here or elsewhere.
    hub repo=NAME sends an export to a private repository: from=FOLDER says which, private=false opens it to all, and
    dry_run=true only lists the files.

    Examples:
        qlora export runs/mine merged
        qlora export runs/mine gguf type=q4_k_m out=for-ollama
    """
    from qlora.exporting import TARGETS
    from qlora.exporting import export as make

    options = _taken(words, *{name for target in TARGETS.values() for name in target.options})
    target = words.pop(1) if len(words) > 1 else None
    if target not in TARGETS:
        *known, last = (f"'{name}', {each.what}" for name, each in TARGETS.items())
        close = nearest(target or "", TARGETS)
        raise InputError(f"qlora export RUN {target or '…'}: expected {'; '.join(known)}; or {last}.{close}")
    make(_run("export", words), target, options)


def report(words: list[str]) -> None:
    """RUN [RUN …]: write report.html from the run's files; of several runs one page, side by side, to out=compare.html.

    Examples:
        qlora report runs/mine
        qlora report runs/mine runs/other out=both.html
    """
    given = _taken(words, "out")
    if given and len(words) < 2:
        raise InputError("out is for the page of several runs; one run's report goes into its folder.")
    if Path(given.get("out", "compare.html")).suffix != ".html":
        raise InputError(f"out is '{given['out']}'; expected the name of a page, as compare.html.")
    folders = [_run("report", [word]) for word in words] or [_run("report", words)]
    from qlora.reporting import write_comparison, write_report

    several = len(folders) > 1
    print(write_comparison(folders, Path(given.get("out", "compare.html"))) if several else write_report(folders[0]))


def watch(words: list[str]) -> None:
    """RUN [port=8712]: the report in a browser, made anew while the run trains; Ctrl-C ends it.

    This machine alone can see it; from another one: ssh -L 8712:127.0.0.1:8712 MACHINE.

    Examples:
        qlora watch runs/mine
        qlora watch runs/mine port=8800
    """
    port = _taken(words, "port").get("port")
    if port is not None and not port.isdecimal():
        raise InputError(f"port is '{port}'; expected a whole number, such as 8712.")
    folder = _run("watch", words)
    from qlora.reporting.watch import server

    with server(folder, None if port is None else int(port)) as serving, suppress(KeyboardInterrupt):
        print(f"http://127.0.0.1:{serving.server_address[1]}   (Ctrl-C ends this, and no training)", flush=True)
        serving.serve_forever()


def study(words: list[str]) -> int:
    """STUDY [plan]: many runs compared fairly: methods, ranks, rates, seeds; one page at the end.

    Goes on where it was stopped. plan says what it will take, and trains nothing. Any value may follow: hours=6 data_root=FOLDER
    size=gpu recipe.training.steps=50. What a study may say is in docs/studies.md.

    Examples:
        qlora study rank.yaml plan
        qlora study rank.yaml hours=2
    """
    if not words:
        raise InputError("qlora study needs a study: qlora study recipes/studies/methods.yaml")
    if strange := [word for word in words[1:] if "=" not in word and word != "plan"]:
        raise InputError(
            f"'{strange[0]}' is nothing that qlora study takes; expected plan, or key=value.{nearest(strange[0], ['plan'])}"
        )
    from qlora.studies.first import look_at_study

    values = [word for word in words[1:] if word != "plan"]
    look_at_study(words[0], *values)
    from qlora.studies.run import plan_study
    from qlora.studies.run import study as run

    if "plan" in words[1:]:
        print(visible(plan_study(words[0], *values)))
        return 0
    return 2 if any(row.error for row in run(words[0], *values).rows) else 0


def doctor(_: list[str]) -> int:
    """Is this machine ready? One line per check, with the fix.

    Examples:
        qlora doctor
        qlora doctor && qlora train mine.yaml
    """
    from qlora.doctor import examine, exit_status, print_findings

    findings = examine()
    print_findings(findings)
    return exit_status(findings)


def recipe(words: list[str]) -> None:
    """[SECTION]: every value of a recipe, with its default and meaning, or those of a section or a key.

    Examples:
        qlora recipe data
        qlora recipe training.learning_rate
    """
    from qlora.recipe import about, reference

    if len(words) > 1:
        raise InputError(f"qlora recipe takes one section or key, but found '{' '.join(words)}'.")
    print(about(words[0], _width()) if words else reference(), end="")


def completion(words: list[str]) -> None:
    """bash|zsh|fish: have your shell complete verbs, keys and run folders.

    Examples:
        eval "$(qlora completion bash)"
        qlora completion fish | source
    """
    from qlora.completion import complete, script

    if words[:1] == ["words"]:  # what such a script asks
        print(*complete(words[1:], {name: _help(name)[0] for name in VERBS}), sep="\n")
    else:
        print(script(words[0] if len(words) == 1 else " ".join(words) or "no shell"), end="")


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    verb.__name__: verb
    for verb in (
        init,
        plan,
        preview,
        train,
        resume,
        evaluate,
        chat,
        export,
        report,
        watch,
        study,
        doctor,
        recipe,
        completion,
    )
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 a defect, 2 input, 3 does not fit, 4 an export that differs, 130 and 143 signals."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    _quiet_libraries()
    stopped: list[int] = []
    try:
        with redirect_stderr(cast(TextIO, _Lasting(sys.stderr))), _terminated(stopped):
            return _status(words, stopped)
    except KeyboardInterrupt:  # once more, while the first was told
        return _stopped(stopped)


def _status(words: list[str], stopped: list[int]) -> int:
    """Run the command; every error becomes one sentence. ``stopped``: the signals that ended it."""
    try:
        return _do(words)
    except QloraError as error:
        return _failed(error.exit_status, error)
    except KeyboardInterrupt:
        return _failed(_stopped(stopped), "stopped; nothing that was saved is lost.")
    except BrokenPipeError:  # | head
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at exit)
        return 0
    except Exception as error:
        if disk_is_full(error):  # not only an OSError: safetensors has an exception of its own
            return _failed(3, f"The disk is full ({error}); make room and go on with qlora resume RUN, or begin again.")
        if isinstance(error, OSError):
            return _failed(2, error)
        if _out_of_memory(error):
            less = "lower training.micro_batch_size or data.max_length, or set training.accumulation=micro_batch_major."
            return _failed(3, f"Out of memory ({first_line(error)}); {less}")
        print(visible(traceback.format_exc()), end="", file=sys.stderr)
        return _failed(1, "this is a defect of qlora; please report it with the lines above.")


def _do(words: list[str]) -> int:
    verb, *rest = words or ["--help"]
    if verb == "--version":
        try:
            print(f"qlora {metadata.version(DISTRIBUTION)}")
        except metadata.PackageNotFoundError:
            print("qlora from a checkout that is not installed")
        return 0
    if verb in ("help", "--help", "-h"):
        lines = [_entry(name, takes, does) for name in VERBS for takes, does, _ in [_help(name)]]
        print(USAGE, "", *lines, "", EXAMPLES, "", _wrapped(NOTES), sep="\n")
        return 0 if words else 2
    if verb not in VERBS:
        raise InputError(f"'{verb}' is not a verb of qlora.{nearest(verb, VERBS)} The verbs are {', '.join(VERBS)}.")
    takes, does, more = _help(verb)
    if {"--help", "-h"} & set(rest) and rest[:1] != ["words"]:
        print(f"qlora {verb} {takes}".rstrip(), _wrapped(does), *filter(None, [_wrapped(more)]), sep="\n\n")
        return 0
    if verb == "init":
        rest = _joined(rest)
    rest = rest if rest[:1] == ["words"] else [_plain(verb, word) for word in rest]
    keys = re.findall(r"^([a-z][\w.]*)=", "\n".join(rest), re.M) if rest[:1] != ["words"] and verb != "init" else []
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise InputError(f"'{twice[0]}' is given {keys.count(twice[0])} times; expected it once.")
    if _several() and verb not in ("train", "resume"):
        raise InputError(
            f"qlora {verb} is done by one process, but a launcher started {os.environ['WORLD_SIZE']} (WORLD_SIZE); start it without."
        )
    if rest and not takes:
        raise InputError(f"qlora {verb} takes nothing more, but found '{' '.join(rest)}'.")
    return VERBS[verb](rest) or 0


def _help(verb: str) -> tuple[str, str, str]:
    """What a verb takes, what it does, and more of it: its docstring, ``RUN: talk to the trained model.``, in parts."""
    first, _, more = (inspect.getdoc(VERBS[verb]) or "").partition("\n\n")
    takes, _, does = first.partition(": ") if ": " in first else ("", "", first)
    return takes, does[:1].upper() + does[1:], more


def _entry(verb: str, takes: str, does: str) -> str:
    """A verb's line of the help; what it does stands below it where the terminal is narrow."""
    head = f"  {verb:<10} {_short(takes):<19}"
    if _width() < NARROW:
        return f"{head.rstrip()}\n{_wrapped(does, '    ')}"
    return _wrapped(f"{head} {does}", hanging=" " * 33)


def _wrapped(text: str, indent: str = "", hanging: str | None = None) -> str:
    """``text`` as wide as the terminal, paragraph by paragraph; a list of commands stays as it is."""
    place = textwrap.TextWrapper(
        _width(), initial_indent=indent, subsequent_indent=indent if hanging is None else hanging,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    parts = text.split("\n\n")
    return "\n\n".join(one if "\n    " in one else place.fill(one) for one in parts)


def _width() -> int:
    return min(shutil.get_terminal_size().columns, WIDEST)


def _joined(words: list[str]) -> list[str]:
    """``--model X`` → ``--model=X``, as init's own options may be written."""
    joined: list[str] = []
    for word in words:
        if joined and joined[-1].startswith("--") and "=" not in joined[-1] and not word.startswith("--"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _short(takes: str) -> str:
    """``RUN merged|nf4|adapter|…`` where there are many."""
    words = takes.split("|")
    return takes if len(words) < 4 else f"{words[0]}|…"


def _plain(verb: str, word: str) -> str:
    """``--training.steps=10`` → ``training.steps=10``. Raises InputError for any other flag."""
    if word.startswith("--") and "=" in word:
        return word[2:]
    if "." in word and word.startswith("--"):
        raise InputError(f"'{word}' has no value; expected one behind its key, as in {word}=VALUE.")
    if word.startswith("-") and not os.path.exists(word):
        raise InputError(
            f"'{word}' is not a flag of qlora {verb}; expected --help, or a value with its key, such as --training.steps=10."
        )
    return word


def _recipe(verb: str, words: list[str], trains: bool = False, reads: bool = True) -> Recipe:
    """The recipe that the words name, of which everything is found that can be wrong and needs no torch."""
    from qlora.recipe import Recipe
    from qlora.runs.first import look_at_recipe

    if not words:
        raise InputError(f"qlora {verb} needs a recipe: qlora {verb} quickstart.yaml")
    path = Path(words[0])
    if path.is_dir():
        raise InputError(f"'{path}' is a folder; qlora {verb} takes a recipe, such as {path / 'recipe.yaml'}.")
    recipe = Recipe.from_yaml(path, *words[1:])
    look_at_recipe(recipe, trains, reads)
    return recipe


def _run(verb: str, words: list[str]) -> Path:
    if not words:
        raise InputError(f"qlora {verb} needs a run folder: qlora {verb} runs/quickstart")
    if len(words) > 1:
        more = "what its help names" if verb == "export" else "nothing more"
        raise InputError(
            f"qlora {verb} takes a run folder and {more}, but found '{' '.join(words[1:])}' (qlora {verb} --help)."
        )
    path = Path(words[0])
    if not path.is_dir():
        from qlora.files.durable import from_here

        found = f"'{path}' is a file" if path.is_file() else f"There is no run folder '{path}'"
        raise InputError(f"{found}; expected a folder that qlora train made, such as runs/quickstart.{from_here(path)}")
    return path


def _taken(words: list[str], *names: str) -> dict[str, str]:
    """Take every ``name=value`` of these names out of the words."""
    taken = [word for word in words[1:] if "=" in word and word.partition("=")[0] in names]
    for key in (word.partition("=")[0].lstrip("-") for word in words[1:] if "=" in word):
        if "." not in key and key not in names and (hint := nearest(key, names)):
            raise InputError(f"'{key}' is no option here.{hint}")
    words[:] = [word for word in words if word not in taken]
    return dict(word.split("=", 1) for word in taken)


def _summary(run: Run) -> None:
    """What a run came to, on standard output. Of several processes one has something to say."""
    if run.report is None and _several():
        return
    from rich.console import Console

    from qlora.machine.disk import bytes_text, duration_text
    from qlora.runs.session import NOTHING_HELD_OUT

    def judge(outcome: str, said: str) -> None:
        style = {"better": "green", "worse": "bold red", "diverged": "bold red"}.get(outcome, "yellow")
        console = Console(soft_wrap=True)
        console.print(f"Verdict                {outcome}: {said}", style=style, markup=False, highlight=False)

    print(f"\nTrainable parameters   {run.trainable_parameters:,}")
    if run.before and run.after:
        change = run.after.loss / run.before.loss - 1
        print(f"Held-out loss          {run.before.loss:.4f} before, {run.after.loss:.4f} after ({change:+.1%})")
        if run.verdict is not None:
            judge(*run.verdict)
        if run.before.preferences and run.after.preferences:
            print(f"Preferences before     {run.before.preferences}\n  and after            {run.after.preferences}")
        if run.before.classes and run.after.classes:
            print(f"Classes before         {run.before.classes}\n  and after            {run.after.classes}")
            print(visible(run.after.classes.table()))
    elif run.after:
        perplexity = "" if run.after.classes else f" (perplexity {run.after.perplexity:.2f})"
        print(f"Held-out loss          {run.after.loss:.4f}{perplexity}")
        if run.after.preferences:
            print(f"Preferences            {run.after.preferences}")
        if run.after.classes:
            print(f"Classes                {run.after.classes}\n{visible(run.after.classes.table())}")
    else:
        judge("not known", NOTHING_HELD_OUT)
    steps = f" in {run.steps:,} steps" if run.steps else ""
    print(f"Time and peak memory   {duration_text(run.seconds)}{steps}, {bytes_text(run.peak_memory_bytes)}")
    for item in run.generations:
        print(f"\n? {visible(item.prompt)}")
        for name, text in (("expected", item.expected), ("before", item.before), ("after", item.after)):
            if text is not None:
                print(f"  {name + ':':<10}{visible(' '.join(text.split()))}")
    if run.tasks:
        from qlora.evaluation.tasks.table import lines

        print("", *map(visible, lines(run.tasks)), sep="\n")
    print(f"\nRun folder   {visible(run.folder)}")
    if run.report:
        print(f"Report       {visible(run.report)}")
    print(f"Try next     {_command()} {_next(run)}")


def _next(run: Run) -> str:
    """What to do after a run: talk to the model, take a classifier away, or train anew where it came out worse."""
    if run.verdict is None or run.verdict.outcome not in ("worse", "diverged"):
        if run.after and run.after.classes:
            return f"export {visible(shlex.quote(str(run.folder)))} merged"
        return f"chat {visible(shlex.quote(str(run.folder)))}"
    from qlora.recipe import Recipe

    path = run.folder / "recipe.yaml"
    rate = Recipe.from_yaml(path).training.slower
    again = visible(shlex.quote(f"{run.folder}-again"))
    return f"train {visible(shlex.quote(str(path)))} folder={again} training.learning_rate={rate:g}"


def _command() -> str:
    """How this command is called from here: by its name, or by its path where the shell would not find it."""
    called = Path(sys.argv[0])
    if called.name != "qlora" or shutil.which("qlora"):
        return "qlora"
    return str(called.relative_to(Path.cwd()) if called.is_relative_to(Path.cwd()) else called)


def _failed(status: int, why: object) -> int:
    if _several():
        from qlora.machine.processes import tells

        if not tells():
            return status
    print(f"qlora: {visible(why)}", file=sys.stderr)
    return status


def _several() -> bool:
    """Whether a launcher started this as one of several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


def _join() -> None:
    """Wait for the other processes, so that whatever ends one of them can be said once."""
    if _several():
        from qlora.machine.processes import here

        here()


def _leave() -> None:
    if _several():
        from qlora.machine.processes import leave

        leave()


def _stopped(stopped: list[int]) -> int:
    """The exit status after a signal: SIGINT's where nothing was noted."""
    return 128 + (stopped[-1] if stopped else signal.SIGINT)


@contextmanager
def _terminated(stopped: list[int]) -> Iterator[None]:
    """Inside, SIGTERM ends the work as Ctrl-C does, so that what is half-written is removed; it is noted in ``stopped``."""

    def note(number: int, frame: object) -> None:
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


class _Lasting:
    """A stream that takes no secret, and never fails: work goes on when its terminal is closed, or the disk under a log full."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self.stream.write(redacted(text))
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:  # qlora doctor runs without it
        return isinstance(error, MemoryError)
    from qlora.machine.device import ran_out_of_memory

    return ran_out_of_memory(error)


def _quiet_libraries() -> None:
    """Other libraries' progress bars and advice; qlora says what matters of it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if _several():  # what a process that ended leaves behind in the others is said in a sentence
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore", category=FutureWarning)
    if hasattr(sys.stdout, "reconfigure"):  # an answer's letters that the terminal lacks are no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")


def entry() -> None:
    """The ``qlora`` command."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
