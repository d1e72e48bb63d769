"""Arrangements: each rung takes what it says, the fastest that fits is taken, and nothing that is computed changes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, Gemma4TextConfig, GptOssConfig, LlamaConfig, OPTConfig

from qlora.cli import main
from qlora.errors import DoesNotFitError, RecipeError
from qlora.machine.cards import card
from qlora.machine.device import DTYPES
from qlora.machine.disk import GIB, bytes_text
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.checkpoint import open_checkpoint
from qlora.model.skeleton import skeleton_base
from qlora.planning.ladder import SPARE, Arrangement, Arranger, Target, changed, largest
from qlora.planning.plan import amount, card_elsewhere, ladder_lines, plan, survey
from qlora.planning.rates import rates_of
from qlora.recipe import LoRA, MemorySection, ModelSection, Recipe
from qlora.residence.load import cached_bytes, load_base
from tests.data.conftest import make_tokenizer
from tests.marks import slow
from tests.tiny import chat_checkpoint

SIZES = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 8000, "max_position_embeddings": 8192,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_checkpoint(tmp_path_factory.mktemp("mid") / "model", **SIZES)


@pytest.fixture(autouse=True)
def small_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model beside the libraries' own memory would leave nothing to choose."""
    monkeypatch.setattr("qlora.planning.memory.RUNTIME", {"cpu": 2**20, "cuda": 2**20})
    monkeypatch.setattr("qlora.planning.memory.HOST_RUNTIME", 2**20)
    monkeypatch.setattr("qlora.planning.memory.WIDE_HEAP", 0)


def recipe_of(folder: Path, *overrides: str, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "model": {"name": str(folder)},
        "data": {"train": "none.jsonl", "max_length": 2048},
        "training": {"batch_size": 2},
        **sections,
    }
    return Recipe.from_dict(values, *overrides)


@functools.cache
def planted(folder: Path, kind: str) -> AdaptedModel:
    """One for all tests, so that a step of one shape is tried once."""
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    base = skeleton_base(ModelSection(name=str(folder)), torch.device("meta"), dtype)
    return apply_method(base, LoRA(r=8, adapter_dtype="bf16" if kind == "cuda" else "fp32"))


def arranger(folder: Path, free: int, kind: str = "cuda", host: int = 64 * GIB, **sections: Any) -> Arranger:
    adapted = planted(folder, kind)
    target = Target("a card", torch.device(kind), free, free, host, 1000 * GIB, rates_of(card("3090")))
    return Arranger(adapted, recipe_of(folder, **sections), target)


def tokens_a_step(one: Arrangement) -> int:
    return one.recipe.training.batch_size * one.recipe.data.max_length


@pytest.mark.slow
def test_a_ladder_goes_down_in_memory_and_in_speed_and_keeps_every_token(folder: Path) -> None:
    found = arranger(folder, 24 * GIB)
    rungs = found.ladder()
    assert len(rungs) >= 4
    needs = [one.needed.total for one in rungs]
    seconds = [one.seconds.expected for one in rungs if one.seconds]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == len(needs)
    assert seconds == sorted(seconds)
    assert {tokens_a_step(one) for one in rungs} == {2 * 2048}
    assert rungs[-1].recipe.memory.layers == "streamed"
    assert rungs[-1].needed.total < 0.5 * rungs[0].needed.total
    chosen = found.fastest(rungs)
    assert chosen is rungs[0]
    lines = ladder_lines(rungs, found.target, chosen)
    assert lines[0].startswith("→ fits")
    assert sum(line.startswith("→") for line in lines) == 1


@pytest.mark.slow
def test_as_many_layers_stay_as_fit(folder: Path) -> None:
    """Between the rung with all layers and the one with none there is one that fills the device."""
    wide = arranger(folder, 24 * GIB).ladder()
    streamed, resident = (
        wide[-1],
        max((one for one in wide if one.recipe.memory.layers == "resident"), key=lambda one: -one.needed.total),
    )
    free = (streamed.needed.total + resident.needed.total) // 2
    assert streamed.needed.total < free < resident.needed.total
    found = arranger(folder, free)
    chosen = found.fastest()
    assert chosen is not None
    stay = chosen.recipe.memory.layers
    assert isinstance(stay, int)
    assert 0 < stay < 12
    assert chosen.needed.total <= free
    more = found.look({**chosen.changes, "memory.layers": stay + 1})
    assert more.needed.total > free


