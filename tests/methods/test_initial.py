"""The laws of PiSSA and LoftQ: PEFT's pairs, the base as it was without them, and files that rebuild the frozen weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from peft.utils import loftq_utils
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.export.merged import merge
from qlora.methods import beginning
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.dora import DoraLinear
from qlora.methods.files import save_adapter, save_portable
from qlora.methods.loading import load_adapter
from qlora.model.base import Base
from qlora.model.checkpoint import Checkpoint
from qlora.model.nf4 import dense_weight
from qlora.model.skeleton import skeleton_base
from qlora.residence.layers import wrap_layers
from qlora.training.loop import Trainer
from tests.rounding import LAYER, rounding
from tests.tiny import difference, logits_of, random_rows, stir, tiny_base, tiny_checkpoint

TARGETS = ("down_proj", "q_proj")
PISSA = config.LoRA(r=4, alpha=6, init="pissa", target_modules=TARGETS)
LOFTQ = config.LoRA(r=4, alpha=6, init="loftq", target_modules=TARGETS)
LOFTQ_3 = config.LoRA(r=4, alpha=6, init="loftq", loftq_iterations=3, target_modules=TARGETS)
DORA = config.DoRA(r=4, alpha=6, init="pissa", target_modules=TARGETS)
BEGINNINGS = {"pissa": PISSA, "loftq": LOFTQ, "loftq_3": LOFTQ_3, "dora": DORA}
every = pytest.mark.parametrize("section", BEGINNINGS.values(), ids=BEGINNINGS)
Q = "model.layers.0.self_attn.q_proj"
ROWS = random_rows(8)
LOST = 10  # what NF4 loses is about a tenth of a weight, so rounding weighs ten times as much in it


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), "qwen2", num_hidden_layers=1)


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same checkpoint as bitsandbytes quantised it."""
    folder = tmp_path_factory.mktemp("packed")
    nf4_model(checkpoint).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return folder


def nf4_model(folder: Path) -> Any:
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    # in train mode, because in eval bitsandbytes packs the weights anew on some CPUs
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=quantised).train()


def frozen(model: AdaptedModel | Base) -> dict[str, Tensor]:
    """Every frozen tensor below the layers, by name, whatever was planted."""
    network = model.model
    return {
        name.replace(".base.", "."): values.detach().clone()
        for name, values in [*network.named_buffers(), *network.named_parameters()]
        if "lora_" not in name and "beginning" not in name
    }


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def product(layer: Any) -> Tensor:
    return (layer.lora_B @ layer.lora_A).detach()


def trained(base: Base, section: Any) -> AdaptedModel:
    """As after some steps: every trained value moved from where it began."""
    model = apply_method(base, section)
    generator = torch.Generator().manual_seed(7)
    for values in model.trainable_parameters().values():
        values.data += 0.05 * torch.randn(values.shape, generator=generator)
    return model


@pytest.mark.parametrize("section", [PISSA, DORA], ids=["lora", "dora"])
def test_pissa_is_pefts(checkpoint: Path, section: Any) -> None:
    ours = apply_method(tiny_base(checkpoint, "none"), section)
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(TARGETS),
            init_lora_weights="pissa",
            use_dora=section is DORA,
        ),
    )
    worst = difference(logits_of(ours.model), logits_of(theirs))
    for path, layer in ours.planted.items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        lora_A, lora_B = other.lora_A["default"].weight, other.lora_B["default"].weight
        worst = max(worst, difference(product(layer), lora_B @ lora_A))
        worst = max(worst, difference(layer.lora_A.norm(dim=1), lora_A.norm(dim=1)))
        worst = max(worst, difference(layer.base.weight, other.base_layer.weight))
        if section is DORA:
            magnitude = other.lora_magnitude_vector["default"].weight
            worst = max(worst, difference(layer.lora_magnitude_vector, magnitude))
    print(f"{section.name}: {worst:.1e} from PEFT's PiSSA")
    assert worst < rounding()


def test_pissa_keeps_the_function_and_takes_the_largest_part(checkpoint: Path) -> None:
    base = tiny_base(checkpoint, "none")
    before, weights = logits_of(base.model), frozen(base)
    model = apply_method(base, PISSA)
    assert difference(logits_of(model.model), before) < rounding()
    for path, layer in model.planted.items():
        weight = weights[f"{path}.weight"]
        values = torch.linalg.svdvals(weight)
        torch.testing.assert_close(
            torch.linalg.svdvals(product(layer) * 1.5)[:4], values[:4], rtol=1e-4, atol=rounding()
        )
        torch.testing.assert_close(torch.linalg.svdvals(dense_weight(layer.base, torch.float32))[0], values[4])
        assert layer.lora_A.requires_grad


