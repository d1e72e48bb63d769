"""Bottleneck adapters: a small network of two linears added inside each layer, in four forms.

    f(x) = up(act(down(x)))          down [size, d], up [d, size], both with a bias

    houlsby    h + scale · f(h)               h: what attention gives, and what the MLP gives, before it is added to the
                                              residual; two adapters a layer (Houlsby et al. 2019, arXiv:1902.00751)
    lin        y + scale · f(LayerNorm(y))    y: what the layer gives, the residual in it (Lin et al. 2020,
                                              arXiv:2004.03829)
    pfeiffer   y + scale · f(y)               (Pfeiffer et al. 2020, arXiv:2005.00247)
    parallel   MLP(x) + scale · f(x)          x: what the MLP reads (He et al. 2021, arXiv:2110.04366)

Where the papers and programs disagree:
- lin. The paper puts the adapter on top of each layer, H + W_up relu(W_down LN(H)), and its own program (zlinao/VGLM)
  hands it the block's output after both residual sums. So does this. LoRA's paper tells the same as "after the MLP and
  after a LayerNorm".
- pfeiffer. In a layer that normalises first (Llama, GPT-2) the layer's output is what the library ``adapters`` feeds its
  ``SeqBnConfig``, and the two agree. In BERT, which normalises last, paper and library send the adapter's sum through the
  layer's LayerNorm once more; here the adapter follows that LayerNorm.
- parallel. The paper's x is what the sublayer reads, hence here what the MLP gets, normalised in Llama. The library takes
  the residual stream before that norm; the two agree where layers normalise last (DistilBERT).
- houlsby. In a layer that normalises a sublayer's output too (Gemma 2) the adapter stands before that norm, and in all
  before the residual dropout.
- First values. Down is Kaiming uniform, the rest of f zero, so that every form begins as the base exactly; Houlsby et al.
  draw both linears small instead. LayerNorm begins at weight one, bias zero.

On disk an adapter's tensors are called by where they stand and what they are:
``base_model.model.model.layers.0.mlp.houlsby.down.weight``, and so on for ``down.bias``, ``up.weight``, ``up.bias``,
``norm.weight`` and ``norm.bias``; ``lin`` and ``pfeiffer`` stand at the layer, ``model.layers.0.lin``.

With ``lin`` and ``pfeiffer`` the states that transformers collects for ``output_hidden_states`` are those that layers
give before their adapter; what comes out of the last layer, and all logits, have every adapter in them.

Knows these formulas and their first values; must not know where a family keeps its sublayers (``sublayers.py``), how
weights are stored, or the training loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.errors import MethodError
from qlora.methods.method import Method
from qlora.methods.planted import Planted, unplanted
from qlora.methods.sublayers import find_layers, sublayer, width
from qlora.model.anatomy import at
from qlora.recipe.methods import Bottleneck as Section
from qlora.residence.boundary import one_draw

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
SUBLAYERS = {"houlsby": ("attention", "MLP"), "parallel": ("whole MLP",)}  # the other forms stand at the layer
EPSILON = 1e-5  # lin's LayerNorm, as in GPT-2, which the paper adapts


class Adapter(nn.Module):
    """f itself: [..., d] → [..., d] in the input's dtype. ``norm`` is there for ``lin`` alone.

    ``norm`` is in fp32 at least, whatever ``dtype``: its weight begins at 1, where a step of 1e-4 is rounded away in bf16.
    """

    def __init__(self, d: int, size: int, activation: str, dropout: float, norm: bool, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.norm = nn.LayerNorm(d, EPSILON, device="meta", dtype=wide) if norm else None
        self.down = nn.Linear(d, size, device="meta", dtype=dtype)
        self.up = nn.Linear(size, d, device="meta", dtype=dtype)
        self.activation = activation
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = F.layer_norm(x, self.norm.normalized_shape, *_weight_and_bias(self.norm, x.dtype), EPSILON)
        with one_draw(x.device):
            x = F.dropout(x, self.dropout, self.training)
        low = ACTIVATIONS[self.activation](F.linear(x, *_weight_and_bias(self.down, x.dtype)))
        return F.linear(low, *_weight_and_bias(self.up, x.dtype))

    @torch.no_grad()
    def begin(self, device: torch.device, generator: torch.Generator) -> None:
        """Take first values, on ``device``: down uniform in ±1/√d, drawn on the CPU in fp32, and up zero."""
        self.to_empty(device=device)
        for values in self.parameters():
            values.zero_()
        if self.norm is not None:
            self.norm.weight.fill_(1)
        d = self.down.in_features
        drawn = torch.empty(self.down.weight.shape).uniform_(-(d**-0.5), d**-0.5, generator=generator)
        self.down.weight.copy_(drawn)


def _weight_and_bias(module: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return module.weight.to(dtype), module.bias.to(dtype)


class Bottleneck(Planted):
    """A layer or one of its sublayers, with an adapter on what it gives, or beside it.

    The base may give a tensor or a tuple, whose first entry is the hidden states; so does this. The adapter is called by
    its form, so that two of different forms at one place have different names.
    """

    def __init__(self, base: nn.Module, form: str, adapter: Adapter, scale: float) -> None:
        super().__init__(base)
        self.form = form
        self.scale = scale
        self.add_module(form, adapter)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        answer = self.base(*args, **kwargs)
        if not self.enabled:
            return answer
        hidden, *others = answer if isinstance(answer, tuple) else (answer,)
        x = hidden if self.form != "parallel" else args[0] if args else kwargs["hidden_states"]
        hidden = torch.add(hidden, self.get_submodule(self.form)(x), alpha=self.scale)
        return (hidden, *others) if isinstance(answer, tuple) else hidden

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class BottleneckMethod(Method):
    """How bottleneck adapters are planted; nothing happens in the loss or between steps."""

    place = "containers"
    unmergeable = (
        "an activation stands between its two linears, so no weight of the base can hold them; keep the adapter beside "
        "the base, as qlora chat and qlora.load_adapter do, or train lora, which merges"
    )
    section: Section

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """Raises MethodError for a model without layers that have what the form needs, a layer that another method trains
        whole, the same form twice."""
        form, layers = self.section.form, find_layers(model)
        widths = {
            place: width(layer)
            for path, layer in layers.items()
            for place in ([sublayer(layers, path, part) for part in SUBLAYERS.get(form, ())] or [path])
        }
        for path in widths:
            self._refuse_taken(model, path)
        return {
            path: Bottleneck(at_hand(model, path), form, self.new_adapter(path, d), self.section.scale)
            for path, d in widths.items()
        }

    def new_adapter(self, path: str, d: int) -> Adapter:
        """An adapter at ``path`` that begins as no change at all; on the meta device it has no values."""
        section = self.section
        adapter = Adapter(d, section.size, section.activation, section.dropout, section.form == "lin", self.dtype)
        if self.device.type != "meta":
            adapter.begin(self.device, self.generator(f"{path}.{section.form}"))
        return adapter

    def _refuse_taken(self, model: nn.Module, path: str) -> None:
        """Raise MethodError where a method other than this has planted something around ``path``, or the same form at it."""
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            found = at_hand(model, ".".join(parts[:count]))
            while isinstance(found, Planted):
                same = isinstance(found, Bottleneck) and count == len(parts) and found.form == self.section.form
                around = not isinstance(found, Bottleneck) and count < len(parts)
                if same or around:
                    other = f"another bottleneck of form {self.section.form}" if same else type(found).__name__
                    raise MethodError(
                        f"A bottleneck is to stand at '{path}', where there is {other} already, at "
                        f"'{'.'.join(parts[:count])}'; leave one of them out of the recipe's methods."
                    )
                found = found.base

    def put(self, model: nn.Module, path: str, module: nn.Module) -> None:
        """Inside a layer that another form stands at."""
        holder, _, name = path.rpartition(".")
        setattr(at(model, holder) if holder else model, name, module)


def at_hand(model: nn.Module, path: str) -> nn.Module:
    """The module at ``path`` with what is planted there, inside layers that something is planted at."""
    holder, _, name = path.rpartition(".")
    return getattr(at(model, holder) if holder else unplanted(model), name)
