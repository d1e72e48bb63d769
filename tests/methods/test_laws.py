"""The laws that every method keeps, each once, over all of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qlora import recipe as config
from qlora.data.batches import collate
from qlora.data.examples import make_example
from qlora.data.packing import Row, make_rows
from qlora.errors import MethodError
from qlora.evaluation.generate import answers
from qlora.evaluation.score import score
from qlora.export.merged import merge
from qlora.methods.base import METHODS, AdaptedModel, apply_method
from qlora.methods.files import save_adapter
from qlora.methods.loading import load_adapter
from qlora.model.base import Base
from qlora.model.loss import batch_loss
from qlora.model.nf4 import FrozenLinear, dense_weight
from qlora.model.walk import Walk
from qlora.recipe import ModelSection, TrainingSection
from qlora.residence.load import load_base
from qlora.runs.measured import widen
from qlora.training.loop import Trainer
from tests.rounding import GRADIENT, rounding
from tests.tiny import CPU, FAMILIES, VOCABULARY, difference, tiny_base, tiny_checkpoint

TARGETS = ("q_proj", "v_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """A method as a recipe has it, and what it promises."""

    section: Any
    identity: bool = True
    """Whether the adapted model is the base exactly at step 0."""
    merges: bool = True
    quantization: str = "nf4"
    plants: bool = True
    """Whether it can be taken out again, leaving the base as it was."""
    reads_data: bool = False


CASES = {
    "lora": Case(config.LoRA(r=4, alpha=8, dropout=0.1)),
    "rslora": Case(config.LoRA(r=4, alpha=8, rslora=True, rank_pattern={"down_proj": 2}, alpha_pattern={"v_proj": 3})),
    "lora_plus": Case(config.LoRA(r=4, learning_rate_ratio=4.0, init="gaussian", target_modules=TARGETS)),
    "pissa": Case(config.LoRA(r=4, alpha=4, init="pissa", target_modules=TARGETS), identity=False),
    "loftq": Case(config.LoRA(r=4, alpha=4, init="loftq", target_modules=TARGETS), identity=False),
    "eva": Case(config.LoRA(r=4, init="eva", target_modules=TARGETS), reads_data=True),
    "dora": Case(config.DoRA(r=4, alpha=8, dropout=0.1, target_modules=TARGETS)),
    "adalora": Case(config.AdaLoRA(r=2, initial_r=4, alpha=8, target_modules=TARGETS), identity=True),
    "houlsby": Case(config.Bottleneck(form="houlsby", size=8, dropout=0.1), merges=False),
    "lin": Case(config.Bottleneck(form="lin", size=8), merges=False),
    "pfeiffer": Case(config.Bottleneck(form="pfeiffer", size=8), merges=False),
    "parallel": Case(config.Bottleneck(form="parallel", size=8, scale=4.0), merges=False),
    "prompt_tuning": Case(config.PromptTuning(tokens=3), identity=False, merges=False),
    "p_tuning": Case(config.PTuning(tokens=3, hidden_size=16), identity=False, merges=False),
    "prefix_tuning": Case(config.PrefixTuning(tokens=3), identity=False, merges=False),
    "prefix_projected": Case(config.PrefixTuning(tokens=3, projection_size=8), identity=False, merges=False),
    "ia3": Case(config.IA3()),
    "bitfit": Case(config.BitFit(new_biases=True)),
    "full": Case(config.Full(), quantization="none", plants=False),
    "modules": Case(config.Modules(modules=("layers.1.mlp", "norm"))),
    "head": Case(config.Modules(modules=("lm_head",))),
    "new_tokens": Case(config.NewTokens(tokens=("<tool>", "</tool>"))),
    "lora_and_bottleneck": Case(
        config.Combined(
            parts=(
                # the order of the names counts, also in a file of ours
                config.LoRA(r=4, target_modules=TARGETS, rank_pattern={"layers.0.mlp.down_proj": 2, "down_proj": 3}),
                config.Bottleneck(size=8),
            )
        ),
        merges=False,
    ),
    "lora_and_prompt": Case(
        config.Combined(parts=(config.LoRA(r=4, target_modules=TARGETS), config.PromptTuning(tokens=3))),
        identity=False,
        merges=False,
    ),
    "lora_head_and_new_tokens": Case(
        config.Combined(
            parts=(
                config.LoRA(r=4, target_modules=TARGETS),
                config.Modules(modules=("norm",)),
                config.NewTokens(tokens=("<tool>",)),
            )
        )
    ),
}
ENDS = config.Modules(modules=("embed_tokens", "lm_head"))
every_method = pytest.mark.parametrize("name", CASES)
# the slowest laws: each method once here, its other forms in make test-all
FORMS = (
    "rslora",
    "lora_plus",
    "lin",
    "pfeiffer",
    "parallel",
    "prefix_tuning",
    "head",
    "lora_and_bottleneck",
    "lora_and_prompt",
)
each_method_once = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in FORMS else []) for name in CASES]
)


def test_every_method_is_here() -> None:
    here = {part.name for name, case in CASES.items() if name not in FORMS for part in config.parts_of(case.section)}
    assert here == set(METHODS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"))


def rows_of(count: int = 8, seed: int = 0) -> list[Row]:
    """Packed rows of two or three short examples."""
    random = numpy.random.default_rng(seed)
    made = [make_example(random.integers(3, VOCABULARY, n), [True] * n) for n in random.integers(3, 8, 3 * count)]
    return make_rows(made, 20, packing=True)[:count]


ROWS = rows_of()


def spoken(model: AdaptedModel, rows: list[Row]) -> list[Row]:
    """``rows`` with new tokens in them, where the model has such; what is never read gets no gradient."""
    embedding: Any = model.model.get_input_embeddings()  # type: ignore[operator]
    new = numpy.arange(VOCABULARY, embedding.num_embeddings, dtype=numpy.int32)
    if not len(new):
        return rows
    changed = []
    for row in rows:
        ids = row.ids.copy()
        ids[1::4] = numpy.resize(new, len(ids[1::4]))
        changed.append(replace(row, ids=ids, labels=numpy.where(row.labels == -100, row.labels, ids)))
    return changed


def adapted(checkpoint: Path, case: Case, stirred: bool = False, quantization: str | None = None) -> AdaptedModel:
    model = apply_method(tiny_base(checkpoint, quantization or case.quantization), case.section)
    if case.reads_data:
        model.prepare([collate(ROWS, 0)])
    if stirred:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for values in model.trainable_parameters().values():
                values += 0.05 * torch.randn(values.shape, generator=generator)
    return model


def logits(model: AdaptedModel) -> torch.Tensor:
    """Of a batch of rows with what the method puts before them, in eval mode; without the method's own positions."""
    batch = collate(ROWS[:2], 0, model.virtual_tokens)
    with torch.no_grad():
        output = model.model.eval()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return output.logits[:, :, :VOCABULARY].float()


