"""Which modules of a model compute what a fused operator does, and are to compute it by that.

    RMSNorm               run on a few random rows ─┐
    attention's rotary    called with random heads ─┼─ values and gradients as the operator's? ─► its ``forward`` on this module
    gated MLP             run with small linears   ─┘  no: left as it is

A module is known by what it computes; names say only where to look. The kernels then have to prove themselves on the
device (``proof.py``) before one of them is taken. transformers' own way in (``use_kernel_forward_from_hub``) does nothing
unless another package is installed, and takes a class by its name; here nothing of transformers is changed: a module gets a
``forward`` of its own, attention the same code with another ``apply_rotary_pos_emb`` in sight. What methods plant finds all
its places.

Knows modules and the operators; must not know what is quantised, trained, or behind a boundary.
"""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from qlora.model.kernels import language
from qlora.model.kernels.glu import ACTIVATIONS, glu
from qlora.model.kernels.proof import prove
from qlora.model.kernels.rms_norm import rms_norm
from qlora.model.kernels.rotary import rotary

OLDEST = 7.5  # the compute capability that Triton's kernels are tried on
ROTARY = "apply_rotary_pos_emb"
PAIRS, JOINED = ("gate_proj", "up_proj"), ("gate_up_proj",)
CLOSE = 64 * torch.finfo(torch.float32).eps  # of the largest number: two orders of computing the same

Forward = Callable[..., Any]


def fuse(model: nn.Module, dtype: torch.dtype, capability: float, device: torch.device | None = None) -> None:
    """Have ``model`` compute its norms, rotary positions and gated activations by fused operators, where these do the same.

    ``capability`` is CUDA's, 0 where it computes on another device. Given a CUDA ``device`` the kernels are tried there
    first, and if one does not compile or is off, a sentence says so and nothing is changed; without one the card is not here,
    and is taken to have them, for a plan. A CPU has no kernels, but gains in 16 bits by their plain ways: these keep less for
    backward, and go over what is in the cache. In fp32 it stays transformers' own, bit for bit.
    """
    cpu = not capability and device is not None and device.type == "cpu" and dtype.itemsize == 2
    if not cpu and (capability < OLDEST or (device is not None and not language.HERE)):
        return
    with torch.random.fork_rng(devices=[]):
        found = [(module, forward) for module in model.modules() if (forward := _fused(module)) is not None]
    needed = frozenset(forward.operator for _, forward in found)  # type: ignore[attr-defined]
    if device is not None and not cpu and not prove(needed, device, dtype):
        return
    for module, forward in found:
        module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def fused(model: nn.Module) -> dict[str, int]:
    """How many modules of ``model`` compute by each operator: ``{"rms_norm": 65, "rotary": 32, "glu_silu": 32}``."""
    own: list[Any] = [vars(module).get("forward") for module in model.modules()]
    return dict(Counter(forward.operator for forward in own if hasattr(forward, "operator")))


def _fused(module: nn.Module) -> Forward | None:
    """The ``forward`` that does by a fused operator what the module does; None where there is none."""
    if "forward" in vars(module):
        return None
    return _norm(module) or _attention(module) or _mlp(module)


def _named(forward: Any, operator: str) -> Forward:
    forward.operator = operator
    return forward


# ── norms ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _norm(module: nn.Module) -> Forward | None:
    weight = module._parameters.get("weight")
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if len(module._parameters) != 1 or module._buffers or module._modules or weight is None or weight.dim() != 1:
        return None
    if not isinstance(eps, float) or not _takes_one(module):
        return None
    # of such a size that the second row is as small as eps: it has to stand inside the root
    x = torch.randn(2, len(weight)) * torch.tensor([[1.0], [eps**0.5]])
    one = torch.randn(len(weight))
    for offset in (0.0, 1.0):

        def plain(x: Tensor, weight: Tensor) -> Tensor:
            return _standing_in(module, _parameters={"weight": weight}).forward(x)

        def ours(x: Tensor, weight: Tensor, offset: float = offset) -> Tensor:
            return rms_norm(x, weight, eps, offset)

        if _alike(plain, ours, x, one):
            narrow = plain(x.bfloat16(), one).dtype == torch.bfloat16
            return _named(_norm_forward(eps, offset, narrow), "rms_norm")
    return None


def _norm_forward(eps: float, offset: float, narrow: bool) -> Forward:
    def forward(module: Any, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())
        return rms_norm(x, module.weight, eps, offset, narrow)

    return forward


