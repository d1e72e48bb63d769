"""The law of resume: a run that was broken off and goes on is the run that was never broken, bit for bit.

Through trainers, the cells of tests/training/matrix.py; and through run folders, with a real signal.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import signal
import subprocess
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from safetensors.torch import load_file
from torch import Tensor, nn

import qlora.runs.folder
from qlora.cli import main
from qlora.data.batches import step_rows
from qlora.errors import NonFiniteError, RecipeError, Stopped
from qlora.methods.adalora import AdaLoraMethod
from qlora.recipe import Recipe
from qlora.runs.train import resume, train
from qlora.training import checkpoint
from qlora.training.log import MetricsLog
from qlora.training.loop import Trainer
from tests.runs.test_run import WEIGHTS, assert_same_run, lines_of
from tests.tiny import tiny_checkpoint, tiny_values
from tests.training import matrix
from tests.training.matrix import Cell

# another instruction set sums in another order
INSTRUCTIONS = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("resume") / "base")


# --- the matrix ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", matrix.few(), ids=lambda cell: cell.method)
@pytest.mark.sampled
def test_a_resumed_run_is_the_run_that_was_not_broken(base: Path, tmp_path: Path, cell: Cell) -> None:
    found = matrix.try_cell(base, tmp_path, cell)
    assert found == matrix.Found(eight_bit=found.eight_bit)
    if "8bit" not in cell.optimizer:
        assert not found.eight_bit
    elif cell.method == "lora":
        assert found.eight_bit


@pytest.mark.slow
def test_every_pair_of_settings_is_resumed_bit_for_bit(base: Path, tmp_path: Path) -> None:
    differ, refused = [], set()
    for cell in matrix.every_pair():
        found = matrix.try_cell(base, tmp_path, cell)
        if found.refused:
            refused.add((cell.method, cell.placement))
        elif found.differs:
            differ.append((cell, found.differs))
    assert differ == []
    assert refused == {("full", placement) for placement in ("streamed from disk", "half streamed")} | {
        (method, "embedding and head on the host") for method in ("full",)
    }


def pairs(cells: list[Cell], *names: str) -> set[tuple[Any, ...]]:
    return {(a, b, getattr(cell, a), getattr(cell, b)) for cell in cells for a, b in combinations(names, 2)}


def test_the_cells_cover_every_pair() -> None:
    """The few: of everything but the method, and every method once. The many: of everything."""
    sizes = {
        "method": len(matrix.METHODS), "optimizer": len(matrix.OPTIMIZERS), "placement": len(matrix.PLACEMENTS), "packing": 2,
        "broken_at": len(matrix.BROKEN),
    }  # fmt: skip
    for cells, names in ((matrix.few(), list(sizes)[1:]), (matrix.every_pair(), list(sizes))):
        assert len(pairs(cells, *names)) == sum(sizes[a] * sizes[b] for a, b in combinations(names, 2))
    assert Counter(cell.method for cell in matrix.few()) == dict.fromkeys(matrix.METHODS, 1)


def test_a_difference_is_seen(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One moment that does not come back, by a thousandth."""
    cell = Cell("lora", "adamw", "resident", True, "mid-epoch")
    put_back = checkpoint.load_optimizer_tensors

    def almost(optimizer: Any, parameters: Any, tensors: dict[str, Tensor]) -> None:
        put_back(optimizer, parameters, tensors)
        moment = next(iter(optimizer.state.values()))["exp_avg"]
        moment.view(-1)[7] *= 1.001

    monkeypatch.setattr(checkpoint, "load_optimizer_tensors", almost)
    assert "optimizer.safetensors" in matrix.try_cell(base, tmp_path, cell).differs


# --- paged states ----------------------------------------------------------------------------------------------------


