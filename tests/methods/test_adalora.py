"""The laws of AdaLoRA: PEFT's forward, gradients and loss, its choice of triplets step by step, its files both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.adalora import RankAllocator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from qlora import recipe as config
from qlora.errors import MethodError
from qlora.export.merged import merge
from qlora.methods.adalora import AdaLoraLinear, AdaLoraMethod
from qlora.methods.base import AdaptedModel, apply_method
from qlora.methods.files import save_adapter, save_portable
from qlora.methods.loading import load_adapter
from qlora.methods.peft_config import read_adapter_config
from tests import tiny
from tests.methods.against_peft import assert_answers_as
from tests.rounding import GRADIENT, rounding
from tests.tiny import TOKENS, difference, logits_of, stir, tiny_base, tiny_checkpoint

SECTION = config.AdaLoRA(r=2, initial_r=4, alpha=8, warmup=0.2, final=0.3, interval=2)
TOTAL = 10


def peft_config(section: config.AdaLoRA = SECTION, total: int = TOTAL) -> peft.AdaLoraConfig:
    return peft.AdaLoraConfig(
        init_r=section.initial_r,
        target_r=section.r,
        lora_alpha=int(section.alpha),
        tinit=round(section.warmup * total),
        tfinal=round(section.final * total),
        deltaT=section.interval,
        total_step=total,
        beta1=section.beta1,
        beta2=section.beta2,
        orth_reg_weight=section.orthogonality,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def peft_model(folder: Path, quantization: str, section: config.AdaLoRA = SECTION) -> Any:
    """PEFT's AdaLoRA on from_pretrained, in train mode: in eval bitsandbytes packs the weights anew on some CPUs."""
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=quantised if quantization == "nf4" else None
    )
    return peft.get_peft_model(model, peft_config(section)).train()


def peft_parameters(model: Any) -> dict[str, nn.Parameter]:
    return {
        name.removeprefix("base_model.model.").replace(".default", ""): values
        for name, values in model.named_parameters()
        if "lora_" in name
    }


def method_of(model: AdaptedModel) -> AdaLoraMethod:
    method = model.methods[0]
    assert isinstance(method, AdaLoraMethod)
    return method


def trained(
    folder: Path, steps: int = TOTAL, section: config.AdaLoRA = SECTION, total: int = TOTAL, theirs: Any = None
) -> AdaptedModel:
    """After ``steps`` of AdamW on the loss and the penalty; ``theirs``, if given, takes the same gradients and steps."""
    ours = apply_method(tiny_base(folder, "none"), section)
    take_steps(ours, range(1, steps + 1), total, theirs)
    return ours


def take_steps(ours: AdaptedModel, steps: range, total: int, theirs: Any = None, optimizers: Any = None) -> Any:
    parameters = ours.trainable_parameters()
    others = peft_parameters(theirs) if theirs is not None else {}
    if optimizers is None:
        optimizers = [torch.optim.AdamW(group.values(), lr=2e-2) for group in (parameters, others) if group]
    if theirs is not None:
        assert others.keys() == parameters.keys()
    for step in steps:
        batch = (TOKENS + step) % tiny.VOCABULARY
        penalty = ours.penalty()
        assert penalty is not None
        (ours.model(input_ids=batch, labels=batch, use_cache=False).loss + penalty).backward()
        for name, values in others.items():
            values.grad = parameters[name].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        ours.after_step(step, total)
        if theirs is not None:
            theirs.base_model.update_and_allocate(step)
            for name, values in others.items():
                assert torch.equal(parameters[name], values), (step, name)
            pattern = theirs.peft_config["default"].rank_pattern
            if pattern is not None:
                kept = {path: values.tolist() for path, values in method_of(ours).kept.items()}
                assert {key.replace(".lora_E.default", ""): values for key, values in pattern.items()} == kept
        for optimizer in optimizers:
            optimizer.zero_grad()
    return optimizers


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch) -> str:
    """A family whose linears are Conv1D, one of them square."""
    monkeypatch.setitem(tiny.FAMILIES, "gpt2", (GPT2Config, GPT2LMHeadModel))
    return "gpt2"


