"""The law of pairs: loss, rewards and gradients of a plain implementation, whole logits and one answer at a time, by any way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora import recipe as config
from qlora.data.examples import make_example
from qlora.data.packing import Row, make_rows
from qlora.errors import DataError, RunError
from qlora.machine.processes import here
from qlora.methods.base import AdaptedModel, apply_method
from qlora.model.base import Base
from qlora.recipe import MemorySection, ModelSection, Recipe
from qlora.residence.layers import unwrap_layers
from qlora.residence.load import load_base
from qlora.residence.placement import Placement
from qlora.training.loop import Trainer
from qlora.training.objectives.pairs import pair_numbers
from tests.methods.test_laws import CASES, Case, adapted, spoken
from tests.rounding import MODEL, rounding
from tests.steps import LATER, close, same_bits, step_of
from tests.tiny import CPU, VOCABULARY, adapter_bytes, stir, tiny_checkpoint
from tests.together import together

LAYERS = 2
ALLOWED = rounding(sums=2 * MODEL * LAYERS)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"name": "dpo", "beta": 0.5},
    "smoothed dpo": {"name": "dpo", "beta": 0.5, "label_smoothing": 0.2},
    "ipo": {"name": "ipo", "beta": 0.5},
    "orpo": {"name": "orpo", "beta": 0.5},
}
MICRO = {"accumulation": "micro_batch_major"}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "resident": ({}, {**MICRO, "recompute": "none"}),
    "recomputed, one row at a time": ({}, {**MICRO, "micro_batch_size": 1}),
    "layer-major": ({}, {}),
    "layer-major, one row at a time, small chunks": ({}, {"micro_batch_size": 1, "loss_chunk": 7}),
    "everything": (
        {"layers": 1, "tier": "disk", "slots": 3, "mlp_tile": 7, "layer_inputs": "host", "embedding": "host", "head": "host"},
        {},
    ),
}  # fmt: skip


def random_pairs(count: int, packing: bool = True, seed: int = 0) -> list[Row]:
    """Rows of pairs: a question of 2 to 5 tokens and two answers of 1 to 6, of which some tokens do not count."""
    random = numpy.random.default_rng(seed)
    made = []
    for _ in range(count):
        asked = random.integers(3, VOCABULARY, int(random.integers(2, 6)))
        for _side in range(2):
            said = random.integers(3, VOCABULARY, int(random.integers(1, 7)))
            trained = numpy.r_[numpy.zeros(len(asked)), 1, random.random(len(said) - 1) < 0.8]
            made.append(make_example(numpy.r_[asked, said], trained))
    return make_rows(made, 23, packing, together=2)


ROWS = {"packed": random_pairs(12, seed=3)[:5], "apart": random_pairs(5, packing=False, seed=4)}


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Placement, "poison", True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("base"), num_hidden_layers=LAYERS)


def base_of(folder: Path, memory: dict[str, Any]) -> Base:
    model = ModelSection(name=str(folder), compute_dtype="fp32")
    return load_base(model, CPU, memory=MemorySection(**memory, cache=str(folder / "cache")))


def model_of(folder: Path, memory: dict[str, Any] | None = None, **method: Any) -> AdaptedModel:
    model = apply_method(base_of(folder, memory or {}), config.LoRA(r=4, alpha=8, **method))
    stir(model, 0.05)
    return model


def recipe_of(objective: dict[str, Any], memory: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """A recipe of an objective; its data section is not read."""
    step = {"batch_size": 5, "micro_batch_size": 2, "steps": 6, "learning_rate": 1e-2, "max_grad_norm": None}
    return Recipe.from_dict(
        {"data": {"train": "x"}, "objective": objective, "training": {**step, **training}, "memory": memory or {}}
    )


def plain(model: AdaptedModel, rows: list[Row], objective: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(mean loss, gradients, rewards [pairs, 2]) as everyone writes it, from whole logits of each answer alone."""
    beta, smoothing, name = objective["beta"], objective.get("label_smoothing", 0.0), objective["name"]

    def of(row: Row, begin: int, end: int) -> tuple[Tensor, Tensor, int]:
        ids = torch.tensor(row.ids[begin:end].astype("int64"))
        logits = model.model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        each = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        counts = torch.tensor(row.labels[begin + 1 : end] != -100)
        return each[counts].sum(), -each.mean(), int(counts.sum())

    losses, rewards = [], []
    for row in rows:
        spans = row.spans()
        for chosen, rejected in zip(spans[::2], spans[1::2], strict=True):
            (up, text, long), (down, _, short) = of(row, *chosen), of(row, *rejected)
            with torch.no_grad(), model.disabled():
                before = [of(row, *span)[0] for span in (chosen, rejected)]
            up_by, down_by = beta * (up - before[0]), beta * (down - before[1])
            if name == "dpo":
                margin = up_by - down_by
                losses.append(-(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin))
            elif name == "ipo":
                losses.append((up_by / beta / long - down_by / beta / short - 1 / (2 * beta)) ** 2)
            else:
                a, b = up / long, down / short
                odds = (a - torch.log1p(-a.exp())) - (b - torch.log1p(-b.exp()))
                losses.append(text - beta * F.logsigmoid(odds))
                up_by, down_by = beta * a, beta * b
            rewards.append(torch.stack([up_by, down_by]).detach())
    loss = torch.stack(losses).mean()
    model.model.zero_grad(set_to_none=True)
    loss.backward()
    found = {
        name: values.grad.clone() for name, values in model.trainable_parameters().items() if values.grad is not None
    }
    model.model.zero_grad(set_to_none=True)
    return loss.detach(), found, torch.stack(rewards)


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[str, str], tuple[Tensor, dict[str, Tensor], Tensor]]:
    known: dict[tuple[str, str], Any] = {}

    def of(objective: str, rows: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        if (objective, rows) not in known:
            known[objective, rows] = plain(model_of(folder), ROWS[rows], OBJECTIVES[objective])
        found: tuple[Tensor, dict[str, Tensor], Tensor] = known[objective, rows]
        return found

    return of


@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind, marks=[pytest.mark.slow] if kind == "apart" and name != "dpo" else [])
    for name in OBJECTIVES for kind in ROWS
])  # fmt: skip
@pytest.mark.sampled
def test_a_step_is_that_of_whole_logits_one_answer_at_a_time(
    folder: Path, expected: Callable[..., Any], name: str, kind: str
) -> None:
    loss, gradients, rewards = expected(name, kind)
    for memory, training in list(WAYS.values())[0 if (name, kind) == ("dpo", "packed") else 3 :]:
        model = model_of(folder, memory)
        trainer = Trainer(model, ROWS[kind], recipe=recipe_of(OBJECTIVES[name], memory, **training))
        step, found = step_of(trainer)
        unwrap_layers(model.model)
        assert step.loss == pytest.approx(float(loss), rel=ALLOWED)
        close(found, gradients, ALLOWED)
        chosen, rejected = rewards.mean(0).tolist()
        assert step.measures["reward_chosen"] == pytest.approx(chosen, abs=ALLOWED * 10)
        assert step.measures["reward_rejected"] == pytest.approx(rejected, abs=ALLOWED * 10)
        assert step.measures["reward_margin"] == pytest.approx(chosen - rejected, abs=ALLOWED * 10)
        assert step.measures["reward_accuracy"] == float((rewards[:, 0] > rewards[:, 1]).double().mean())


