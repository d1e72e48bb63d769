"""The main job on a tiny model, and its law: 10 steps are 6 steps, a kill and 4 more, bit for bit."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qlora
from qlora.chat import talk
from qlora.cli import main
from qlora.errors import RunError
from qlora.export.verify import GgufFile
from qlora.files.durable import write_json
from qlora.files.lock import run_lock
from qlora.recipe import Recipe
from qlora.runs.evaluate import chat_tokenizer, evaluate, load_run
from qlora.runs.export import in_transformers, merge
from qlora.runs.folder import RUN_FILES
from qlora.runs.train import resume, train
from qlora.training import checkpoint
from qlora.training.log import MetricsLog
from tests.rounding import difference, rounding
from tests.tiny import conversations, tiny_values, write_lines

WEIGHTS = "adapter_model.safetensors"
# what two runs of the same steps must share to the last bit; seconds and memory may differ
EXACT = ("step", "epoch", "loss", "learning_rate", "grad_norm", "target_tokens", "tokens")
EXACT_HELD_OUT = ("step", "held_out_loss", "held_out_perplexity", "held_out_target_tokens")

# Imports once, then forks a process for each run, which sends itself a signal when the line of a step is written and goes
# on as if nothing were. Prints the wait status of each.
DRIVER = """
import json, os, signal, sys
import qlora.runs.train
from qlora.cli import main
from qlora.files.durable import write_json
from qlora.runs.folder import RUN_FILES
from qlora.training.log import MetricsLog
from qlora.training import checkpoint
write = MetricsLog.write
for recipe, number, last in json.loads(sys.argv[1]):
    def wounded(self, values):
        write(self, values)
        if values["step"] == last and ("loss" in values or last == 0):
            os.kill(os.getpid(), number)
    MetricsLog.write = wounded
    child = os.fork()
    if not child:
        os.dup2(os.open(recipe + ".err", os.O_WRONLY | os.O_CREAT), 2)
        os.dup2(2, 1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        status = main(["train", recipe])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return lines_of_file(folder / "metrics.jsonl")


def lines_of_file(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def numbers_of(folder: Path) -> list[tuple[Any, ...]]:
    """The lines without what depends on the clock and the machine."""
    return [
        tuple(line[key] for key in (EXACT_HELD_OUT if "held_out_loss" in line else EXACT)) for line in lines_of(folder)
    ]


def evaluation_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return values


def recipe_in(place: Path, values: dict[str, Any]) -> Path:
    path = place / "tiny.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps that nothing disturbed. Copy it before changing it."""
    place = tmp_path_factory.mktemp("finished")
    recipe = recipe_in(place, tiny_values(tiny_model, chat_data, place / "run"))
    assert main(["train", str(recipe)]) == 0
    return place / "run"


def test_a_run_without_its_checkpoints_is_not_begun_anew_over_its_own(finished: Path, tmp_path: Path) -> None:
    """Deleting them saves disk; what was learned and noted stays."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"checkpoints of .* are gone.*train on from it: qlora train"):
        resume(run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_folder_is_taken_before_anything_is_loaded(
    tiny_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_values(tiny_model, chat_data, tmp_path / "run")
    monkeypatch.setattr("qlora.runs.train.load_recipe_data", lambda *_: pytest.fail("data were read"))
    (tmp_path / "run").mkdir()
    with run_lock(tmp_path / "run"), pytest.raises(RunError, match="is training in"):
        train(Recipe.from_dict(values), quiet=True)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr("qlora.runs.train.load_recipe_data", lambda *_: raised(RuntimeError("while loading")))
    with pytest.raises(RuntimeError, match="while loading"):
        train(Recipe.from_dict(values), quiet=True)
    assert not (tmp_path / "run").exists()  # nothing began, and nothing is left


def raised(error: Exception) -> Any:
    raise error


class Wounded(NamedTuple):
    """A run in a process of its own that a signal hit."""

    folder: Path
    status: int
    errors: str


@pytest.fixture(scope="module")
def wounded(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wounded]:
    """Real processes, each hit at another moment."""
    hits = {
        "killed after step 8": (signal.SIGKILL, 8),
        "killed after step 1": (signal.SIGKILL, 1),
        "killed while measuring": (signal.SIGKILL, 0),
        "interrupted": (signal.SIGINT, 4),
        "terminated": (signal.SIGTERM, 5),
        "interrupted at the last step": (signal.SIGINT, 10),
        "terminated while measuring": (signal.SIGTERM, 0),
    }
    places = {name: tmp_path_factory.mktemp("wounded") for name in hits}
    orders = []
    for name, (number, step) in hits.items():
        recipe = recipe_in(places[name], tiny_values(tiny_model, chat_data, places[name] / "run"))
        orders.append((str(recipe), int(number), step))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(orders)],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    statuses = map(int, done.stdout.split())
    return {
        name: Wounded(place / "run", status, (place / "tiny.yaml.err").read_text(encoding="utf-8"))
        for (name, place), status in zip(places.items(), statuses, strict=True)
    }


# --- the main job ----------------------------------------------------------------------------------------------------


def test_run_folder_holds_what_the_readme_documents(finished: Path) -> None:
    # LoRA finds nothing out, the recipe names no task, and there are no pairs
    left_out = {"method.json", "tasks", "tasks.json", "reference"}
    assert {path.name for path in finished.iterdir()} == {*RUN_FILES, ".lock"} - left_out
    assert [path.name for path in sorted((finished / "checkpoints").iterdir())] == ["000009", "000010"]

    steps = [line for line in lines_of(finished) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    fields = {"tokens_per_second", "peak_memory_bytes", "seconds", "micro_batch_size", *EXACT}
    assert all(line.keys() == fields for line in steps)
    assert all(line["peak_memory_bytes"] > 2**20 and line["tokens"] > line["target_tokens"] > 0 for line in steps)
    held_out = [line for line in lines_of(finished) if "held_out_loss" in line]
    assert [line["step"] for line in held_out] == [0, 4, 8, 10]
    assert all(line.keys() == set(EXACT_HELD_OUT) for line in held_out)

    measured = evaluation_of(finished)
    for name, line in (("before", held_out[0]), ("after", held_out[-1])):
        rows = measured["held_out"][name].pop("rows")
        assert sum(loss for loss, _ in rows) / sum(count for _, count in rows) == pytest.approx(line["held_out_loss"])
        assert measured["held_out"][name] == {
            "loss": line["held_out_loss"],
            "perplexity": line["held_out_perplexity"],
            "target_tokens": line["held_out_target_tokens"],
        }
    assert measured["held_out"]["after"]["loss"] < 0.9 * measured["held_out"]["before"]["loss"]
    assert measured["verdict"]["outcome"] == "better"
    assert len(measured["generations"]) == 2
    assert all(item.keys() == {"prompt", "expected", "before", "after"} for item in measured["generations"])
    assert all(isinstance(text, str) for item in measured["generations"] for text in item.values())

    plan = json.loads((finished / "plan.json").read_text(encoding="utf-8"))
    assert {"model", "method", "data", "steps", "device", "memory", "disk", "why"} <= plan.keys()
    assert plan["steps"] == 10
    assert plan["model"]["compute_dtype"] == "fp32"
    assert plan["method"]["trainable_parameters"] == sum(
        values.numel() for values in load_file(finished / "adapter" / WEIGHTS).values()
    )
    assert all(isinstance(sentence, str) for sentence in plan["why"])
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    assert environment["versions"]["torch"] == torch.__version__
    assert len(environment["data_fingerprint"]) == 64


def test_recipe_of_the_run_trains_the_same_run_again(finished: Path, tmp_path: Path) -> None:
    assert main(["train", str(finished / "recipe.yaml"), f"folder={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again/adapter" / WEIGHTS).read_bytes() == (finished / "adapter" / WEIGHTS).read_bytes()
    assert numbers_of(tmp_path / "again") == numbers_of(finished)
    assert evaluation_of(tmp_path / "again") == evaluation_of(finished)


@pytest.mark.slow
def test_recipe_of_a_replacing_run_does_not_replace_it_again(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    short = ("overwrite=true", "training.steps=1", "evaluation.prompts=0", "data.held_out_fraction=0")
    assert main(["train", str(recipe_file), *short]) == 0
    captured = capsys.readouterr()
    assert "Warning: nothing is held out" in captured.err
    assert "Verdict                not known: nothing is held out" in captured.out
    (folder / "mine.txt").write_text("kept")
    assert main(["train", str(recipe_file), *short]) == 0  # told to
    assert (folder / "mine.txt").exists()
    assert main(["train", str(folder / "recipe.yaml")]) == 2
    assert "overwrite=true" in capsys.readouterr().err
    # without held-out data there is nothing to measure, and no file that says so
    assert not (folder / "evaluation.json").exists()
    assert (folder / "report.html").exists()


def test_python_returns_the_numbers_that_the_files_hold(finished: Path) -> None:
    result = evaluate(finished, quiet=True)
    measured = evaluation_of(finished)
    assert result.after is not None
    assert result.after.loss == measured["held_out"]["after"]["loss"]
    assert [item.after for item in result.generations] == [item["after"] for item in measured["generations"]]
    assert result.trainable_parameters == load_run(finished, quiet=True).count_trainable()


def test_evaluate_leaves_the_run_as_it_is(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert main(["evaluate", str(finished)]) == 0
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    assert f"{evaluation_of(finished)['held_out']['after']['loss']:.4f}" in capsys.readouterr().out


def test_export_loads_in_plain_transformers(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert main(["export", str(finished), "merged", f"out={out}", "dtype=fp32"]) == 0
    assert "logits differ by at most" in capsys.readouterr().out
    plain = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    adapted = load_run(finished, quiet=True)
    ids = torch.tensor([tokenizer("What does copytree do?")["input_ids"]])
    with torch.no_grad():
        expected = adapted.model(input_ids=ids).logits
        found = plain(ids).logits
        with adapted.disabled():
            bare = adapted.model(input_ids=ids).logits
    assert difference(found, expected) <= rounding()
    assert (bare - expected).abs().max() > 0.1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).startswith(
        "<|start|>user"
    )
    # taken: refused unless told
    assert main(["export", str(finished), "merged", f"out={out}"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["export", str(finished), "merged", f"out={out}", "overwrite=true"]) == 0
    assert next(iter(load_file(out / "model.safetensors").values())).dtype == torch.bfloat16


def test_forms_are_measured_before_one_is_chosen(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(finished, tmp_path / "run")
    assert main(["export", str(copy), "merged"]) == 0
    text = (copy / "forms.md").read_text(encoding="utf-8")
    assert text in (printed := capsys.readouterr().out)
    lines = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines()[4:]}
    assert list(lines) == [
        "trained", *(f"{base}, {how}" for base in ("dequantized", "original") for how in ("16 bits", "in NF4 again"))
    ]  # fmt: skip
    loss, divergence = ({name: float(cells[at]) for name, cells in lines.items()} for at in (0, 2))
    assert loss["trained"] == pytest.approx(evaluate(copy, quiet=True).after.loss, abs=1e-4)  # type: ignore[union-attr]
    assert divergence["trained"] == 0
    assert divergence["dequantized, 16 bits"] < divergence["original, 16 bits"]
    chosen = json.loads((copy / "merged/qlora_merge.json").read_text(encoding="utf-8"))["weights"]
    assert f"Merged into the {chosen} base" in printed
    assert main(["export", str(copy), "check"]) == 0
    assert "tensors are those of the run" in capsys.readouterr().out
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        tensors = load_file(copy / "merged/model.safetensors")
        tensors[name] *= 1.05
        save_file(tensors, copy / "merged/model.safetensors", metadata={"format": "pt"})
        assert main(["export", str(copy), "check", f"from={copy / 'merged'}"]) == 4
        assert f"{name} differ" in capsys.readouterr().err
        tensors[name] /= 1.05
        save_file(tensors, copy / "merged/model.safetensors", metadata={"format": "pt"})
    assert main(["export", str(copy), "nf4"]) == 0
    assert "this NF4" in capsys.readouterr().out
    opened = AutoModelForCausalLM.from_pretrained(copy / "nf4")
    assert opened.config.quantization_config.load_in_4bit
    assert main(["export", str(copy), "gguf", "type=q4_0"]) == 0
    measured = [line for line in capsys.readouterr().out.splitlines() if ", q4_0 " in line]
    assert [line.split("|")[1].strip() for line in measured] == ["dequantized, q4_0", "original, q4_0"]
    assert "\n".join(measured) in (copy / "gguf-q4_0/README.md").read_text(encoding="utf-8")
    assert (copy / "forms.md").read_text(encoding="utf-8") == text


def test_a_merge_too_large_to_be_opened_is_read_again_layer_by_layer(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("qlora.runs.export.total_memory_bytes", lambda device: (1, 1))
    assert main(["export", str(finished), "merged", f"out={tmp_path / 'merged'}", "base=dequantized"]) == 0
    printed = capsys.readouterr().out
    assert "Read again: its 21 tensors are those of the run." in printed
    assert "| merged  " in printed
    assert "logits differ" not in printed


def test_an_export_elsewhere_is_checked_against_the_run(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, away = shutil.copytree(finished, tmp_path / "run"), tmp_path / "away"

    def checked(place: Path, status: int) -> str:
        assert main(["export", str(copy), "check", f"from={place}"]) == status
        said = capsys.readouterr()
        return said.err if status else said.out

    for what in (["gguf", "type=q8_0", "base=dequantized"], ["gguf-adapter"], ["adapter"]):
        assert main(["export", str(copy), *what, f"out={away / what[0]}"]) == 0
    shutil.copytree(copy / "adapter", away / "own")
    assert main(["export", str(copy), "merged", f"out={away / 'merged'}", "base=dequantized"]) == 0
    capsys.readouterr()
    assert "| gguf " in checked(away / "gguf", 0)
    for name, tensor, said in (
        ("gguf/model-q8_0.gguf", "blk.1.ffn_up.weight", b"gpt-2"),
        ("gguf-adapter/adapter.gguf", "blk.0.attn_q.weight.lora_b", b"lora"),
    ):
        file = away / name
        assert "tensors are those of the run" in checked(file, 0)
        whole, place = file.read_bytes(), int(GgufFile(file).tensors[tensor].data_offset)
        file.write_bytes(whole[:place] + bytes(64) + whole[place + 64 :])
        assert tensor in checked(file, 4)
        file.write_bytes(whole.replace(said, b"x" * len(said), 1))
        checked(file, 4)
        file.write_bytes(whole[:200])
        assert "is no whole GGUF file" in checked(file, 4)
        file.write_bytes(whole)
    assert "tensors are those of the run" in checked(away / "merged", 0)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        file = away / "merged" / name
        whole = file.read_bytes()
        file.write_bytes(whole + b" ")
        assert f"other content than was written in {name}" in checked(away / "merged", 4)
        file.unlink()
        assert name in checked(away / "merged", 4)
        file.write_bytes(whole)
    for folder in (away / "adapter", away / "own"):
        assert "tensors are those of the run" in checked(folder, 0)
        values = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        (folder / "adapter_config.json").write_text(json.dumps({**values, "lora_alpha": 3}), encoding="utf-8")
        assert "adapter_config.json's lora_alpha differ" in checked(folder, 4)
        (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
        tensors = load_file(folder / WEIGHTS)
        name = next(name for name in tensors if "down_proj.lora_B" in name)
        save_file({**tensors, name: tensors[name] * 1.1}, folder / WEIGHTS)
        assert f"{name} differ" in checked(folder, 4)


def test_peft_loads_the_adapter_strictly(finished: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = load_run(finished, quiet=True)
    base = AutoModelForCausalLM.from_pretrained(adapted.base.folder)
    model = peft.PeftModel.from_pretrained(base, finished / "adapter")
    theirs = {key: value for key, value in model.state_dict().items() if "lora_" in key}
    ours = {key.replace(".weight", ".default.weight"): value for key, value in adapted.adapter_state().items()}
    assert theirs.keys() == ours.keys()
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (4, 4)  # alpha / r = 8 / 4 is in B
    assert all(torch.equal(theirs[key], value * (2 if "lora_B" in key else 1)) for key, value in ours.items())


def test_a_run_without_its_checkpoints_answers_from_its_adapter(finished: Path, tmp_path: Path) -> None:
    run_folder = shutil.copytree(finished, tmp_path / "run")
    expected = evaluate(run_folder, quiet=True)
    shutil.rmtree(run_folder / "checkpoints")
    again = evaluate(run_folder, quiet=True)
    assert (again.after, again.generations) == (expected.after, expected.generations)


def test_the_adapter_alone_is_exported_as_plain_lora(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = shutil.copytree(finished, tmp_path / "run")
    assert main(["export", str(run_folder), "adapter"]) == 0
    assert "portable" in capsys.readouterr().out
    for name in (WEIGHTS, "adapter_config.json", "chat_template.jinja"):
        assert (run_folder / "portable" / name).read_bytes() == (run_folder / "adapter" / name).read_bytes()
    assert main(["export", str(run_folder), "adapter"]) == 2
    assert main(["export", str(run_folder), "adapter", "overwrite=true"]) == 0
    assert main(["export", str(run_folder), "adapter", "dtype=bf16"]) == 2
    inside = f"out={run_folder / 'checkpoints' / '000010'}"
    capsys.readouterr()
    assert main(["export", str(run_folder), "adapter", inside, "overwrite=true"]) == 2
    assert "is being read" in capsys.readouterr().err
    assert (run_folder / "checkpoints" / "000010" / "optimizer.safetensors").is_file()


def test_chat_and_report(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    talk(finished, StringIO("fox 3?\n\n/new\nfox 3?\n/quit\nnever asked\n"))
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2
    assert answers[0] == answers[1]  # greedy, and /new forgets
    page = (finished / "report.html").read_bytes()
    assert main(["report", str(finished)]) == 0
    assert capsys.readouterr().out.strip() == str(finished / "report.html")
    assert b"<html" in page
    assert page == (finished / "report.html").read_bytes()


def test_raw_text_run_has_no_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    text = write_lines(tmp_path / "text.jsonl", [{"text": f"the fox said {n} hello there " * 4} for n in range(12)])
    values = tiny_values(tiny_model, text, tmp_path / "run")
    values["training"] = {"steps": 1, "batch_size": 2, "micro_batch_size": 2}
    assert main(["train", str(recipe_in(tmp_path, values))]) == 0
    assert not list((tmp_path / "run").rglob("chat_template*"))
    assert chat_tokenizer(tmp_path / "run").chat_template is None


# --- stopped and resumed ---------------------------------------------------------------------------------------------


def assert_same_run(folder: Path, expected: Path) -> None:
    assert (folder / "adapter" / WEIGHTS).read_bytes() == (expected / "adapter" / WEIGHTS).read_bytes()
    for name in (WEIGHTS, "optimizer.safetensors"):
        ours, theirs = (load_file(place / "checkpoints/000010" / name) for place in (folder, expected))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert numbers_of(folder) == numbers_of(expected)
    assert evaluation_of(folder) == evaluation_of(expected)


@pytest.mark.slow
def test_killed_run_goes_on_bit_for_bit(wounded: dict[str, Wounded], finished: Path) -> None:
    hit = wounded["killed after step 8"]
    assert hit.status == -signal.SIGKILL
    assert [path.name for path in sorted((hit.folder / "checkpoints").iterdir())] == ["000003", "000006"]
    assert lines_of(hit.folder)[-1]["step"] == 8
    assert main(["resume", str(hit.folder)]) == 0
    assert_same_run(hit.folder, finished)


@pytest.mark.slow
def test_run_killed_before_its_first_checkpoint_begins_again(wounded: dict[str, Wounded], finished: Path) -> None:
    hit = wounded["killed after step 1"]
    assert not (hit.folder / "checkpoints").exists()
    assert main(["resume", str(hit.folder)]) == 0
    assert_same_run(hit.folder, finished)


@pytest.mark.slow
def test_run_killed_while_measuring_measures_again(wounded: dict[str, Wounded], finished: Path) -> None:
    hit = wounded["killed while measuring"]
    assert not (hit.folder / "evaluation.json").exists()
    assert [line["step"] for line in lines_of(hit.folder)] == [0]
    assert main(["resume", str(hit.folder)]) == 0
    assert_same_run(hit.folder, finished)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "status", "step"),
    [("interrupted", 130, 4), ("terminated", 143, 5), ("interrupted at the last step", 130, 10)],
)
def test_signal_saves_and_says_how_to_resume(
    name: str, status: int, step: int, wounded: dict[str, Wounded], finished: Path, tmp_path: Path
) -> None:
    hit = wounded[name]
    assert hit.status == status, hit.errors
    message = [line for line in hit.errors.splitlines() if line.startswith("qlora: ")]
    assert len(message) == 1
    assert f"qlora resume {hit.folder}" in message[0]
    assert "Traceback" not in hit.errors
    assert checkpoint.find(hit.folder / "checkpoints")[-1].name == f"{step:06d}"
    copy = shutil.copytree(hit.folder, tmp_path / "run")  # another test takes it as it is
    assert main(["resume", str(copy)]) == 0
    assert_same_run(copy, finished)


@pytest.mark.slow
def test_signal_before_the_first_step_says_how_to_resume(wounded: dict[str, Wounded], finished: Path) -> None:
    hit = wounded["terminated while measuring"]
    assert hit.status == 143, hit.errors
    assert hit.errors.splitlines()[-1].endswith(f"Go on with: qlora resume {hit.folder}")
    assert main(["resume", str(hit.folder)]) == 0
    assert_same_run(hit.folder, finished)


def test_resume_of_a_finished_run_changes_nothing(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    done = qlora.resume(copy, quiet=True)
    assert (done.steps, done.folder) == (10, copy)
    assert_same_run(copy, finished)
    assert {path.name for path in copy.iterdir()} == {path.name for path in finished.iterdir()}


@pytest.mark.slow
def test_torn_last_line_is_written_again(wounded: dict[str, Wounded], finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "checkpoints/000010")
    path = copy / "metrics.jsonl"
    text = path.read_text(encoding="utf-8")
    path.write_text(text[: text.index('"step": 10') + 20], encoding="utf-8")
    assert main(["resume", str(copy)]) == 0
    assert_same_run(copy, finished)


def test_resume_refuses_another_recipe_or_other_data(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    path = copy / "recipe.yaml"
    original = path.read_text(encoding="utf-8")
    path.write_text(original.replace("steps: 10", "steps: 20"), encoding="utf-8")
    with pytest.raises(RunError, match="changed after the run began"):
        resume(copy, quiet=True)
    path.write_text(original, encoding="utf-8")
    data = Path(yaml.safe_load(original)["data"]["train"])
    kept = data.read_bytes()
    try:
        write_lines(data, conversations(39))
        with pytest.raises(RunError, match=r"data of .* has changed"):
            resume(copy, quiet=True)
    finally:
        data.write_bytes(kept)
    (copy / "environment.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunError, match=r"environment\.json' is damaged"):
        resume(copy, quiet=True)


def test_another_base_under_a_run_is_noticed(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    copy, model = tmp_path / "run", tmp_path / "model"
    shutil.copytree(finished, copy)
    shutil.copytree(tiny_model, model)
    recipe = (copy / "recipe.yaml").read_text(encoding="utf-8").replace(str(tiny_model), str(model))
    (copy / "recipe.yaml").write_text(recipe, encoding="utf-8")
    environment = json.loads((copy / "environment.json").read_text(encoding="utf-8"))
    environment["recipe_sha256"] = hashlib.sha256(recipe.encode()).hexdigest()
    (copy / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    load_run(copy, quiet=True)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6}), encoding="utf-8")
    for work in (load_run, resume, merge, evaluate):
        with pytest.raises(RunError, match="is not the one that"):
            work(copy)
    assert not (copy / "merged").exists()


def test_evaluation_refuses_data_that_changed(finished: Path, tmp_path: Path) -> None:
    data = Path(yaml.safe_load((finished / "recipe.yaml").read_text(encoding="utf-8"))["data"]["train"])
    kept = data.read_bytes()
    try:
        write_lines(data, conversations(41))
        with pytest.raises(RunError, match="may have been trained on"):
            evaluate(finished, quiet=True)
    finally:
        data.write_bytes(kept)


def test_damaged_evaluation_is_said_and_measured_again(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    for text in (
        '{"held_out": 3}',
        '{"held_out": {"before": {"x": 1}}}',
        '{"generations": [{}]}',
        '{"generations": []}',
    ):
        (copy / "evaluation.json").write_text(text, encoding="utf-8")
        with pytest.raises(RunError, match=r"evaluation\.json' is damaged"):
            resume(copy, quiet=True)
    (copy / "evaluation.json").unlink()
    resume(copy, quiet=True)
    assert evaluation_of(copy) == evaluation_of(finished)
    assert [line["step"] for line in lines_of(copy) if "held_out_loss" in line].count(0) == 1


def test_export_stands_when_it_cannot_be_compared(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy)
    data = Path(yaml.safe_load((copy / "recipe.yaml").read_text(encoding="utf-8"))["data"]["train"])
    data.rename(data.with_suffix(".away"))
    try:
        assert main(["export", str(copy), "merged"]) == 0
    finally:
        data.with_suffix(".away").rename(data)
    printed = capsys.readouterr().out
    assert "It was not compared with the trained model" in printed
    assert "Which base suits was not measured" in printed
    assert str(data) in printed
    assert (copy / "merged/model.safetensors").is_file()


@pytest.mark.slow
def test_run_of_a_device_that_is_not_here_goes_on(
    wounded: dict[str, Wounded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(wounded["interrupted"].folder, copy)
    recipe = (copy / "recipe.yaml").read_text(encoding="utf-8").replace("name: cpu", "name: cuda:7")
    (copy / "recipe.yaml").write_text(recipe, encoding="utf-8")
    environment = json.loads((copy / "environment.json").read_text(encoding="utf-8"))
    environment["recipe_sha256"] = hashlib.sha256(recipe.encode()).hexdigest()
    (copy / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    assert main(["resume", str(copy)]) == 0
    assert "(device cuda:7, now cpu): it goes on, but not bit for bit" in capsys.readouterr().err


@pytest.mark.slow
def test_a_home_in_the_folders_name_is_the_home(
    tiny_model: Path, chat_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    values = tiny_values(tiny_model, chat_data, tmp_path)
    values["training"] = {"steps": 1, "batch_size": 2}
    values["evaluation"] = {"prompts": 0, "held_out_rows": 1}
    done = train(Recipe.from_dict({**values, "folder": "~/runs/mine"}), quiet=True)
    assert done.folder == tmp_path / "home/runs/mine"
    assert not (tmp_path / "~").exists()


def test_json_files_hold_no_infinity(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [float("inf"), (1.5, float("nan"))]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"a": [None, [1.5, None]]}
    log = MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1, "loss": 2.0})
    assert lines_of_file(log.path) == [{"step": 1, "loss": 2.0}]


def test_plan_reads_no_weight(tiny_model: Path, chat_data: Path, tmp_path: Path, capsys: Any) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "model.safetensors").unlink()
    recipe = recipe_in(tmp_path, tiny_values(bare, chat_data, tmp_path / "run"))
    assert main(["plan", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    assert "quantised weights" in printed
    assert not (tmp_path / "run").exists()


def test_a_merge_is_compared_without_the_rounding_of_16_bits(tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    """Both in fp32, with the weights as they were computed with: bf16 is in these, and no longer in the sums."""
    shutil.copytree(tiny_model, tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    values = tiny_values(tmp_path / "base", chat_data, tmp_path / "run")
    values["model"]["compute_dtype"] = "bf16"
    values["training"] |= {"steps": 2, "micro_batch_size": 5}
    values["evaluation"] = {"prompts": 0}
    qlora.train(qlora.Recipe.from_dict(values), quiet=True)
    found = in_transformers(tmp_path / "run", qlora.merge(tmp_path / "run", dtype="fp32").folder)
    assert found is not None
    assert found.largest < rounding() * found.largest_logit


def test_a_run_keeps_the_threads_that_others_left_it(
    tiny_model: Path,
    chat_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run's sums depend on them, so what decided is in its recipe, not the moment of a resume."""
    asked, set_threads = [], list[int]()
    monkeypatch.setattr("qlora.runs.session.threads_for", lambda there: asked.append(there) or 1)
    monkeypatch.setattr("torch.get_num_threads", lambda: set_threads[-1] if set_threads else 8)
    monkeypatch.setattr("torch.set_num_threads", set_threads.append)
    monkeypatch.setattr("qlora.runs.session.allowed_cores", lambda: 6)
    values = tiny_values(tiny_model, chat_data, tmp_path / "run")
    train(Recipe.from_dict(values, "device.threads=null"))
    assert (asked, set_threads) == ([6], [6, 1])
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").device.threads == 1
    assert "device.threads is 1 of 6: other programs keep cores busy" in capsys.readouterr().err
    train(Recipe.from_dict(values, "device.threads=3", f"folder={tmp_path / 'told'}"), quiet=True)
    assert (asked, set_threads[-1]) == ([6], 3)