@pytest.mark.parametrize(("family", "quantization"), [("llama", "nf4"), ("qwen2", "none"), ("gpt2", "none")])
def test_logits_loss_and_gradients_are_those_of_peft(tmp_path: Path, gpt2: str, family: str, quantization: str) -> None:
    folder = tiny_checkpoint(tmp_path, family, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ours = apply_method(tiny_base(folder, quantization), SECTION)
    stir(ours, 0.2)
    theirs = peft_model(folder, quantization)
    missing = peft.set_peft_model_state_dict(theirs, ours.adapter_state())
    assert not missing.unexpected_keys
    found = ours.model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    expected = theirs(input_ids=TOKENS, labels=TOKENS, use_cache=False)
    penalty = ours.penalty()
    assert penalty is not None
    assert penalty > 0.1
    loss = found.loss + penalty
    loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=rounding(), atol=0)
    assert difference(found.logits, expected.logits) < rounding()
    with ours.disabled():
        assert difference(logits_of(ours.model), expected.logits) > 1e-2  # the adapter matters
    theirs_by_name = peft_parameters(theirs)
    assert theirs_by_name.keys() == ours.trainable_parameters().keys()
    worst = max(
        difference(values.grad, theirs_by_name[name].grad) for name, values in ours.trainable_parameters().items()
    )
    print(f"{family} {quantization}: logits {difference(found.logits, expected.logits):.1e}, gradients {worst:.1e}")
    assert worst < rounding(GRADIENT)


@pytest.mark.parametrize(
    "section",
    [
        SECTION,
        config.AdaLoRA(r=1, initial_r=4, alpha=8, warmup=0, final=0, beta1=0.5, beta2=0.9, orthogonality=0.1),
        config.AdaLoRA(r=3, initial_r=4, alpha=2, warmup=0.5, final=0.4, interval=3),
    ],
)
def test_step_by_step_the_same_triplets_as_peft(tmp_path: Path, section: config.AdaLoRA) -> None:
    folder = tiny_checkpoint(tmp_path)
    theirs = peft_model(folder, "none", section)
    fresh = apply_method(tiny_base(folder, "none"), section)
    peft.set_peft_model_state_dict(theirs, {key: values.clone() for key, values in fresh.adapter_state().items()})
    ours = trained(folder, section=section, theirs=theirs)
    ranks = method_of(ours).report()["ranks"]
    assert sum(ranks.values()) == section.r * len(ranks)
    assert len(set(ranks.values())) > 1
    assert_answers_as(theirs.eval(), ours)


@pytest.mark.parametrize("total", [2, 3, 10, 97, 1000])
@pytest.mark.parametrize(("warmup", "final"), [(0.1, 0.3), (0, 0), (0.45, 0.5), (0.01, 0.98)])
def test_the_budget_falls_as_pefts(tmp_path: Path, total: int, warmup: float, final: float) -> None:
    section = config.AdaLoRA(r=2, initial_r=5, warmup=warmup, final=final, target_modules=("a", "b"))
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 6)})
    method = method_of(apply_method(model, section))
    first, last = method.turns(total)
    assert 0 <= first < last <= total
    theirs = peft.AdaLoraConfig(init_r=5, target_r=2, tinit=first, tfinal=total - last, total_step=total)
    names = nn.ModuleDict(
        {path: nn.ParameterDict({"lora_A": nn.ParameterDict({"default": torch.empty(5, 8)})}) for path in "ab"}
    )
    allocator = RankAllocator(names, theirs, "default")
    for step in range(1, total + 1):
        assert method.budget(step, total) == allocator.budget_schedule(step)[0], step
    assert method.budget(last, total) == 4


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_runs_end_at_their_budget(tmp_path: Path, total: int) -> None:
    ours = trained(tiny_checkpoint(tmp_path), total, total=total)
    ranks = method_of(ours).ranks()
    assert sum(ranks.values()) == 2 * len(ranks)


def test_nothing_is_pruned_without_a_lower_rank(tmp_path: Path) -> None:
    ours = trained(tiny_checkpoint(tmp_path), section=SECTION.model_copy(update={"r": 4}))
    assert set(method_of(ours).ranks().values()) == {4}


