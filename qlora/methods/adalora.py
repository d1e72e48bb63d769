"""AdaLoRA: ranks move to the weights that need them (Zhang et al. 2023, arXiv:2303.10512).

    y = x Wᵀ + b + scaling · dropout(x) (E ⊙ A)ᵀ Bᵀ     A [R, in], E [R, 1], B [out, R], scaling = alpha / (R + 1e-5)

A row of A, its number in E and a column of B are a triplet: a singular value with its two vectors, which a penalty keeps
close to orthogonal. Every target begins with R = ``initial_r`` triplets; the budget of all of them together then falls:

    R·n ┤━━━━━━━╮
        │        ╲                  importance of a number w      I = |w · ∂L/∂w|, smoothed: Ī ← β₁ Ī + (1 − β₁) I
        │          ╲                its uncertainty               Ū ← β₂ Ū + (1 − β₂) |I − Ī|
    r·n ┤            ╰───━━━━━━     a triplet's score             Ī·Ū of E, plus the mean Ī·Ū of A's row, and of B's column
        └───────┴──────────┴─────
              warmup     final      every ``interval`` steps, and at ``final``: E = 0 in all triplets below the budget

Until ``final`` a triplet may come back, because its E goes on learning; after it the choice stands. The scaling never
follows the rank. Every detail is PEFT's: scores, ties, and what counts at which step. Knows this formula and this
schedule; must not know how W is stored, adapter files, or the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.methods.layout import Fields, Layout, padded, whole
from qlora.methods.lora import AdaptedLinear, add_delta, any_transposed, as_autocast, plain_config
from qlora.methods.method import Method
from qlora.methods.planted import Planted
from qlora.methods.targets import choose_targets, target_names
from qlora.model.base import Base
from qlora.model.nf4 import features
from qlora.recipe.methods import AdaLoRA

PARTS = ("lora_A", "lora_E", "lora_B")
AVERAGES = ("importance", "uncertainty")
FIRST_SPREAD = 0.02  # the standard deviation that A and B begin with
NOMINAL_STEPS = 1000  # total_step in adapter_config.json before the first step, when nobody knows it


class AdaLoraLinear(Planted):
    """A frozen linear with triplets beside it; see the formula above. ``unread`` is as in ``LoraLinear``."""

    def __init__(
        self, base: nn.Module, lora_A: Tensor, lora_E: Tensor, lora_B: Tensor, scaling: float, dropout: float
    ) -> None:
        super().__init__(base)
        self.in_features, self.out_features = lora_A.shape[1], lora_B.shape[0]
        self.lora_A = nn.Parameter(lora_A)
        self.lora_E = nn.Parameter(lora_E)
        self.lora_B = nn.Parameter(lora_B)
        self.scaling = scaling
        self.dropout = dropout
        self.unread = False

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out] in the dtype of ``x``, or in that of ``torch.autocast``."""
        if not self.enabled:
            return self.base(x)
        dropout = self.dropout if self.training else 0.0
        return AdaptedLinear.apply(as_autocast(x), self.lora_A * self.lora_E, self.lora_B, self, dropout)

    @torch.no_grad()
    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(E ⊙ A, scaling · B) without the triplets that do nothing; one such where there is no other."""
        if self.lora_E.is_meta:  # they cannot be counted: the most that it may be
            return self.lora_A.float(), self.lora_B.float()
        on = self.lora_E.flatten() != 0
        on[0] |= ~on.any()
        return self.lora_A[on].float() * self.lora_E[on].float(), self.lora_B[:, on].float() * self.scaling

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight``, [out, in] (Conv1D: [in, out]) in fp32, plus scaling · B (E ⊙ A), in place."""
        if name == "weight":
            add_delta(self, values, self.lora_A.float() * self.lora_E.float(), self.lora_B)
        return values

    def penalty(self) -> Tensor:
        """‖A Aᵀ − 1‖ and ‖Bᵀ B − 1‖ (Frobenius), [2] in fp32."""
        norms = []
        for vectors in (self.lora_A.float(), self.lora_B.float().t()):
            one = torch.eye(len(vectors), device=vectors.device)
            norms.append(torch.linalg.matrix_norm(vectors @ vectors.t() - one))
        return torch.stack(norms)

    def extra_repr(self) -> str:
        return f"initial_r={len(self.lora_E)}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class AdaLoraLayout(Layout):
    """PEFT's AdaLoraConfig, and triplets as bare parameters."""

    method: AdaLoraMethod
    peft_type = "ADALORA"
    only = {"bias": ("none", None), "init_lora_weights": (True, False, None)}  # noqa: RUF012
    read = frozenset(
        [
            "r",
            "init_r",
            "target_r",
            "lora_alpha",
            "lora_dropout",
            "target_modules",
            "total_step",
            "tinit",
            "tfinal",
            "deltaT",
            "beta1",
            "beta2",
            "orth_reg_weight",
            "rank_pattern",
            "fan_in_fan_out",
        ]
    )

    def fitted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """``tensors`` with R triplets everywhere: those that PEFT leaves out of its files are filled up with zeros."""
        filled = dict(super().fitted(tensors))
        rank = self.method.section.initial_r
        for path in self.method.planted:
            keys = [self.key(f"{path}.{part}") for part in PARTS]
            if any(key not in tensors or tensors[key].dim() != 2 for key in keys):
                continue
            lora_A, lora_E, lora_B = (tensors[key] for key in keys)
            if len(lora_A) < rank and len(lora_A) == len(lora_E) == lora_B.shape[1]:
                shapes = ((rank, lora_A.shape[1]), (rank, lora_E.shape[1]), (lora_B.shape[0], rank))
                filled |= {key: padded(tensors[key], *shape) for key, shape in zip(keys, shapes, strict=True)}
        return filled

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in; triplets without a singular value are those that were pruned, unless none has one yet."""
        super().load(tensors)
        self.method.loaded()

    def state_shapes(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
        """With averages where there are some: not before the first step, nor after the last allocation."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{path}.kept": tuple(kept.shape) for path, kept in self.method.kept.items()
        }
        if any(key.endswith(AVERAGES) for key in tensors):
            for name, values in self.method.parameters().items():
                shapes |= {f"{name}.{what}": tuple(values.shape) for what in AVERAGES}
        return {**shapes, "total_steps": ()}

    def peft_config(self, every_path: list[str]) -> Fields:
        """All triplets are in the file, so there is no ``rank_pattern`` to cut them by."""
        section, planted, total = self.method.section, self.method.planted, self.method.total or NOMINAL_STEPS
        first, last = self.method.turns(total)
        # with PEFT's default of r, which AdaLoRA does not use
        plain = plain_config(
            8, {"target_modules": target_names(planted, every_path)}, section.dropout, any_transposed(planted)
        )
        return {
            **plain,
            "lora_alpha": whole(section.alpha),
            "init_r": section.initial_r,
            "target_r": section.r,
            "total_step": total,
            "tinit": first,
            "tfinal": total - last,
            "deltaT": section.interval,
            "beta1": section.beta1,
            "beta2": section.beta2,
            "orth_reg_weight": section.orthogonality,
            "rank_pattern": None,
        }

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields:
        """Its ``rank_pattern`` says which triplets its file lacks, which the file shows."""
        total, first, final = values.get("total_step"), values.get("tinit", 0), values.get("tfinal", 0)
        if not (isinstance(total, int) and isinstance(first, int) and isinstance(final, int) and total > 0):
            raise MethodError(
                f"The AdaLoRA adapter sets total_step={total!r:.20}, tinit={first!r:.20} and tfinal={final!r:.20}; expected "
                "whole numbers of steps."
            )
        names = {"init_r": "initial_r", "target_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout"}
        names |= {"deltaT": "interval", "orth_reg_weight": "orthogonality"}
        names |= {name: name for name in ("beta1", "beta2", "target_modules")}
        found = {ours: values[theirs] for theirs, ours in names.items() if theirs in values}
        return {"name": "adalora", **found, "warmup": first / total, "final": final / total}

    def why_not_portable(self) -> str | None:
        """Once the triplets are multiplied out it is plain LoRA."""
        return None

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {path: layer.low_rank() for path, layer in self.method.planted.items()}  # type: ignore[misc]