def test_pissa_loses_less_to_quantisation(checkpoint: Path) -> None:
    exact = apply_method(tiny_base(checkpoint, "none"), PISSA)
    lost, lost_before = 0.0, 0.0
    base, own = tiny_base(checkpoint), tiny_base(checkpoint, "none")
    weights = {path: dense_weight(own.model.get_submodule(path), torch.float32) for path in exact.planted}
    for path, weight in weights.items():
        lost_before += float((weight - dense_weight(base.model.get_submodule(path), torch.float32)).square().sum())
    for path, layer in apply_method(base, PISSA).planted.items():
        whole = dense_weight(layer.base, torch.float32) + 1.5 * product(layer)
        lost += float((weights[path] - whole).square().sum())
    print(f"error of NF4 with PiSSA: {(lost / lost_before) ** 0.5:.3f} of NF4's")
    assert lost < lost_before


@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_loftq_makes_up_for_what_was_lost(checkpoint: Path, iterations: int) -> None:
    base, own = tiny_base(checkpoint), tiny_base(checkpoint, "none")
    before = frozen(base)
    quantised = {
        path: dense_weight(base.model.get_submodule(path), torch.float32)
        for path in (Q, "model.layers.0.mlp.down_proj")
    }
    model = apply_method(base, LOFTQ.model_copy(update={"loftq_iterations": iterations}))
    for path, plain in quantised.items():
        weight, layer = dense_weight(own.model.get_submodule(path), torch.float32), model.planted[path]
        left = weight - dense_weight(layer.base, torch.float32) - 1.5 * product(layer)
        print(f"{iterations} rounds, {path}: {left.norm() / (weight - plain).norm():.3f} of NF4's error")
        assert left.norm() < 0.95 * (weight - plain).norm()
    assert same(frozen(model), before) is (iterations == 1)


@pytest.fixture
def cuda_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's LoftQ names CUDA as the place to compute in, whatever there is."""

    def here(value: Any) -> Any:
        return "cpu" if isinstance(value, str | torch.device) and str(value).startswith("cuda") else value

    for kind in (torch.Tensor, bitsandbytes.nn.Params4bit):
        before = kind.to

        def to(self: Any, *args: Any, before: Any = before, **options: Any) -> Any:
            return before(self, *map(here, args), **{key: here(value) for key, value in options.items()})

        monkeypatch.setattr(kind, "to", to)


@pytest.mark.usefixtures("cuda_is_the_cpu")
@pytest.mark.parametrize("iterations", [1, 4])
def test_loftq_is_pefts(checkpoint: Path, iterations: int) -> None:
    """With alpha = r: PEFT leaves the scaling out of its decomposition. And without double quantisation, as there."""
    own = tiny_base(checkpoint, "none")
    section = LOFTQ.model_copy(update={"alpha": 4, "loftq_iterations": iterations})
    model = apply_method(tiny_base(checkpoint, double_quant=False), section)
    for path, layer in model.planted.items():
        weight = dense_weight(own.model.get_submodule(path), torch.float32)
        quantised, lora_A, lora_B = loftq_utils.loftq_init(weight, num_bits=4, reduced_rank=4, num_iter=iterations)
        assert difference(dense_weight(layer.base, torch.float32), quantised) < rounding()
        assert difference(product(layer), lora_B @ lora_A) < LOST * rounding()


@pytest.mark.usefixtures("cuda_is_the_cpu")
def test_one_round_of_loftq_is_pefts_replacement(checkpoint: Path) -> None:
    theirs = peft.get_peft_model(
        nf4_model(checkpoint), peft.LoraConfig(r=4, lora_alpha=4, target_modules=list(TARGETS))
    ).train()
    peft.replace_lora_weights_loftq(theirs, model_path=str(checkpoint))
    ours = apply_method(tiny_base(checkpoint), LOFTQ.model_copy(update={"alpha": 4}))
    for path, layer in ours.planted.items():
        other = theirs.get_submodule(f"base_model.model.{path}")
        assert (
            difference(product(layer), other.lora_B["default"].weight @ other.lora_A["default"].weight)
            < LOST * rounding()
        )
    assert difference(logits_of(ours.model), logits_of(theirs)) < rounding()


