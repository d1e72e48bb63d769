"""The law of checkpoints: 10 steps = 6 + a fresh process's trainer + 4 steps, bitwise; nothing half-written is found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora.errors import RunError
from qlora.files.durable import damage, seal
from qlora.methods.base import AdaptedModel
from qlora.methods.files import read_adapter_tensors
from qlora.model.nf4 import FrozenLinear
from qlora.recipe import TrainingSection
from qlora.residence.layers import unwrap_layers
from qlora.training import checkpoint
from qlora.training.loop import Trainer
from tests.rounding import difference, rounding
from tests.tiny import TOKENS, adapter_bytes, logits_of, random_rows, stir, tiny_checkpoint, tiny_model

ROWS = random_rows(30, seed=1)[:14]  # by 4: steps of 4, 4, 4 and 2 rows an epoch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def fresh(base: Path, folder: Path, optimizer: str = "adamw", rank: int = 4, **values: Any) -> Trainer:
    """As a new process would begin: the base loaded again, the adapter at its first values."""
    targets = ("q_proj", "o_proj", "down_proj")
    model = tiny_model(base, stirred=False, dropout=0.1, r=rank, target_modules=targets)
    training: dict[str, Any] = {
        "batch_size": 4, "micro_batch_size": 2, "steps": 10, "learning_rate": 1e-2, "optimizer": optimizer,
        "schedule": "cosine", "warmup_fraction": 0.2, "weight_decay": 0.1,
    }  # fmt: skip
    return Trainer(model, ROWS, TrainingSection(**{**training, **values}), folder)


def take(trainer: Trainer, count: int) -> list[tuple[float, float, float, float]]:
    steps = [next(trainer) for _ in range(count)]
    return [(step.loss, step.grad_norm, step.learning_rate, step.epoch) for step in steps]


@pytest.fixture
def saved(base: Path, tmp_path: Path) -> tuple[Trainer, Path]:
    trainer = fresh(base, tmp_path)
    take(trainer, 2)
    return trainer, trainer.save()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
@pytest.mark.sampled
def test_ten_steps_are_six_and_four(base: Path, tmp_path: Path, optimizer: str) -> None:
    """Six steps end in the middle of the second epoch; the four after it cross into the third. Rank 64 makes matrices
    of 4,096 values and more, which have 8-bit state."""
    whole = fresh(base, tmp_path / "whole", optimizer, 64)
    steps = take(whole, 10)
    first = fresh(base, tmp_path / "cut", optimizer, 64)
    assert take(first, 6) == steps[:6]
    place = first.save()
    torch.manual_seed(99)
    second = fresh(base, tmp_path / "cut", optimizer, 64)
    second.load(place)
    assert second.step_number == 6
    assert take(second, 4) == steps[6:]
    assert adapter_bytes(second.model) == adapter_bytes(whole.model)
    if "8bit" in optimizer:
        assert any(tensor.dtype == torch.uint8 for tensor in load_file(place / checkpoint.OPTIMIZER).values())


@pytest.mark.parametrize("step", [0, 4, 9, 10])
@pytest.mark.sampled
def test_at_the_edges_too(base: Path, tmp_path: Path, step: int) -> None:
    """Before the first step, at the end of an epoch, before the last step and after it."""
    whole = fresh(base, tmp_path)
    steps = take(whole, step)
    place = whole.save()
    steps += take(whole, 10 - step)
    again = fresh(base, tmp_path)
    again.load(place)
    assert take(again, 10 - step) == steps[step:]
    assert next(again, None) is None
    assert adapter_bytes(again.model) == adapter_bytes(whole.model)


def test_a_trainer_can_go_back(base: Path, tmp_path: Path) -> None:
    trainer = fresh(base, tmp_path)
    take(trainer, 3)
    place = trainer.save()
    later = take(trainer, 3)
    trainer.load(place)
    assert take(trainer, 3) == later


def test_an_older_runs_checkpoint_of_the_same_step_is_replaced(base: Path, tmp_path: Path) -> None:
    older = fresh(base, tmp_path, learning_rate=0.05)
    take(older, 2)
    stale = older.save()
    newer = fresh(base, tmp_path)
    take(newer, 2)
    place = newer.save()
    assert place == stale
    state = newer.model.adapter_state()
    assert all(torch.equal(values, state[key]) for key, values in read_adapter_tensors(place).items())
    written = (place / "state.json").stat().st_ino
    assert newer.save() == place
    assert (place / "state.json").stat().st_ino == written  # once is enough


def test_a_state_of_the_wrong_shape_is_damage(saved: tuple[Trainer, Path], base: Path, tmp_path: Path) -> None:
    _, place = saved
    path = place / "state.json"
    whole = json.loads(path.read_text())
    for broken in ({**whole, "step": None}, {**whole, "loss_scale": "x"}, {"step": 1}, []):
        path.write_text(json.dumps(broken))
        with pytest.raises(checkpoint.DamagedError, match=r"state\.json has .* bytes instead of"):
            fresh(base, tmp_path).load(place)
        seal(place)
        with pytest.raises(checkpoint.DamagedError, match="000002' is damaged"):
            fresh(base, tmp_path).load(place)


def test_what_lies_in_a_checkpoint(saved: tuple[Trainer, Path]) -> None:
    trainer, place = saved
    assert place.name == "000002"
    assert sorted(path.name for path in place.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "checksums.json", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    assert [path.name for path in place.parent.iterdir()] == ["000002"]
    assert json.loads((place / "state.json").read_text()) == {
        "step": 2, "total_steps": 10, "loss_scale": 1.0, "optimizer": "adamw",
    }  # fmt: skip
    state = trainer.model.adapter_state()
    assert all(torch.equal(values, state[key]) for key, values in read_adapter_tensors(place).items())


def test_peft_loads_a_checkpoint(saved: tuple[Trainer, Path], base: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    trainer, place = saved
    stir(trainer.model)  # what PEFT loads must be what was saved, not what is here now
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    unwrap_layers(trainer.model.model)
    for path, module in trainer.model.model.named_modules():
        if isinstance(module, FrozenLinear):
            plain.get_submodule(path.removesuffix(".base")).weight.data.copy_(module.dequantise(torch.float32))
    theirs = peft.PeftModel.from_pretrained(plain, place).eval()
    trainer.model.load_adapter_state(read_adapter_tensors(place))
    with torch.no_grad():
        found = theirs(input_ids=TOKENS).logits
    assert difference(found, logits_of(trainer.model.model)) <= rounding()
    with trainer.model.disabled():
        assert difference(found, logits_of(trainer.model.model)) > 100 * rounding()


def test_the_loss_scale_goes_round(base: Path, tmp_path: Path) -> None:
    trainer = fresh(base, tmp_path)
    take(trainer, 1)
    trainer.state.loss_scale = 512.0
    again = fresh(base, tmp_path)
    again.load(trainer.save())
    assert again.state.loss_scale == 512.0


def test_the_newest_are_kept_and_others_are_left_alone(base: Path, tmp_path: Path) -> None:
    trainer = fresh(base, tmp_path, keep_checkpoints=2)
    folder = tmp_path / "checkpoints"
    (folder / "notes").mkdir(parents=True)
    for _ in range(4):
        take(trainer, 1)
        trainer.save()
    assert [place.name for place in checkpoint.find(folder)] == ["000003", "000004"]
    assert sorted(path.name for path in folder.iterdir()) == ["000003", "000004", "notes"]


def test_they_are_in_the_order_of_their_steps(tmp_path: Path) -> None:
    for name in ("1000000", "999999", "000007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / checkpoint.STATE).write_text("{}")
    assert [place.name for place in checkpoint.find(tmp_path)] == ["000007", "999999", "1000000"]
    assert checkpoint.find(tmp_path / "none") == []


@pytest.mark.parametrize("at", ["save_adapter", "save_file", "fsync"])
def test_an_interrupted_one_is_not_found(saved: tuple[Trainer, Path], monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    trainer, place = saved
    take(trainer, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    target: Any = os if at == "fsync" else checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(target, at, fail)
        with pytest.raises(KeyboardInterrupt):
            trainer.save()
    assert checkpoint.find(place.parent) == [place]
    newest = trainer.save()
    assert checkpoint.find(place.parent) == [place, newest]


def test_one_that_was_killed_is_not_found(saved: tuple[Trainer, Path]) -> None:
    """No code ran after the kill: what stands there is whatever was written aside, under another name."""
    _, place = saved
    shutil.copytree(place, place.with_name(".000003.writing-1"))
    (place.with_name("000004")).mkdir()
    shutil.copy(place / checkpoint.OPTIMIZER, place.with_name("000004"))
    found, lost = checkpoint.newest(place.parent)
    assert found == place
    assert len(lost) == 1
    assert "000004' is damaged (checksums.json is missing" in lost[0]


def test_the_same_step_is_written_once(saved: tuple[Trainer, Path]) -> None:
    trainer, place = saved
    before = (place / checkpoint.STATE).stat().st_mtime_ns
    assert trainer.save() == place
    assert (place / checkpoint.STATE).stat().st_mtime_ns == before


@pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors", "adapter_model.safetensors"])
@pytest.mark.parametrize("wound", ["cut", "gone", "garbage"])
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.sampled
def test_a_damaged_one_is_refused_and_changes_nothing(
    saved: tuple[Trainer, Path], base: Path, tmp_path: Path, file: str, wound: str, sealed: bool
) -> None:
    _, place = saved
    if wound == "gone":
        (place / file).unlink()
    else:
        content = (place / file).read_bytes()
        (place / file).write_bytes(content[: len(content) // 2] if wound == "cut" else b"[1, 2]" * 9)
    if sealed:  # by somebody else: what is read is checked all the same
        seal(place)
    trainer = fresh(base, tmp_path)
    before = adapter_bytes(trainer.model)
    with pytest.raises(RunError, match=r"000002' is damaged \("):
        trainer.load(place)
    assert adapter_bytes(trainer.model) == before
    assert trainer.step_number == 0


@pytest.mark.parametrize(
    ("values", "words"), [({"optimizer": "adamw_8bit"}, "with adamw, not"), ({"steps": 11}, "10 steps")]
)
def test_another_runs_checkpoint_is_refused(
    saved: tuple[Trainer, Path], base: Path, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    trainer = fresh(base, tmp_path, **values)
    with pytest.raises(RunError, match=words):
        trainer.load(saved[1])


def test_nothing_is_unpickled(saved: tuple[Trainer, Path]) -> None:
    assert not [path for path in saved[1].rglob("*") if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]


def test_saving_works_behind_the_boundary_with_unchanged_names(saved: tuple[Trainer, Path], base: Path) -> None:
    bare: AdaptedModel = tiny_model(base, target_modules=saved[0].model.section.target_modules)
    assert "layers.0.self_attn" in "".join(bare.adapter_state())
    assert read_adapter_tensors(saved[1]).keys() == bare.adapter_state().keys()


@pytest.mark.parametrize("file", ["adapter_model", "method"])
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(base: Path, tmp_path: Path, file: str) -> None:
    def beginning(folder: str) -> Trainer:
        model = tiny_model(base, stirred=False, init="pissa", target_modules=("q_proj",))
        return Trainer(model, ROWS, TrainingSection(batch_size=4, steps=3), tmp_path / folder)

    trainer = beginning("old")
    take(trainer, 1)
    place = trainer.save()
    tensors = load_file(place / f"{file}.safetensors")
    save_file(dict(list(tensors.items())[1:]), place / f"{file}.safetensors", metadata={"format": "pt"})
    seal(place)
    other = beginning("new")
    before, answers = adapter_bytes(other.model), logits_of(other.model.model)
    with pytest.raises(RunError, match="000001' does not belong to this run"):
        other.load(place)
    assert adapter_bytes(other.model) == before
    assert torch.equal(logits_of(other.model.model), answers)
    assert other.step_number == 0


def test_checkpoints_of_another_course_make_room(base: Path, tmp_path: Path) -> None:
    """An earlier trainer was here and went further: what is saved now stays, and is what is found."""
    first = fresh(base, tmp_path, keep_checkpoints=2)
    for _ in range(2):
        take(first, 3)
        first.save()
    second = fresh(base, tmp_path, keep_checkpoints=2)
    take(second, 2)
    place = second.save()
    assert checkpoint.find(tmp_path / "checkpoints") == [place]
    assert place.name == "000002"


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["optimizer.safetensors", "adapter_model.safetensors", "adapter_config.json"])
def test_the_newest_that_is_whole_is_taken_and_the_loss_is_said(base: Path, tmp_path: Path, file: str) -> None:
    trainer = fresh(base, tmp_path, keep_checkpoints=3)
    for _ in range(3):
        take(trainer, 1)
        trainer.save()
    folder = tmp_path / "checkpoints"
    flip(folder / "000003" / file, 12_345)
    place, lost = checkpoint.newest(folder)
    assert place == folder / "000002"
    assert len(lost) == 1
    assert f"000003' is damaged ({file} has another checksum" in lost[0]
    other = fresh(base, tmp_path, keep_checkpoints=3)
    assert other.load_newest() == lost
    assert other.step_number == 2
    assert take(other, 1)
    assert adapter_bytes(other.model) == adapter_bytes(trainer.model)
    assert damage(other.save()) is None  # the damaged one has made room
    for found in checkpoint.find(folder):
        flip(found / file, 3)
    with pytest.raises(checkpoint.DamagedError, match=r"No checkpoint in .*000003.*000002.*000001.* train anew"):
        checkpoint.newest(folder)
    assert len(checkpoint.find(folder)) == 3  # nothing is deleted


def test_a_checkpoint_without_its_checksums_is_damaged(saved: tuple[Trainer, Path], base: Path, tmp_path: Path) -> None:
    (saved[1] / "checksums.json").unlink()
    with pytest.raises(checkpoint.DamagedError, match=r"checksums\.json is missing"):
        fresh(base, tmp_path).load(saved[1])


def test_no_checkpoint_is_no_damage(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "checkpoints") == (None, [])