def loss_gradients(model: AdaptedModel) -> dict[str, torch.Tensor]:
    model.model.eval()  # no dropout
    parameters = model.trainable_parameters()
    for values in parameters.values():
        values.grad = None
    batch = collate(spoken(model, ROWS[:2]), 0, model.virtual_tokens)
    loss, _ = batch_loss(model.model, batch, 8)
    loss.backward()
    found = {}
    for name, values in parameters.items():
        assert values.grad is not None, name
        found[name] = values.grad.clone()
        values.grad = None
    return found


@every_method
@pytest.mark.sampled
def test_step_0_is_the_base(checkpoint: Path, name: str) -> None:
    case = CASES[name]
    if not case.identity:
        pytest.skip("begins as something else, as its paper says")
    base = tiny_base(checkpoint, case.quantization)
    with torch.no_grad():
        batch = collate(ROWS[:2], 0)
        expected = base.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).logits.float()
    worst = difference(logits(adapted(checkpoint, case)), expected)
    assert worst <= (rounding() if name == "dora" else 0)


@every_method
@pytest.mark.sampled
def test_disabled_is_the_base_and_removed_leaves_it(checkpoint: Path, name: str) -> None:
    case = CASES[name]
    # a PiSSA layer that is off still misses what quantising the residual lost, so it is held to the base unquantised
    quantization = "none" if name == "pissa" else case.quantization
    base = tiny_base(checkpoint, quantization)
    batch = collate(ROWS[:2], 0)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad():
        expected = base.model(**inputs).logits
    if not case.plants:
        pytest.skip("changes the base's own weights")
    model = adapted(checkpoint, case, stirred=True, quantization=quantization)
    # new tokens alone change nothing for the old ones
    assert name == "new_tokens" or difference(logits(model)[:, -1], expected[:, -1, :VOCABULARY]) > 1e-4
    with model.disabled(), torch.no_grad():
        assert model.virtual_tokens == 0
        worst = difference(model.model(**inputs).logits[..., :VOCABULARY], expected)
        assert worst <= (rounding() if name == "pissa" else 0)
    back = model.remove()
    with torch.no_grad():
        assert torch.equal(back.model(**inputs).logits, expected)
    model.attach()
    with model.disabled():
        pass
    assert model.layers()[0].enabled