@pytest.mark.slow
def test_host_memory_and_disk_count_too(folder: Path) -> None:
    """Layers that host memory cannot hold are streamed from the file cache; a disk that is too small is a refusal."""
    smallest = arranger(folder, 24 * GIB).ladder()[-1]
    on_disk = {**smallest.changes, "memory.tier": "disk"}
    tight = arranger(folder, 24 * GIB).look(on_disk).needed
    host = tight.host_total + 2**20
    little = arranger(folder, tight.total + 2**20, host=host)
    assert little.target.lacking(smallest.needed) == [
        f"host memory: {bytes_text(smallest.needed.host_total)} of {bytes_text(host)}"
    ]
    chosen = little.fastest()
    assert chosen is not None
    assert chosen.recipe.memory.tier == "disk"
    assert chosen.needed.host_total <= host
    assert chosen.needed.disk["file_cache"] > 0
    assert arranger(folder, tight.total + 2**20, host=2**20).fastest() is None


@pytest.mark.slow
def test_on_a_cpu_only_the_disk_saves_memory(folder: Path) -> None:
    rungs = arranger(folder, 24 * GIB, "cpu").ladder()
    for one in rungs:
        assert (one.recipe.memory.embedding, one.recipe.memory.head) == ("device", "device")
        assert one.recipe.memory.layers == "resident" or one.recipe.memory.tier == "disk"
        assert one.needed.host_total == one.needed.total
    assert rungs[-1].needed.disk["file_cache"] > 0


