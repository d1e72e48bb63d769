"""Combinations are PEFT's add_weighted_adapter, to rounding; what is written loads everywhere; nothing mixes bases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.combining import WAYS, combine, drawn, save_combined
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from tests.methods.against_peft import assert_answers_as
from tests.rounding import doubled, no_worse, rounding
from tests.tiny import difference, logits_of, stir, tiny_base, tiny_checkpoint

WEIGHTS = {"one": 0.7, "two": -0.4, "three": 1.3}
SAME_RANK = {
    "one": config.LoRA(r=4, alpha=8, target_modules=("q_proj", "down_proj")),
    "two": config.LoRA(r=4, alpha=6, target_modules=("q_proj", "v_proj")),
    "three": config.LoRA(r=4, alpha=4, rslora=True, target_modules=("down_proj", "q_proj")),
}
OTHER_RANKS = {
    "one": config.LoRA(r=4, alpha=8, target_modules=("q_proj", "down_proj"), rank_pattern={"down_proj": 3}),
    "two": config.LoRA(r=2, alpha=6, target_modules=("q_proj", "v_proj")),
    "three": config.LoRA(
        r=6, alpha=4, rslora=True, target_modules=("down_proj", "q_proj"), alpha_pattern={"q_proj": 9}
    ),
}
ADDING = [way for way in WAYS if way not in ("cat", "svd") and not way.endswith("_svd")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and, below ``same`` and ``other``, three adapters each."""
    folder = tmp_path_factory.mktemp("combining")
    tiny_checkpoint(folder / "base")
    for kind, sections in (("same", SAME_RANK), ("other", OTHER_RANKS)):
        for number, (name, section) in enumerate(sections.items()):
            model = apply_method(tiny_base(folder / "base", "none"), section)
            torch.manual_seed(number)
            for values in model.trainable_parameters().values():
                values.data.normal_(std=0.1)
            save_adapter(model, folder / kind / name)
    return folder


def adapters(folders: Path, kind: str = "same") -> dict[str, Path]:
    return {name: folders / kind / name for name in WEIGHTS}


def deltas(pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {path: lora_B @ lora_A for path, (lora_A, lora_B) in pairs.items()}


@pytest.fixture(scope="module")
def peft_models(folders: Path) -> dict[str, Any]:
    """PEFT's model with the three adapters of each kind."""
    models = {}
    for kind in ("same", "other"):
        base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
        paths = adapters(folders, kind)
        models[kind] = peft.PeftModel.from_pretrained(base, paths["one"], adapter_name="one")
        for name in ("two", "three"):
            models[kind].load_adapter(paths[name], adapter_name=name)
    return models


def pefts(model: Any, how: str, **settings: Any) -> dict[str, Tensor]:
    """PEFT's combination of the same files: ΔW by module path."""
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "new", combination_type=how, **settings)
    found = {
        path.removeprefix("base_model.model."): module.get_delta_weight("new").detach()
        for path, module in model.named_modules()
        if hasattr(module, "lora_A") and "new" in module.lora_A
    }
    model.delete_adapter("new")
    return found


