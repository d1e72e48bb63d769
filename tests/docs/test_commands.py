"""Every command, recipe and script on every page is run, or checked, or named below with the reason why it is not.

    ```sh      each command: qlora's are called on a tiny model; make's targets, scripts and their options are looked up
    ```yaml    is a part of a recipe, or a study; one that begins with "# mine.yaml" is also written there for the commands that follow
    ```python  is executed in a folder of its own, with the tiny model in place of the one it names
    ```json    each line is a record in a form that is known
    ```text    what a command prints, or a drawing: has no command in it

A page is read from top to bottom in one folder. What its commands need and no earlier one made (a recipe of the
repository, data, a run) is put there under the name that the page uses. Any other kind of block fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from qlora import cli
from qlora.data.detection import detect_form
from qlora.recipe import Recipe, reference
from qlora.studies.spec import StudySection, settings_of
from tests.docs.pages import PAGES, ROOT, Block, blocks, name, prose, spans

KINDS = ("sh", "python", "yaml", "json", "text")
PROGRAMS = {  # what is not run here, and why
    "torchrun": "tests/runs/test_several.py starts it, in another folder",
    "accelerate": "tests/runs/test_several.py starts it, in another folder",
    "srun": "needs a cluster",
    "git": "the address of a clone is the reader's",
    "cd": "belongs to the reader's shell",
    ".": "belongs to the reader's shell",
    "pip": "would install; which names it may be given is checked in test_links.py",
    "vllm": "another project's program, which the tests do not install",
    "llama-cli": "llama.cpp's program; tests/programs runs its library",
    "ollama": "another project's program, which the tests do not install",
    "pre-commit": "another project's program, which the tests do not install",
}
SCRIPTS = {  # likewise of Python
    "convert_hf_to_gguf.py": "llama.cpp's",
    "convert_lora_to_gguf.py": "llama.cpp's",
}
STAND_INS = ("Qwen/Qwen3-8B", "smollm2-135m-instruct")  # models in whose place the tiny one stands
TARGETS = set(re.findall(r"(?m)^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8")))
MADE = {"merged": "merged", "nf4": "nf4", "adapter": "portable", "gguf": "gguf-q8_0", "gguf-adapter": "gguf-adapter"}
RUN_VERBS = ("resume", "evaluate", "chat", "export", "report")
RECIPE_VERBS = ("plan", "preview", "train")
COMMAND = re.compile(r"^\s*(\$ )?(qlora (?!run\b)\w|make |python3? |pip |git |vllm )")
VALUE = re.compile(
    r"(?P<section>model|method|data|training|evaluation|memory|device)\.(?P<key>(?!json)\w+)(?:[=:] ?(?P<value>[^…]+))?"
)
HUB = {"split", "held_out_split", "subset", "limit"}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block; comments left out, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def tiny(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe or a study as a page has it, made small: few rows and steps, files that are here; the model is replaced in its text."""
    if "recipe" in values:
        arms = dict(list(values["arms"].items())[:2])
        return {**values, "recipe": tiny(values["recipe"]), "arms": arms, "rates": [1e-3], "seeds": [0]}
    data = {key: value for key, value in values.get("data", {}).items() if key not in HUB}
    if data.get("form") != "text" and "columns" not in data:
        data["train"] = "my.jsonl"
        if data.pop("held_out", None):
            data["held_out_fraction"] = 0.2
    training = {**values.get("training", {}), "batch_size": 4, "micro_batch_size": 2}
    if training.get("steps"):
        training["steps"] = 3
    return {
        **values,
        "data": {**data, "max_length": 64, "limit": 16},
        "training": training,
        "evaluation": {"prompts": 1, "max_new_tokens": 4},
        "device": {**values.get("device", {}), "threads": 1},
    }


