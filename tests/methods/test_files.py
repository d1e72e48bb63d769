"""PEFT's layout: PEFT loads what we save with every key consumed, we load what PEFT saves, and nothing is half understood."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora import recipe as config
from qlora.data.packing import Row
from qlora.errors import MethodError, RunError
from qlora.export.merged import merge
from qlora.files.durable import clear_leftovers, folder_written_aside
from qlora.methods import peft_config
from qlora.methods.base import apply_method
from qlora.methods.files import save_adapter, save_portable
from qlora.methods.loading import load_adapter
from qlora.methods.lora import LoraLayout, LoraLinear
from qlora.methods.peft_config import read_adapter_config
from qlora.recipe import TrainingSection
from qlora.training.loop import Trainer
from tests.methods.against_peft import assert_answers_as
from tests.rounding import rounding
from tests.tiny import FAMILIES, TOKENS, VOCABULARY, difference, logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.LoRA(r=4, alpha=8, dropout=0.1)
PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ("layers.1.self_attn.q_proj", "down_proj")])
@pytest.mark.sampled
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
    assert worst < rounding()
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
    assert_answers_as(theirs, ours)
    save_adapter(ours, tmp_path / "again")
    again = load_adapter(tiny_base(folder, "none"), tmp_path / "again")
    assert torch.equal(logits_of(again.model), logits_of(ours.model))


REGEX = r"model\.layers\.\d+\.(self_attn|mlp)\.(q|v|up)_proj"  # as Unsloth writes it


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({"target_modules": REGEX}, ("q_proj", "up_proj", "v_proj")),
        ({"target_modules": ["q_proj"], "layers_to_transform": 0}, ("model.layers.0.self_attn.q_proj",)),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
            ("model.layers.1.self_attn.q_proj",),
        ),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}, ("q_proj",)),
        ({"target_modules": "all-linear", "exclude_modules": r".*mlp.*"}, ("k_proj", "o_proj", "q_proj", "v_proj")),
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, ("q_proj",)),
        ({"target_modules": ["q_proj"], "ensure_weight_tying": True}, ("q_proj",)),
        ({"target_modules": ["q_proj", "k_proj"], "rank_pattern": {"q_.*": 3, "o_proj": 2}}, ("k_proj", "q_proj")),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {r"^model\.layers\.[1-9]\..*": 5, "q_proj": 7, "x": 1}},
            ("q_proj",),
        ),
    ],
)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.sampled
def test_what_peft_chooses_by_patterns_is_loaded(
    tmp_path: Path, chosen: dict[str, Any], expected: tuple[str, ...], dora: bool
) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    torch.manual_seed(5)
    settings = peft.LoraConfig(
        r=4, lora_alpha=6, task_type="CAUSAL_LM", init_lora_weights=False, use_dora=dora, **chosen
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **chosen}))  # PEFT spells some of it out
    ours = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    assert config.parts_of(ours.section)[0].target_modules == expected
    assert_answers_as(theirs, ours)
    save_adapter(ours, tmp_path / "again")
    again = load_adapter(tiny_base(folder, "none"), tmp_path / "again")
    assert torch.equal(logits_of(again.model), logits_of(ours.model))


def test_ia3_by_a_regex_is_loaded(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    settings = peft.IA3Config(
        target_modules=r".*\.(k_proj|down_proj)",
        feedforward_modules=r".*\.down_proj",
        init_ia3_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings).eval()
    for name, values in theirs.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.uniform_(values, 0.5, 1.5)
    theirs.save_pretrained(tmp_path / "adapter")
    assert_answers_as(theirs, load_adapter(tiny_base(folder, "none"), tmp_path / "adapter"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "chosen",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_ensured_weight_tying_is_loaded(tmp_path: Path, chosen: dict[str, Any], tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    torch.manual_seed(5)
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, ensure_weight_tying=True, **chosen)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), settings).eval()
    for name, values in theirs.named_parameters():
        if "modules_to_save" in name:
            values.data.mul_(1.1)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    assert difference(logits_of(ours.model), logits_of(theirs)) < rounding()


@pytest.mark.parametrize(
    ("rows", "trained", "parts"),
    [
        (0, False, ["lora"]),
        (0, True, ["lora", "modules"]),
        (-4, False, ["lora"]),
        (2, False, ["lora", "new_tokens"]),
        (2, True, None),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.sampled
def test_embeddings_that_peft_saves_are_loaded(
    tmp_path: Path, rows: int, trained: bool, parts: list[str] | None, tied: bool
) -> None:
    folder = tiny_checkpoint(tmp_path / "base", tie_word_embeddings=tied)
    torch.manual_seed(5)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.resize_token_embeddings(VOCABULARY + rows, mean_resizing=False)
    if trained:
        plain.get_input_embeddings().weight.data[3] += 0.1
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    theirs = peft.get_peft_model(plain, settings).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|a|>", "<|b|>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    if parts is None:
        with pytest.raises(MethodError, match=r"a trained .* of 98 rows, and that of .* has 96; resize the vocabulary"):
            load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
        return
    ours = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    assert [part.name for part in config.parts_of(ours.section)] == parts
    tokens = TOKENS % (VOCABULARY + min(rows, 0))
    expected = theirs(input_ids=tokens).logits
    assert difference(ours.model(input_ids=tokens).logits[..., : VOCABULARY + rows], expected) < rounding()
    if rows > 0:
        new = torch.tensor([[3, 96, 97, 5]])
        assert difference(ours.model(input_ids=new).logits, theirs(input_ids=new).logits) < rounding()
    merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32", quantization="none", dtype="fp32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert difference(merged(input_ids=tokens).logits[..., : VOCABULARY + rows], expected) < rounding()


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({"(": 1}, "no regular expression"),
        ({"(" * 499 + ")" * 499: 1}, "no regular expression"),
        ({"a{1000000000}": 1}, "too long"),
        ({r"((.|..)+)+[^a-z_.0-9]": 1}, r"more than 0\.2 s to match"),
    ],
)
def test_a_hostile_pattern_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: dict[str, int], said: str
) -> None:
    adapter = saved_elsewhere(tmp_path, recorded=True)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "alpha_pattern": pattern}))
    monkeypatch.setattr(peft_config, "MOST_SECONDS", 0.2)
    with pytest.raises(MethodError, match=said):
        read_adapter_config(adapter)


def test_the_files_say_what_pefts_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = apply_method(tiny_base(Path("base")), SECTION)  # other programs read the whole path, wherever they run
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
        assert (file.metadata() or {})["format"] == "pt"
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
    with pytest.raises(MethodError, match=r"has alpha=8\.0, this model alpha=9\.0"):
        load_adapter(other, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": "much"}),
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_qalora", True),
        ("alora_invocation_tokens", [5, 6]),
        ("layers_to_transform", [0]),
        ("exclude_modules", ["v_proj"]),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("something_of_next_year", 1),
        ("peft_type", "LOHA"),
        ("peft_type", None),
        ("task_type", "SPEECH"),
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


@pytest.mark.parametrize(("field", "value", "said"), [("r", 0, "r is 0"), ("init", "x", "init is 'x'")])
def test_a_list_of_methods_names_the_field_too(tmp_path: Path, field: str, value: Any, said: str) -> None:
    parts = [{"name": "lora", field: value}, {"name": "modules", "modules": ["lm_head"]}]
    ours = {"peft_type": "QLORA", "qlora_method": {"name": "combined", "parts": parts}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours))
    with pytest.raises(MethodError, match=f"cannot be used: {said}"):
        read_adapter_config(tmp_path)


def saved_elsewhere(folder: Path, recorded: bool, **section: Any) -> Path:
    """A saved adapter of a tiny llama; without ``recorded`` it does not say of which base, as other software writes it."""
    model = apply_method(
        tiny_base(tiny_checkpoint(folder / "base")), config.LoRA(**{**SECTION.model_dump(), **section})
    )
    stir(model)
    save_adapter(model, folder / "adapter")
    if not recorded:
        save_file(model.adapter_state(), folder / "adapter" / "adapter_model.safetensors")
    return folder / "adapter"


@pytest.mark.parametrize(
    ("recorded", "section", "sizes", "said"),
    [
        (True, {}, {"intermediate_size": 192}, "other configuration, tokenizer or tensors"),
        (False, {}, {"intermediate_size": 192}, r"wrong shape in .*\[4, 128\] instead of \[4, 192\]"),
        (False, {}, {"num_hidden_layers": 1}, r"unknown .*layers\.1\..*another base"),
        (False, {}, {"num_hidden_layers": 3}, r"lacks .*layers\.2\..*another base"),
        (
            False,
            {"target_modules": ("layers.1.mlp.up_proj",)},
            {"num_hidden_layers": 1},
            r"adapts model\.layers\.1\.mlp\.up_proj",
        ),
    ],
)
@pytest.mark.sampled
def test_an_adapter_of_another_base_leaves_the_base_bare(
    tmp_path: Path, recorded: bool, section: dict[str, Any], sizes: dict[str, int], said: str
) -> None:
    adapter = saved_elsewhere(tmp_path, recorded, **section)
    other = tiny_base(tiny_checkpoint(tmp_path / "other", **sizes))
    with pytest.raises(MethodError, match=said) as caught:
        load_adapter(other, adapter)
    assert "another base" in str(caught.value)
    assert str(adapter) in str(caught.value)
    assert str(caught.value).replace(str(tmp_path), "").count(". ") == 0  # one sentence
    assert not any(isinstance(module, LoraLinear) for module in other.model.modules())


@pytest.mark.parametrize("problem", ["lacks", "unknown"])
def test_a_file_with_missing_or_extra_keys_is_refused(tmp_path: Path, problem: str) -> None:
    adapter = saved_elsewhere(tmp_path, recorded=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if problem == "lacks":
        del tensors[key]
    else:
        key = key.replace("q_proj", "qk_norm")
        tensors[key] = torch.zeros(4)
    save_file(tensors, adapter / "adapter_model.safetensors")
    base = tiny_base(tmp_path / "base")
    with pytest.raises(MethodError, match=f"{problem} {key}"):
        load_adapter(base, adapter)
    assert not any(isinstance(module, LoraLinear) for module in base.model.modules())


def test_names_of_other_families_in_a_list_are_left_out(tmp_path: Path) -> None:
    adapter = saved_elsewhere(tmp_path, recorded=True, target_modules=("q_proj", "up_proj"))
    expected = logits_of(load_adapter(tiny_base(tmp_path / "base"), adapter).model)
    values = json.loads((adapter / "adapter_config.json").read_text())
    values["target_modules"].append("query_key_value")
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    model = load_adapter(tiny_base(tmp_path / "base"), adapter)
    assert model.section.target_modules == ("q_proj", "up_proj")
    assert torch.equal(logits_of(model.model), expected)


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


def test_a_load_that_is_interrupted_leaves_the_base_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path / "base"))
    before, modules = logits_of(base.model), [name for name, _ in base.model.named_modules()]
    model = apply_method(base, SECTION)
    stir(model)
    save_adapter(model, tmp_path / "adapter")
    model.remove()
    for error in (torch.OutOfMemoryError, KeyboardInterrupt):

        def failing(*rest: Any, error: type[BaseException] = error) -> None:
            raise error

        monkeypatch.setattr(LoraLayout, "load", failing)
        with pytest.raises(error):
            load_adapter(base, tmp_path / "adapter")
        assert [name for name, _ in base.model.named_modules()] == modules
        assert torch.equal(logits_of(base.model), before)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_of_any_new_file(tmp_path: Path, umask: int, mode: int) -> None:
    """safetensors writes through a private temporary file; a server of another user must be able to read what it gets."""
    folder = tiny_checkpoint(tmp_path / "base")
    model = apply_method(tiny_base(folder), config.AdaLoRA(r=2, initial_r=3))  # with a state of its own
    before = os.umask(umask)
    try:
        trainer = Trainer(
            model, [Row(*[numpy.arange(3, 11, dtype=numpy.int32)] * 3, (0,))], TrainingSection(), tmp_path
        )
        checkpoint = trainer.save()
        save_adapter(model, tmp_path / "adapter")
        save_portable(model, tmp_path / "portable")
        merge(folder, tmp_path / "adapter", tmp_path / "merged", compute_dtype="fp32")
    finally:
        os.umask(before)
    written = [checkpoint, *(tmp_path / name for name in ("adapter", "portable", "merged"))]
    modes = {
        str(path): oct(path.stat().st_mode & 0o777) for place in written for path in place.rglob("*") if path.is_file()
    }
    assert len(modes) > 10
    assert set(modes.values()) == {oct(mode)}, modes
