"""What fine-tuning did to the weights, against float64 decompositions of what the layers answer before and after."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qlora import recipe as config
from qlora.errors import DataError, MethodError
from qlora.evaluation import change
from qlora.evaluation.change import NO_MATRIX, Change, change_of, directions_of, overlaps
from qlora.methods.base import METHODS, AdaptedModel, apply_method
from qlora.methods.lora_experts import LoraExperts
from qlora.methods.planted import unplanted
from qlora.model.nf4 import features
from qlora.residence.layers import wrap_layers
from qlora.residence.load import load_base
from tests.methods.test_lora import tiny_gpt2
from tests.rounding import difference, rounding
from tests.tiny import CPU, adapter_bytes, stir, tiny_base, tiny_checkpoint, word_tokenizer

TARGETS = ("q_proj", "down_proj", "up_proj")  # square, wide, tall
TURNED = ("c_attn", "c_proj")  # whose weights lie the other way round
LORA = config.LoRA(r=4, alpha=8, target_modules=TARGETS)
CASES: dict[str, tuple[Any, str, int | None]] = {  # the section, the base, the rank of the change where it is low
    "lora": (LORA, "nf4", 4),
    "lora, 8 bits": (LORA, "int8", 4),
    "lora, transposed": (LORA.model_copy(update={"target_modules": TURNED}), "nf4", 4),
    "embedding": (config.LoRA(r=4, alpha=8, target_modules=("embed_tokens",)), "nf4", 4),
    "pissa": (config.LoRA(r=4, alpha=4, init="pissa", target_modules=TARGETS), "nf4", 8),
    "loftq": (config.LoRA(r=4, alpha=4, init="loftq", loftq_iterations=2, target_modules=TARGETS), "nf4", 8),
    "adalora": (config.AdaLoRA(r=2, initial_r=4, alpha=8, target_modules=TARGETS), "nf4", 4),
    "dora": (config.DoRA(r=4, alpha=8, target_modules=TARGETS), "nf4", None),
    "dora, pissa": (config.DoRA(r=4, alpha=4, init="pissa", target_modules=TARGETS), "nf4", None),
    "dora, transposed": (config.DoRA(r=4, alpha=8, target_modules=TURNED), "none", None),
    "ia3": (config.IA3(), "nf4", None),
    "modules": (config.Modules(modules=("layers.1.mlp", "norm")), "nf4", None),
    "full": (config.Full(), "none", None),
    "full, transposed": (config.Full(), "none", None),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def transposed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2().save_pretrained(folder)
    word_tokenizer(pad_token="<pad>", bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def stand_ins(model: AdaptedModel, paths: list[str]) -> dict[str, Tensor]:
    """The matrix that a linear or an embedding multiplies with, in float64, from its answers to unit vectors."""
    found = {}
    for path in paths:
        module = model.model.get_submodule(path)
        with torch.no_grad():
            if isinstance(embedding := unplanted(module), nn.Embedding):
                found[path] = module(torch.arange(embedding.num_embeddings)).double()
            else:
                answers = module(torch.eye(features(unplanted(module))[1] + 1)[:, :-1])
                found[path] = (answers[:-1] - answers[-1]).t().double()  # the last row is the bias
    return found


@pytest.mark.parametrize("name", CASES)
@pytest.mark.sampled
def test_the_change_is_what_the_answers_say(checkpoint: Path, transposed: Path, name: str) -> None:
    section, quantization, rank = CASES[name]
    model = apply_method(tiny_base(transposed if "transposed" in name else checkpoint, quantization), section)
    found = change_of(model)
    paths = [one.path.replace(".mlp.", ".mlp.module.") if name == "modules" else one.path for one in found.matrices]
    before = stand_ins(model, paths)
    for one in found.matrices:  # DoRA's magnitudes are rounded norms
        assert one.relative <= (rounding() if "dora" in name else 0)
        assert "dora" in name or one.effective_rank == one.rank_90 == one.intruders.count == 0  # type: ignore[union-attr]
    stir(model)
    kept = adapter_bytes(model)
    found, directions, after = change_of(model), directions_of(model), stand_ins(model, paths)
    assert adapter_bytes(model) == kept
    assert len({one.path for one in found.matrices}) == len(found.matrices) >= 2 or name == "embedding"
    for path, one in zip(paths, found.matrices, strict=True):
        delta = after[path] - before[path]
        bound = rounding() * float(after[path].norm() + before[path].norm())
        expected, values = torch.linalg.svdvals(delta), torch.tensor(one.values)
        assert (one.rows, one.columns) == tuple(delta.shape)
        assert len(values) == (rank or min(delta.shape)), path
        assert (expected[: len(values)] - values).abs().max() <= bound
        assert one.norm == pytest.approx(float(delta.norm()), abs=bound)
        assert one.norm_before == pytest.approx(float(before[path].norm()), abs=bound)
        # the leading ones: a value as far as the bound from the next has no direction of its own
        first = torch.linalg.svd(delta).Vh[:1]
        turn = 4 * bound / float(expected[0] - expected[1])
        assert abs(1 - float((directions[one.path][:1].double() @ first.t()).abs())) <= turn, path
    assert Change.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert str(found).count("\n") >= len(found.by_module())


def test_every_method_is_here() -> None:
    assert set(METHODS) == {section.name for section, _, _ in CASES.values()} | NO_MATRIX.keys()


@pytest.mark.parametrize(
    ("section", "matrices", "told"),
    [
        (config.BitFit(new_biases=True), 0, "BitFit"),
        (config.PromptTuning(tokens=3), 0, "Prompt tuning"),
        (config.PTuning(tokens=3, hidden_size=16), 0, "P-tuning"),
        (config.PrefixTuning(tokens=3), 0, "Prefix tuning"),
        (config.Bottleneck(size=8), 0, "Bottleneck"),
        (config.NewTokens(tokens=("<tool>",)), 0, "New tokens"),
        (config.Modules(modules=("model.norm",)), 0, "model.norm.weight"),
        (config.Combined(parts=(LORA, config.PromptTuning(tokens=3))), 6, "Prompt tuning"),
    ],
)
def test_what_is_no_matrix_is_a_sentence(checkpoint: Path, section: Any, matrices: int, told: str) -> None:
    found = change_of(apply_method(tiny_base(checkpoint), section))
    assert len(found.matrices) == matrices
    (sentence,) = found.left_out
    assert sentence.startswith(told)
    assert sentence.endswith(".")
    assert sentence in str(found)


def test_experts_are_matrices_of_their_own(tmp_path: Path) -> None:
    names = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    section = config.LoRA(r=2, alpha=4, target_modules=("q_proj",), target_parameters=names)
    model = apply_method(tiny_base(tiny_checkpoint(tmp_path, "qwen3_moe")), section)
    stir(model)
    found = {one.path: one for one in change_of(model).matrices}
    assert len(found) == 2 * (1 + 2 * 8)
    path, layer = next((path, layer) for path, layer in model.planted.items() if isinstance(layer, LoraExperts))
    for expert in range(8):
        before = layer.base.dequantise(expert, torch.float32).double()
        delta = layer.merged_expert(expert, before.clone()) - before
        one = found[f"{path}[{expert}]"]
        expected = torch.linalg.svdvals(delta)[:2]
        assert difference(torch.tensor(one.values), expected) <= rounding()
        assert one.norm_before == pytest.approx(float(before.norm()), rel=rounding())
        assert (one.layer, one.module) == (0, f"{path.split('.', 3)[3]}[{expert}]")


def test_streamed_layers_say_the_same(checkpoint: Path) -> None:
    section, models = config.ModelSection(name=str(checkpoint), compute_dtype="fp32"), []
    for layers in ("resident", "streamed"):
        base = load_base(section, CPU, memory=config.MemorySection(layers=layers))  # type: ignore[arg-type]
        models.append(apply_method(base, config.DoRA(r=4, alpha=8, target_modules=TARGETS)))
        stir(models[-1])
    assert change_of(models[0]) == change_of(models[1])


@pytest.mark.parametrize("name", ["lora", "full", "modules"])
def test_while_it_trains_layers_are_wrapped(checkpoint: Path, name: str) -> None:
    section, quantization, _ = CASES[name]
    model = apply_method(tiny_base(checkpoint, quantization), section)
    stir(model)
    expected = change_of(model, intruders=False)
    wrap_layers(model.model, 1)
    assert change_of(model, intruders=False) == expected
    assert expected.matrices[0].intruders is None


def test_one_matrix_is_in_memory_at_a_time(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = apply_method(tiny_base(checkpoint, "none"), config.Full())
    read, alive = change._matrix, []

    def watched(module: nn.Module, weight: Tensor) -> Tensor:
        made = read(module, weight)
        assert sum(one() is not None for one in alive) <= 1  # W₀, while W₀ + ΔW is read
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(change, "_matrix", watched)
    assert len(change_of(model).matrices) == 16 < len(alive)


def test_two_runs_overlap_where_their_inputs_do(checkpoint: Path) -> None:
    one, other = (apply_method(tiny_base(checkpoint), LORA.model_copy(update={"r": r, "alpha": r})) for r in (4, 8))
    for model, r in ((one, 4), (other, 8)):
        for path, layer in model.planted.items():  # the first two inputs are both runs' largest
            generator = torch.Generator().manual_seed(len(path))
            shared = torch.linalg.qr(torch.randn(layer.in_features, 2, generator=generator)).Q.t()
            others = torch.randn(r - 2, layer.in_features, generator=generator.manual_seed(r))
            layer.lora_A.data.copy_(torch.cat([100 * shared, others]))
            layer.lora_B.data.copy_(torch.linalg.qr(torch.randn(layer.out_features, r, generator=generator)).Q)
    found = overlaps(directions_of(one), directions_of(other))
    assert list(found) == list(one.planted)
    for values in found.values():
        assert values.shape == (4, 8)
        assert float(values[1, 1]) == pytest.approx(1, abs=1e-2)
        assert float(values[3, 7]) < 0.9
    with pytest.raises(MethodError, match="in common"):
        overlaps(directions_of(one), {})
    with pytest.raises(MethodError, match="other columns"):
        overlaps(directions_of(one), {path: values[:, 1:] for path, values in directions_of(other).items()})


def test_full_fine_tuning_of_a_module_of_yours_has_nothing_before() -> None:
    model = apply_method(tiny_gpt2(), config.Full())
    with pytest.raises(MethodError, match=r"came from no folder.*load_base"):
        change_of(model)


@pytest.mark.parametrize(
    "wrong", [{}, {"matrices": [{"path": "q"}], "left_out": []}, {"matrices": 3, "left_out": []}, []]
)
def test_other_json_is_refused(wrong: Any) -> None:
    with pytest.raises(DataError, match=r"no change of weights.*to_json"):
        Change.from_json(wrong)