@pytest.fixture
def paging(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU has no paging, and bitsandbytes falls back in silence: here its buffers say that they page, as on a GPU."""

    def buffer(self: Any, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        made = torch.zeros_like(p, dtype=dtype)
        if self.is_paged:
            made.is_paged = True  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", buffer)
    monkeypatch.setattr(bitsandbytes.functional, "prefetch_tensor", lambda values, to_cpu=False: None)


def moments(trainer: Trainer) -> list[Tensor]:
    return [state[key] for state in trainer.state.optimizer.state.values() for key in ("state1", "state2")]


@pytest.mark.parametrize("optimizer", ["paged_adamw", "paged_adamw_8bit", "adamw_8bit"])
@pytest.mark.usefixtures("paging")
def test_paged_states_come_back_paged(base: Path, tmp_path: Path, optimizer: str) -> None:
    """bitsandbytes' own ``load_state_dict`` brings them back as ordinary tensors (bitsandbytes#782)."""
    cell = Cell("lora", optimizer, "resident", True, "mid-epoch")
    trainer = matrix.trainer_for(base, tmp_path, cell)
    matrix.take(trainer, 2)
    trainer.save()
    again = matrix.trainer_for(base, tmp_path, cell, again=True)
    paged = optimizer.startswith("paged")
    for one in (trainer, again):
        assert len(moments(one)) == 2 * len(one.state.parameters)
        assert all(getattr(values, "is_paged", False) is paged for values in moments(one))
    loaded = moments(again)
    assert matrix.take(again, 4) == matrix.take(trainer, 4)
    assert all(now is before for now, before in zip(moments(again), loaded, strict=True))  # the very buffers are used
    assert matrix.files_of(again.save()) == matrix.files_of(trainer.save())


# --- steps that were skipped -----------------------------------------------------------------------------------------


def poisoned(trainer: Trainer, row: int) -> Trainer:
    """With an embedding that is NaN for a token that only this row holds."""
    others = {int(token) for number, other in enumerate(trainer.rows) if number != row for token in other.ids}
    token = next(int(token) for token in trainer.rows[row].ids if int(token) not in others)
    embedding: Any = trainer.model.model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        embedding.weight[token] = torch.nan
    return trainer


EARLY = next(row for row in step_rows(5, 2, 1, 0) if row in step_rows(5, 2, 4, 0))
"""A row of steps 2 and 5: once before the checkpoint, once after."""


@pytest.mark.parametrize(
    ("method", "optimizer", "placement"),
    [
        ("lora", "adamw_8bit", "streamed from disk"),
        ("adalora", "adamw", "resident"),
        ("lora + modules + new_tokens", "paged_adamw", "micro-batch by micro-batch"),
    ],
)
def test_a_run_with_skipped_steps_goes_on_bit_for_bit(
    base: Path, tmp_path: Path, method: str, optimizer: str, placement: str
) -> None:
    cell = Cell(method, optimizer, placement, False, "end of an epoch")

    def fresh(folder: str, again: bool = False) -> Trainer:
        return poisoned(matrix.trainer_for(base, tmp_path / folder, cell, again, not_finite="skip"), EARLY)

    whole = fresh("whole")
    steps = list(whole)
    assert [step.number for step in steps if step.skipped] == [2, 5]
    assert str(EARLY) in steps[1].note
    trainer = fresh("broken")
    for _ in range(2):
        next(trainer)
    before = matrix.files_of(trainer.save())
    trainer = fresh("broken", again=True)
    assert trainer.state.skipped == 1
    found = [next(trainer)]
    trainer.save()
    trainer = fresh("broken", again=True)
    found += list(trainer)
    assert trainer.state.skipped == whole.state.skipped == 2
    assert [(s.loss, s.grad_norm) for s in found[:-1]] == [(s.loss, s.grad_norm) for s in steps[2:-1]]
    assert found[-1].note == steps[-1].note
    files = matrix.files_of(trainer.save())
    assert files == matrix.files_of(whole.save())
    assert files["adapter_model.safetensors"] != before["adapter_model.safetensors"]


def test_the_limit_counts_the_steps_skipped_before_the_checkpoint(base: Path, tmp_path: Path) -> None:
    cell = Cell("lora", "adamw", "resident", False, "mid-epoch")
    trainer = poisoned(matrix.trainer_for(base, tmp_path, cell, not_finite="skip", skip_limit=1), EARLY)
    matrix.take(trainer, 3)
    trainer.save()
    again = poisoned(matrix.trainer_for(base, tmp_path, cell, True, not_finite="skip", skip_limit=1), EARLY)
    with pytest.raises(NonFiniteError, match=rf"Step 5 .* on rows {EARLY}.*skip_limit=1 steps were skipped before"):
        list(again)
    assert [place.name for place in checkpoint.find(tmp_path / "checkpoints")] == ["000004"]


def test_adalora_makes_up_for_its_last_allocation(base: Path, tmp_path: Path) -> None:
    """Of five steps the last one that allocates is the third; a run that skips it must not keep all triplets for good."""
    cell = Cell("adalora", "adamw", "resident", False, "mid-epoch")
    third = step_rows(5, 2, 2, 0)[0]
    ranks = []
    for not_finite in (False, True):
        trainer = matrix.trainer_for(base, tmp_path, cell, not_finite="skip")
        steps = list(poisoned(trainer, third) if not_finite else trainer)
        assert steps[2].skipped is not_finite
        (method,) = trainer.model.methods
        assert isinstance(method, AdaLoraMethod)
        assert method.turns(5)[1] == 3
        assert not method.averages
        ranks.append(sum(method.ranks().values()))
        assert ranks[-1] <= method.section.r * len(method.planted)
    assert ranks[0] == ranks[1]


# --- run folders -----------------------------------------------------------------------------------------------------


LAST_OF_EPOCH = 6


@pytest.fixture(scope="module")
def values(tiny_model: Path, chat_data: Path) -> dict[str, Any]:
    """Ten steps of packed rows, three to a step; what is measured in between falls on and beside the checkpoints."""
    found = tiny_values(tiny_model, chat_data, Path("run"))
    found["data"] |= {"packing": True}
    found["training"] |= {"batch_size": 3, "save_every": 3}
    found["evaluation"] |= {"every": 4, "prompts": 1, "max_new_tokens": 3}
    found["memory"] = {"rehearse": False}
    return found


def recipe_of(values: dict[str, Any], folder: Path, *overrides: str) -> Recipe:
    return Recipe.from_dict({**values, "folder": str(folder)}, *overrides)


@pytest.fixture(scope="module")
def finished(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(recipe_of(values, folder), quiet=True)
    return folder


@pytest.fixture(scope="module")
def stopped(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that SIGTERM hit in step 4, the first of the second epoch; begun in a repository with a changed file."""
    place = tmp_path_factory.mktemp("stopped")
    (place / "notes.txt").write_text("one")
    git(place, "init", "-q")
    git(place, "add", "notes.txt")
    git(place, "commit", "-qm", "one")
    (place / "notes.txt").write_text("two")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place)
        stop_after(patched, 4)
        with pytest.raises(Stopped, match="step 4 of 10"):
            train(recipe_of(values, place / "run"), quiet=True)
    return place / "run"


def git(place: Path, *words: str) -> str:
    call = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
    return subprocess.run(call, cwd=place, check=True, capture_output=True, text=True).stdout.strip()


def stop_after(patched: pytest.MonkeyPatch, step: int) -> None:
    """SIGTERM to this process when the line of this step is written."""
    write = MetricsLog.write

    def wounded(self: MetricsLog, line: Any) -> None:
        write(self, line)
        if "loss" in line and line["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    patched.setattr(MetricsLog, "write", wounded)


@pytest.mark.parametrize(
    "stops", [[5], [LAST_OF_EPOCH]], ids=["mid-epoch, twice in a row", "and at the last step of an epoch"]
)
def test_a_stopped_run_goes_on_bit_for_bit(finished: Path, stopped: Path, tmp_path: Path, stops: list[int]) -> None:
    epochs = {line["step"]: line["epoch"] for line in lines_of(finished) if "loss" in line}
    assert [step for step, epoch in epochs.items() if epoch % 1 == 0] == [LAST_OF_EPOCH]
    assert [line["step"] for line in lines_of(finished) if "held_out_loss" in line] == [0, 4, 8, 10]
    folder = shutil.copytree(stopped, tmp_path / "run")
    for step in stops:
        with pytest.MonkeyPatch.context() as patched:
            stop_after(patched, step)
            with pytest.raises(Stopped, match=f"step {step} of 10"):
                resume(folder, quiet=True)
    torch.manual_seed(5)
    resume(folder, quiet=True)
    assert_same_run(folder, finished)


def test_deterministic_kernels_give_a_cpu_the_same_run(
    values: dict[str, Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is the same run twice, too; and the process has its own kernels again afterwards."""
    found, take = [], Trainer.__next__

    def looking(trainer: Trainer) -> Any:
        found.append(torch.are_deterministic_algorithms_enabled())
        return take(trainer)

    monkeypatch.setattr(Trainer, "__next__", looking)
    train(recipe_of(values, tmp_path / "run", "device.deterministic=true"), quiet=True)
    assert found
    assert all(found)
    assert not torch.are_deterministic_algorithms_enabled()
    assert_same_run(tmp_path / "run", finished)


def test_another_seed_is_another_run(values: dict[str, Any], finished: Path, tmp_path: Path) -> None:
    """From the first step on, whose rate is that of the longer run."""
    short = ("training.seed=1", "training.steps=2", "training.schedule=constant", "training.warmup_fraction=0")
    train(recipe_of(values, tmp_path / "run", *short), quiet=True)
    losses, others = (
        [line["loss"] for line in lines_of(folder) if "loss" in line] for folder in (tmp_path / "run", finished)
    )
    assert len(losses) == 2
    assert all(loss not in others for loss in losses)


CONSTANT = ("training.schedule=constant", "training.steps=4", "training.warmup_fraction=0.5")


def test_at_a_constant_rate_a_finished_run_goes_on_as_the_longer_one(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An epoch of six steps and four more, of which two are the warm-up; also where making it longer, or its first new step, is
    broken off."""
    longer = (*CONSTANT, "training.steps=10", "training.warmup_fraction=0.2")
    train(recipe_of(values, tmp_path / "whole", *longer), quiet=True)
    train(recipe_of(values, tmp_path / "run", *CONSTANT), quiet=True)
    assert main(["resume", str(tmp_path / "run")]) == 0  # finished
    for broken, patch in (
        (OSError, broken_off),
        (OSError, broken_off),
        (Stopped, lambda patched: stop_after(patched, 5)),
    ):
        with monkeypatch.context() as patched:
            patch(patched)
            with pytest.raises(broken):
                resume(tmp_path / "run", "training.steps=10", quiet=True)
        measured = json.loads((tmp_path / "run" / "evaluation.json").read_text())
        assert (list(measured["held_out"]), measured["verdict"]) == (["before"], None)  # it is not finished any more
        assert [answer["after"] for answer in measured["generations"]] == [None]
    resume(tmp_path / "run", quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert Recipe.from_yaml(tmp_path / "run" / "recipe.yaml").training.steps == 10


def broken_off(patched: pytest.MonkeyPatch) -> None:
    """The recipe of the longer run cannot be written, which is the last thing that is."""

    def refused(path: Path) -> Any:
        raise OSError(f"{path.name} is refused")

    patched.setattr(qlora.runs.folder, "file_written_aside", refused)


@pytest.mark.parametrize(
    ("begun", "asked", "said"),
    [
        ((), "training.epochs=9", r"follows a linear schedule .* method.from="),
        (CONSTANT, "training.steps=3", "has 4 steps, and training.steps would make them 3; expected more"),
        ((*CONSTANT, "training.steps=13"), "training.epochs=2", "has 13 steps, and training.epochs would make them 12; expected more"),
        ((*CONSTANT, "method={name: adalora, initial_r: 4, r: 2, warmup: 0, final: 0}"), "training.epochs=9", "AdaLoRA spreads"),
    ],
    ids=["linear", "fewer", "fewer epochs", "adalora"],
)  # fmt: skip
@pytest.mark.sampled
def test_a_run_is_made_longer_only_where_its_steps_stay_the_same(
    values: dict[str, Any], tmp_path: Path, begun: tuple[str, ...], asked: str, said: str
) -> None:
    train(recipe_of(values, tmp_path / "run", *(begun or ("training.steps=1",))), quiet=True)
    before = (tmp_path / "run/recipe.yaml").read_bytes()
    with pytest.raises(RecipeError, match=said):
        resume(tmp_path / "run", asked, quiet=True)
    assert (tmp_path / "run/recipe.yaml").read_bytes() == before


def test_a_run_remembers_where_it_began(stopped: Path, chat_data: Path) -> None:
    environment = json.loads((stopped / "environment.json").read_text())
    assert (environment["git_commit"], environment["git_changed"]) == (git(stopped.parent, "rev-parse", "HEAD"), True)
    assert list(environment["data_files"].values()) == [hashlib.sha256(chat_data.read_bytes()).hexdigest()]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["device_name"] == f"CPU ({INSTRUCTIONS}), 1 threads"
    assert environment["attention"] == "qlora_each_example"


def test_a_run_from_elsewhere_goes_on_and_says_that_it_is_another(
    finished: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun on another torch and another device: nobody can promise the same bits."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    text = (folder / "environment.json").read_text()
    text = text.replace(f"CPU ({INSTRUCTIONS}), 1 threads", "NVIDIA T4").replace(
        f'"torch": "{torch.__version__}"', '"torch": "2.0.1"'
    )
    text = text.replace('"qlora_each_example"', '"sdpa"').replace('"kernels": {}', '"kernels": {"rotary": 2}')
    (folder / "environment.json").write_text(text)
    assert resume(folder).steps == 10
    said = capsys.readouterr().err
    assert f"torch 2.0.1, now {torch.__version__}" in said
    assert "attention sdpa, now qlora_each_example" in said
    assert "fused kernels {'rotary': 2}, now {}" in said
    assert f"NVIDIA T4, now CPU ({INSTRUCTIONS}), 1 threads" in said
    assert "not bit for bit any more" in said
    assert nn.functional.cosine_similarity(adapter(folder), adapter(finished), 0) > 0.999


def adapter(folder: Path) -> Tensor:
    return torch.cat([values.flatten() for _, values in sorted(load_file(folder / "adapter" / WEIGHTS).items())])


def test_resume_on_the_same_machine_says_nothing_of_the_kind(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resume(shutil.copytree(finished, tmp_path / "run"))
    assert "bit for bit" not in capsys.readouterr().err