@every
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_off_is_how_it_began_and_removed_is_the_base_bit_for_bit(
    checkpoint: Path, section: Any, quantization: str
) -> None:
    if section.init == "loftq" and quantization == "none":
        pytest.skip("nothing was lost")
    base = tiny_base(checkpoint, quantization)
    before, tensors = logits_of(base.model), frozen(base)
    model = apply_method(base, section)
    began, changed = logits_of(model.model), frozen(model)
    stir(model, 0.1)
    adapted = logits_of(model.model)
    with model.disabled():
        alone = logits_of(model.model)
    assert difference(adapted, alone) > 1e-2
    if section is LOFTQ:  # its frozen weight is the base's own
        assert torch.equal(alone, before)
        assert same(changed, tensors)
    else:
        assert not same(changed, tensors)
        assert difference(alone, began) < (rounding() if section is DORA else 1e-30)
        assert difference(alone, before) < {"nf4": 0.6, "int8": 0.1, "none": rounding()}[quantization]
    model.remove()
    assert same(frozen(base), tensors)
    assert torch.equal(logits_of(base.model), before)
    model.attach()
    assert same(frozen(model), changed)
    assert torch.equal(logits_of(model.model), adapted)


@every
def test_saved_and_loaded_is_the_same_bit_for_bit(checkpoint: Path, tmp_path: Path, section: Any) -> None:
    model = trained(tiny_base(checkpoint), section)
    save_adapter(model, tmp_path)
    again = load_adapter(tiny_base(checkpoint), tmp_path)
    assert again.section == section
    assert same(frozen(again), frozen(model))
    assert torch.equal(logits_of(again.model), logits_of(model.model))
    with model.disabled(), again.disabled():
        assert torch.equal(logits_of(again.model), logits_of(model.model))


def test_the_file_decides_and_not_a_second_decomposition(checkpoint: Path, tmp_path: Path) -> None:
    """The pair that was begun with is turned, as another library's SVD may turn it, and is found again as it was saved."""
    model = apply_method(tiny_base(checkpoint), LOFTQ_3)
    for layer in model.planted.values():
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2))).Q
        for name in ("lora", "given"):
            lora_A, lora_B = getattr(layer.beginning, f"{name}_A"), getattr(layer.beginning, f"{name}_B")
            lora_B.copy_(lora_B @ turn.t())
            lora_A.copy_(turn @ lora_A * 1.01)
    method = model.methods[0]
    method.load_state(method.state())
    stir(model)
    save_adapter(model, tmp_path)
    again = load_adapter(apply_method(tiny_base(checkpoint), LOFTQ_3), tmp_path)
    assert same(frozen(again), frozen(model))
    assert not same(frozen(again), frozen(apply_method(tiny_base(checkpoint), LOFTQ_3)))
    assert torch.equal(logits_of(again.model), logits_of(model.model))


def test_it_loads_behind_the_recompute_boundary(checkpoint: Path) -> None:
    model = trained(tiny_base(checkpoint), PISSA)
    expected = frozen(model)
    state = {key: values.clone() for key, values in model.method_state().items()}
    again = apply_method(tiny_base(checkpoint), PISSA)
    wrap_layers(again.model, 1)
    again.load_state(again.adapter_state(), state)
    assert same({name.replace(".layer.", "."): values for name, values in frozen(again).items()}, expected)


@every
def test_the_folder_cannot_be_mistaken_for_pefts(checkpoint: Path, tmp_path: Path, section: Any) -> None:
    model = trained(tiny_base(checkpoint), section)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "QLORA"
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(checkpoint), tmp_path)
    (tmp_path / "method.safetensors").unlink()
    base = tiny_base(checkpoint)
    before = logits_of(base.model)
    with pytest.raises(MethodError, match=r"lacks.*lora_A"):
        load_adapter(base, tmp_path)
    assert torch.equal(logits_of(base.model), before)


def test_another_beginning_is_refused_before_anything_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    save_adapter(trained(tiny_base(checkpoint), PISSA), tmp_path)
    model = apply_method(tiny_base(checkpoint), PISSA.model_copy(update={"init": "kaiming"}))
    before = logits_of(model.model)
    with pytest.raises(MethodError, match="has init=pissa, this model init=kaiming"):
        load_adapter(model, tmp_path)
    assert torch.equal(logits_of(model.model), before)


