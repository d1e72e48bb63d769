"""Several processes train as one does: losses, gradients, adapters and decisions, on gloo."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora.errors import DoesNotFitError
from qlora.machine.processes import here
from qlora.methods.base import apply_method
from qlora.planning.memory import largest_share
from qlora.residence.owned import OwnedLayers, is_elsewhere
from qlora.training.loop import Trainer
from qlora.training.masters import KEY
from tests.steps import GRADIENT, LATER, LOSS, difference, step_of
from tests.tiny import tiny_checkpoint
from tests.together import together
from tests.training.matrix import METHODS, Cell, trainer_for

ROWS, BATCH = 9, 4
"""Steps of 4, 4 and 1 rows: with 2 or 3 processes uneven shares, and in the last step of an epoch some with no row at all."""
WAYS: dict[str, dict[str, Any]] = {
    "layer by layer": {},
    "micro-batch by micro-batch": {"accumulation": "micro_batch_major"},
    "all kept": {"recompute": "none", "accumulation": "micro_batch_major"},
}


def cell(method: str, placement: str = "resident") -> Cell:
    return Cell(method, "adamw", placement, False, "mid-epoch")


def trainer(base: Path, folder: Path, one: Cell, **settings: Any) -> Trainer:
    return trainer_for(base, folder, one, rows=ROWS, **{"batch_size": BATCH, "steps": 6, **settings})


def train(base: Path, folder: Path, cells: list[Cell], settings: dict[str, Any]) -> None:
    """Of each cell the gradients of three steps by an optimizer that stands still, and losses and adapter of three that moves."""
    found = []
    for number, one in enumerate(cells):
        training = trainer(base, folder / str(number), one, **settings)
        still = [step_of(training) for _ in range(3)]
        still = [(step, whole(training, grads)) for step, grads in still]
        slack = {name: torch.zeros_like(values) for name, values in training.model.trainable_parameters().items()}
        later = [moving(training, slack) for _ in range(3)]
        slack = whole(training, slack)
        parameters = training.model.trainable_parameters()
        adapter = whole(training, {name: values.detach().float() for name, values in parameters.items()})
        same_everywhere(adapter)
        found.append(([step.loss for step, _ in still], [grads for _, grads in still], later, (adapter, slack)))
    if here().main:
        folder.mkdir(exist_ok=True)
        torch.save(found, folder / f"{here().size}.pt")


def whole(training: Trainer, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``tensors`` by parameter: of those that are spread over the processes their owners' one."""
    layers = training.model.base.placement
    if not isinstance(layers, OwnedLayers):
        return tensors
    layers.forget()
    of = {
        name: tensors[name] if layers.is_here(name) else torch.zeros(p.shape)
        for name, p in training.model.trainable_parameters().items()
    }
    spread = {name: values.clone() for name, values in of.items() if name in layers.names}
    here().sum(list(spread.values()))
    return of | spread


def moving(training: Trainer, slack: dict[str, torch.Tensor]) -> float:
    """Take a step; its loss. Adam divides a gradient by its own size, so that a number whose gradient is rounding moves by the
    whole rate either way: that is added to ``slack``, and of other numbers the part of their gradient that is rounding."""
    optimizer: Any = training.state.optimizer
    move = optimizer.step

    def look(*args: Any, **more: Any) -> None:
        for name, values in training.model.trainable_parameters().items():
            if values.grad is None:  # another process has it
                continue
            size = values.grad.float().abs()
            doubtful = (GRADIENT * size.max() / size).nan_to_num(0.0).clamp(max=1.0)
            slack[name] += 2 * training.training.learning_rate * doubtful.to(slack[name])
        move(*args, **more)

    optimizer.step = look
    try:
        return next(training).loss
    finally:
        optimizer.step = move


def found_by(size: int, folder: Path) -> list[Any]:
    """What ``train`` found by so many processes."""
    found: list[Any] = torch.load(folder / f"{size}.pt", weights_only=True)
    return found


