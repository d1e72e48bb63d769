"""What fine-tuning did to the weights: each matrix's change ΔW, by layer and module, one matrix in memory at a time.

    change_of(model)       its singular values, how they are spread, ‖ΔW‖ / ‖W₀‖, and directions that W₀ had none like
    directions_of(model)   the leading directions of its rows, for ``overlaps`` with those of another run

W₀ is the weight of step 0: what the adapter was trained beside, dequantised where the base is packed (PiSSA, LoftQ: with what the pair
began as, which is the original weight as near as its quantisation lets it). Full fine-tuning has no W₀ any more, and the
checkpoint gives it, tensor by tensor. What is no change of a matrix (prompts, bottlenecks, biases) is told in a sentence
and not as zeros. Knows adapted models; must not know runs, or what a page shows of this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora.errors import DataError, MethodError, listed
from qlora.evaluation.spectrum import (
    Directions,
    Intruders,
    effective_rank,
    elsewhere,
    factored,
    norm,
    overlap,
    rank_of_energy,
    singular_values,
)
from qlora.methods.base import AdaptedModel
from qlora.methods.decomposition import leading
from qlora.methods.full import FullMethod
from qlora.methods.lora_experts import LoraExperts
from qlora.methods.method import Method, generator_of
from qlora.methods.modules import ModulesMethod, TrainedModule
from qlora.methods.planted import Planted
from qlora.model.checkpoint import Checkpoint
from qlora.model.load import turned
from qlora.model.nf4 import FrozenLinear, at_hand, dense_weight, is_linear, is_transposed

NO_MATRIX = {
    "bitfit": "BitFit trains biases, which are vectors: it changed no matrix.",
    "prompt_tuning": "Prompt tuning puts vectors before the text: it changed no weight of the base.",
    "p_tuning": "P-tuning puts vectors before the text: it changed no weight of the base.",
    "prefix_tuning": "Prefix tuning puts keys and values before the text's: it changed no weight of the base.",
    "bottleneck": "Bottleneck adapters are small networks of their own: they changed no weight of the base.",
    "new_tokens": "New tokens have rows of their own in the embedding and the head: they changed no other row.",
}
"""What there is to say of the methods whose change is no matrix."""


@dataclass(frozen=True)
class MatrixChange:
    """What became of one matrix. Rows are outputs and columns inputs; an embedding's rows are tokens."""

    path: str
    """In the untouched model: ``model.layers.3.self_attn.q_proj``; of one expert ``….experts.down_proj[5]``."""
    rows: int
    columns: int
    values: tuple[float, ...]
    """All singular values of ΔW that may differ from 0, from the largest: of a rank-r adapter r of them."""
    norm: float
    """‖ΔW‖ (Frobenius)."""
    norm_before: float
    """‖W₀‖ (Frobenius)."""
    intruders: Intruders | None = None
    """Of W₀ + ΔW; None where they were not asked for."""
    control: Intruders | None = None
    """Of W₀ and a change with the same singular values in random directions: what a change of this size makes anywhere."""

    @property
    def layer(self) -> int | None:
        """The number of its layer; None for what stands in none, as a head."""
        return _parted(self.path)[0]

    @property
    def module(self) -> str:
        """Its path inside its layer: ``self_attn.q_proj``."""
        return _parted(self.path)[1]

    @property
    def relative(self) -> float:
        """‖ΔW‖ / ‖W₀‖; infinite where there was nothing before."""
        return self.norm / self.norm_before if self.norm_before else (float("inf") if self.norm else 0.0)

    @cached_property
    def effective_rank(self) -> float:
        """Between 0 (no change) and the number of values: how evenly they are spread, by their entropy."""
        return effective_rank(self.values)

    @cached_property
    def rank_90(self) -> int:
        """How many leading values hold 90 % of ΔW's energy, ‖ΔW‖²."""
        return rank_of_energy(self.values)