@pytest.mark.parametrize("section", [*(case.section for case in CASES.values()), ENDS], ids=[*CASES, "ends"])
@pytest.mark.sampled
def test_a_model_of_16_bits_is_measured_in_fp32(checkpoint: Path, section: Any) -> None:
    quantization = "none" if isinstance(section, config.Full) else "nf4"
    base = load_base(ModelSection(name=str(checkpoint), compute_dtype="bf16", quantization=quantization), CPU)
    model = apply_method(base, section)
    batch = collate(ROWS[:2], 0, model.virtual_tokens)
    for expected in (torch.bfloat16, torch.float32):
        walk = Walk(model.model, [batch])
        assert {hidden.dtype for hidden in (*walk.first, *walk.last)} == {expected}
        assert widen(model)


@every_method
@pytest.mark.sampled
def test_gradients_flow_to_exactly_the_declared_parameters(checkpoint: Path, name: str) -> None:
    model = adapted(checkpoint, CASES[name], stirred=True)
    declared = {id(values): key for key, values in model.trainable_parameters().items()}
    wanting = {id(values) for values in model.model.parameters() if values.requires_grad}
    assert wanting == set(declared)
    silent = [key for key, grad in loss_gradients(model).items() if not grad.any()]
    assert not silent
    others = [key for key, values in model.model.named_parameters() if values.grad is not None]
    assert not others