def same_everywhere(tensors: dict[str, torch.Tensor]) -> None:
    """Every process holds the same bits: no sum of these could tell +x in one place from +x in another."""
    sums = [
        float((values.double() * torch.arange(1, 1 + values.numel()).view(values.shape)).sum())
        for values in tensors.values()
    ]
    assert all(other == sums for other in here().gather(*sums))


def compare(
    base: Path, folder: Path, cells: list[Cell], sizes: tuple[int, ...], one: int | None = None, **settings: Any
) -> None:
    """Train by each of so many processes, and compare with what ``one`` found: the first of ``sizes``, or an earlier call's."""
    for size in sizes:
        if size == 1:
            train(base, folder, cells, settings)
        else:
            together(size, train, base, folder, cells, settings)
    alone, *others = (found_by(size, folder) for size in {one or sizes[0]: 0, **dict.fromkeys(sizes)})
    for other in others:
        for which, expected, found in zip(cells, alone, other, strict=True):
            losses, gradients, later, (adapter, slack) = expected
            assert found[0] == pytest.approx(losses, rel=LOSS), which
            for ours, theirs in zip(found[1], gradients, strict=True):
                assert ours.keys() == theirs.keys()
                worst = max(difference(ours[name], values) for name, values in theirs.items() if values.any())
                assert worst < GRADIENT, which
            assert found[2] == pytest.approx(later, rel=LATER), which
            for name, values in adapter.items():
                apart = (found[3][0][name] - values).abs()
                assert (apart <= LATER * values.abs().max() + slack[name]).all(), (which, name)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several") / "base"
    tiny_checkpoint(folder)
    return folder


