"""PEFT's layout: PEFT loads what we save with every key consumed, we load what PEFT saves, and nothing is half understood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qlora import config
from qlora.errors import MethodError, RunError
from qlora.methods import LoraLinear, apply_method, load_adapter, read_adapter_config, save_adapter
from qlora.methods.files import clear_leftovers, folder_written_aside
from tests.methods.tiny import FAMILIES, difference, logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.LoRA(r=4, alpha=8, dropout=0.1)
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ("layers.1.self_attn.q_proj", "down_proj")])
def test_peft_loads_ours_whole(tmp_path: Path, family: str, targets: Any) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path / "base", family), "none")
    ours = apply_method(base, SECTION.model_copy(update={"target_modules": targets}))
    stir(ours)
    save_adapter(ours, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == ours.adapter_state().keys()
    assert all(torch.equal(values, ours.adapter_state()[key]) for key, values in state.items())
    worst = difference(logits_of(ours.model), logits_of(theirs))
    print(f"{family}: {worst:.1e}")
    assert worst < 1e-6
    with ours.disabled():
        assert difference(logits_of(ours.model), logits_of(theirs)) > 1e-2


@pytest.mark.parametrize("rslora", [False, True])
def test_we_load_what_peft_saves(tmp_path: Path, rslora: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    torch.manual_seed(5)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        use_rslora=rslora,
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), lora).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    assert difference(logits_of(ours.model), logits_of(theirs)) < 1e-6
    save_adapter(ours, tmp_path / "again")
    again = load_adapter(tiny_base(folder, "none"), tmp_path / "again")
    assert torch.equal(logits_of(again.model), logits_of(ours.model))


def test_the_files_say_what_pefts_say(tmp_path: Path) -> None:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), SECTION)
    save_adapter(model, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert values == {
        **PLAIN, "lora_dropout": 0.1, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "use_dora": False, "use_rslora": False, "modules_to_save": None, "rank_pattern": {},
        "alpha_pattern": {}, "layers_to_transform": None, "layers_pattern": None, "peft_version": "0.18.0",
        "base_model_name_or_path": str(tmp_path / "base"), "revision": None,
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.adapter_state())


def test_section_and_values_go_round(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    model = apply_method(tiny_base(folder), SECTION)
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "optimizer.safetensors").write_text("left alone")
    stir(model, 0.2)
    save_adapter(model, tmp_path / "adapter")  # replaces the first
    assert (tmp_path / "adapter" / "optimizer.safetensors").is_file()
    section = read_adapter_config(tmp_path / "adapter")
    assert (section.r, section.alpha, section.dropout) == (4, 8, 0.1)
    fresh = apply_method(tiny_base(folder), SECTION)
    assert torch.equal(logits_of(load_adapter(fresh, tmp_path / "adapter").model), logits_of(model.model))
    other = apply_method(tiny_base(folder), config.LoRA(r=4, alpha=9))
    with pytest.raises(MethodError, match=r"alpha/r = 2, this model by 2\.25"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("bias", "all"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["v_proj"]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("trainable_token_indices", [3]),
        ("something_of_next_year", 1),
        ("peft_type", "IA3"),
        ("task_type", "SEQ_CLS"),
        ("target_modules", ".*q_proj"),
        ("target_modules", None),
        ("r", 0),
        ("lora_alpha", "much"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(PLAIN))
    assert read_adapter_config(tmp_path).target_modules == ("q_proj",)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**PLAIN, field: value}))
    with pytest.raises(MethodError, match=field):
        read_adapter_config(tmp_path)


def test_an_adapter_of_another_base_leaves_the_base_bare(tmp_path: Path) -> None:
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path / "base")), SECTION)
    save_adapter(model, tmp_path / "adapter")
    wider = tiny_base(tiny_checkpoint(tmp_path / "wider", intermediate_size=192))
    with pytest.raises(MethodError, match=r"wrong shape in .*\[4, 128\] instead of \[4, 192\]"):
        load_adapter(wider, tmp_path / "adapter")
    assert not any(isinstance(module, LoraLinear) for module in wider.model.modules())


def test_missing_and_damaged_files_are_said(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path / "base"))
    with pytest.raises(MethodError, match=r"no adapter_config\.json"):
        load_adapter(base, tmp_path / "nowhere")
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(MethodError, match="cannot be read"):
        load_adapter(base, folder)
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN))
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(MethodError, match="never read"):
        load_adapter(base, folder)
    (folder / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(MethodError, match="damaged"):
        load_adapter(base, folder)


def fail_while_writing(folder: Path, overwrite: bool = False) -> None:
    with folder_written_aside(folder, overwrite) as aside:
        (aside / "half").write_text("half")
        raise ZeroDivisionError


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    with folder_written_aside(tmp_path / "new") as aside:
        (aside / "whole").write_text("1")
        assert not (tmp_path / "new").exists()
    with pytest.raises(RunError, match="not empty"), folder_written_aside(tmp_path / "new"):
        pass
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(tmp_path / "new", overwrite=True)
    assert (tmp_path / "new" / "whole").read_text() == "1"
    with folder_written_aside(tmp_path / "new", overwrite=True) as aside:
        (aside / "other").write_text("2")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["other"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_killed_writers_left_is_cleared_away(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".a.writing-{dead.pid}", f".b.writing-{dead.pid}", f".a.writing-{os.getppid()}", ".a.writing-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    with folder_written_aside(tmp_path / "a") as aside:
        (aside / "whole").write_text("")
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == sorted([f".b.writing-{dead.pid}", f".a.writing-{os.getppid()}", ".a.writing-x", "a"])
    (tmp_path / "a").rename(tmp_path / f".a.old-{dead.pid}")  # killed between the two renamings
    clear_leftovers(tmp_path)
    assert (tmp_path / "a" / "whole").is_file()
    assert not list(tmp_path.glob(f".*-{dead.pid}"))