def worst(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(difference(ours[path], theirs[path]) for path in theirs)


class OurDraws:
    """Takes the place of torch.bernoulli in PEFT: its n-th draw at a target is ours for the n-th adapter there, all A
    before all B. Draws with a generator are our own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int, density: float) -> None:
        self.seed, self.density, self.real = seed, density, torch.bernoulli
        self.names: list[str] = []
        lora = peft.tuners.lora.model.LoraModel
        self.adding = lora._generalized_task_arithmetic_weighted_adapter
        self.decomposing = lora._svd_generalized_task_arithmetic_weighted_adapter
        monkeypatch.setattr(torch, "bernoulli", self.draw)
        monkeypatch.setattr(lora, "_generalized_task_arithmetic_weighted_adapter", self.announced(self.adding, "AB"))
        monkeypatch.setattr(
            lora, "_svd_generalized_task_arithmetic_weighted_adapter", self.announced(self.decomposing, "")
        )

    def announced(self, real: Any, halves: str) -> Any:
        def call(model: Any, how: str, names: Any, weights: Any, *rest: Any, **settings: Any) -> Any:
            target = next(module for module in rest if isinstance(module, torch.nn.Module))
            path = next(path for path, module in model.model.named_modules() if module is target)
            self.names = [
                f"{name}:{path}{half and f':{half}'}"
                for half in halves or [""]
                for name in names
                if name in target.lora_A
            ]
            return real(model, how, names, weights, *rest, **settings)

        return call

    def draw(self, chances: Tensor, generator: Any = None) -> Tensor:
        if generator is not None:
            return self.real(chances, generator=generator)
        return drawn(chances, self.density, self.seed, self.names.pop(0))


CASES = [
    *[(how, {}) for how in ("cat", "svd", "linear")],
    *[(how, {"density": density}) for how in WAYS if "prune" in how or "dare_linear" in how for density in (0.3, 0.8)],
    *[
        (how, {"density": 0.4, "majority_sign_method": majority})
        for how in WAYS
        if "ties" in how
        for majority in ("total", "frequency")
    ],
    ("ties", {"density": 1.0}),
]


@pytest.mark.parametrize(("how", "settings"), CASES)
@pytest.mark.filterwarnings("ignore:The density")
@pytest.mark.sampled
def test_the_result_is_that_of_peft(
    folders: Path, peft_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, how: str, settings: dict[str, Any]
) -> None:
    kind = "same" if how in ADDING else "other"
    OurDraws(monkeypatch, 5, settings.get("density", 1.0))
    ours = deltas(combine(adapters(folders, kind), WEIGHTS, how, seed=5, **settings))
    theirs = pefts(peft_models[kind], how, **settings)
    print(f"{how} {settings}: {worst(ours, theirs):.1e}")
    assert worst(ours, theirs) < rounding()


@pytest.mark.parametrize("rank", [1, 5])
def test_svd_of_another_rank_is_that_of_peft(folders: Path, peft_models: dict[str, Any], rank: int) -> None:
    ours = combine(adapters(folders, "other"), WEIGHTS, "svd", rank=rank)
    assert {len(lora_A) for lora_A, _ in ours.values()} <= set(range(1, rank + 1))
    assert worst(deltas(ours), pefts(peft_models["other"], "svd", svd_rank=rank)) < rounding()


def exact(folders: Path, kind: str) -> dict[str, Tensor]:
    """Σ wᵢ ΔWᵢ by each adapter's own planted modules."""
    total: dict[str, Tensor] = {}
    for name, weight in WEIGHTS.items():
        model = load_adapter(tiny_base(folders / "base", "none"), folders / kind / name)
        for path, (lora_A, lora_B) in model.methods[0].layout.pairs().items():
            total[path] = total.get(path, torch.zeros(())) + weight * lora_B @ lora_A
    return total


@pytest.mark.parametrize("kind", ["same", "other"])
def test_cat_is_the_weighted_sum_and_svd_with_all_ranks_too(folders: Path, kind: str) -> None:
    for pairs in (
        combine(adapters(folders, kind), WEIGHTS, "cat"),
        combine(adapters(folders, kind), WEIGHTS, "svd", rank=12),
    ):
        assert worst(deltas(pairs), exact(folders, kind)) < rounding()


def test_dare_has_the_expectation_of_linear(folders: Path) -> None:
    """The mean of 60 draws comes as near to what nothing was dropped from as their scatter allows."""
    models = {
        name: load_adapter(tiny_base(folders / "base", "none"), folders / "same" / name) for name in ("one", "two")
    }
    wanted = deltas(combine(models, [0.7, -0.4], "linear"))
    draws = [deltas(combine(models, [0.7, -0.4], "dare_linear", density=0.5, seed=seed)) for seed in range(60)]
    for path, expected in wanted.items():
        every = torch.stack([draw[path] for draw in draws])
        error = (every.mean(0) - expected) / (every.std(0) / math.sqrt(len(every))).clamp(min=1e-6)
        assert error.abs().mean() < 1.0  # 0.8 for a normal distribution
        assert abs(error.mean()) < 0.2
        assert difference(every[0], expected) > 0.1


def test_what_is_dropped_depends_on_seed_and_name_alone(folders: Path) -> None:
    every = combine(adapters(folders), WEIGHTS, "dare_linear", density=0.5)
    again = combine(adapters(folders), list(WEIGHTS.values()), "dare_linear", density=0.5)
    other = combine(adapters(folders), WEIGHTS, "dare_linear", density=0.5, seed=1)
    path = "model.layers.0.self_attn.q_proj"
    assert all(torch.equal(every[path][half], again[path][half]) for half in (0, 1))
    assert not torch.equal(every[path][0], other[path][0])
    alone = combine({"two": folders / "same" / "two"}, [1.0], "dare_linear", density=0.5)
    kept, whole = alone[path][0], combine({"two": folders / "same" / "two"}, [1.0], "linear")[path][0]
    assert torch.equal(kept != 0, drawn(kept, 0.5, 0, f"two:{path}:A").bool())
    torch.testing.assert_close(kept, torch.where(kept != 0, 2 * whole, 0))


@pytest.mark.parametrize("how", ["svd", "cat", "linear"])
def test_the_folder_loads_here_and_in_peft(folders: Path, tmp_path: Path, how: str) -> None:
    kind = "same" if how == "linear" else "other"
    save_combined(tmp_path / "new", adapters(folders, kind), WEIGHTS, how)
    pairs = combine(adapters(folders, kind), WEIGHTS, how)
    ours = load_adapter(tiny_base(folders / "base", "none"), tmp_path / "new")
    loaded = {path: lora_B @ lora_A for path, (lora_A, lora_B) in ours.methods[0].layout.pairs().items()}
    assert worst(loaded, deltas(pairs)) < rounding()
    assert ours.section.target_modules == ("down_proj", "q_proj", "v_proj")
    base = AutoModelForCausalLM.from_pretrained(folders / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "new").eval()
    assert peft.get_peft_model_state_dict(theirs).keys() == ours.adapter_state().keys()
    assert_answers_as(theirs, ours)
    with ours.disabled():
        assert difference(logits_of(ours.model), logits_of(theirs)) > 1e-2


def test_names_that_are_not_known_become_whole_paths(folders: Path, tmp_path: Path) -> None:
    model = apply_method(tiny_base(folders / "base", "none"), config.LoRA(r=2))
    stir(model)
    save_adapter(model, tmp_path / "all")
    text = (tmp_path / "all" / "adapter_config.json").read_text()
    start, end = text.index('"target_modules"'), text.index("]", text.index('"target_modules"')) + 1
    (tmp_path / "all" / "adapter_config.json").write_text(text[:start] + '"target_modules": "all-linear"' + text[end:])
    save_combined(tmp_path / "new", {"all": tmp_path / "all", "one": folders / "other" / "one"}, [1, 0], "cat")
    again = load_adapter(tiny_base(folders / "base", "none"), tmp_path / "new")
    assert len(again.planted) == 14
    no_worse(logits_of(again.model), logits_of(model.model), logits_of(doubled(model.model)))


def loaded(folders: Path, section: Any, size: float = 0.1) -> AdaptedModel:
    model = apply_method(tiny_base(folders / "base", "none"), section)
    stir(model, size)
    return model


def test_loaded_adapters_are_combined_like_their_files(folders: Path) -> None:
    models: dict[str, Any] = {
        name: load_adapter(tiny_base(folders / "base", "none"), path)
        for name, path in adapters(folders, "same").items()
    }
    for how, density in (("ties", 0.4), ("linear", None), ("svd", None)):
        ours = deltas(combine(models, WEIGHTS, how, density=density))
        assert worst(ours, deltas(combine(adapters(folders), WEIGHTS, how, density=density))) < rounding()


@pytest.mark.parametrize(
    "section",
    [
        config.AdaLoRA(r=2, initial_r=3, alpha=6, target_modules=("q_proj", "v_proj")),
        config.LoRA(r=3, init="pissa", target_modules=("q_proj",)),
    ],
    ids=lambda section: section.name + getattr(section, "init", ""),
)
def test_what_is_lora_in_the_end_is_combined_when_loaded(folders: Path, tmp_path: Path, section: Any) -> None:
    model = loaded(folders, section)
    ours = deltas(combine({"it": model, "one": folders / "other" / "one"}, [1.0, 0.0], "cat"))
    wanted = {path: lora_B @ lora_A for path, (lora_A, lora_B) in model.methods[0].layout.pairs().items()}
    assert worst({path: ours[path] for path in wanted}, wanted) < rounding()
    save_adapter(model, tmp_path / "it")
    with pytest.raises(MethodError, match=r"only plain LoRA is combined from its files"):
        combine({"it": tmp_path / "it"}, [1.0])


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (config.DoRA(r=2, target_modules=("q_proj",)), "cannot be combined"),
        (config.IA3(), "cannot be combined"),
        (
            config.Combined(parts=(config.LoRA(r=2, target_modules=("q_proj",)), config.Modules(modules=("norm",)))),
            "and",
        ),
        (config.LoRA(r=2, target_modules=("embed_tokens", "q_proj")), "embed_tokens.* is on no linear"),
    ],
    ids=["dora", "ia3", "with modules", "embedding"],
)
def test_what_is_no_lora_on_linears_is_refused(folders: Path, tmp_path: Path, section: Any, said: str) -> None:
    model = loaded(folders, section)
    with pytest.raises(MethodError, match=said):
        combine({"it": model}, [1.0])
    save_adapter(model, tmp_path / "it")
    with pytest.raises(MethodError, match=r"plain LoRA|no LoRA on a linear"):
        combine({"it": tmp_path / "it"}, [1.0])