def test_two_are_one(base: Path, tmp_path: Path) -> None:
    """With dropout, uneven counts of target tokens, and a last step that has a row for one of them alone."""
    compare(base, tmp_path, [cell("lora"), cell("full")], (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_three_are_two_are_one_by_every_method(way: str, base: Path, tmp_path: Path) -> None:
    methods = METHODS if way == "layer by layer" else ("lora", "adalora", "bottleneck, houlsby", "dora", "full")
    compare(base, tmp_path, [cell(method) for method in methods], (1, 2, 3), **WAYS[way])


def shares_of_full(base: Path, folder: Path) -> None:
    """A step of full fine-tuning: no process keeps what another keeps, and together they keep what a checkpoint has."""
    one = replace(cell("full"), narrow=True)
    training = trainer(base, folder, one)
    next(training)
    state, everything = training.state, training.model.trainable_parameters()
    mine = set(state.masters.values)
    assert {id(p) for p in state.optimizer.state} == {id(values) for values in state.masters.values.values()}
    assert all(
        values is not everything[name] and values.dtype == torch.float32
        for name, values in state.masters.values.items()
    )
    assert sum(count for (count,) in here().gather(len(mine))) == len(everything)
    numbers = [count for (count,) in here().gather(sum(everything[name].numel() for name in mine))]
    assert max(numbers) < 0.6 * sum(numbers)
    assert max(numbers) == sum(p.numel() for p in largest_share(everything, here().size).values())
    kept = state.kept()
    if here().main:
        assert {name.rpartition("/")[0] for name in kept} == everything.keys()
    same_everywhere({name: values.detach().float() for name, values in everything.items()})


@pytest.mark.slow
def test_full_fine_tuning_shares_out_what_is_beside_the_weights(base: Path, tmp_path: Path) -> None:
    together(2, shares_of_full, base, tmp_path)


def owned(base: Path, folder: Path) -> None:
    """A step: of the layers' weights, gradients and moments each process keeps its own, and all of them is one model."""
    training = trainer(base, folder, replace(cell("full", "spread"), narrow=True))
    layers, parameters = training.model.base.placement, training.model.trainable_parameters()
    assert isinstance(layers, OwnedLayers)
    mine = [name for name in layers.names if layers.is_here(name)]
    numbers = [count for (count,) in here().gather(sum(parameters[name].numel() for name in mine))]
    assert max(numbers) < 0.6 * sum(numbers)
    assert sum(numbers) == sum(parameters[name].numel() for name in layers.names)
    next(training)
    layers.forget()
    assert all(is_elsewhere(parameters[name]) == (name not in mine) for name in layers.names)
    assert all(p.isnan().all() for name, p in parameters.items() if name in layers.names and name not in mine)
    assert all(name in mine for name in layers.names & training.state.masters.values.keys())
    training.save()
    assert all(is_elsewhere(parameters[name]) == (name not in mine) for name in layers.names)


def test_full_fine_tuning_spreads_the_weights_themselves(base: Path, tmp_path: Path) -> None:
    together(2, owned, base, tmp_path)


@pytest.mark.parametrize("accumulation", ["layer_major", pytest.param("micro_batch_major", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_spread_weights_train_as_whole_ones(accumulation: str, base: Path, tmp_path: Path) -> None:
    compare(base, tmp_path, [cell("full")], (1,), recompute="all", accumulation=accumulation)
    compare(base, tmp_path, [cell("full", "spread")], (2,), one=1, recompute="all", accumulation=accumulation)


@pytest.mark.slow
def test_and_wherever_the_base_is(base: Path, tmp_path: Path) -> None:
    compare(base, tmp_path, [cell("lora", place) for place in ("streamed from disk", "half streamed")], (1, 3))


def one_runs_out_of_memory(base: Path, folder: Path) -> None:
    """The last process cannot take two rows at once: all take one, with the losses of a run that never could."""
    expected = [next(trainer(base, folder / "small", cell("ia3"))).loss]
    training = trainer(base, folder / "run", cell("ia3"), micro_batch_size=2, recompute="all")
    loss = training.objective.loss

    def too_large(rows: Any, chunk: int) -> Any:
        if here().rank == here().size - 1 and training.micro_batch_size > 1:
            raise torch.OutOfMemoryError("not enough")
        return loss(rows, chunk)

    training.objective.loss = too_large  # type: ignore[method-assign]
    step = next(training)
    assert training.micro_batch_size == 1
    assert "1 row at once instead of 2" in step.note
    assert [step.loss] == pytest.approx(expected, rel=LOSS)


def one_has_no_smaller_way(base: Path, folder: Path) -> None:
    training = trainer(base, folder / "run", cell("ia3"))
    next(training)

    def too_large(rows: Any, chunk: int) -> Any:
        raise torch.OutOfMemoryError("not enough")

    if here().rank == here().size - 1:
        training.objective.loss = too_large  # type: ignore[method-assign]
    with pytest.raises(DoesNotFitError, match="no smaller way is left"):
        next(training)
    assert here().any(True)  # they are all here still
    assert (folder / "run" / "checkpoints" / "000001" / "checksums.json").is_file()


def one_is_not_finite(base: Path, folder: Path) -> None:
    """A loss that is NaN in one process: no process takes the step, and the adapter is as it was."""
    training = trainer(base, folder / "run", cell("ia3"), not_finite="skip", steps=2)
    loss = training.objective.loss
    before = {name: values.detach().clone() for name, values in training.model.trainable_parameters().items()}

    def broken(rows: Any, chunk: int) -> Any:
        return loss(rows, chunk) * (math.nan if here().main else 1.0)

    training.objective.loss = broken  # type: ignore[method-assign]
    step = next(training)
    assert step.skipped
    assert training.state.skipped == 1
    same_everywhere(before)
    for name, values in training.model.trainable_parameters().items():
        assert torch.equal(values, before[name])


def one_overflows(base: Path, folder: Path) -> None:
    """A gradient that overflows in one process: all halve the loss scale."""
    training = trainer(base, folder / "run", cell("ia3"))
    training.state.loss_scale = 4.0
    loss = training.objective.loss

    def overflowing(rows: Any, chunk: int) -> Any:
        found = loss(rows, chunk)
        if here().main and training.state.loss_scale > 2:
            found.register_hook(lambda grad: grad * math.inf)
        return found

    training.objective.loss = overflowing  # type: ignore[method-assign]
    assert not next(training).skipped
    assert here().gather(training.state.loss_scale) == [[2.0]] * here().size


@pytest.mark.slow
@pytest.mark.parametrize("what", [one_runs_out_of_memory, one_has_no_smaller_way, one_is_not_finite, one_overflows])
def test_what_one_meets_all_decide(what: Any, base: Path, tmp_path: Path) -> None:
    together(2, what, base, tmp_path)


def resumed(base: Path, folder: Path, last: int, one: Cell) -> None:
    """Go on to step ``last`` from the newest checkpoint, where there is one, and save."""
    again = (folder / "checkpoints").is_dir()
    one = one if here().size > 1 else replace(one, placement="resident")
    here().barrier()
    training = trainer_for(base, folder, one, again=again, rows=ROWS, batch_size=BATCH, steps=6)
    while training.step_number < last:
        next(training)
    training.save()


@pytest.mark.slow
@pytest.mark.parametrize(
    "one",
    [cell("adalora"), cell("full"), *(replace(cell("full", place), narrow=True) for place in ("resident", "spread"))],
    ids=str,
)
def test_resumed_by_two_one_and_three(one: Cell, base: Path, tmp_path: Path) -> None:
    """The checkpoint after 6 steps by 2 → 1 → 3 processes is that of one process, to rounding, in the same files."""
    resumed(base, tmp_path / "one", 6, one)
    for size, last in ((2, 2), (1, 4), (3, 6)):
        together(size, resumed, base, tmp_path / "several", last, one)
    folders = [tmp_path / name / "checkpoints" / "000006" for name in ("one", "several")]
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in folders}) == 1
    assert len({(folder / "adapter_config.json").read_bytes() for folder in folders}) == 1
    assert len({(folder / "state.json").read_bytes() for folder in folders}) == 1
    from safetensors.torch import load_file

    found = [{file.stem: load_file(file) for file in folder.glob("*.safetensors")} for folder in folders]
    for name, alone in found[0].items():
        several = found[1][name]
        assert {key: values.shape for key, values in alone.items()} == {
            key: values.shape for key, values in several.items()
        }
        if not one.narrow:  # what rounds to 8 bits at each step is soon elsewhere
            for key, values in alone.items():
                assert difference(several[key].float(), values.float()) < LATER, key
    if one.narrow:
        masters = {key.removesuffix(KEY): values for key, values in found[1]["optimizer"].items() if key.endswith(KEY)}
        narrow = found[1]["adapter_model"]
        assert len(masters) == len(narrow)
        assert all(
            torch.equal(masters[key.removeprefix("base_model.model.")].to(values.dtype), values)
            for key, values in narrow.items()
        )


def loaded_in_part(base: Path, folder: Path) -> None:
    """A run's own way: what other processes will have is never read, and the steps are those of a base that was read whole."""
    from qlora.model.checkpoint import Checkpoint, open_checkpoint
    from qlora.recipe import Recipe
    from qlora.runs.bases import Bases

    values = {
        "model": {"name": str(base), "quantization": "none", "compute_dtype": "fp32"},
        "method": {"name": "full"},
        "data": {"train": "none.jsonl"},
        "memory": {"layers": "streamed", "tier": "processes"},
    }
    recipe, read, plain = Recipe.from_dict(values), set[str](), Checkpoint.read

    def spy(self: Checkpoint, name: str, *given: Any) -> torch.Tensor:
        read.add(name)
        return plain(self, name, *given)

    Checkpoint.read = spy  # type: ignore[method-assign]
    frozen = Bases().take(recipe, open_checkpoint(recipe.model), torch.device("cpu"), quiet=True)
    Checkpoint.read = plain  # type: ignore[method-assign]
    whole = trainer(base, folder / "whole", cell("full", "spread"))
    model = apply_method(frozen, recipe.method)
    training = Trainer(model, list(whole.rows), whole.training, memory=recipe.memory)
    layers = model.base.placement
    assert isinstance(layers, OwnedLayers)
    names = {name for name in layers.names if not layers.is_here(name)}
    assert names
    assert not read & names
    assert len(read) == len(model.trainable_parameters()) - len(names)
    assert [next(training).loss for _ in range(3)] == [next(whole).loss for _ in range(3)]


@pytest.mark.slow
def test_weights_of_others_are_never_read(base: Path, tmp_path: Path) -> None:
    together(2, loaded_in_part, base, tmp_path)
