"""``qlora init``: the recipe that it writes is what it says of it, fits, and trains on the data it looked at."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from qlora import init as starting
from qlora.cli import main
from qlora.errors import DoesNotFitError, InputError
from qlora.init import held_out_share, row_length
from qlora.planning.plan import timed
from qlora.recipe import Recipe
from tests.tiny import write_lines


def talk(question: str, answer: str) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture
def here(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with 300 short conversations, three that are long, and the model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny_model)
    short = [talk(f"hello {number}?", "there " * 5) for number in range(300)]
    write_lines(tmp_path / "my.jsonl", [*short, *(talk("long?", "word " * 900) for _ in range(3))])
    return tmp_path


def test_the_recipe_is_what_is_said_of_it(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["init", "--model", "model", "--data", "my.jsonl", "--card", "T4", "--host-memory=16GiB", "method.r=8"])
        == 0
    )
    told = capfd.readouterr().out
    text = (here / "my.yaml").read_text(encoding="utf-8")
    recipe = Recipe.from_yaml(here / "my.yaml")
    assert text.startswith("# qlora train my.yaml\n#\n# Fine-tunes model (")
    assert "\n# qlora init --model model --data my.jsonl --card T4 --host-memory 16GiB method.r=8\n" in text
    assert (recipe.folder, recipe.model.name, recipe.data.train) == ("runs/my", "model", "my.jsonl")
    assert (recipe.method.r, recipe.memory.budget) == (8, None)  # type: ignore[union-attr]
    # 300 of 303 examples, 99 %, are far shorter; the model has 256 positions
    assert recipe.data.max_length == 256
    assert "holds 99.0% of the examples whole; the longest has at most 8,192 tokens" in text
    held, rows, steps = map(
        int, re.search(r"303 records, (\d+) of them held out → (\d+) rows → (\d+) steps", told).groups()
    )  # type: ignore[union-attr]
    assert held == round(303 * recipe.data.held_out_fraction)
    training = recipe.training
    assert steps == training.epochs * -(-rows // training.batch_size)
    planned = timed(
        recipe.model_copy(update={"device": recipe.device.model_copy(update={"memory": "T4", "host_memory": "16GiB"})}),
        True,
    )
    assert f"Needs T4: {planned.memory.total / 1024**2:.1f} MiB of its 14.56 GiB" in text
    assert planned.memory.total < planned.target.free
    for verb in ("preview", "plan", "train"):
        assert f"    qlora {verb} my.yaml" in told
    assert main(["init", "--model=model", "--data=my.jsonl"]) == 2
    assert "'my.yaml' is there already" in capfd.readouterr().err


@pytest.mark.slow
def test_what_it_wrote_trains(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "--model=model", "--data=my.jsonl", "--out=small.yml", "epochs=1"]) == 0
    short = ["training.steps=2", "evaluation.prompts=0", "memory.budget=null", "data.limit=40", "device.threads=1"]
    assert main(["train", "small.yml", *short]) == 0
    assert (here / "runs/small/report.html").is_file()


def test_it_asks_in_a_terminal(here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(
        ["modle/x/y", "model", "", "none.jsonl", "my.jsonl", "5090-Pro", "12GiB", "two", "0", "2", "asked.yaml"]
    )
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: f"{next(answers)}\n"))
    assert main(["init"]) == 0
    told = capfd.readouterr().out
    assert len(starting.QUESTIONS) == 5
    assert all(f"{question}: " in told for question in starting.QUESTIONS.values())
    for mistake in (
        "There is no model folder 'modle/x/y'",
        "Data is needed",
        "There is no 'none.jsonl'",
        "not a card",
        "epochs is 'two'; expected a whole number of at least 1.",
        "epochs is '0'; expected",
    ):
        assert mistake in told
    assert Recipe.from_yaml(here / "asked.yaml").training.epochs == 2
    assert "Needs a GPU of 12GiB" in told


def test_nothing_typed_is_a_proposal(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter(["model", "my.jsonl", "", "", ""])
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, readline=lambda: f"{next(answers)}\n"))
    assert main(["init"]) == 0
    assert Recipe.from_yaml(here / "my.yaml").training.epochs == 3
    assert "Needs this machine" in capfd.readouterr().out


def test_of_one_text_pieces_are_held_out(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "text.txt").write_text(" ".join(f"w{number % 60}" for number in range(30_000)), encoding="utf-8")
    assert main(["init", "model=model", "data=text.txt"]) == 0
    found = re.search(r"1 record, (\d+) pieces held out → (\d+) rows", capfd.readouterr().out)
    assert found is not None
    held, rows = map(int, found.groups())
    assert 0 < held < rows / 10
    assert "pieces never trained on; loss and answers" in (here / "text.yaml").read_text(encoding="utf-8")


def test_what_is_not_read_is_told(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "labelled.csv").write_text("text,label\n" + "hello there,good\n" * 30, encoding="utf-8")
    assert main(["init", "model=model", "data=labelled.csv"]) == 0
    assert "Of the data: fields that are not read: 'label' (30 records)." in capfd.readouterr().out


def test_without_a_terminal_it_says_what_it_needs(
    here: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    for words, missing in (
        (["--data=my.jsonl"], "needs --model:"),
        (["model=model"], "needs --data:"),
        ([], "--model and --data"),
    ):
        assert main(["init", *words]) == 2
        assert missing in capfd.readouterr().err
    assert main(["init", "model=model", "data=my.jsonl", "rank=8"]) == 2
    assert "'rank=8' is nothing that qlora init takes" in capfd.readouterr().err
    assert main(["init", "model=model", "data=no.jsonl"]) == 2
    assert "There is no data file 'no.jsonl'" in capfd.readouterr().err
    assert not list(here.glob("*.yaml"))


def test_rows_get_shorter_until_it_fits(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(recipe: Recipe, card: str | None, host_memory: str | None) -> object:
        tried.append(recipe.data.max_length)
        if recipe.data.max_length > 128:
            raise DoesNotFitError("too much")
        return timed(recipe)

    monkeypatch.setattr(starting, "plan_for", refuse)
    write_lines(here / "long.jsonl", [talk("long?", "word " * 40) for _ in range(20)])
    made = starting.drafted({"model": "model", "data": "long.jsonl"}, Path("long.yaml"), [])
    assert tried[-1] == made.recipe.data.max_length == 128
    assert tried == [256, 128]


@pytest.mark.parametrize("cached", [True, False])
def test_a_model_of_the_hub(here: Path, tiny_model: Path, cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the hub's cache, and there to be had: the hub is asked only for the second."""
    asked = []
    config = str(tiny_model / "config.json")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: config if cached else None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, **_: asked.append(url))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tiny_model))
    monkeypatch.setattr(starting, "plan_for", lambda recipe, *_: timed(recipe))
    starting.init(["model=org/name", "data=my.jsonl", "out=hub.yaml"])
    assert Recipe.from_yaml(here / "hub.yaml").model.name == "org/name"
    assert [url.rpartition("/")[2] for url in asked] == ([] if cached else ["config.json"])


