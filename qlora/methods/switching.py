"""Several adapters on one base: held at once, switched from call to call, or mixed row by row in one batch.

    base (frozen, once) ─┬─ "sql"   planted modules, put in and taken out by pointers
                         ├─ "chat"  …
                         └─ None    the base alone

    mixed(["sql", None, "chat"]):   y = x Wᵀ for all rows at once;  y[0] += sql(x[0]);  y[2] += chat(x[2])

The mixed product is that of S-LoRA (Sheng et al. 2023, arXiv:2311.03285) and Punica (Chen et al. 2023,
arXiv:2310.18547), by plain matrix products. Knows planted modules and where they stand; must not know files beyond
``load_adapter``, generation or the training loop. Not for several threads: there is one model, which answers one way at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from qlora.errors import MethodError, listed, nearest
from qlora.methods.base import AdaptedModel, OnBase, apply_method, refuse_adapted
from qlora.methods.beginning import gives_up
from qlora.methods.loading import load_adapter
from qlora.methods.lora import LoraLinear, as_autocast, without_autocast
from qlora.methods.peft_config import read_adapter_config
from qlora.methods.planted import Planted
from qlora.model.base import Base
from qlora.model.in_memory import as_base
from qlora.model.nf4 import add_product, dense_weight, features
from qlora.recipe import parts_of


class Adapters(OnBase):
    """A base and its adapters by name. At most one of them stands in the model at a time, or several by rows (``mixed``).

    Stands wherever a model answers: ``answers(adapters, prompts, 64)``. The base is loaded once and never copied.
    """

    def __init__(self, base: Base | nn.Module) -> None:
        """Raises MethodError when ``base`` carries an adapter already."""
        self.base = base if isinstance(base, Base) else as_base(base)
        refuse_adapted(self.base)
        self._adapters: dict[str, AdaptedModel] = {}
        self._current: str | None = None
        self.mixing = False
        """Whether rows are answered by an adapter each, so that a batch is always whole."""

    def __repr__(self) -> str:
        """A line for the base and one for each adapter."""
        base = self.base
        using = "mixed" if self.mixing else self._current or "the base alone"
        lines = [f"Adapters on {base.name} ({base.quantization}, {base.device}), answering: {using}"]
        for name, adapter in self._adapters.items():
            methods = " and ".join(method.section.name for method in adapter.methods)
            lines.append(f"  {name}: {methods}, {adapter.count_trainable():,} numbers")
        return "\n".join(lines if self._adapters else [*lines, "  no adapter yet"])

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the adapter of the moment puts before every text."""
        return 0 if self._current is None else self._adapters[self._current].virtual_tokens

    @property
    def first_position(self) -> int:
        """The position of a text's first token with the adapter of the moment."""
        return 0 if self._current is None else self._adapters[self._current].first_position

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names, in the order in which they came."""
        return tuple(self._adapters)

    @property
    def current(self) -> str | None:
        """The adapter in use; None when the base answers alone, or inside ``mixed``."""
        return self._current

    def __getitem__(self, name: str) -> AdaptedModel:
        """The adapter ``name``, to be looked at, trained or saved; it stands in the model only while it is in use."""
        if name not in self._adapters:
            known = f"there are {listed(self._adapters, 8)}" if self._adapters else "none was loaded yet"
            raise MethodError(f"No adapter here is called '{name}'; {known}.{nearest(name, self._adapters)}")
        return self._adapters[name]

    def load(self, name: str, folder: str | Path) -> AdaptedModel:
        """Read the adapter in ``folder`` and hold it as ``name``; what is in use stays in use.

        Raises MethodError when the name is taken, or whatever ``load_adapter`` raises, as for an adapter of another base.
        """
        with self._bare(name):
            _refuse_full(name, read_adapter_config(folder))
            adapter = load_adapter(self.base, folder)
            adapter.remove()
        self._adapters[name] = adapter
        return adapter

    def add(self, name: str, adapter: Any, seed: int = 0) -> AdaptedModel:
        """Hold ``adapter`` as ``name``: an adapted model of this very base, or the section of a new one, as ``LoRA(r=8)``.

        ``seed`` decides a new one's first values. Raises MethodError when the name is taken or the base is another one.
        """
        if isinstance(adapter, AdaptedModel) and adapter.base.model is not self.base.model:
            raise MethodError(
                f"'{name}' is an adapter on another copy of '{adapter.base.name}'; plant it in the base that these adapters "
                "share, or save it and load it here."
            )
        with self._bare(name):
            _refuse_full(name, adapter.section if isinstance(adapter, AdaptedModel) else adapter)
            if not isinstance(adapter, AdaptedModel):
                adapter = apply_method(self.base, adapter, seed)
            if any(isinstance(module, Planted) for module in self.model.modules()):
                adapter.remove()
            refuse_adapted(self.base)
        self._adapters[name] = adapter
        return adapter

    def remove(self, name: str) -> AdaptedModel:
        """Let go of the adapter ``name`` and return it; when it is in use, the base answers alone from now on."""
        adapter = self[name]
        if name == self._current or self.mixing:
            self.off()
        del self._adapters[name]
        return adapter

    def use(self, name: str | None) -> None:
        """Answer with the adapter ``name`` from now on, or with the base alone.

        Nothing is read or copied: modules change places. (PiSSA changes the base's weights too, which takes longer.)
        """
        if self.mixing:
            raise MethodError("The batch is mixed here, each row has its adapter; leave mixed() before switching.")
        wanted = None if name is None else self[name]
        if name == self._current:
            return
        if self._current is not None:
            self._adapters[self._current].remove()
            self._current = None
        if wanted is not None:
            wanted.attach()
            self._current = name

    def off(self) -> None:
        """Answer with the base alone from now on."""
        self.use(None)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, the adapter ``name`` answers; then the one from before."""
        before = self._current
        self.use(name)
        try:
            yield
        finally:
            self.use(before if before in self._adapters else None)

    @contextmanager
    def mixed(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of every batch is answered by the adapter ``names[i]``, or by the base where that is None.

        A batch must have exactly as many rows as there are names; with beams, a name for each beam. Prompts of several lengths
        are padded in front, which a model with states (Mamba, RWKV) reads as text: give it prompts of one length. The frozen
        product is made once for all rows. Raises MethodError for an adapter that cannot answer single rows (prompts, bottlenecks, an
        adapter that changes the base), and inside for a batch of another size.
        """
        names = tuple(names)
        if not names:
            raise MethodError("mixed() got no names; expected one for each row of the batch, None for the base alone.")
        adapters = {name: self[name] for name in dict.fromkeys(names) if name is not None}
        with self.using(None):
            for name, adapter in adapters.items():
                _require_rows(name, adapter)
            with _planted_by_rows(self.model, adapters, names):
                self.mixing = True
                try:
                    yield
                finally:
                    self.mixing = False

    @contextmanager
    def _bare(self, name: str) -> Iterator[None]:
        """Inside, the base stands alone, to plant the new adapter ``name``; then what was in use is back."""
        if not name:
            raise MethodError("An adapter needs a name that is not empty.")
        if name in self._adapters:
            raise MethodError(f"There is an adapter '{name}' already; remove it first or choose another name.")
        with self.using(None):
            yield


class MixedRows(Planted):
    """A base's module whose rows are each answered by their own adapter.

    ``layers`` are the modules that the adapters would plant here; an adapter that plants nothing here leaves its rows to
    the base.
    """

    def __init__(self, base: nn.Module, layers: Mapping[str, Planted], rows: Rows) -> None:
        super().__init__(base)
        self.layers = tuple(layers.items())  # a tuple, so that they are no children: their base is here already
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """What the base's module makes of ``x``, by rows."""
        places = self.rows.places(x)
        here = [(layer, places[name]) for name, layer in self.layers if self.enabled and layer.enabled]
        beside = [(layer, place) for layer, place in here if type(layer) is LoraLinear]
        whole = [(layer, place) for layer, place in here if type(layer) is not LoraLinear]
        if not beside:
            return _in_parts(lambda rows: self.base(x if rows is None else x[rows]), x, whole)
        x = as_autocast(x)
        added = x.new_zeros(*x.shape[:-1], features(self.base)[0])
        with without_autocast(x.device):
            for layer, place in beside:
                added.index_add_(0, place, _update(layer, x[place]))

        def of(rows: Tensor | None) -> Tensor:
            return _Onto.apply(*((x, added) if rows is None else (x[rows], added[rows])), self.base)

        return _in_parts(of, x, whole)


class _Onto(torch.autograd.Function):
    """``added`` + x Wᵀ + b of a frozen linear, in place, summed before it is rounded as one adapter's is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, added: Tensor, base: nn.Module) -> Tensor:
        ctx.base = base
        ctx.mark_dirty(added)
        add_product(base, x, added)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ dense_weight(ctx.base, grad.dtype) if ctx.needs_input_grad[0] else None, grad, None


class Rows:
    """Which adapter answers which row, and where these rows are in a module's input."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.flat: int | None = None
        """What the first dimension is where a model flattens rows and positions into one; None while that is unknown."""
        self._known: dict[tuple[int, torch.device], dict[str | None, Tensor]] = {}

    def look(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before each forward of the whole model: check the batch's size and remember how long its rows are."""
        first = (kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids"))
        batch = next((value for value in (*first, *args, *kwargs.values()) if isinstance(value, Tensor)), None)
        self.flat = None
        if batch is None or batch.dim() == 0:
            return
        if len(batch) != len(self.names):
            raise MethodError(
                f"The batch has {len(batch)} rows, but mixed() got {len(self.names)} names; give one name for each row."
            )
        has_positions = batch.dim() == 3 or (batch.dim() == 2 and not batch.is_floating_point())
        self.flat = len(batch) * batch.shape[1] if has_positions else len(batch)

    def places(self, x: Tensor) -> dict[str | None, Tensor]:
        """For each name the places of its rows in the first dimension of ``x``: [rows, …], or flat [rows · positions, in].

        Raises MethodError where rows cannot be told apart, as inside a mixture of experts.
        """
        count = len(self.names)
        flattened = x.dim() == 2 and x.is_floating_point()
        if len(x) != (self.flat if flattened else count):
            raise MethodError(
                f"This model sends {list(x.shape)} through a module that is adapted, in which the {count} rows of the batch "
                "cannot be told apart; answer each adapter's rows apart, with using()."
            )
        each = len(x) // count
        if (each, x.device) not in self._known:
            rows = torch.arange(len(x), device=x.device).view(count, each)
            self._known[each, x.device] = {
                name: torch.cat([rows[i] for i, other in enumerate(self.names) if other == name])
                for name in dict.fromkeys(self.names)
            }
        return self._known[each, x.device]


def _update(layer: LoraLinear, x: Tensor) -> Tensor:
    """What LoRA adds to the frozen product: scaling · dropout(x) Aᵀ Bᵀ."""
    x = F.dropout(x, layer.dropout, layer.training)
    return (x @ layer.lora_A.to(x.dtype).t() @ layer.lora_B.to(x.dtype).t()) * layer.scaling


def _in_parts(others: Callable[[Tensor | None], Tensor], x: Tensor, whole: list[tuple[Planted, Tensor]]) -> Tensor:
    """Rows of a method that needs more than the frozen product go through its own module, the ``others`` together."""
    if not whole:
        return others(None)
    taken = torch.cat([place for _, place in whole])
    rest = torch.ones(len(x), dtype=torch.bool, device=x.device).index_fill(0, taken, False).nonzero().squeeze(1)
    parts = [layer(x[place]) for layer, place in whole] + ([others(rest)] if len(rest) else [])
    return torch.cat(parts)[torch.argsort(torch.cat([taken, rest]))]


@contextmanager
def _planted_by_rows(
    model: nn.Module, adapters: Mapping[str, AdaptedModel], names: Sequence[str | None]
) -> Iterator[None]:
    """Inside, ``MixedRows`` stand wherever one of ``adapters`` plants something; the model is bare outside."""
    rows = Rows(names)
    planted: dict[str, dict[str, Planted]] = {}
    for name, adapter in adapters.items():
        for path, layer in adapter.planted.items():
            planted.setdefault(path, {})[name] = layer.train(model.training)
    mixed = {path: MixedRows(model.get_submodule(path), layers, rows) for path, layers in planted.items()}
    hook = model.register_forward_pre_hook(rows.look, with_kwargs=True)
    try:
        for path, layer in mixed.items():
            model.set_submodule(path, layer.train(model.training))
        yield
    finally:
        hook.remove()
        for path, layer in mixed.items():
            model.set_submodule(path, layer.base)


def _refuse_full(name: str, section: Any) -> None:
    if any(part.name == "full" for part in parts_of(section)):
        raise MethodError(
            f"'{name}' is full fine-tuning, which overwrites the base that all adapters share; merge it and load the result "
            "as a base of its own."
        )


def _require_rows(name: str, adapter: AdaptedModel) -> None:
    """Raise MethodError unless ``adapter``, which is not planted now, can answer some rows of a batch beside others."""
    for method in adapter.methods:
        if not method.by_rows:
            raise MethodError(
                f"The adapter '{name}' is {method.section.name}, which changes more than single rows of a batch; answer its "
                f"rows apart, with using('{name}')."
            )
        moved = [
            path
            for path, layer in method.planted.items()
            if layer.base is not adapter.model.get_submodule(path) or gives_up(layer)
        ]
        if moved:
            raise MethodError(
                f"The adapter '{name}' changes the base itself at {listed(moved, 3)}, which all rows of a batch share; "
                f"answer its rows apart, with using('{name}')."
            )