@dataclass(frozen=True)
class Change:
    """What became of every matrix that a model's methods change, in the model's order; ``left_out``: a sentence for all else."""

    matrices: tuple[MatrixChange, ...]
    left_out: tuple[str, ...] = ()

    def by_module(self) -> dict[str, list[MatrixChange]]:
        """The same module of all layers, in their order, by its path inside a layer."""
        found: dict[str, list[MatrixChange]] = defaultdict(list)
        for one in self.matrices:
            found[one.module].append(one)
        return dict(found)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Change:
        """What ``to_json`` gave. Raises DataError for anything else."""
        try:
            matrices = [
                MatrixChange(
                    **{
                        **one,
                        "values": tuple(map(float, one["values"])),
                        **{key: one[key] and Intruders(**one[key]) for key in ("intruders", "control")},
                    }
                )
                for one in values["matrices"]
            ]
            return cls(tuple(matrices), tuple(values["left_out"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"This is no change of weights as Change.to_json gives it ({type(error).__name__}: {error})."
            ) from None

    def __str__(self) -> str:
        """In Markdown a line for each module: the medians over its layers, of intruders the mean; then what was left out."""
        lines = [
            f"| {'module':<24} | matrices | ‖ΔW‖ / ‖W₀‖ | effective rank | rank at 90 % | energy of intruders | of a random change's |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for module, several in self.by_module().items():
            strange = [" | ".join(_share([getattr(one, key) for one in several]) for key in ("intruders", "control"))]
            figures = [(one.relative, one.effective_rank, one.rank_90) for one in several]
            relative, spread, rank = (median(column) for column in zip(*figures, strict=True))
            lines.append(
                f"| {module:<24} | {len(several):>8} | {relative:>11.4f} | {spread:>14.1f} | {rank:>12g} | {strange[0]} |"
            )
        return "\n".join([*(lines if self.matrices else []), *self.left_out])


def _share(several: list[Intruders | None]) -> str:
    """The mean energy of intruders, for people."""
    known = [one.energy for one in several if one is not None]
    return f"{sum(known) / len(known):>19.2%}" if known else f"{'–':>19}"


def _parted(path: str) -> tuple[int | None, str]:
    """(layer, the path inside it): the first number in a path is its layer's."""
    parts = path.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    return (None, path) if place is None else (int(parts[place]), ".".join(parts[place + 1 :]))


# ── of a model ────────────────────────────────────────────────────────────────────────────────────────────────────────


class Matrix(NamedTuple):
    """One matrix of a model, read when it is asked for."""

    path: str
    before: Callable[[], Tensor]
    """W₀ [rows, columns] in fp32, a copy."""
    pair: tuple[Tensor, Tensor] | None
    """(A, B) with ΔW = B A, where that is all."""
    after: Callable[[], Tensor] | None = None
    """W₀ + ΔW where there is no pair, a copy; in float64 where it is computed and not read."""

    def delta(self, before: Tensor) -> Tensor:
        """ΔW [rows, columns] in fp32."""
        if self.pair is not None:
            return self.pair[1] @ self.pair[0]
        assert self.after is not None
        return self.after().sub_(before).float()


@torch.no_grad()
def change_of(model: AdaptedModel, intruders: bool = True) -> Change:
    """What became of every matrix that ``model``'s methods change; the model stays as it is.

    ``intruders``: with directions that W₀ had none like, which take all of W₀'s singular vectors and so most of the time.

    Raises MethodError for full fine-tuning of a model that came from no folder, whose weights before are nowhere.
    """
    found = tuple(_measured(matrix, intruders) for matrix in matrices_of(model))
    return Change(found, tuple(_left_out(model)))


def _measured(matrix: Matrix, intruders: bool) -> MatrixChange:
    before = matrix.before()
    rows, columns = before.shape
    if matrix.pair is not None:
        values = factored(*matrix.pair)[1]
        delta = matrix.delta(before) if intruders else None
        size = float(values.square().sum().sqrt())
    else:
        delta = matrix.delta(before)
        values, size = singular_values(delta), norm(delta)
    strange: dict[str, Intruders] = {}
    if delta is not None and intruders:
        old, generator = Directions(before), generator_of(0, matrix.path)
        strange["intruders"] = old.intruders(delta.add_(before), generator)
        strange["control"] = old.intruders(elsewhere(values, rows, columns, generator).add_(before), generator)
    return MatrixChange(matrix.path, rows, columns, tuple(values.tolist()), size, norm(before), **strange)


@torch.no_grad()
def directions_of(model: AdaptedModel, most: int = 64) -> dict[str, Tensor]:
    """By path, the ``most`` leading right singular vectors [k, columns] of ΔW, in fp32 on the CPU: the inputs that it answers to.

    Of a pair they are exact, of a dense change a subspace iteration's (``methods/decomposition.py``).
    """
    found = {}
    for matrix in matrices_of(model):
        if matrix.pair is not None:
            right = factored(*matrix.pair)[2]
        else:
            delta = matrix.delta(matrix.before())
            right = leading(delta, min(most, *delta.shape), generator_of(0, matrix.path))[2]
        found[matrix.path] = right[:most].float().cpu()
    return found


def overlaps(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By path, φ(i, j) [k, l] between the directions of two runs on one base, for every matrix that both changed.

    Raises MethodError where there is none, or one has other columns.
    """
    both = [path for path in one if path in other]
    if not both:
        raise MethodError(
            f"The two runs changed no matrix in common ({listed(one, 2)}; {listed(other, 2)}); expected two on one base."
        )
    if odd := [path for path in both if one[path].shape[1] != other[path].shape[1]]:
        raise MethodError(f"{listed(odd, 3)} has other columns in the two runs; expected two on one base.")
    return {path: overlap(one[path], other[path]) for path in both}


def _left_out(model: AdaptedModel) -> Iterator[str]:
    """A sentence for each method, or for some of what it trains, that is no change of a matrix."""
    for method in model.methods:
        if (sentence := NO_MATRIX.get(method.section.name)) is not None:
            yield sentence
        elif isinstance(method, FullMethod | ModulesMethod):
            shown = {path for path, _ in _whole(model, method)}
            if others := [name for name in method.parameters() if name.removesuffix(".weight") not in shown]:
                yield f"{listed(others, 2)} trained too and {'is' if len(others) == 1 else 'are'} left out: no single matrices."


def matrices_of(model: AdaptedModel) -> Iterator[Matrix]:
    """Every matrix that the model's methods change."""
    for method in model.methods:
        if isinstance(method, FullMethod | ModulesMethod):
            yield from (Matrix(path, before, None, after) for path, (before, after) in _whole(model, method))
        elif method.section.name not in NO_MATRIX:
            for path, layer in method.planted.items():
                if isinstance(layer, LoraExperts):
                    yield from (_expert(model, path, layer, expert) for expert in range(layer.base.count))
                else:
                    yield _planted(model, path, layer)


Read = Callable[[], Tensor]


def _planted(model: AdaptedModel, path: str, layer: Planted) -> Matrix:
    frozen = _weight(model, layer.base, "weight")

    def after() -> Tensor:
        # in float64: a change of a thousandth of its weight would lose three of fp32's seven digits
        return turned(layer.base, layer.merged("weight", turned(layer.base, frozen().double())))

    return Matrix(path, lambda: layer.at_first(frozen()), layer.low_rank(), after)


def _expert(model: AdaptedModel, path: str, layer: LoraExperts, expert: int) -> Matrix:
    lora_A, lora_B = (half.float() for half in layer.pair(expert))

    def before() -> Tensor:
        with at_hand(layer.base):
            matrix = layer.base.dequantise(expert, model.base.compute_dtype).float()
        return matrix.t() if layer.base.transposed else matrix

    return Matrix(f"{path}[{expert}]", before, (lora_A, lora_B * layer.scaling))


def _whole(model: AdaptedModel, method: Method) -> Iterator[tuple[str, tuple[Read, Read]]]:
    """(path, what reads W₀, what reads W₀ + ΔW) of the matrices that trained as they are."""
    if isinstance(method, FullMethod):
        checkpoint, names = model.base.checkpoint, model.base.names or {}
        if checkpoint is None:
            raise MethodError(
                f"'{model.base.name}' came from no folder, so what its weights were before full fine-tuning is nowhere to be "
                "read; load the base with load_base."
            )
        stored = {id(values): names[alias] for alias, values in method.aliases.items() if alias in names}
        owners = {  # by identity: while it trains, layers are wrapped and have other paths
            id(values): (module, key)
            for module in model.model.modules()
            for key, values in module.named_parameters(recurse=False)
        }
        for name, values in method.trained.items():
            if values.dim() in (2, 4) and id(values) in stored:
                module, key = owners[id(values)]
                before = partial(_read, checkpoint, stored[id(values)], module, values)
                yield name.removesuffix(".weight"), (before, _weight(model, module, key))
        return
    for path, layer in method.planted.items():
        assert isinstance(layer, TrainedModule)
        for name, values in layer.own_parameters().items():
            if values.dim() in (2, 4):
                owner, _, key = name.rpartition(".")
                pair = [_weight(model, whole.get_submodule(owner), key) for whole in (layer.base, layer.module)]
                yield f"{path}.{name}".removesuffix(".weight"), (pair[0], pair[1])


def _read(checkpoint: Checkpoint, name: str, module: nn.Module, like: Tensor) -> Tensor:
    """A weight as it was before it trained: the checkpoint's, in the dtype that it began to train in."""
    return _matrix(module, checkpoint.read(name).to(like.device, like.dtype))


def _weight(model: AdaptedModel, module: nn.Module, key: str) -> Read:
    """Reads a weight that is here or waits elsewhere, quantised or not."""

    def read() -> Tensor:
        if is_linear(module) and key == "weight":
            dtype = module.compute_dtype if isinstance(module, FrozenLinear) else torch.float32
            return dense_weight(module, dtype).to(model.device, torch.float32, copy=True)
        return _matrix(module, getattr(module, key).detach().to(model.device))

    return read


def _matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A weight as it lies as a matrix [rows, columns] in fp32, a copy."""
    return (weight.t() if is_transposed(module) else weight.flatten(1)).to(torch.float32, copy=True)