@every
@pytest.mark.parametrize("source", ["nf4", "int8", "none", "prequantised"])
@pytest.mark.sampled
def test_merged_is_the_adapted_model(checkpoint: Path, packed: Path, tmp_path: Path, section: Any, source: str) -> None:
    if section.init == "loftq" and source in ("none", "prequantised"):
        pytest.skip("what was lost is nothing, or not known")
    folder, quantization = (packed, "nf4") if source == "prequantised" else (checkpoint, source)
    model = trained(tiny_base(folder, quantization), section)
    save_adapter(model, tmp_path / "adapter")
    merge(
        folder,
        tmp_path / "adapter",
        tmp_path / "out",
        quantization=quantization,  # type: ignore[arg-type]
        compute_dtype="fp32",
        dtype="fp32",
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    worst = difference(logits_of(plain), logits_of(model.model))
    print(f"{section.name} {section.init} {source}: {worst:.1e}")
    assert worst < rounding()


@pytest.mark.parametrize("section", [PISSA, LOFTQ, LOFTQ_3], ids=["pissa", "loftq", "loftq_3"])
def test_merged_into_the_original_is_what_was_learned_on_top_of_it(
    checkpoint: Path, tmp_path: Path, section: Any
) -> None:
    quantization: Any = "none" if section is PISSA else "nf4"
    began = apply_method(tiny_base(checkpoint, quantization), section)
    first = {path: product(layer) for path, layer in began.planted.items()}
    model = trained(tiny_base(checkpoint, quantization), section)
    save_adapter(model, tmp_path / "adapter")
    options = {"quantization": quantization, "compute_dtype": "fp32", "dtype": "fp32"}
    merge(checkpoint, tmp_path / "adapter", tmp_path / "out", base="original", **options)
    before, after = load_file(checkpoint / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for path, layer in model.planted.items():
        expected = before[f"{path}.weight"] + 1.5 * (product(layer) - first[path])
        torch.testing.assert_close(after[f"{path}.weight"], expected, rtol=rounding(), atol=rounding(LAYER))
    assert torch.equal(after[f"{Q}.bias"], before[f"{Q}.bias"])
    if quantization == "none":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert difference(logits_of(plain), logits_of(model.model)) < rounding()


def peft_on_the_original(checkpoint: Path, adapter: Path) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(plain, adapter).eval()


def test_the_portable_adapter_on_the_untouched_checkpoint_is_the_trained_model(
    checkpoint: Path, tmp_path: Path
) -> None:
    model = trained(tiny_base(checkpoint, "none"), PISSA)
    assert save_portable(model, tmp_path) is None
    assert not (tmp_path / "method.safetensors").exists()
    assert load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{Q}.lora_A.weight"].shape == (8, 64)
    worst = difference(logits_of(peft_on_the_original(checkpoint, tmp_path)), logits_of(model.model))
    print(f"portable PiSSA in PEFT: {worst:.1e}")
    assert worst < rounding()
    again = load_adapter(tiny_base(checkpoint, "none"), tmp_path)
    assert difference(logits_of(again.model), logits_of(model.model)) < rounding()


@pytest.mark.parametrize("section", [PISSA, LOFTQ_3], ids=["pissa", "loftq_3"])
def test_the_portable_adapter_of_a_quantised_run_is_what_a_merge_into_the_original_is(
    checkpoint: Path, tmp_path: Path, section: Any
) -> None:
    model = trained(tiny_base(checkpoint), section)
    save_adapter(model, tmp_path / "adapter")
    assert save_portable(model, tmp_path / "portable") is None
    options: Any = {"compute_dtype": "fp32", "dtype": "fp32"}
    merge(checkpoint, tmp_path / "adapter", tmp_path / "out", base="original", **options)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert difference(logits_of(peft_on_the_original(checkpoint, tmp_path / "portable")), logits_of(plain)) < rounding()


def test_training_goes_on_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    training = config.TrainingSection(batch_size=4, micro_batch_size=2, steps=6, learning_rate=1e-2)
    whole = Trainer(apply_method(tiny_base(checkpoint), LOFTQ_3), ROWS, training)
    losses = [next(whole).loss for _ in range(6)]
    first = Trainer(apply_method(tiny_base(checkpoint), LOFTQ_3), ROWS, training, tmp_path)
    assert [next(first).loss for _ in range(3)] == losses[:3]
    place = first.save()
    second = Trainer(apply_method(tiny_base(checkpoint), LOFTQ_3), ROWS, training, tmp_path)
    second.load(place)
    assert [next(second).loss for _ in range(3)] == losses[3:]


def test_a_prequantised_base_begins_from_what_it_stands_for(packed: Path) -> None:
    base = tiny_base(packed)
    before, tensors = logits_of(base.model), frozen(base)
    weight = dense_weight(base.model.get_submodule(Q), torch.float32)
    model = apply_method(base, PISSA)
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(product(model.planted[Q]) * 1.5)[:4], values[:4])
    model.remove()
    assert same(frozen(base), tensors)
    assert torch.equal(logits_of(base.model), before)
    model.attach()
    model.remove()
    with pytest.raises(MethodError, match=r"came quantised.*16-bit checkpoint"):
        apply_method(base, LOFTQ)


def test_loftq_is_refused_where_nothing_was_lost(checkpoint: Path) -> None:
    base = tiny_base(checkpoint, "none")
    before = frozen(base)
    with pytest.raises(MethodError, match=r"none of the targets is quantised; use method\.init=pissa"):
        apply_method(base, LOFTQ)
    assert same(frozen(base), before)


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_only_linears_have_such_beginnings(checkpoint: Path, init: Any) -> None:
    section = config.LoRA(r=4, init=init, target_modules=("embed_tokens", "q_proj"))
    with pytest.raises(MethodError, match=f"init is {init}, which begins adapters on linears only.*model.embed_tokens"):
        apply_method(tiny_base(checkpoint), section)


def test_a_shared_weight_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, tie_word_embeddings=True)
    with pytest.raises(MethodError, match="lm_head is shared"):
        apply_method(tiny_base(folder), config.LoRA(r=4, init="pissa", target_modules=("lm_head",)))


