"""The plan of every method, from a config.json alone: no tokenizer, no weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qlora import recipe as config
from qlora.cli import main
from qlora.errors import DoesNotFitError, MethodError, ModelError, RecipeError
from qlora.machine.disk import bytes_text
from qlora.methods.base import apply_method
from qlora.methods.files import portable_bytes, save_portable
from qlora.model.checkpoint import open_checkpoint
from qlora.model.skeleton import skeleton_base
from qlora.planning.accounting import account
from qlora.planning.plan import REST, plan
from qlora.planning.rows import read
from qlora.planning.shapes import dense_of
from qlora.recipe import Recipe
from tests.families.checkpoints import save_family
from tests.methods.test_laws import CASES, Case
from tests.tiny import any_checkpoint, tiny_base, tiny_checkpoint


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that holds config.json and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(tiny_checkpoint(tmp_path_factory.mktemp("whole")) / "config.json", folder)
    return folder


def recipe_of(bare: Path, case: Case, **training: object) -> Recipe:
    values = {
        "model": {"name": str(bare), "quantization": case.quantization},
        "method": case.section.model_dump(),
        "data": {"train": "none.jsonl", "max_length": 64},
        "training": {"batch_size": 2, "micro_batch_size": 2, **training},
        "device": {"name": "cpu"},
        "folder": str(bare / "run"),
    }
    return Recipe.model_validate(values)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_every_method_is_planned(bare: Path, name: str) -> None:
    case = CASES[name]
    planned = plan(recipe_of(bare, case))
    counted = account(bare, case.section, case.quantization)
    assert planned.account == counted
    assert (planned.parameters, planned.trainable_parameters) == (counted.parameters, counted.trainable_parameters)
    assert planned.memory.device["optimizer"] == counted.optimizer_bytes == 8 * counted.trainable_parameters
    assert planned.memory.device["adapter"] == 4 * counted.trainable_parameters
    # 3 are kept, one more is written before the oldest goes, and the adapter stands apart at the end
    keep = planned.recipe.training.keep_checkpoints + 1
    adapter = planned.disk_bytes - keep * counted.checkpoint_bytes - REST
    if name in ("rslora", "pissa", "loftq", "adalora"):  # one rank for all, two pairs for one, no averages
        assert adapter > 0
    else:
        assert adapter == counted.adapter_bytes + counted.method_bytes

    lines = str(planned).splitlines()
    assert f"{counted.trainable_parameters:,} trainable parameters" in lines[1]
    assert all(part in lines[1] for part in (*counted.trainable, "in fp32"))
    for title, count in (
        ("adapter on disk", counted.adapter_bytes),
        ("checkpoint on disk", counted.checkpoint_bytes),
        ("run folder at most", planned.disk_bytes),
    ):
        assert f"  {title:<20}{bytes_text(count):>12}" in lines


def test_the_adapter_for_others_is_counted_as_it_is_written(bare: Path, tmp_path: Path) -> None:
    for name in ("lora", "rslora", "pissa", "houlsby"):
        base = skeleton_base(recipe_of(bare, CASES[name]).model, torch.device("cpu"), torch.float32)
        model = apply_method(base, CASES[name].section, values_follow=True)
        save_portable(model, tmp_path / name)
        written = sum(
            tensor.nbytes for file in (tmp_path / name).glob("*.safetensors") for tensor in load_file(file).values()
        )
        assert portable_bytes(model) == written


def test_each_kind_of_method_changes_what_is_held(bare: Path) -> None:
    """Full fine-tuning holds weights, gradients and moments; a head of its own stands beside the frozen one."""
    lora, full, head = (plan(recipe_of(bare, CASES[name])).memory for name in ("lora", "full", "head"))
    parameters = plan(recipe_of(bare, CASES["full"])).parameters
    assert full.device["adapter"] == full.device["optimizer"] // 2 == 4 * parameters
    assert "quantised_weights" not in full.device
    assert full.device["other_weights"] < 4 * 96  # rotary frequencies
    assert head.device["adapter"] == 4 * 96 * 64
    assert head.device["other_weights"] == lora.device["other_weights"]
    assert head.total < lora.total  # no gradient goes below the head
    eight = plan(recipe_of(bare, CASES["full"], optimizer="adamw_8bit")).account
    assert eight.optimizer_bytes < 0.35 * full.device["optimizer"]


def test_a_command_line_prints_it(bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_of(bare, CASES["lora_and_prompt"]).model_dump(mode="json")), encoding="utf-8")
    assert main(["plan", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "lora 3,328 + prompt_tuning 192: 3,520 trainable parameters" in printed
    assert "adapter on disk" in printed


def test_what_does_not_fit_is_refused_before_anything_is_read(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MethodError, match="are packed"):
        plan(recipe_of(bare, Case(config.Full(), quantization="nf4")))
    monkeypatch.setattr("qlora.planning.plan.total_memory_bytes", lambda device: (2**20, 2**30))
    with pytest.raises(DoesNotFitError, match="trainable parameters") as refused:
        plan(recipe_of(bare, CASES["lora"]))
    assert "No arrangement fits. The smallest" in str(refused.value)


def test_the_data_are_read_and_what_is_wrong_with_them_is_only_said(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows, steps and what ends an answer; a plan holds without the data, and says what is wrong with them."""
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<pad>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    told = {
        "training.steps=7": "rows → 7 steps, at most 7.0 s",
        f"data.chat_template={template}": "An answer ends with <pad>, which the model's own files do not name as an end",
        "data.max_length=1000": "data.max_length=1,000 is above the ",
        f"data.train={broken}": "The data were not read: ",
        "data.train=someone/somewhere": "The data were not read: 'someone/somewhere' is not in files here",
    }
    for word, said in told.items():
        recipe = Recipe.from_yaml(recipe_file, word)
        assert said in read(recipe, open_checkpoint(recipe.model, weights=False)).said(1.0)
    assert main(["plan", str(recipe_file), "training.steps=7"]) == 0
    assert "rows → 7 steps, at most " in capsys.readouterr().out