class Bench:
    """A folder in which a page's commands work as they stand."""

    def __init__(self, folder: Path, model: Path, finished: Path) -> None:
        self.folder, self.model, self.finished = folder, model, finished
        lines = (finished.parent / "chat.jsonl").read_text(encoding="utf-8")
        (folder / "my.jsonl").write_text(lines, encoding="utf-8")
        turns = [[turn["content"] for turn in json.loads(line)["messages"]] for line in lines.splitlines()]
        table = "question,answer\n" + "".join(f"{question},{answer}\n" for question, answer in turns)
        (folder / "faq.csv").write_text(table, encoding="utf-8")
        labelled = [{"review": question, "opinion": len(question) % 2} for question, _ in turns]
        (folder / "reviews.jsonl").write_text("".join(json.dumps(one) + "\n" for one in labelled), encoding="utf-8")
        text = "\n".join(" ".join(pair) for pair in turns)
        (folder / "my-text.txt").write_text(text, encoding="utf-8")
        self.recipe("quickstart.yaml", (ROOT / "recipes/methods/lora.yaml").read_text(encoding="utf-8"))
        for path in (ROOT / "recipes").rglob("*.yaml"):
            self.recipe(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for block in blocks(ROOT / "README.md"):  # mine.yaml, of which every page speaks
            if block.kind == "yaml":
                keep_recipe(self, block.text)

    def here(self, text: str) -> str:
        """With the tiny model in the place of those that are named."""
        for model in STAND_INS:
            text = text.replace(model, str(self.model))
        return text

    def recipe(self, path: str, text: str) -> None:
        place = self.folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(yaml.safe_dump(tiny(yaml.safe_load(self.here(text))), sort_keys=False), encoding="utf-8")

    def run(self, path: str) -> None:
        """A finished run under the name that a page uses."""
        if not (self.folder / path).exists():
            shutil.copytree(self.finished, self.folder / path)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was trained to its end."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(chat_data, folder / "chat.jsonl")
    values = {
        "model": {"name": str(tiny_model)},
        "method": {"name": "lora", "r": 16},
        "data": {"train": str(folder / "chat.jsonl"), "held_out_fraction": 0.2, "max_length": 64},
        "training": {"steps": 2, "batch_size": 2},
        "evaluation": {"prompts": 1, "max_new_tokens": 4},
        "device": {"threads": 1},
        "folder": str(folder / "run"),
    }
    import qlora

    qlora.train(Recipe.from_dict(values), quiet=True)
    return folder / "run"


@pytest.fixture
def bench(finished: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello there\n/quit\n"))
    monkeypatch.setenv("QLORA_CACHE", str(tmp_path / "cache"))

    def plan_alone(recipe: Recipe, table: bool = False) -> Any:
        """Of a survey the plan: what else would fit takes minutes for a model that fits everywhere."""
        from qlora.planning.plan import plan

        found = plan(recipe)
        return SimpleNamespace(fits=True, plan=found, __str__=found.__str__)

    monkeypatch.setattr("qlora.planning.plan.survey", plan_alone)
    monkeypatch.setattr(
        "qlora.planning.plan.require_several", lambda: None
    )  # where it is for two cards that are not here
    return Bench(tmp_path, tiny_model, finished)


# --- every page, in seconds: nothing escapes, everything is known ----------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    for block in blocks(page):
        where = f"{name(page)}, line {block.line}"
        assert block.kind in KINDS, (
            f"{where}: a block of kind '{block.kind}' is not tested; known are {', '.join(KINDS)}"
        )
        if block.kind == "text":
            hidden = [line for line in block.text.splitlines() if COMMAND.match(line)]
            assert not hidden, f"{where}: a command in a text block is not tested: {hidden[0]}"
    hidden = [line for line in prose(page).splitlines() if re.match(r"(    |\t)", line) and COMMAND.match(line)]
    assert not hidden, f"{name(page)}: a command outside of a fenced block is not tested: {hidden[0]}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_known(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks(page):
        for words in commands(block.text) if block.kind == "sh" else ():
            look_up(words, f"{name(page)}, line {block.line}", monkeypatch)
    for span in spans(page):
        if COMMAND.match(span):
            look_up(shlex.split(span), f"{name(page)}, `{span}`", monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_recipe_and_record_is_valid(page: Path) -> None:
    for block in blocks(page):
        if block.kind == "yaml":
            values = yaml.safe_load(block.text)
            if "recipe" in values:
                assert settings_of(StudySection.model_validate(values))
                continue
            values["data"] = {"train": "my.jsonl", **values.get("data", {})}
            Recipe.from_dict(values)
        elif block.kind == "json":
            for number, line in enumerate(block.text.splitlines()):
                assert detect_form(json.loads(line)), (
                    f"{name(page)}, line {block.line + number}: a record of no known form"
                )


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name)
def test_every_value_that_is_named_is_one_of_a_recipe(page: Path, tmp_path: Path) -> None:
    """In sentences, as `memory.budget` or `training.steps=3`, and behind commands."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {train: my.jsonl}", encoding="utf-8")
    tables = reference().split("## `")
    for span in spans(page):
        if found := VALUE.fullmatch(span):
            there = [table for table in tables if re.match(rf"{found['section']}\b", table)]
            assert any(f"| `{found['key']}` |" in table for table in there), f"{name(page)}: no recipe has `{span}`"
            if found["value"]:
                Recipe.from_yaml(recipe, f"{found['section']}.{found['key']}={found['value']}")
    for block in blocks(page):
        for words in commands(block.text) if block.kind == "sh" else ():
            if words[0] == "qlora" and words[1] in (*RECIPE_VERBS, "resume"):
                given = [word.removeprefix("--") for word in words[3:] if not word.startswith("count=")]
                Recipe.from_yaml(recipe, *given)


def look_up(words: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is this a command that is there? Run nothing."""
    program, *rest = words
    if program == "qlora":
        if rest[:1] == ["VERB"]:  # the grammar
            return
        assert rest, where
        assert rest[0] in (*cli.VERBS, "--help", "--version"), f"{where}: no verb '{rest[0]}'"
    elif program == "make":
        unknown = [word for word in rest if "=" not in word and word not in TARGETS]
        assert not unknown, f"{where}: the Makefile has no target {unknown}"
    elif Path(program).name in ("python", "python3"):
        look_up_script(rest, where, monkeypatch)
    elif program == "cp":
        assert (ROOT / rest[0]).is_file() or rest[0] == "quickstart.yaml", f"{where}: {rest[0]} is not there"
    elif "/" in program:
        assert (ROOT / program).is_file(), f"{where}: {program} is not there"
    else:
        assert program in PROGRAMS, f"{where}: '{program}' is neither tested nor named in PROGRAMS"


def look_up_script(rest: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"{where}: no module {rest[1]}"
        if rest[1] == "pytest":
            missing = [word for word in rest[2:] if word.startswith("tests") and not (ROOT / word).exists()]
            assert not missing, f"{where}: {missing} is not there"
    elif rest[0] in SCRIPTS:
        pass
    else:
        script = ROOT / rest[0]
        assert script.is_file(), f"{where}: {rest[0]} is not there"
        if script.is_relative_to(ROOT / "benchmarks"):
            parse_options(script, rest[1:], where, monkeypatch)


def parse_options(script: Path, options: list[str], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load a benchmark up to the moment when it has parsed its options."""
    if "…" in options or "--help" in options:
        options = []
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def stop(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script), *options])
        patch.syspath_prepend(str(ROOT))
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except SystemExit as error:
            pytest.fail(f"{where}: {script.name} does not take {options} ({error})")
    pytest.fail(f"{where}: {script.name} parses no options")


# --- page by page, as a reader would do it ---------------------------------------------------------------------------


def _pages() -> list[Any]:
    """The first page always, the others in make test-all; a page without anything to run not at all."""
    found = []
    for page in PAGES:
        if any(block.kind in ("python", "yaml") or _of_qlora(block) for block in blocks(page)):
            first = page.name in ("README.md", "data.md")
            found.append(pytest.param(page, id=name(page), marks=() if first else pytest.mark.slow))
    return found


def _of_qlora(block: Block) -> bool:
    return block.kind == "sh" and any(words[0] == "qlora" for words in commands(block.text))


@pytest.mark.parametrize("page", _pages())
def test_the_page_works_from_top_to_bottom(page: Path, bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    do: dict[str, Callable[[Bench, str], None]] = {"sh": run_commands, "yaml": keep_recipe, "python": run_python}
    for block in blocks(page):
        try:
            do.get(block.kind, lambda bench, text: None)(bench, block.text)
        except (Exception, SystemExit) as error:
            said = "".join(capfd.readouterr())[-2000:]
            raise AssertionError(f"{name(page)}, line {block.line}: {error}\n{said}") from error


def run_commands(bench: Bench, text: str) -> None:
    for words in commands(text):
        if words[0] == "cp":
            shutil.copy(bench.folder / words[1], bench.folder / words[2])
        elif words[0] == "qlora":
            run_qlora(bench, [bench.here(word) for word in words[1:]])


def run_qlora(bench: Bench, words: list[str]) -> None:
    verb = words[0]
    if verb in RUN_VERBS:
        bench.run(words[1])
        elsewhere = any(word.startswith("out=") for word in words)
        if verb == "export" and words[2] in MADE and not elsewhere:  # a page shows several ways to make the same
            shutil.rmtree(bench.folder / words[1] / MADE[words[2]], ignore_errors=True)
    elif verb == "train":  # a page shows several ways to begin the same run
        folder = Recipe.from_yaml(words[1], *(word.removeprefix("--") for word in words[2:])).folder
        shutil.rmtree(bench.folder / str(folder), ignore_errors=True)
    allowed = (0, 2) if verb == "doctor" else (0,)  # what the machine lacks is no fault of the page
    status = cli.main(words)
    assert status in allowed, f"qlora {' '.join(words)} ended with {status}"


def keep_recipe(bench: Bench, text: str) -> None:
    if named := re.match(r"# *(\S+\.yaml)\b", text):
        bench.recipe(named[1], text)


def run_python(bench: Bench, text: str) -> None:
    for path in re.findall(r"""["'](runs/[\w.-]+)/?\w*["']""", text):
        if path not in re.findall(r"""folder=["'](runs/[\w.-]+)["']""", text):
            bench.run(path)
    for path in re.findall(r"""["'](runs/[\w.-]+/merged)["']""", text):
        if not (bench.folder / path).exists():
            run_qlora(bench, ["export", str(Path(path).parent), "merged"])
    exec(compile(bench.here(text), "<page>", "exec"), {"__name__": "__page__"})