def test_before_the_first_step_every_rank_is_the_initial_one(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    before = logits_of(base.model)
    model = apply_method(base, SECTION)
    assert torch.equal(logits_of(model.model), before)
    assert set(method_of(model).ranks().values()) == {4}
    for layer in model.layers():
        assert abs(layer.lora_A.std() / 0.02 - 1) < 0.3
        assert abs(layer.lora_B.std() / 0.02 - 1) < 0.3
        assert not layer.lora_E.any()


@pytest.mark.parametrize("steps", [3, 5, 8])
def test_ten_steps_are_some_then_the_rest(tmp_path: Path, steps: int) -> None:
    """Cut before, between and after the allocations; the optimizer is carried over, the adapter and its state saved."""
    folder = tiny_checkpoint(tmp_path / "base")
    whole = trained(folder)
    first = apply_method(tiny_base(folder, "none"), SECTION)
    optimizers = take_steps(first, range(1, steps + 1), TOTAL)
    save_adapter(first, tmp_path / "cut")
    second = load_adapter(apply_method(tiny_base(folder, "none"), SECTION, seed=5), tmp_path / "cut")
    moments = optimizers[0].state_dict()
    later = torch.optim.AdamW(second.trainable_parameters().values(), lr=2e-2)
    later.load_state_dict(moments)
    take_steps(second, range(steps + 1, TOTAL + 1), TOTAL, optimizers=[later])
    for name, values in whole.trainable_parameters().items():
        assert torch.equal(values, second.trainable_parameters()[name]), name
    state = load_file(tmp_path / "cut" / "method.safetensors")
    assert any(key.endswith(".importance") for key in state) is (
        steps < 7
    )  # after the last allocation they are dropped
    third = load_adapter(second, tmp_path / "cut")  # back to the earlier state
    assert all(torch.equal(v, third.method_state()[k]) for k, v in state.items())


def test_peft_loads_ours_whole(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base", "qwen2")
    ours = trained(folder)
    save_adapter(ours, tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == ours.adapter_state().keys()
    assert all(torch.equal(values, ours.adapter_state()[key]) for key, values in state.items())
    assert_answers_as(theirs, ours)
    wanted, found = peft_config().to_dict(), json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    names = (
        "init_r",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "total_step",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "lora_alpha",
    )
    assert {name: found[name] for name in names} == {name: wanted[name] for name in names}
    assert read_adapter_config(tmp_path / "adapter").model_copy(
        update={"target_modules": "all-linear"}
    ) == SECTION.model_copy(update={"final": 0.3})


@pytest.mark.parametrize("steps", [1, 6, 10])
def test_we_load_what_peft_saves(tmp_path: Path, steps: int) -> None:
    """Before its first mask, and later without the triplets that are masked: of some targets none is left."""
    folder = tiny_checkpoint(tmp_path / "base")
    section = SECTION.model_copy(update={"r": 1})
    theirs = peft_model(folder, "none", section)
    fresh = apply_method(tiny_base(folder, "none"), section)
    peft.set_peft_model_state_dict(theirs, {key: values.clone() for key, values in fresh.adapter_state().items()})
    trained(folder, steps, section, theirs=theirs)
    expected = logits_of(theirs.eval())
    theirs.save_pretrained(tmp_path / "adapter")
    sizes = {
        len(v) for k, v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if k.endswith("lora_A")
    }
    assert sizes == {4} if steps == 1 else (len(sizes) > 1 and (0 in sizes or steps < 10))
    ours = load_adapter(tiny_base(folder, "none"), tmp_path / "adapter")
    worst = difference(logits_of(ours.model), expected)
    print(f"{steps} steps: ranks {sorted(sizes)}, logits {worst:.1e}")
    assert worst < rounding()
    assert (ours.section.r, ours.section.initial_r, ours.section.warmup) == (1, 4, 0.2)
    save_adapter(ours, tmp_path / "again")
    again = load_adapter(tiny_base(folder, "none"), tmp_path / "again")
    assert torch.equal(logits_of(again.model), logits_of(ours.model))


def test_another_initial_rank_is_refused(tmp_path: Path) -> None:
    """Filled up with zeros it would load, and be scaled by another number."""
    folder = tiny_checkpoint(tmp_path / "base")
    save_adapter(apply_method(tiny_base(folder), SECTION), tmp_path / "adapter")
    other = apply_method(tiny_base(folder), SECTION.model_copy(update={"initial_r": 6}))
    with pytest.raises(MethodError, match="initial_r=4, this model initial_r=6"):
        load_adapter(other, tmp_path / "adapter")


def test_half_a_triplet_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    model = apply_method(tiny_base(folder), SECTION)
    state = {key: values.clone() for key, values in model.adapter_state().items()}
    key = next(key for key in state if key.endswith("lora_E"))
    with pytest.raises(MethodError, match=r"wrong shape in .*lora_E \[3, 1\] instead of \[4, 1\]"):
        model.load_adapter_state({**state, key: state[key][:3]})
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter" / "method.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.0.self_attn.q_proj" not in k}, file)
    with pytest.raises(MethodError, match=r"layers\.0\.self_attn\.q_proj\.kept"):
        load_adapter(tiny_base(folder), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("field", "value"), [("total_step", None), ("tinit", "1"), ("target_r", 9), ("use_rslora", True)]
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, field: str, value: Any) -> None:
    values = {key: value for key, value in peft_config().to_dict().items() if not key.startswith("_")}
    values |= {"peft_type": "ADALORA", "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "init_r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values, default=str))
    assert read_adapter_config(tmp_path).initial_r == 4
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, field: value}, default=str))
    with pytest.raises(MethodError, match=r"total_step|r 9 above initial_r 4|use_rslora"):
        read_adapter_config(tmp_path)