def test_a_weight_that_cannot_be_read_leaves_the_base_as_it_was(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(checkpoint)
    before, modules = frozen(base), [name for name, _ in base.model.named_modules()]
    calls: list[str] = []

    def failing(base: Base, path: str, *rest: Any) -> Tensor:
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return kept(base, path, *rest)

    kept = beginning.own_weight
    monkeypatch.setattr(beginning, "own_weight", failing)
    with pytest.raises(KeyboardInterrupt):
        apply_method(base, PISSA)
    assert same(frozen(base), before)
    assert [name for name, _ in base.model.named_modules()] == modules


def test_a_model_of_yours_is_put_back_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8))
    x = torch.randn(5, 12)
    before, weights = model(x).detach(), {name: values.clone() for name, values in model.state_dict().items()}
    adapted = apply_method(model, config.LoRA(r=3, init="pissa", target_modules=("0",)))
    assert not torch.equal(model[0].base.weight, weights["0.weight"])
    assert difference(model(x), before) < rounding(LAYER)
    stir(adapted)
    adapted.remove()
    assert all(torch.equal(values, weights[name]) for name, values in model.state_dict().items())
    adapted.attach()
    with adapted.disabled():
        assert difference(model(x), before) < rounding(LAYER)


def test_a_transposed_weight_is_decomposed_as_it_multiplies(tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=96, n_positions=32)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_checkpoint(tmp_path / "words")).save_pretrained(tmp_path)
    base = tiny_base(tmp_path, "none")
    before, tensors = logits_of(base.model), frozen(base)
    model = trained(base, config.LoRA(r=4, init="pissa", target_modules=("c_attn", "attn.c_proj")))
    with model.disabled():
        assert difference(logits_of(model.model), before) < rounding()
    save_adapter(model, tmp_path / "adapter")
    merge(tmp_path, tmp_path / "adapter", tmp_path / "out", quantization="none", compute_dtype="fp32", dtype="fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert difference(logits_of(plain), logits_of(model.model)) < rounding()
    model.remove()
    assert same(frozen(base), tensors)


def test_a_bf16_adapter_begins_exactly_as_it_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    """A and B are rounded first and the residual is taken after, so the rounding costs nothing."""
    base = tiny_base(checkpoint, "none")
    before = logits_of(base.model)
    model = apply_method(base, PISSA.model_copy(update={"adapter_dtype": "bf16"}))
    assert model.planted[Q].lora_A.dtype == torch.bfloat16
    weight = dense_weight(model.planted[Q].base, torch.float32) + 1.5 * (
        model.planted[Q].lora_B.float() @ model.planted[Q].lora_A.float()
    )
    own = load_file(checkpoint / "model.safetensors")[f"{Q}.weight"]
    assert difference(weight, own) < rounding(LAYER)
    assert difference(logits_of(model.model), before) < rounding()


def test_gaussian_is_pefts_distribution(checkpoint: Path) -> None:
    model = apply_method(tiny_base(checkpoint), config.LoRA(r=8, init="gaussian"))
    values = torch.cat([layer.lora_A.detach().flatten() for layer in model.planted.values()])
    assert abs(float(values.std()) * 8 - 1) < 0.03
    assert float(values.abs().max()) * 8 > 3  # normal, not uniform
    assert not any(layer.lora_B.any() for layer in model.planted.values())
    other = apply_method(tiny_base(checkpoint), config.LoRA(r=8, init="gaussian"), seed=1)
    assert not torch.equal(other.planted[Q].lora_A, model.planted[Q].lora_A)


@pytest.mark.parametrize("section", [PISSA, LOFTQ_3], ids=["pissa", "loftq"])
def test_a_plan_reads_no_weight(checkpoint: Path, section: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail(f"{name} was read"))
    named = config.ModelSection(name=str(checkpoint), quantization="nf4", compute_dtype="fp32")
    base = Base(
        model=skeleton_base(named, torch.device("meta"), torch.float32).model,
        tokenizer=None,
        folder=Path(),
        name="plan",
        revision=None,
        quantization="nf4",
        double_quant=True,
        device=torch.device("meta"),
        compute_dtype=torch.float32,
    )
    model = apply_method(base, section)
    shapes = {key: tuple(values.shape) for key, values in model.method_state().items()}
    assert shapes[f"lora/{Q}.lora_A"] == (4, 64)
    assert len(shapes) == len(model.planted) * (2 if section is PISSA else 4)
    assert all(values.is_meta for values in model.method_state().values())


def test_a_beginning_that_fails_after_a_weight_was_given_up_is_undone(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base(checkpoint)
    before, modules = frozen(base), [name for name, _ in base.model.named_modules()]
    monkeypatch.setattr(DoraLinear, "measure", lambda self, dtype: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        apply_method(base, DORA)
    assert same(frozen(base), before)
    assert [name for name, _ in base.model.named_modules()] == modules


@every
@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.sampled
def test_loading_decomposes_nothing(
    checkpoint: Path, tmp_path: Path, section: Any, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if section.init == "loftq" and quantization == "none":
        pytest.skip("LoftQ needs a quantised base")
    model = trained(tiny_base(checkpoint, quantization), section)
    expected, weights = logits_of(model.model), frozen(model)
    save_adapter(model, tmp_path)
    for name in ("principal_pair",):
        monkeypatch.setattr(beginning, name, lambda *rest: pytest.fail("a weight was decomposed"))
    base = tiny_base(checkpoint, quantization)
    bare = frozen(base)
    loaded = load_adapter(base, tmp_path)
    assert torch.equal(logits_of(loaded.model), expected)
    assert same(frozen(loaded), weights)
    assert same(frozen(loaded.remove()), bare)
    # as a resumed run does it, with the recipe's section
    planted = apply_method(tiny_base(checkpoint, quantization), section, values_follow=True)
    assert same(frozen(planted), bare)
    ids = torch.arange(3, 9)[None]
    planted.model.train()
    with pytest.raises(MethodError, match="nothing was loaded into it"):
        planted.model(input_ids=ids, use_cache=False)
    planted.load_state(model.adapter_state(), model.method_state())
    planted.model(input_ids=ids, use_cache=False)
    assert torch.equal(logits_of(planted.model.eval()), expected)
    assert same(frozen(planted), weights)


def test_values_that_follow_into_a_module_of_yours(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8))
    own = {name: values.clone() for name, values in network.state_dict().items()}
    section, x = config.LoRA(r=3, init="pissa", target_modules=("0",)), torch.randn(5, 12)
    model = apply_method(network, section)
    stir(model)
    expected = network(x).detach()
    save_adapter(model, tmp_path)
    base = model.remove()
    loaded = load_adapter(base, tmp_path)
    assert torch.equal(network(x), expected)
    loaded.remove()
    assert all(torch.equal(values, own[name]) for name, values in network.state_dict().items())
