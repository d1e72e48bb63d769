"""What ``method.from`` means: a new run begins with the values of an adapter that is there already.

    recipe + the adapter's config ─► a recipe whose method is the adapter's ─► planned and planted ─► its values loaded

Knows adapters and run folders on disk; must not know how a run is planned or trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from qlora.errors import MethodError, RecipeError, listed
from qlora.files.durable import expanded, sha256_of
from qlora.files.strangers import shown
from qlora.methods.base import AdaptedModel
from qlora.methods.files import CONFIG, WEIGHTS, recorded_base
from qlora.methods.loading import kind_of, load_adapter
from qlora.methods.peft_config import read_adapter_config
from qlora.model.checkpoint import Checkpoint
from qlora.model.tensor_file import read_header
from qlora.recipe import Combined, Recipe, parts_of
from qlora.training.checkpoint import adapter_folder

# What a recipe may say beside ``from`` otherwise than the adapter: how it trains, and no number that it holds.
TRAINING = {
    "adapter_dtype", "dropout", "learning_rate_ratio", "warmup", "final", "interval", "beta1", "beta2", "orthogonality",
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The adapter that a run goes on from."""

    folder: Path
    sha256: str
    """Of its tensors' file."""
    method: str
    """In short."""

    def __str__(self) -> str:
        return (
            f"Goes on from the adapter in '{self.folder}' ({self.method}), as a new run: its values and its shape are kept, "
            "the optimizer and the schedule begin anew."
        )

    def check(self, model: AdaptedModel) -> None:
        """Raise MethodError where the names and shapes in the adapter's file are not those that ``model``, on meta, has."""
        expected, entries = model.adapter_state(), read_header(self.folder / WEIGHTS).entries
        # whole embeddings may stand there as well; whether they are the base's own shows when that is loaded
        shapes = {key: entry.shape for key, entry in entries.items() if key in expected or ".lora_" in key}
        model.fitted(
            {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}, f"The adapter in '{self.folder}'"
        )

    def check_base(self, checkpoint: Checkpoint) -> None:
        """Raise MethodError when the adapter says that it was trained on another base."""
        if recorded_base(self.folder) not in (None, checkpoint.fingerprint):
            raise MethodError(
                f"The adapter in '{self.folder}' was trained on another base than '{checkpoint.name}' (other configuration, "
                "tokenizer or tensors); name the base that it was trained on in model.name."
            )

    def load(self, model: AdaptedModel) -> None:
        """Put the adapter's values into ``model``. Raises MethodError when they do not fit, or changed since they were found."""
        load_adapter(model, self.folder)
        if sha256_of(self.folder / WEIGHTS) != self.sha256:
            raise MethodError(f"The adapter in '{self.folder}' was changed while it was read; train again.")

    def as_dict(self) -> dict[str, str]:
        """What the run folder keeps of it."""
        return {"folder": str(self.folder), "sha256": self.sha256}


def continued(recipe: Recipe) -> tuple[Recipe, Origin | None]:
    """The recipe with the section of the adapter in ``method.from``, and that adapter; None where the run begins afresh.

    Raises MethodError when there is no adapter, or when the recipe's method says something else than it.
    """
    wanted = recipe.method
    if wanted.from_ is None:
        return recipe, None
    place = _place(expanded(wanted.from_))
    asked = _asked(expanded(wanted.from_))
    found = _agreed(wanted, read_adapter_config(place), place, asked).model_copy(update={"from_": wanted.from_})
    if not (place / WEIGHTS).is_file():
        raise MethodError(
            f"There is no {WEIGHTS} in '{place}'; expected an adapter folder in PEFT's layout, or a run's."
        )
    method = " and ".join(part.in_short() for part in parts_of(found))
    return recipe.model_copy(update={"method": found}), Origin(place, sha256_of(place / WEIGHTS), method)


def _place(folder: Path) -> Path:
    """The adapter in ``folder``, which may be a run's: where that lies as it was trained."""
    if (folder / CONFIG).is_file():
        return folder
    if (folder / "checkpoints").is_dir() or (folder / "adapter").is_dir():
        return adapter_folder(folder)
    raise MethodError(
        f"method.from is '{folder}', where there is neither an adapter ({CONFIG}) nor a run with a checkpoint; expected the "
        "folder of one of them."
    )


def _asked(folder: Path) -> list[Any]:
    """The methods that a run's recipe asked for; none where ``folder`` is no run, or one of another release."""
    try:
        return sorted(parts_of(Recipe.from_yaml(folder / "recipe.yaml").method), key=kind_of)
    except RecipeError:
        return []


def _agreed(wanted: Any, found: Any, place: Path, known: list[Any]) -> Any:
    """The section that was ``found``, with what the recipe says of training. Raises MethodError for a contradiction.

    ``known`` is what the adapter's own run was asked for, where it is one: ``all-linear`` there is what the adapter lists.
    """
    parts = sorted(parts_of(found), key=kind_of)
    nameless = "name" not in wanted.model_fields_set
    asked = [wanted] * len(parts) if nameless else sorted(parts_of(wanted), key=kind_of)
    agreed = []
    if not nameless and [*map(kind_of, asked)] != [*map(kind_of, parts)]:
        raise MethodError(
            f"The recipe's method is {' and '.join(part.name for part in asked)}, and the adapter in '{place}' is "
            f"{' and '.join(part.name for part in parts)}; give method.from alone, its adapter says the rest."
        )
    for mine, theirs, own in zip_longest(asked, parts, known[: len(parts)]):
        said = {key: getattr(mine, key) for key in mine.model_fields_set - {"from_", "name"}}
        apart = [
            f"{key}={shown(value)} instead of {shown(getattr(theirs, key, 'nothing'))}"
            for key, value in sorted(said.items())
            if key not in TRAINING and _plain(value) not in (_plain(getattr(one, key, None)) for one in (theirs, own))
        ]
        if apart:
            raise MethodError(
                f"The recipe's method has {listed(apart, 5)} of the adapter in '{place}' that it goes on from; leave these keys "
                "out beside method.from, or train anew without it."
            )
        known = type(theirs).model_fields
        agreed.append(theirs.model_copy(update={k: v for k, v in said.items() if k in TRAINING and k in known}))
    return found.model_copy(update={"parts": tuple(agreed)}) if isinstance(found, Combined) else agreed[0]


def _plain(value: Any) -> Any:
    """Names without their order: PEFT keeps none."""
    return sorted(value) if isinstance(value, tuple) else value