def test_lengths_and_shares() -> None:
    assert row_length([10] * 99 + [5000], False) == starting.SHORTEST
    assert row_length([10] * 98 + [1000, 5000], False) == 1024
    assert row_length([100_000], True) == starting.TEXT
    for records, share in (
        (20, 0.2),
        (100, 0.1),
        (1000, 0.05),
        (100_000, 0.002),
        (1, 0.0),
        (2, 0.0),
        (4, 0.0),
        (5, 0.2),
    ):
        assert held_out_share(records) == share


def test_values_are_written_as_yaml_reads_them() -> None:
    import yaml

    for value in (
        "my.jsonl",
        "true",
        "no",
        "1e3",
        "a: b",
        "x # y",
        "",
        None,
        True,
        3,
        0.05,
        32.0,
        [1, "a"],
        {"a": "b"},
        "ü.txt",
    ):
        assert yaml.safe_load(f"key: {starting._yaml(value)}") == {"key": value}
    assert (
        Recipe.from_dict(
            {"data": {"train": "x"}}, f"training.learning_rate={starting._yaml(2e-4)}"
        ).training.learning_rate
        == 2e-4
    )


def test_an_amount_that_is_none(here: Path) -> None:
    with pytest.raises(InputError, match="not a card"):
        starting.init(["model=model", "data=my.jsonl", "card=huge"])