class AdaLoraMethod(Method):
    """How the triplets are planted, measured and pruned."""

    by_rows = True
    layout_class = AdaLoraLayout
    section: AdaLoRA

    def __init__(self, section: AdaLoRA, base: Base, seed: int = 0, values_follow: bool = False) -> None:
        super().__init__(section, base, seed, values_follow)
        self.kept: dict[str, Tensor] = {}
        """By target, which triplets the last allocation kept: bool [R]."""
        self.averages: dict[str, tuple[Tensor, Tensor]] = {}
        """By parameter, the smoothed importance and uncertainty of its numbers, fp32; none before the first step and
        after the last allocation."""
        self.total: int | None = None
        """How many steps there are in all; None until training says."""

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """Raises MethodError where a target's smaller side is below ``initial_r``."""
        targets = choose_targets(model, self.section.target_modules)
        rank = self.section.initial_r
        thin = [f"{path} {list(features(linear))}" for path, linear in targets.items() if rank > min(features(linear))]
        if thin:
            raise MethodError(
                f"method.initial_r is {rank}, more than the smaller side of {listed(thin, 3)}; lower it or leave these out "
                "of method.target_modules."
            )
        planted: dict[str, Planted] = {path: self.new_layer(path, linear) for path, linear in targets.items()}
        self.kept = {path: torch.ones(rank, dtype=torch.bool, device=self.device) for path in targets}
        return planted

    def new_layer(self, path: str, linear: nn.Module) -> AdaLoraLinear:
        """New triplets on ``linear``: A and B normal, drawn on the CPU in fp32, E zero, so that nothing changes at first.

        E is in fp32 whatever dtype A and B have, and so is its product with A, through which A gets its gradient.
        """
        outputs, inputs = features(linear)
        rank, meta = self.section.initial_r, self.device.type == "meta"
        lora_A = torch.empty(rank, inputs, device="meta" if meta else None)
        lora_B = torch.empty(outputs, rank, device=lora_A.device)
        if not meta:
            generator = self.generator(path)
            lora_A.normal_(std=FIRST_SPREAD, generator=generator)
            lora_B.normal_(std=FIRST_SPREAD, generator=generator)
        return AdaLoraLinear(
            linear,
            lora_A.to(self.device, self.dtype),
            torch.zeros(rank, 1, device=self.device, dtype=torch.float32),
            lora_B.to(self.device, self.dtype),
            self.section.alpha / (rank + 1e-5),
            self.section.dropout,
        )

    def penalty(self) -> Tensor | None:
        """``orthogonality`` times the mean, over all A and B, of their distance from orthogonal."""
        if self.section.orthogonality == 0:
            return None
        return self.section.orthogonality * torch.cat([layer.penalty() for layer in self.planted.values()]).mean()

    # ── the schedule ──────────────────────────────────────────────────────────────────────────────────────────────────

    def turns(self, total: int) -> tuple[int, int]:
        """(the last step with the full budget, the step of the last allocation) of ``total`` steps.

        Example: 100 steps, warmup 0.1, final 0.3 → (10, 70)
        """
        first = min(round(self.section.warmup * total), total - 1)
        return first, max(total - round(self.section.final * total), first + 1)

    def budget(self, step: int, total: int) -> int:
        """The triplets that are left at ``step``, of all targets together: a cubic fall from R·n to r·n."""
        first, last = self.turns(total)
        most, least = (rank * len(self.planted) for rank in (self.section.initial_r, self.section.r))
        left = min(1.0, max(0.0, 1 - (step - first) / (last - first)))
        return int((most - least) * left**3 + least)

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Measure importances until the last allocation, allocate when it is time, and keep pruned triplets pruned after.

        Where the step of the last allocation was skipped, the next one makes up for it.
        """
        self.total = total
        first, last = self.turns(total)
        late = step > last and bool(self.averages)
        if step < last or (step == last and not self.averages):
            self.measure()
        if step == last or late or (first < step < last and step % self.section.interval == 0):
            self.allocate(self.budget(step, total))
        if step >= last:
            self.averages = {}
            self.prune()

    def measure(self) -> None:
        """Take this step's importances into the averages."""
        beta1, beta2 = self.section.beta1, self.section.beta2
        for name, values in self.parameters().items():
            if name not in self.averages:
                like = torch.zeros_like(values, dtype=torch.float32)
                self.averages[name] = like, like.clone()
            importance, uncertainty = self.averages[name]
            if values.grad is None:  # a module that no forward reached
                now = torch.zeros_like(importance)
            else:
                now = (values.float() * values.grad.float()).abs_()
            importance.mul_(beta1).add_((1 - beta1) * now)
            uncertainty.mul_(beta2).add_((1 - beta2) * (now - importance).abs_())

    def scores(self) -> dict[str, Tensor]:
        """How much each triplet matters, [R] by target."""
        found = {}
        for path in self.planted:
            lora_A, lora_E, lora_B = (torch.mul(*self.averages[f"{path}.{part}"]) for part in PARTS)
            found[path] = lora_E.flatten() + (lora_A.mean(1) + lora_B.mean(0))
        return found

    def allocate(self, budget: int) -> None:
        """Keep the ``budget`` triplets with the highest scores of all targets, and prune the others.

        As in PEFT all that are equal to the highest score pruned are pruned with it.
        """
        scores = self.scores()
        every = torch.cat(list(scores.values()))
        if (pruned := len(every) - budget) > 0:
            threshold = torch.kthvalue(every, pruned).values
            self.kept = {path: values > threshold for path, values in scores.items()}
        self.prune()

    @torch.no_grad()
    def prune(self) -> None:
        """Set E to zero where the last allocation kept nothing."""
        for path, layer in self.planted.items():
            layer.lora_E.masked_fill_(~self.kept[path].unsqueeze(1), 0)

    # ── what came of it ───────────────────────────────────────────────────────────────────────────────────────────────

    @torch.no_grad()
    def ranks(self) -> dict[str, int]:
        """The triplets of each target that do something; before the first step that is none, and ``initial_r`` is said."""
        found = {path: int(layer.lora_E.count_nonzero()) for path, layer in self.planted.items()}
        return found if any(found.values()) else {path: len(kept) for path, kept in self.kept.items()}

    def report(self) -> dict[str, object]:
        """The ranks that the budget was spent on."""
        return {"ranks": self.ranks()}

    # ── for a resumed run ─────────────────────────────────────────────────────────────────────────────────────────────

    def loaded(self) -> None:
        """Values have come from a file: its triplets without a singular value are pruned, unless none has one yet."""
        on = {path: layer.lora_E.detach().flatten() != 0 for path, layer in self.planted.items()}
        begun = any(bool(values.any()) for values in on.values())
        self.kept = on if begun else {path: torch.ones_like(values) for path, values in on.items()}
        self.averages = {}

    def state(self) -> dict[str, Tensor]:
        """Which triplets are kept, the averages as long as there are any, and all steps (0 before the first).

        On the meta device, where room is counted, with the averages that there will be.
        """
        averages = self.averages
        if self.device.type == "meta":
            like = {name: torch.empty_like(values, dtype=torch.float32) for name, values in self.parameters().items()}
            averages = {name: (values, torch.empty_like(values)) for name, values in like.items()}
        state = {f"{path}.kept": kept for path, kept in self.kept.items()}
        for name, pair in averages.items():
            state |= {f"{name}.{what}": values for what, values in zip(AVERAGES, pair, strict=True)}
        return {**state, "total_steps": torch.tensor(self.total or 0)}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state`` gave."""
        self.kept = {path: tensors[f"{path}.kept"].to(self.device, torch.bool, copy=True) for path in self.kept}
        self.total = int(tensors["total_steps"]) or None
        self.averages = {}
        for name in self.parameters():
            if f"{name}.{AVERAGES[0]}" in tensors:
                importance, uncertainty = (
                    tensors[f"{name}.{what}"].to(self.device, torch.float32, copy=True) for what in AVERAGES
                )
                self.averages[name] = importance, uncertainty