def each(case: Case, folder: Path, **training: Any) -> tuple[float, dict[str, Tensor]]:
    model = adapted(folder, case, stirred=True)
    for module in model.model.modules():
        if isinstance(vars(module).get("dropout"), float):
            module.dropout = 0.0  # type: ignore[assignment]
    trainer = Trainer(model, spoken(model, ROWS["packed"]), recipe=recipe_of(OBJECTIVES["dpo"], **training))
    step, found = step_of(trainer)
    return step.loss, found


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in ("lora", "prompt_tuning", "head", "full") else [pytest.mark.slow]) for name in CASES
])  # fmt: skip
@pytest.mark.sampled
def test_every_method_learns_from_pairs_by_any_way(folder: Path, name: str) -> None:
    resident = each(CASES[name], folder, **WAYS["resident"][1])
    assert all(grad.any() for grad in resident[1].values())
    for way in ("recomputed, one row at a time", "layer-major, one row at a time, small chunks"):
        loss, found = each(CASES[name], folder, **WAYS[way][1])
        assert loss == pytest.approx(resident[0], rel=ALLOWED)
        close(found, resident[1], ALLOWED)


def test_a_head_that_trains_gets_the_gradient_of_whole_logits(folder: Path) -> None:
    case = CASES["head"]
    model = adapted(folder, case, stirred=True)
    loss, gradients, _ = plain(model, ROWS["packed"], OBJECTIVES["orpo"])
    step, found = step_of(Trainer(model, ROWS["packed"], recipe=recipe_of(OBJECTIVES["orpo"])))
    assert step.loss == pytest.approx(float(loss), rel=ALLOWED)
    close(found, gradients, ALLOWED)