def test_a_run_on_a_cpu_computes_in_what_its_processor_is_good_at(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``auto`` became is in the resolved recipe, which the run folder keeps; adapters stay in fp32."""
    monkeypatch.setattr("qlora.planning.plan.faster_in_bf16", lambda: True)
    planned = plan(Recipe.from_yaml(recipe_file, "model.compute_dtype=auto"))
    assert planned.recipe.model.compute_dtype == "bf16"
    assert planned.recipe.method.adapter_dtype == "fp32"  # type: ignore[union-attr]
    assert any(sentence.startswith("model.compute_dtype is bf16") for sentence in planned.why)
    assert plan(Recipe.from_yaml(recipe_file)).recipe.model.compute_dtype == "fp32"  # it was asked for
    whole = plan(
        Recipe.from_yaml(recipe_file, "model.compute_dtype=auto", "method={name: full}", "model.quantization=none")
    )
    assert whole.recipe.model.compute_dtype == "fp32"


def test_what_is_not_quantised_is_told(tmp_path: Path) -> None:
    """By hand: 96 tokens of 64 numbers twice, two layers with 8 experts, four norms each, and the last norm."""
    folder = tiny_checkpoint(tmp_path / "model", "qwen3_moe")
    planned = plan(
        Recipe.from_dict({"model": {"name": str(folder), "compute_dtype": "fp32"}, "data": {"train": "none.jsonl"}})
    )
    rest = {"routers": 2 * 8 * 64, "rest": 2 * (2 * 64 + 2 * 16) + 64}
    numbers = {"embeddings": 96 * 64, "head": 96 * 64, **rest}
    assert planned.dense == dense_of(tiny_base(folder).model)
    assert planned.dense is not None
    assert planned.dense.bytes == {kind: 4 * count for kind, count in numbers.items()}
    assert planned.dense.share == sum(rest.values()) / (planned.parameters - 2 * 96 * 64)
    assert str(planned.dense) in str(planned)
    assert dense_of(tiny_base(folder, "none").model) is None


@pytest.mark.parametrize(
    "found", [None, {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}]
)
def test_a_mixture_is_told_of_its_routers_and_of_experts_that_are_packed_here(found: object, tmp_path: Path) -> None:
    folder = any_checkpoint(
        tmp_path / "base", "Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
    )
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": found}), encoding="utf-8")
    (folder / "model.safetensors").unlink()  # which are not packed
    said = str(plan(Recipe.from_dict({"model": {"name": str(folder)}, "data": {"train": "none.jsonl"}})))
    assert "The routers of its experts are frozen" in said
    assert "all-linear without the experts" in said
    assert ("has in 16 bits, are packed to nf4 here" in said) == (found is not None)


def test_a_model_whose_tokens_see_ahead_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    recipe = Recipe.from_dict(
        {"model": {"name": str(save_family(tmp_path, "paligemma"))}, "data": {"train": "none.jsonl"}}
    )
    with pytest.raises(ModelError, match="this paligemma model a token sees what follows it"):
        plan(recipe)


def test_tokens_without_an_embedding_are_told_by_a_plan(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(values | {"vocab_size": 40}), encoding="utf-8")
    (tmp_path / "text.txt").write_text("w30 w80\n" * 40, encoding="utf-8")
    recipe = {"model": {"name": str(folder)}, "data": {"train": str(tmp_path / "text.txt"), "max_length": 16}}
    reading = read(Recipe.from_dict(recipe), open_checkpoint(Recipe.from_dict(recipe).model, weights=False))
    assert "embeddings for tokens 0 to 39 alone" in reading.why_not


@pytest.mark.parametrize(
    ("kind", "memory", "said"),
    [
        ("granitemoehybrid", {"mlp_tile": 16}, "so there is nothing to cut into tiles; leave memory.mlp_tile out."),
        ("gemma3_text", {"embedding": "host"}, "set memory.embedding=device and memory.head=device."),
    ],
)
def test_what_is_wrong_beside_streamed_layers_is_said_alone(
    kind: str, memory: dict[str, object], said: str, tmp_path: Path
) -> None:
    """Streaming has no part in it."""
    values = {
        "model": {"name": str(save_family(tmp_path, kind))},
        "method": {"name": "lora", "target_modules": ["q_proj", *(["lm_head"] if "embedding" in memory else [])]},
        "data": {"train": "none.jsonl", "max_length": 64},
        "memory": {"layers": "streamed", "tier": "disk"} | memory,
    }
    with pytest.raises(ModelError) as caught:
        plan(Recipe.from_dict(values))
    assert said in str(caught.value)
    assert "streamed" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "lacks 1 tensors of the LlamaForCausalLM in its config.json"),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(64, 64), "up_proj.weight' in .* has the shape .64, 64."),
        ("model.layers.0.extra.weight", torch.zeros(2), "no place for: model.layers.0.extra.weight"),
    ],
    ids=["lacking", "another shape", "too many"],
)
def test_weights_of_another_model_are_refused_by_a_plan_where_they_are_here(
    key: str, value: torch.Tensor | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    tensors = {name: held for name, held in load_file(folder / "model.safetensors").items() if name != key}
    save_file(tensors | ({} if value is None else {key: value}), folder / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr("qlora.model.checkpoint.read_tensor", lambda entry: pytest.fail(f"{entry} was read"))
    with pytest.raises(ModelError, match=said):
        plan(Recipe.from_dict({"model": {"name": str(folder)}, "data": {"train": "none.jsonl"}}))


@pytest.mark.parametrize(
    ("kind", "changed", "said"),
    [
        ("mixtral", {"intermediate_size": 2}, r"'.*experts\.0\.w1\.weight' in .* has the shape .*of 4 experts with \["),
        ("qwen3_moe", {"moe_intermediate_size": 2}, r"experts\.0\.down_proj\.weight' in .* has the shape"),
        ("gpt_oss", {"intermediate_size": 2}, r"experts\.gate_up_proj_bias' in .* has the shape"),
        ("gpt_oss", {"num_local_experts": 2}, r"' in .* has the shape"),
    ],
)
def test_experts_of_another_model_are_refused_by_a_plan(
    kind: str, changed: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_family(tmp_path, kind)
    recipe = Recipe.from_dict({"model": {"name": str(folder)}, "data": {"train": "none.jsonl"}})
    plan(recipe)
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {key: values[key] // by for key, by in changed.items()}))
    monkeypatch.setattr("qlora.model.checkpoint.read_tensor", lambda entry: pytest.fail(f"{entry} was read"))
    with pytest.raises(ModelError, match=f"{said}.*One of them is another model's: fetch both again"):
        plan(recipe)


def test_one_expert_of_another_shape_is_named_by_a_plan(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    (odd,) = (name for name in tensors if ".layers.0." in name and "experts.3.w2" in name)
    save_file(tensors | {odd: tensors[odd][:, ::2].contiguous()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"'{odd}' in .* has the shape"):
        plan(Recipe.from_dict({"model": {"name": str(folder)}, "data": {"train": "none.jsonl"}}))


def test_towers_of_which_a_part_is_missing_are_refused_by_a_plan(tmp_path: Path) -> None:
    folder = save_family(tmp_path, "gemma3")
    recipe = Recipe.from_dict({"model": {"name": str(folder)}, "data": {"train": "none.jsonl"}})
    tensors = load_file(folder / "model.safetensors")
    tower = sorted(name for name in tensors if "vision" in name)
    save_file({name: held for name, held in tensors.items() if name != tower[0]}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="lacks 1 tensors of the Gemma3"):
        plan(recipe)
    text = {name: held for name, held in tensors.items() if "language_model" in name or "lm_head" in name}
    save_file(text, folder / "model.safetensors")
    assert "the checkpoint holds the language model alone" in str(plan(recipe))


@pytest.mark.parametrize("name", ["lora", "full"])
def test_layers_spread_over_one_process_are_refused_before_anything_is_loaded(bare: Path, name: str) -> None:
    recipe = recipe_of(bare, CASES[name])
    spread = recipe.memory.model_copy(update={"layers": "streamed", "tier": "processes"})
    with pytest.raises(RecipeError, match="there is one alone; start several by torchrun"):
        plan(recipe.model_copy(update={"memory": spread}))