@every_method
@pytest.mark.sampled
def test_nf4_gradients_are_those_on_the_dequantised_weights(checkpoint: Path, name: str) -> None:
    case = CASES[name]
    if case.quantization == "none":
        pytest.skip("has no 4-bit base")
    model = adapted(checkpoint, case, stirred=True)
    packed = loss_gradients(model)
    for path, module in list(model.model.named_modules()):
        if isinstance(module, FrozenLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.requires_grad_(False).weight.copy_(dense_weight(module, torch.float32))
            if module.bias is not None:
                dense.bias.copy_(module.bias)
            model.model.set_submodule(path, dense)
    plain = loss_gradients(model)
    worst = max(difference(packed[key], plain[key]) for key in plain)
    assert worst < rounding(GRADIENT)


def trainer_of(checkpoint: Path, case: Case, folder: Path, prepared: bool = True) -> Trainer:
    model = apply_method(tiny_base(checkpoint, case.quantization), case.section)
    if case.reads_data and prepared:
        model.prepare([collate(ROWS, 0)])
    training = TrainingSection(batch_size=4, micro_batch_size=2, steps=10, learning_rate=1e-2, weight_decay=0.1)
    return Trainer(model, spoken(model, ROWS), training, folder)


@each_method_once
@pytest.mark.sampled
def test_ten_steps_are_six_a_new_process_and_four(checkpoint: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    whole = trainer_of(checkpoint, case, tmp_path / "whole")
    losses = [next(whole).loss for _ in range(10)]
    first = trainer_of(checkpoint, case, tmp_path / "cut")
    assert [next(first).loss for _ in range(6)] == losses[:6]
    place = first.save()
    torch.manual_seed(99)
    second = trainer_of(checkpoint, case, tmp_path / "cut", prepared=False)
    second.load(place)
    assert [next(second).loss for _ in range(4)] == losses[6:]
    ends = [
        {key: values.detach().numpy().tobytes() for key, values in trainer.state.parameters.items()}
        for trainer in (whole, second)
    ]
    assert ends[0] == ends[1]
    assert len(set(losses)) == 10


@each_method_once
@pytest.mark.sampled
def test_evaluation_leaves_the_model_as_it_was(checkpoint: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    plain, disturbed = (trainer_of(checkpoint, case, tmp_path / way) for way in ("a", "b"))
    expected = [next(plain).loss for _ in range(3)]
    found = [next(disturbed).loss]
    first = score(disturbed.model, ROWS[:3])
    texts = answers(disturbed.model, [[5, 6, 7], [8, 9]], 4)
    assert (score(disturbed.model, ROWS[:3]), answers(disturbed.model, [[5, 6, 7], [8, 9]], 4)) == (first, texts)
    assert [*found, *(next(disturbed).loss for _ in range(2))] == expected


@every_method
@pytest.mark.sampled
def test_saved_and_loaded_gives_the_same_logits(checkpoint: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = adapted(checkpoint, case, stirred=True)
    expected = logits(model)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_base(checkpoint, case.quantization), tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert again.section.name == case.section.name


@every_method
@pytest.mark.sampled
def test_merged_is_the_adapted_model_or_a_sentence_says_why_not(checkpoint: Path, tmp_path: Path, name: str) -> None:
    case = CASES[name]
    model = adapted(checkpoint, case, stirred=True)
    save_adapter(model, tmp_path / "adapter")

    def merged() -> None:
        merge(
            checkpoint,
            tmp_path / "adapter",
            tmp_path / "merged",
            quantization=case.quantization,  # type: ignore[arg-type]
            compute_dtype="fp32",
            dtype="fp32",
        )

    if not case.merges:
        with pytest.raises(MethodError, match=r"cannot be merged.*; "):
            merged()
        assert not (tmp_path / "merged").exists()
        return
    merged()
    plain, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    batch = collate(ROWS[:2], 0)
    with torch.no_grad():
        found = plain.eval()(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    worst = difference(found[:, :, :VOCABULARY], logits(model))
    print(f"{name}: merged differs by {worst:.1e} of the largest logit")
    assert worst < rounding()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@every_method
def test_other_families_learn_too(tmp_path: Path, name: str, family: str) -> None:
    """Biases and an untied head; a tied head with capped logits and sliding windows: the loss falls, on an 8-bit base."""
    assert family in FAMILIES
    case = CASES[name]
    base: Base = tiny_base(tiny_checkpoint(tmp_path, family), "int8" if case.quantization == "nf4" else "none")
    model = apply_method(base, case.section)
    if case.reads_data:
        model.prepare([collate(ROWS, 0)])
    training = TrainingSection(batch_size=4, steps=30, learning_rate=3e-2, schedule="constant", warmup_fraction=0)
    steps = [step.loss for step in Trainer(model, spoken(model, ROWS[:4]), training)]
    assert steps[-1] < steps[0] - 0.02