# ── rotary positions ──────────────────────────────────────────────────────────────────────────────────────────────────


def _attention(module: nn.Module) -> Forward | None:
    forward: Any = type(module).forward
    if not isinstance(forward, FunctionType) or ROTARY not in forward.__code__.co_names:
        return None
    plain = forward.__globals__.get(ROTARY)
    if not callable(plain) or not _turns(plain, rest=0):
        return None
    partly = _turns(plain, rest=4)

    def turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        whole = cos.dim() == 3 and q.dim() == k.dim() == 4 and cos.dtype == q.dtype == k.dtype
        if more or named or not whole or not (partly or cos.shape[-1] == q.shape[-1]):
            return plain(q, k, cos, sin, *more, **named)
        return rotary(q, k, cos, sin)

    names = {**forward.__globals__, ROTARY: turn}
    same = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    same.__kwdefaults__ = forward.__kwdefaults__
    return _named(same, "rotary")


def _turns(plain: Callable[..., Any], rest: int) -> bool:
    """Whether ``plain`` turns heads as the operator does, the last ``rest`` numbers of which do not turn."""
    q, k = torch.randn(2, 3, 5, 8 + rest), torch.randn(2, 1, 5, 8 + rest)
    # two rows whose positions differ; both halves are the same in transformers' tables
    cos, sin = (torch.randn(2, 5, 4).repeat(1, 1, 2) for _ in range(2))
    try:
        return _alike(lambda q, k: torch.cat(plain(q, k, cos, sin), 1), lambda q, k: torch.cat(rotary(q, k, cos, sin), 1), q, k)  # fmt: skip
    except (TypeError, ValueError, RuntimeError, IndexError):  # other arguments, or no such heads
        return False


# ── gated MLPs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _mlp(module: nn.Module) -> Forward | None:
    inputs = next((names for names in (PAIRS, JOINED) if module._modules.keys() >= {*names, "down_proj"}), None)
    # beside these the activation, and no dropout, which tells nothing while a model is not training
    if inputs is None or len(module._modules) > len(inputs) + 2 or not _takes_one(module):
        return None
    small = {name: nn.Linear(6, 10 * (3 - len(inputs))) for name in inputs} | {"down_proj": nn.Linear(10, 6)}
    stand_in = _standing_in(module, _modules={**module._modules, **small})
    x = 2 * torch.randn(7, 6)
    for act in ACTIVATIONS:
        forward = _mlp_forward(inputs, act)
        try:
            if _alike(stand_in.forward, lambda x, forward=forward: forward(stand_in, x), x):
                return _named(forward, f"glu_{act}")
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):  # it takes something else
            return None
    return None


def _mlp_forward(inputs: Sequence[str], act: str) -> Forward:
    def gated(module: Any, x: Tensor) -> Tensor:
        products = [getattr(module, name)(x) for name in inputs]
        return glu(products[0], products[1] if len(products) > 1 else None, act)

    def forward(module: Any, *given: Tensor, **named: Tensor) -> Any:
        (x,) = (*given, *named.values())
        return module.down_proj(gated(module, x))  # gate and up are not held meanwhile, unless for backward

    return forward


# ── looking ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _takes_one(module: nn.Module) -> bool:
    """Whether its ``forward`` takes one tensor and nothing else: not a gate that a norm may have, for one."""
    return len(inspect.signature(type(module).forward).parameters) == 2


def _standing_in(module: nn.Module, **parts: Any) -> Any:
    """One of the same class and settings with other ``parts``, in training; the module may be empty, and is left alone."""
    made = copy.copy(module)
    vars(made).update(parts, training=True)
    return made


def _alike(plain: Callable[..., Any], ours: Callable[..., Any], *inputs: Tensor) -> bool:
    """Whether both give the same values and gradients."""
    both = []
    with torch.enable_grad():
        for compute in (plain, ours):
            asked = [one.clone().requires_grad_() for one in inputs]
            value = compute(*asked)
            if not isinstance(value, Tensor):
                return False
            weights = torch.linspace(-1, 1, value.numel()).view(value.shape)
            both.append([value.detach(), *torch.autograd.grad(value, asked, weights)])
    return all(
        mine.shape == theirs.shape and bool((mine - theirs).abs().max() <= CLOSE * theirs.abs().max())
        for theirs, mine in zip(*both, strict=True)
    )