def test_as_plain_lora_without_what_was_pruned(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "base")
    ours = trained(folder, section=SECTION.model_copy(update={"r": 1}))
    pairs, ranks = method_of(ours).layout.pairs(), method_of(ours).ranks()
    assert {path: len(lora_A) for path, (lora_A, _) in pairs.items()} == {path: max(1, r) for path, r in ranks.items()}
    assert save_portable(ours, tmp_path / "plain") is None
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "plain").eval()
    assert theirs.peft_config["default"].peft_type == "LORA"
    assert_answers_as(theirs, ours)


def test_conv1d_merges(tmp_path: Path, gpt2: str) -> None:
    folder = tiny_checkpoint(tmp_path / "base", gpt2)
    ours = apply_method(tiny_base(folder, "none"), SECTION)
    stir(ours, 0.3)
    save_adapter(ours, tmp_path / "adapter")
    merge(folder, tmp_path / "adapter", tmp_path / "out", quantization="none", compute_dtype="fp32", dtype="fp32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert_answers_as(plain, ours)
    with ours.disabled():
        assert difference(logits_of(plain), logits_of(ours.model)) > 1e-2


def planted(base: nn.Module, dropout: float = 0.0) -> AdaLoraLinear:
    generator = torch.Generator().manual_seed(1)
    shapes = ((3, 5), (3, 1), (4, 3))
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return AdaLoraLinear(base, *parts, scaling=2.0, dropout=dropout)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_derivatives(dropout: float) -> None:
    layer = planted(nn.Linear(5, 4).double().requires_grad_(False), dropout)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, lora_A: Tensor, lora_E: Tensor, lora_B: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same elements dropped at every evaluation
        values = {"lora_A": lora_A, "lora_E": lora_E, "lora_B": lora_B}
        answer: Tensor = torch.func.functional_call(layer, values, (x,))
        return answer

    assert torch.autograd.gradcheck(forward, (x, layer.lora_A, layer.lora_E, layer.lora_B))


def test_a_rank_above_a_side_is_refused_before_anything_is_planted(tmp_path: Path) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    with pytest.raises(MethodError, match=r"method\.initial_r is 33.*k_proj \[32, 64\]"):
        apply_method(base, config.AdaLoRA(r=8, initial_r=33))
    assert not any(isinstance(module, AdaLoraLinear) for module in base.model.modules())


def test_on_meta_the_averages_are_counted() -> None:
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 6)})
    adapted = apply_method(model, config.AdaLoRA(r=2, initial_r=4, target_modules=("a", "b")))
    numbers = adapted.count_trainable()
    assert numbers == 4 * (8 + 8 + 1) + 4 * (8 + 6 + 1)
    assert sum(v.numel() for v in adapted.method_state().values() if v.dtype == torch.float32) == 2 * numbers
    assert all(values.is_meta for values in adapted.trainable_parameters().values())


def test_planting_that_fails_half_way_leaves_the_base_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tiny_checkpoint(tmp_path))
    modules = [name for name, _ in base.model.named_modules()]
    made: list[str] = []
    whole = AdaLoraMethod.new_layer

    def failing(self: AdaLoraMethod, path: str, linear: nn.Module) -> AdaLoraLinear:
        made.append(path)
        if len(made) == 3:
            raise torch.OutOfMemoryError
        return whole(self, path, linear)

    monkeypatch.setattr(AdaLoraMethod, "new_layer", failing)
    with pytest.raises(torch.OutOfMemoryError):
        apply_method(base, SECTION)
    assert [name for name, _ in base.model.named_modules()] == modules
