"""Combining: several LoRA adapters of one base become one, without training.

    ΔWᵢ = sᵢ Bᵢ Aᵢ                                 A [r, in], B [out, r], s = alpha / r; wᵢ is the adapter's weight

    cat                A = the wᵢ sᵢ Aᵢ above one another, B = the Bᵢ beside one another: Σ wᵢ ΔWᵢ exactly, the ranks add up
    svd                the best approximation of Σ wᵢ ΔWᵢ of a given rank
    linear             A = Σ ±√|wᵢ sᵢ| Aᵢ, B = Σ √|wᵢ sᵢ| Bᵢ, the sign on A alone: rough, its product has cross terms
    ties               like linear, of matrices trimmed to their largest numbers, and averaged where signs agree
                                                                        (Yadav et al. 2023, arXiv:2306.01708)
    dare_linear, dare_ties     numbers are dropped at random and the rest is stretched       (Yu et al. 2023, arXiv:2311.03099)
    magnitude_prune            linear, of matrices trimmed to their largest numbers
    ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd       the same of the ΔWᵢ, then the best approximation

The results are those of PEFT's ``add_weighted_adapter``. One weight of the model is worked on at a time. Knows pairs of
matrices; must not know a model's forward or how a base is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from qlora.errors import MethodError, listed, nearest
from qlora.methods.base import AdaptedModel
from qlora.methods.files import (
    about_base,
    known_base,
    read_about_base,
    read_adapter_tensors,
    read_linears,
    recorded_base,
    save_pairs,
)
from qlora.methods.layout import PREFIX, Fields
from qlora.methods.loading import at_home
from qlora.methods.lora import LoraMethod, rank_of, scaling_of
from qlora.methods.method import generator_of
from qlora.methods.peft_config import read_adapter_config
from qlora.methods.targets import linears_of, matches, peft_targets
from qlora.model import anatomy
from qlora.model.names import OnLoad
from qlora.recipe import Combined

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
WAYS = ("cat", "svd", "linear", *SPARSE, *(f"{way}_svd" for way in SPARSE))
"""What ``how`` may be."""

Pairs = dict[str, tuple[Tensor, Tensor]]
Majority = Literal["total", "frequency"]


def combine(
    adapters: Mapping[str, AdaptedModel | str | Path],
    weights: Mapping[str, float] | Sequence[float],
    how: str = "svd",
    *,
    density: float | None = None,
    rank: int | None = None,
    majority_sign_method: Majority = "total",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Pairs:
    """The combination of ``adapters`` (folders, or loaded ones) as plain LoRA: fp32 (A, B) by module path, ΔW = B A.

    ``weights``: a number for each adapter, by its name or in their order; a negative one takes an adapter away. ``how``:
    one of ``WAYS``. ``density``: the part of all numbers that ``ties``, ``dare`` and ``magnitude_prune`` keep, in (0, 1].
    ``rank``: at most so many ranks for each target with ``svd``, the adapters' largest when left out.
    ``majority_sign_method``: signs are elected by the sum of the numbers (``total``) or by counting (``frequency``).
    ``seed`` decides what DARE drops. ``device`` is where it is computed; the result is on the CPU.

    Where an adapter lacks a target, the others decide there alone. Raises MethodError for what is no LoRA on linears, for
    adapters of different bases, and for different ranks in a way that adds up A and B.
    """
    settings = Settings(density=density, rank=rank, majority_sign_method=majority_sign_method, seed=seed, device=device)
    return _combine(_parts(adapters), weights, how, settings)


class Settings(TypedDict, total=False):
    """What ``combine`` takes beside the adapters, their weights and ``how``."""

    density: float | None
    rank: int | None
    majority_sign_method: Majority
    seed: int
    device: torch.device | str


def save_combined(
    folder: str | Path,
    adapters: Mapping[str, AdaptedModel | str | Path],
    weights: Mapping[str, float] | Sequence[float],
    how: str = "svd",
    **settings: Unpack[Settings],
) -> None:
    """Write what ``combine`` gives into ``folder``: a plain LoRA adapter, which PEFT and servers load too."""
    parts = _parts(adapters)
    pairs = _combine(parts, weights, how, settings)
    known = [part.targets for part in parts]
    # what the adapters' own names reach together are their paths together
    names = set(pairs) if None in known else {name for names in known for name in names or ()}
    recorded = next((part.fingerprint for part in parts if part.fingerprint is not None), None)
    hidden = {name for name in names if any(matches(one, name) for part in parts for one in part.hidden)}
    targets: Fields = {"target_modules": sorted(names - hidden)}
    if hidden:
        targets["target_parameters"] = sorted(f"{name}.weight" for name in hidden)
    loaded = _one_loaded(adapters)
    on_load = None if loaded is None else OnLoad(loaded.base.model)
    save_pairs(folder, pairs, targets, parts[0].about, recorded, names=on_load)


@dataclass(frozen=True)
class Part:
    """One adapter: its pairs by module path, not scaled, and what is known of its base."""

    name: str
    pairs: Pairs
    scaling: dict[str, float]
    targets: tuple[str, ...] | None
    """The names that reach exactly its paths, where they are known."""
    hidden: tuple[str, ...]
    """Those of linears that PEFT has to be told of by their weights: see ``peft_targets``."""
    about: Fields
    fingerprint: str | None


@dataclass(frozen=True)
class Way:
    """How to combine, checked."""

    how: str
    density: float
    rank: int | None
    majority_sign_method: Majority
    seed: int
    device: torch.device

    def add_up(self, tensors: Sequence[Tensor], weights: Sequence[float], names: Sequence[str]) -> Tensor:
        """One tensor of several of the same shape; ``names`` decide, with the seed, what is dropped at random."""
        kept = torch.stack([self.thinned(tensor, name) for tensor, name in zip(tensors, names, strict=True)])
        weighted = kept * torch.tensor(weights, device=kept.device).view(-1, *[1] * (kept.dim() - 1))
        if "ties" not in self.how:
            return weighted.sum(0)
        votes = kept if self.majority_sign_method == "total" else kept.sign()
        elected = torch.where(votes.sum(0) >= 0, 1, -1)
        agrees = kept.sign() == elected  # zeros agree with nobody
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def thinned(self, tensor: Tensor, name: str) -> Tensor:
        """``tensor`` with a part ``density`` of its numbers: the largest, or, stretched to keep the mean, random ones."""
        if self.density >= 1:
            return tensor
        if "dare" in self.how:
            return tensor * drawn(tensor, self.density, self.seed, name) / self.density
        flat = tensor.flatten()
        largest = flat.abs().topk(int(self.density * len(flat))).indices
        return torch.zeros_like(flat).index_copy(0, largest, flat[largest]).view_as(tensor)


def drawn(like: Tensor, density: float, seed: int, name: str) -> Tensor:
    """Ones with the probability ``density``, else zeros; the same on every device."""
    chances = torch.full(like.shape, density)
    return torch.bernoulli(chances, generator=generator_of(seed, name)).to(like)


@torch.no_grad()
def _combine(parts: list[Part], weights: Mapping[str, float] | Sequence[float], how: str, settings: Settings) -> Pairs:
    way, shares = _way(how, **settings), _shares(parts, weights)
    combined: Pairs = {}
    largest = max(len(lora_A) for part in parts for lora_A, _ in part.pairs.values())
    rank = largest if way.rank is None else way.rank
    for path in dict.fromkeys(path for part in parts for path in part.pairs):
        here = [(part, share) for part, share in zip(parts, shares, strict=True) if path in part.pairs]
        lora_A, lora_B = _combine_at(path, here, way, rank)
        combined[path] = (lora_A.float().cpu(), lora_B.float().cpu())
    return combined


def _combine_at(path: str, here: list[tuple[Part, float]], way: Way, rank: int) -> tuple[Tensor, Tensor]:
    """The pair for the one target ``path`` of the adapters that have it."""
    many_A = [part.pairs[path][0].to(way.device) for part, _ in here]
    many_B = [part.pairs[path][1].to(way.device) for part, _ in here]
    names = [f"{part.name}:{path}" for part, _ in here]
    factors = [share * part.scaling[path] for part, share in here]
    if way.how in ("cat", "svd"):
        lora_A = torch.cat([factor * A for factor, A in zip(factors, many_A, strict=True)])
        lora_B = torch.cat(many_B, 1)
        return (lora_A, lora_B) if way.how == "cat" else _leading_of_pair(lora_A, lora_B, rank)
    if way.how.endswith("_svd"):
        # the scaling is part of ΔW, so the election of signs sees it; the weights come later, as in PEFT
        deltas = [part.scaling[path] * (B @ A) for (part, _), A, B in zip(here, many_A, many_B, strict=True)]
        return _leading(way.add_up(deltas, [share for _, share in here], names), rank)
    ranks = {part.name: len(part.pairs[path][0]) for part, _ in here}
    if len(set(ranks.values())) > 1:
        told = listed([f"{name} {number}" for name, number in ranks.items()])
        raise MethodError(
            f"At {path} the adapters have different ranks ({told}), but {way.how} adds their A and B up; combine with how="
            f"'{'svd' if way.how == 'linear' else f'{way.how}_svd'}' or 'cat'."
        )
    roots = [math.sqrt(abs(factor)) for factor in factors]
    signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
    lora_A = way.add_up(many_A, signed, [f"{name}:A" for name in names])
    lora_B = way.add_up(many_B, roots, [f"{name}:B" for name in names])
    return lora_A, lora_B


def _leading_of_pair(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best (A, B) of ``rank`` for B A [out, in], which is never made: only a matrix of its rank is decomposed."""
    Q_A, R_A = torch.linalg.qr(lora_A.double().t())
    Q_B, R_B = torch.linalg.qr(lora_B.double())
    small_A, small_B = _leading(R_B @ R_A.t(), rank)
    return small_A @ Q_A.t(), Q_B @ small_B