@pytest.mark.slow
def test_the_largest_rows_and_context_are_those_that_just_fit(folder: Path) -> None:
    found = arranger(folder, GIB // 2)
    one = found.look({"training.recompute": "all"})
    rows, context = found.most_rows(one), found.longest_context(one)
    assert rows is not None
    assert context is not None
    for changes, larger in (
        ({"training.micro_batch_size": rows, "training.batch_size": rows}, {"training.micro_batch_size": rows * 5 // 4 + 1, "training.batch_size": rows * 5 // 4 + 1}),
        ({"training.micro_batch_size": 1, "data.max_length": context}, {"training.micro_batch_size": 1, "data.max_length": context * 5 // 4}),
    ):  # fmt: skip
        assert found.look({**one.changes, **changes}).needed.total <= 1.02 * found.target.free
        assert found.look({**one.changes, **larger}).needed.total > found.target.free


def test_a_system_that_does_not_tell_what_is_free_refuses_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora.planning.plan.total_memory_bytes", lambda device: (0, 0))
    planned = plan(recipe_of(folder, device={"name": "cpu"}))
    assert planned.why[-1].startswith("The free memory of this device is not known")


@pytest.mark.parametrize("power", [1, 2, 0.5])
@pytest.mark.parametrize("limit", [0, 1, 7, 100, 12345])
def test_the_largest_number_that_fits(limit: int, power: float) -> None:
    """Of a share that grows in a straight line, with the square, or ever more slowly, from a base that is always taken."""
    looks: list[int] = []

    def share(number: int) -> float:
        looks.append(number)
        return 0.5 + 0.5 * (number / (limit + 0.5)) ** power

    assert largest(share, 1, 2**16) == (limit or None)
    assert largest(share, 1, 10) == (min(limit, 10) or None)
    looks.clear()
    found = largest(share, 1, 2**16, start=8, near=1 / 64)
    assert found == (limit or None) or 63 / 64 * limit <= (found or 0) <= limit
    assert len(looks) <= 14
    assert largest(lambda _: 0.0, 1, 99) == 99  # where nobody knows what is free


@pytest.mark.slow
def test_a_budget_is_resolved_into_the_recipe(folder: Path, tmp_path: Path) -> None:
    """What runs holds plain values: no budget is left in it, and it plans to itself again."""
    resident = plan(recipe_of(folder, "training.recompute=all", device={"name": "cpu"}))
    assert resident.recipe.memory.layers == "resident"
    budget = int(0.7 * resident.memory.total)
    tight = recipe_of(folder, device={"name": "cpu"}, memory={"budget": f"{budget}B", "cache": str(tmp_path / "cache")})
    planned = plan(tight)
    assert planned.memory.total <= budget
    assert planned.recipe.memory.budget is None
    assert planned.chosen.changes
    assert tokens_a_step(planned.chosen) == 2 * 2048
    assert any("budget" in sentence for sentence in planned.why)
    assert plan(planned.recipe).memory == planned.memory
    roomy = plan(recipe_of(folder, device={"name": "cpu"}, memory={"budget": "auto", "cache": str(tmp_path / "cache")}))
    assert roomy.recipe.memory.layers == "resident"
    with pytest.raises(DoesNotFitError, match="No arrangement fits"):
        plan(recipe_of(folder, device={"name": "cpu"}, memory={"budget": "2MiB"}))


def test_what_does_not_fit_is_refused_with_what_would(folder: Path) -> None:
    least = ("training.recompute=all", "training.accumulation=micro_batch_major")
    resident = plan(recipe_of(folder, *least, device={"name": "cpu"}))
    limit = f"{int(0.8 * resident.memory.total)}B"
    with pytest.raises(DoesNotFitError) as refused:
        plan(recipe_of(folder, device={"name": "cpu", "memory": limit}))
    text = str(refused.value)
    assert "layer inputs" in text
    assert "Set memory.budget=auto, or this yourself: " in text
    do = text.rpartition("or this yourself: ")[2].rpartition(" (")[0].split()
    changes = [word for word in do if "=" in word]
    again = recipe_of(folder, *changes, device={"name": "cpu", "memory": limit})
    assert plan(again).memory.total <= 0.8 * resident.memory.total


@pytest.mark.parametrize("name", ["T4", "3060-12", "3090", "4090", "5090", "A100-40", "L4", "H100"])
@pytest.mark.sampled
def test_a_card_that_is_not_here_is_planned_for(folder: Path, name: str) -> None:
    """Weights are not needed: the folder has its config.json alone."""
    bare = folder.parent / "bare"
    bare.mkdir(exist_ok=True)
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    recipe = recipe_of(bare, device={"memory": name, "host_memory": "64GiB"})
    target, resolved, _ = card_elsewhere(recipe, open_checkpoint(recipe.model, weights=False))
    assert (target.free, target.host_free, target.device.type) == (card(name).memory, 64 * GIB, "cuda")
    assert resolved.model.compute_dtype == ("fp16" if name == "T4" else "bf16")
    assert target.workspace == card(name).workspace
    assert resolved.method.adapter_dtype == ("fp32" if name == "T4" else "bf16")
    assert target.rates is not None
    assert target.rates.matrix.expected == 0.5 * card(name).flops


@pytest.mark.slow
def test_a_card_that_is_not_here_is_surveyed(folder: Path) -> None:
    found = survey(recipe_of(folder, device={"memory": "T4", "host_memory": "64GiB"}))
    assert found.fits
    assert found.plan.target.device.type == "cuda"
    assert found.plan.recipe.model.compute_dtype == "fp16"
    assert found.longest_context is not None
    text = str(found)
    assert all(part in text for part in ("tokens/s", "Largest that fits", "From the fastest arrangement", "Assumed"))


@pytest.mark.parametrize("name", ["T4", slow("H100")])
def test_the_card_is_asked_and_not_this_machine(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a card computes in and what it takes are the same whatever GPU is here."""
    recipe = recipe_of(folder, device={"memory": name, "host_memory": "64GiB"})
    found = []
    for here, capability in ((False, (0, 0)), (True, (7, 5)), (True, (9, 0))):
        monkeypatch.setattr(torch.cuda, "is_available", lambda here=here: here)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, is_=capability: is_)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, is_=capability, **__: is_[0] >= 8)
        target, resolved, _ = card_elsewhere(recipe, open_checkpoint(recipe.model, weights=False))
        base = skeleton_base(resolved.model, torch.device("meta"), DTYPES[resolved.model.compute_dtype])
        needed = Arranger(apply_method(base, resolved.method), resolved, target).look().needed
        found.append((resolved.model.compute_dtype, resolved.method.adapter_dtype, needed.as_dict()))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == ("fp16" if name == "T4" else "bf16")
    assert found[0][2]["workspaces"] == (32 * 2**20 if name == "H100" else 8 * 2**20 + 2**17)


@pytest.mark.slow
def test_the_command_line_says_no_by_its_exit_status(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe_of(folder).to_yaml(), encoding="utf-8")
    assert main(["plan", str(path), "device.memory=twelve"]) == 2
    capsys.readouterr()
    assert main(["plan", str(path), "device.memory=150MiB", "device.host_memory=8GiB"]) == 3
    assert "As the recipe stands it does not fit" in capsys.readouterr().out


def test_a_card_may_be_given_as_a_number(folder: Path) -> None:
    """``device.memory=4090`` is a whole number to YAML."""
    assert recipe_of(folder, "device.memory=4090").device.memory == "4090"


def test_amounts_are_bytes_or_cards() -> None:
    assert amount("2GiB") == 2 * GIB
    assert amount("rtx 4090") == card("4090").memory
    with pytest.raises(RecipeError, match="not a card"):
        amount("a lot")


def test_changes_are_values_of_a_recipe(folder: Path) -> None:
    recipe = changed(recipe_of(folder), {"memory.head": "host", "training.micro_batch_size": 2, "data.max_length": 99})
    assert (recipe.memory.head, recipe.training.micro_batch_size, recipe.data.max_length) == ("host", 2, 99)


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
ODD: dict[str, tuple[Any, dict[str, Any]]] = {
    "no MLP to cut": (OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=4096), {}),
    "rows that cannot be cut": (BloomConfig(**SMALL), {}),
    "layers that hand on their keys": (Gemma4TextConfig(**SMALL | {"num_hidden_layers": 4}, intermediate_size=64, layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2, vocab_size_per_layer_input=96, architectures=["Gemma4ForCausalLM"]), {}),
    "MLPs that give scores too": (GptOssConfig(**SMALL | {"num_key_value_heads": 2}, intermediate_size=64, head_dim=8, num_local_experts=4, architectures=["GptOssForCausalLM"]), {}),
    "every weight trains": (LlamaConfig(**SMALL, intermediate_size=64), {"name": "full"}),
    "the head is adapted": (LlamaConfig(**SMALL, intermediate_size=64), {"name": "lora", "r": 2, "target_modules": ["q_proj", "lm_head"]}),
    "new tokens": (LlamaConfig(**SMALL, intermediate_size=64), [{"name": "lora", "r": 2}, {"name": "new_tokens", "tokens": ["<x>"]}]),
    "tied": (LlamaConfig(**SMALL, intermediate_size=64, tie_word_embeddings=True), {"name": "lora", "r": 2}),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in ("rows that cannot be cut", "every weight trains") else slow(name) for name in ODD]
)
@pytest.mark.slow
def test_no_rung_is_offered_that_the_model_or_the_method_refuses(name: str, tmp_path: Path) -> None:
    config, method = ODD[name]
    config.architectures = config.architectures or [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    quantization = "none" if method == {"name": "full"} else "nf4"
    base = skeleton_base(
        ModelSection(name=str(tmp_path), quantization=quantization), torch.device("meta"), torch.bfloat16
    )
    base.tokenizer = make_tokenizer()
    recipe = Recipe.from_dict(
        {
            "data": {"train": "none.jsonl", "max_length": 2048},
            "training": {"batch_size": 2},
            **({"method": method} if method else {}),
        }
    )
    target = Target("a card", torch.device("cuda"), 24 * GIB, 24 * GIB, 64 * GIB, 1000 * GIB, rates_of(card("3090")))
    rungs = Arranger(apply_method(base, recipe.method), recipe, target).ladder()
    assert rungs
    memories = [one.recipe.memory for one in rungs]
    if name in ("no MLP to cut", "MLPs that give scores too"):
        assert {memory.mlp_tile for memory in memories} == {None}
    if name == "rows that cannot be cut":
        assert {one.recipe.training.accumulation for one in rungs} == {"micro_batch_major"}
    if name == "layers that hand on their keys":
        ways = {(one.recipe.training.recompute, one.recipe.training.accumulation) for one in rungs}
        assert ways == {("none", "micro_batch_major")}
        assert {(memory.layers, memory.layer_inputs, memory.mlp_tile) for memory in memories} == {
            ("resident", "device", None)
        }
    if name == "every weight trains":
        assert {memory.layers for memory in memories} == {"resident"}
    if name in ("every weight trains", "the head is adapted", "new tokens"):
        assert {memory.head for memory in memories} == {"device"}
    if name == "tied":
        assert {memory.embedding == memory.head for memory in memories} == {True}


def test_what_the_file_cache_holds_already_is_not_counted_again(folder: Path, tmp_path: Path) -> None:
    memory = MemorySection(layers="streamed", tier="disk", cache=str(tmp_path / "cache"))
    section = ModelSection(name=str(folder))
    assert cached_bytes(section, torch.float32, torch.device("cpu"), memory) == 0
    load_base(section, torch.device("cpu"), memory=memory)
    written = cached_bytes(section, torch.float32, torch.device("cpu"), memory)
    assert written == sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert written > 10 * 2**20
    assert cached_bytes(section, torch.bfloat16, torch.device("cpu"), memory) == 0


@pytest.mark.parametrize("kind", ["cpu", slow("cuda")])
def test_as_few_layers_are_recomputed_as_memory_asks_for(folder: Path, kind: str) -> None:
    """From plenty of memory to little: none, some, all; each plan within its share, and one layer fewer would not be."""
    sections: dict[str, Any] = {"data": {"train": "none.jsonl", "max_length": 512}, "training": {"batch_size": 1}}
    plenty = arranger(folder, 64 * GIB, kind, **sections)
    least, most = (plenty.look({"training.recompute": n}).needed.total for n in ("all", "none"))
    found = []
    for share in (1.01, 0.6, 0.3, 0.01):
        free = int((least + share * (most - least)) / SPARE[kind])
        one = arranger(folder, free, kind, **sections)
        count = one.recipe.training.recomputed(one.depth)
        found.append(count)
        taken = one.look().needed.total
        assert taken <= (free * SPARE[kind] if count < one.depth else free)
        if 0 < count < one.depth:
            assert one.look({"training.recompute": count - 1}).needed.total > free * SPARE[kind]
    assert found[0] == 0
    assert found == sorted(found)
    assert 0 < found[1] < found[2] <= plenty.depth == found[3]


def test_the_order_of_accumulation_goes_with_what_is_kept(folder: Path) -> None:
    sections: dict[str, Any] = {"data": {"train": "none.jsonl", "max_length": 512}, "training": {"batch_size": 2}}
    plenty = arranger(folder, 64 * GIB, "cpu", **sections)
    assert plenty.recipe.training.recompute == "none"
    assert plenty.recipe.training.accumulation == "micro_batch_major"  # of a whole step it would be more
    little = plenty.look({"training.recompute": "all", "training.accumulation": "layer_major"}).needed.total
    # half of that keeps nothing, and then dequantising once a visit is what is left to gain
    assert arranger(folder, little, "cpu", **sections).recipe.training.accumulation == "layer_major"
    assert arranger(folder, little - 1, "cpu", **sections).recipe.training.accumulation == "micro_batch_major"


def test_what_the_recipe_says_of_recomputing_is_kept(folder: Path) -> None:
    for asked in ("all", "none", 1):
        one = arranger(folder, 64 * GIB, training={"batch_size": 2, "recompute": asked})
        assert one.recipe.training.recompute == asked
    # nobody knows what is free
    assert arranger(folder, 0, training={"batch_size": 2}).recipe.training.recompute == "all"
    # streamed layers have other weights in their place when backward comes
    streamed = arranger(folder, 64 * GIB, training={"batch_size": 2}, memory={"layers": 1})
    assert streamed.recipe.training.recompute == streamed.depth - 1