@pytest.mark.parametrize("how", ADDING)
def test_different_ranks_cannot_be_added_up(folders: Path, how: str) -> None:
    density = None if how == "linear" else 0.5
    better = "svd" if how == "linear" else f"{how}_svd"
    with pytest.raises(MethodError, match=rf"different ranks \(one 3, three 6\).*how='{better}'"):
        combine(adapters(folders, "other"), WEIGHTS, how, density=density)


@pytest.mark.parametrize("recorded", [True, False])
def test_adapters_of_different_bases_are_refused(folders: Path, tmp_path: Path, recorded: bool) -> None:
    other = tiny_checkpoint(tmp_path / "other", intermediate_size=192)
    model = apply_method(
        tiny_base(other, "none"), config.LoRA(r=4, target_modules=("q_proj" if recorded else "down_proj",))
    )
    stir(model)
    save_adapter(model, tmp_path / "it")
    if not recorded:
        save_file(model.adapter_state(), tmp_path / "it" / "adapter_model.safetensors")
    said = "other configuration" if recorded else r"down_proj is \[64, 128\] in one and \[64, 192\] in the other"
    with pytest.raises(MethodError, match=f"trained on different bases.*{said}"):
        combine({"one": folders / "same" / "one", "it": tmp_path / "it"}, [1.0, 1.0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"how": "tise"}, r"no way 'tise'.*Did you mean 'ties'"),
        ({"how": "ties"}, "needs density"),
        ({"how": "ties", "density": 0.0}, r"density is 0\.0"),
        ({"how": "ties", "density": 1.5}, r"density is 1\.5"),
        ({"how": "linear", "density": 0.5}, "keeps all numbers"),
        ({"how": "cat", "rank": 4}, "keeps the adapters' ranks"),
        ({"how": "svd", "rank": 0}, "rank is 0"),
        ({"how": "ties", "density": 0.5, "majority_sign_method": "most"}, "'most'"),
        ({"weights": [1.0, 2.0]}, "2 weights for 3 adapters"),
        ({"weights": [1.0, math.nan, 1.0]}, "finite"),
        ({"weights": {"one": 1.0, "two": 1.0, "tree": 1.0}}, "three, tree"),
        ({"adapters": {}}, "no adapters"),
    ],
)
def test_what_cannot_be_is_said(folders: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(MethodError, match=said):
        combine(**{"adapters": adapters(folders), "weights": WEIGHTS, **change})


@pytest.mark.parametrize("problem", ["half", "rank", "nan", "unknown"])
def test_broken_files_are_refused(folders: Path, tmp_path: Path, problem: str) -> None:
    tensors = load_file(folders / "same" / "one" / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if problem == "half":
        del tensors[key]
    elif problem == "rank":
        tensors[key] = torch.ones(3, 64)
    elif problem == "nan":
        tensors[key][0, 0] = torch.nan
    else:
        tensors["base_model.model.model.norm.weight"] = torch.ones(64)
    (tmp_path / "it").mkdir()
    save_file(tensors, tmp_path / "it" / "adapter_model.safetensors")
    (tmp_path / "it" / "adapter_config.json").write_bytes(
        (folders / "same" / "one" / "adapter_config.json").read_bytes()
    )
    with pytest.raises(MethodError, match=r"norm\.weight" if problem == "unknown" else r"layers\.0\.self_attn\.q_proj"):
        combine({"it": tmp_path / "it"}, [1.0])