def _leading(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best (A, B) of at most ``rank`` for ``delta`` [out, in]; the singular values go into B, as in PEFT."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return Vh[:rank], U[:, :rank] * S[:rank]


def _way(
    how: str,
    density: float | None = None,
    rank: int | None = None,
    majority_sign_method: Majority = "total",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Way:
    """Raises MethodError for a way that there is not, and for settings that it has not or lacks."""
    if how not in WAYS:
        raise MethodError(
            f"There is no way '{how}' of combining; expected one of {listed(WAYS, 12)}.{nearest(how, WAYS)}"
        )
    if density is None and how.startswith(SPARSE):
        raise MethodError(f"Combining with {how} needs density, the part of all numbers that it keeps, such as 0.5.")
    if density is not None and not how.startswith(SPARSE):
        raise MethodError(f"density is {density}, but {how} keeps all numbers; leave density out.")
    if density is not None and not 0 < density <= 1:
        raise MethodError(f"density is {density}; expected more than 0 and at most 1.")
    if rank is not None and not how.endswith("svd"):
        raise MethodError(
            f"rank is {rank}, but {how} keeps the adapters' ranks; leave rank out or combine with how='svd'."
        )
    if rank is not None and rank < 1:
        raise MethodError(f"rank is {rank}; expected 1 or more.")
    if majority_sign_method not in ("total", "frequency"):
        raise MethodError(f"majority_sign_method is '{majority_sign_method}'; expected 'total' or 'frequency'.")
    return Way(how, 1.0 if density is None else density, rank, majority_sign_method, seed, torch.device(device))


def _shares(parts: list[Part], weights: Mapping[str, float] | Sequence[float]) -> list[float]:
    """The adapters' weights in their order."""
    names = [part.name for part in parts]
    if isinstance(weights, Mapping):
        if wrong := sorted(set(names) ^ set(weights)):
            raise MethodError(
                f"The adapters are {listed(names)}, and the weights are not theirs: {listed(wrong)} differ."
            )
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise MethodError(f"There are {len(weights)} weights for {len(names)} adapters; expected one for each.")
    shares = [float(weight) for weight in weights]
    if not all(math.isfinite(share) for share in shares):
        raise MethodError(f"The weights are {listed(shares)}; expected finite numbers.")
    return shares


def _parts(adapters: Mapping[str, AdaptedModel | str | Path]) -> list[Part]:
    """What is combined. Raises MethodError where these are no LoRA on linears of one base."""
    if not adapters:
        raise MethodError("There are no adapters to combine; expected at least one by its name.")
    loaded = _one_loaded(adapters)
    parts = [
        _loaded(name, adapter) if isinstance(adapter, AdaptedModel) else _read(name, Path(adapter), loaded)
        for name, adapter in adapters.items()
    ]
    first: dict[str, Part] = {}
    for part in parts:
        for path, (lora_A, lora_B) in part.pairs.items():
            other = first.setdefault(path, part)
            theirs = (len(other.pairs[path][1]), other.pairs[path][0].shape[1])
            if (here := (len(lora_B), lora_A.shape[1])) != theirs:
                raise MethodError(
                    f"'{other.name}' and '{part.name}' were trained on different bases: {path} is {list(theirs)} in one and "
                    f"{list(here)} in the other; combine adapters of one base."
                )
    told = [part for part in parts if part.fingerprint is not None]
    if different := [part.name for part in told if part.fingerprint != told[0].fingerprint]:
        raise MethodError(
            f"'{told[0].name}' and '{different[0]}' were trained on different bases (other configuration, tokenizer or "
            "tensors); combine adapters of one base."
        )
    return parts


def _one_loaded(adapters: Mapping[str, AdaptedModel | str | Path]) -> AdaptedModel | None:
    """Whose model says what modules are called; in files, names may be those of old checkpoints."""
    return next((adapter for adapter in adapters.values() if isinstance(adapter, AdaptedModel)), None)


def _loaded(name: str, adapter: AdaptedModel) -> Part:
    """A loaded adapter of any method that is a plain LoRA in the end."""
    if len(adapter.methods) > 1:
        raise _no_lora(name, " and ".join(method.section.name for method in adapter.methods))
    method = adapter.methods[0]
    if (why := method.layout.why_not_portable()) is not None:
        raise MethodError(f"The adapter '{name}' cannot be combined: {why}.")
    folded = method.layout.pairs()
    scaling = {path: scaling_of(method.section, path) if isinstance(method, LoraMethod) else 1.0 for path in folded}
    pairs = {path: (lora_A, lora_B / scaling[path]) for path, (lora_A, lora_B) in folded.items()}
    fields = peft_targets(pairs, adapter.paths, mixture=anatomy.is_mixture(adapter.base.model))
    hidden = linears_of(fields.get("target_parameters", ()))
    targets = (*fields["target_modules"], *hidden)
    return Part(name, pairs, scaling, targets, hidden, about_base(adapter), known_base(adapter.base))


def _read(name: str, folder: Path, loaded: AdaptedModel | None) -> Part:
    """A LoRA adapter's files; what more there is to other methods only shows on their base."""
    section = read_adapter_config(folder)
    if section.name != "lora" or section.init in ("pissa", "loftq"):
        kind = "several methods" if isinstance(section, Combined) else section.name
        raise _no_lora(name, kind if section.name != "lora" else f"lora with init={section.init}")
    halves: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    tensors: Mapping[str, Tensor] = read_adapter_tensors(folder)
    if loaded is not None:
        tensors = at_home(tensors, loaded.base.model, loaded.paths)
    for key, values in tensors.items():
        path, _, half = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B") or values.dim() != 2 or not key.startswith(PREFIX):
            strange.append(key)
        elif not torch.isfinite(values).all():
            raise MethodError(f"The adapter '{name}' holds values that are not finite, in {key}; use an earlier one.")
        halves.setdefault(path, {})[half] = values.float()
    if strange:
        raise MethodError(
            f"The adapter '{name}' holds {listed(strange, 3)}, which is no LoRA on a linear; combine adapters on linears."
        )
    ranks = {path: rank_of(section, path) for path in halves}
    if odd := [
        path
        for path, pair in halves.items()
        if len(pair) != 2 or not len(pair["lora_A"]) == pair["lora_B"].shape[1] == ranks[path]
    ]:
        raise MethodError(
            f"The adapter '{name}' in '{folder}' has no pair of the rank that its config gives at {listed(odd, 3)}; save it "
            "again."
        )
    return Part(
        name=name,
        pairs={path: (pair["lora_A"], pair["lora_B"]) for path, pair in halves.items()},
        scaling={path: scaling_of(section, path) for path in halves},
        targets=section.target_modules if isinstance(section.target_modules, tuple) else None,
        hidden=read_linears(folder),
        about=read_about_base(folder),
        fingerprint=recorded_base(folder),
    )


def _no_lora(name: str, kind: str) -> MethodError:
    return MethodError(
        f"The adapter '{name}' is {kind}, and only plain LoRA is combined from its files; combine it loaded, if it is a LoRA "
        "in the end (AdaLoRA, PiSSA), or merge it into the base."
    )