def test_before_training_nothing_is_ahead_and_then_the_chosen_answers_are(folder: Path) -> None:
    model = apply_method(base_of(folder, {}), config.LoRA(r=4, alpha=8))
    steps = list(Trainer(model, ROWS["packed"], recipe=recipe_of(OBJECTIVES["dpo"], steps=12)))
    assert steps[0].loss == pytest.approx(float(numpy.log(2)), rel=ALLOWED)
    assert steps[0].measures["reward_margin"] == pytest.approx(0, abs=ALLOWED)
    assert steps[-1].measures["reward_accuracy"] == 1.0 > steps[0].measures["reward_accuracy"]
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps[-1].metrics()["reward_margin"] == steps[-1].measures["reward_margin"] > 0


@pytest.mark.parametrize("case", ["lora", "full"])
def test_a_broken_run_goes_on_with_the_reference_that_it_began_with(folder: Path, tmp_path: Path, case: str) -> None:
    """Also of full fine-tuning, which has no base left to measure."""

    def trainer(place: Path) -> Trainer:
        found = Trainer(adapted(folder, CASES[case]), ROWS["packed"], folder=place, recipe=recipe_of(OBJECTIVES["dpo"]))
        found.log = found.log or _Silent()  # type: ignore[assignment]
        return found

    straight = trainer(tmp_path / "straight")
    losses = [step.loss for step in straight]
    broken = trainer(tmp_path / "broken")
    assert [next(broken).loss for _ in range(3)] == losses[:3]
    broken.save()
    again = trainer(tmp_path / "broken")
    again.load_newest()
    assert [step.loss for step in again] == losses[3:]
    same_bits(again.model.trainable_parameters(), straight.model.trainable_parameters())
    assert adapter_bytes(again.model) == adapter_bytes(straight.model)
    kept = next((tmp_path / "broken" / "reference").glob("*.safetensors"))
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    after = trainer(tmp_path / "broken")
    after.load_newest()
    if case == "lora":
        assert torch.equal(_measured_again(after), straight.reference["train"])
    else:
        with pytest.raises(
            RunError, match=r"'.*reference' is damaged or not there, and the model that gave it has been trained"
        ):
            after.prepare()


class _Silent:
    """In the place of ``metrics.jsonl``, of a trainer whose rows came from no file."""

    def write(self, _: object) -> None:
        pass


def _measured_again(trainer: Trainer) -> Tensor:
    trainer.prepare()
    return trainer.reference["train"]


def _steps_of_pairs(folder: Path, place: Path) -> None:
    """Losses and rewards of steps of 3 and 2 rows, written by the main process."""
    training = recipe_of(OBJECTIVES["dpo"], batch_size=3, steps=4)
    steps = list(Trainer(model_of(folder), ROWS["packed"], recipe=training))
    if here().main:
        torch.save([{"loss": step.loss, **step.measures} for step in steps], place / f"{here().size}.pt")


@pytest.mark.slow
def test_two_processes_are_one(folder: Path, tmp_path: Path) -> None:
    _steps_of_pairs(folder, tmp_path)
    together(2, _steps_of_pairs, folder, tmp_path)
    alone, two = (torch.load(tmp_path / f"{size}.pt", weights_only=True) for size in (1, 2))
    assert len(alone) == len(two) == 4
    for expected, found in zip(alone, two, strict=True):
        assert found == pytest.approx(expected, rel=LATER, abs=LATER)


def test_rows_and_objective_have_to_be_of_one_kind(folder: Path) -> None:
    model = model_of(folder)
    single = make_rows([make_example([3, 4, 5], [0, 1, 1])], 23, packing=True)
    with pytest.raises(
        DataError, match=r"The objective dpo learns from pairs of a chosen .* load_data\(…, pairs=True\)"
    ):
        Trainer(model, single, recipe=recipe_of(OBJECTIVES["dpo"]))


def test_pairs_keep_together_and_alike() -> None:
    for rows in ROWS.values():
        for row in rows:
            assert [index // 2 for index in row.examples[::2]] == [index // 2 for index in row.examples[1::2]]
            assert all(index % 2 == 0 for index in row.examples[::2])
    assert all(len(row.examples) == 2 for row in ROWS["apart"])
    assert max(len(row.examples) for row in ROWS["packed"]) > 2
    assert sorted(pair_numbers(random_pairs(12))) == list(range(12))
