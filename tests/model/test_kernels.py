"""Fused operators against the same in plain torch: values and gradients may err no more than the plain result does.

Triton's kernels run here in its interpreter (TRITON_INTERPRET=1, as ``tests/conftest.py`` sets it), wherever torch's build
brought Triton with it, and on a card in ``tests/test_cuda.py``; the plain way inside the operators runs everywhere.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.model.kernels import fuse, fused, fusing, glu, language, proof, rms_norm, rotary
from tests.rounding import doubled, no_worse, none_worse
from tests.tiny import CPU, TOKENS, random_model

HOPPER = 9.0
ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_triton = pytest.mark.skipif(
    not language.INTERPRETED, reason="Triton is not installed, as with torch's builds for CPUs, or compiles for a GPU"
)


@pytest.fixture(params=["plain", pytest.param("triton", marks=needs_triton)])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By what the operators compute."""
    if request.param == "plain":
        for module in (rms_norm, rotary, glu):
            monkeypatch.setattr(module, "taken", lambda *tensors: False)
    return request.param


# ── one operator ──────────────────────────────────────────────────────────────────────────────────────────────────────


def plain_norm(x: Tensor, weight: Tensor, offset: float, narrow: bool) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    return (normal * (weight.to(wide.dtype) + offset)).to(x.dtype) if narrow else normal.to(x.dtype) * weight


def half_turned(x: Tensor) -> Tensor:
    return torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    size, cos, sin = cos.shape[-1], cos[:, None], sin[:, None]
    return tuple(torch.cat([x[..., :size] * cos + half_turned(x[..., :size]) * sin, x[..., size:]], -1) for x in (q, k))


def plain_glu(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
    gate, up = (gate, up) if up is not None else gate.chunk(2, -1)  # type: ignore[assignment]
    acts: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
    return acts.get(act, lambda x: F.gelu(x, approximate="tanh"))(gate) * up


def results(compute: Callable[..., Any], inputs: list[Tensor]) -> dict[str, Tensor]:
    """Values and gradients by name. The inputs of the operator are no leaves: a GLU's backward writes over its own."""
    leaves = [one.detach().clone().requires_grad_() for one in inputs]
    values = compute(*(one.view_as(one) if one.dim() == 1 else one * 1 for one in leaves))
    values = values if isinstance(values, tuple) else (values,)
    grads = [torch.randn(one.shape, generator=torch.Generator().manual_seed(3)).to(one.dtype) for one in values]
    torch.autograd.backward(values, grads)
    found = {f"value {number}": one.detach() for number, one in enumerate(values)}
    return found | {f"gradient {number}": one.grad for number, one in enumerate(leaves) if one.grad is not None}


def check(ours: Callable[..., Any], plain: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype) -> None:
    rounded = [one.to(dtype) for one in inputs]
    found, low = results(ours, rounded), results(plain, rounded)
    exact = results(plain, [one.double() for one in rounded])
    assert found.keys() == low.keys() == exact.keys()
    for name, values in found.items():
        assert values.dtype == low[name].dtype == dtype
        no_worse(values, low[name], exact[name], dtype)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 80), (3, 1000), (200, 65), (3, 4, 5, 128)])
@pytest.mark.parametrize(("offset", "narrow"), [(0.0, False), (1.0, True)])
def test_rms_norm(
    way: str, dtype: torch.dtype, shape: tuple[int, ...], offset: float, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row, and more than a part of the weight's gradient has at once; heads that lie in memory in another order."""
    monkeypatch.setattr(rms_norm, "PARTS", 2)

    def laid(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if x.dim() == 4 else x

    check(
        lambda x, weight: rms_norm.rms_norm(laid(x), weight, 1e-6, offset, narrow),
        lambda x, weight: plain_norm(laid(x), weight, offset, narrow),
        [normal(*shape), normal(shape[-1])],
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "turned"), [((4, 2), 64, 64), ((3, 1), 80, 32), ((5, 5), 128, 128), ((2, 1), 256, 64)])  # fmt: skip
@pytest.mark.parametrize("tables", [1, 2])
def test_rotary(way: str, dtype: torch.dtype, heads: tuple[int, int], size: int, turned: int, tables: int) -> None:
    """All of a head turns or a part of it; a table for all rows or for each; heads as projections give them."""
    cos, sin = normal(tables, 3, turned), normal(tables, 3, turned + 1)[..., 1:]

    def with_tables(compute: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q, k: compute(q.transpose(1, 2), k.transpose(1, 2), cos.to(dtype).to(q), sin.to(dtype).to(q))

    inputs = [normal(2, 3, count, size) for count in heads]
    check(with_tables(rotary.rotary), with_tables(plain_rotary), inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 30), (2, 3, 1100)])
@pytest.mark.parametrize("act", list(glu.ACTIVATIONS))
@pytest.mark.parametrize("joined", [False, True])
def test_glu(way: str, dtype: torch.dtype, shape: tuple[int, ...], act: str, joined: bool) -> None:
    if joined:
        inputs, form = [2 * normal(*shape)], lambda compute: lambda both: compute(both, None, act)
    else:
        inputs, form = (
            [2 * normal(*shape), normal(*shape[:-1], shape[-1])],
            lambda compute: lambda g, u: compute(g, u, act),
        )
    check(form(glu.glu), form(plain_glu), inputs, dtype)


def test_whoever_else_reads_what_backward_writes_over_fails(way: str) -> None:
    gate, up = (normal(3, 8).requires_grad_() * 1 for _ in range(2))
    value = gate.square().sum() + glu.glu(gate, up, "silu").sum()  # backward reaches the square last
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("trained", [0, 1])
def test_a_norm_gives_the_gradient_that_is_asked_for(way: str, trained: int) -> None:
    """Of its weight alone, in fp32 while the rest is in bf16, as where modules are saved whole; or of its input alone."""
    inputs = [normal(40, 96).bfloat16(), normal(96)]
    inputs[trained].requires_grad_()
    answers = []
    for compute in (rms_norm.rms_norm, plain_norm):
        value = compute(inputs[0], inputs[1], *([1e-6] if compute is rms_norm.rms_norm else [0.0, False]))
        assert value.dtype == torch.float32
        answers.append(torch.autograd.grad(value.square().sum(), inputs[trained])[0])
    assert answers[0].dtype == inputs[trained].dtype
    exact = [one.detach().double().requires_grad_() for one in inputs]
    no_worse(
        *answers, torch.autograd.grad(plain_norm(*exact, 0.0, False).square().sum(), exact[trained])[0], torch.bfloat16
    )


def test_a_norm_keeps_its_input_and_a_number_a_row(way: str) -> None:
    kept: list[Tensor] = []
    x, weight = normal(6, 64).requires_grad_(), normal(64)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        rms_norm.rms_norm(x, weight, 1e-6)
    assert sorted(one.numel() for one in kept) == [6, 64, 6 * 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plan_is_given_what_the_operators_give(way: str, dtype: torch.dtype) -> None:
    """Their fakes have the shapes, strides and dtypes of the results, and their schemas say what is written over."""
    x, heads, table = normal(2, 5, 16), normal(2, 5, 3, 8).transpose(1, 2), normal(1, 5, 8)
    rstd, weight = torch.ones(10), normal(16)
    operators = torch.ops.qlora
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (operators.rms_norm, (x.to(dtype), weight, 1e-6, 0.0, False)),
        (operators.rms_norm_backward, (x, x.to(dtype), weight.to(dtype), rstd, 0.0, True, True)),
        (operators.rms_norm_backward, (x, x, weight, rstd, 1.0, True, False)),
        (operators.rotary, (heads.to(dtype), heads[:, :1].to(dtype), table.to(dtype), table.to(dtype), False)),
        (operators.glu, (x.to(dtype), x.to(dtype), "silu")),
        (operators.glu_backward_, (x.to(dtype, copy=True), x.to(dtype, copy=True), x.to(dtype), "silu")),
    ]
    for operator, inputs in cases:
        torch.library.opcheck(operator.default, inputs, test_utils=("test_schema", "test_faketensor"))


class Compiled:
    """Stands in for a kernel: compiles what would be launched for a card that need not be here, down to its machine code."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return self.launch

    def launch(self, *args: Any, num_warps: int = 4, **constants: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
        kinds = [
            names[one.dtype] if isinstance(one, Tensor) else {int: "i32", float: "fp32"}[type(one)] for one in args
        ]
        signature = dict(zip(self.kernel.arg_names, [*kinds, *["constexpr"] * len(constants)], strict=True))
        source = ASTSource(self.kernel, signature, constexprs=constants)
        made = compile(source, target=GPUTarget("cuda", self.capability, 32), options={"num_warps": num_warps})
        print(self.capability, kinds[0], self.kernel.__name__, len(made.asm["cubin"]))


def compile_all() -> None:
    """In a process of its own, without the interpreter."""
    for module, names in {
        rms_norm: ("_forward", "_backward"),
        rotary: ("_rotate",),
        glu: ("_forward", "_backward"),
    }.items():
        kernels = {name: getattr(module, name) for name in names}
        module.taken = lambda *tensors: True  # type: ignore[attr-defined]
        for capability, dtype in [
            (75, torch.float16),
            (80, torch.bfloat16),
            (90, torch.float32),
            (120, torch.bfloat16),
        ]:
            for name, kernel in kernels.items():
                setattr(module, name, Compiled(kernel, capability))
            for operator, compute, inputs in proof._cases():
                if operator.startswith(module.__name__.rpartition(".")[2]):
                    proof._results(compute, [one.to(dtype) for one in inputs])


@pytest.mark.slow
@pytest.mark.skipif(
    not language.HERE or torch.cuda.is_available(), reason="Triton is not installed, or a card tells more"
)
def test_the_kernels_compile_for_cards_that_are_not_here(tmp_path: Path) -> None:
    """For a T4, an A100, an H100 and an RTX 50, to what the card would run."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", "from tests.model.test_kernels import compile_all; compile_all()"]
    found = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 4 * (4 * 2 + 2 + 6 * 2)
    assert all(int(line.split()[-1]) > 0 for line in lines)


# ── a model ───────────────────────────────────────────────────────────────────────────────────────────────────────────

FAMILIES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "Llama": ({}, {"rms_norm": 5, "rotary": 2, "glu_silu": 2}),
    "Qwen3": ({}, {"rms_norm": 9, "rotary": 2, "glu_silu": 2}),
    "Gemma2": ({}, {"rms_norm": 9, "rotary": 2, "glu_gelu_tanh": 2}),
    "Gemma3Text": ({}, {"rms_norm": 13, "rotary": 2, "glu_gelu_tanh": 2}),
    "Phi3": ({"partial_rotary_factor": 0.5}, {"rms_norm": 5, "rotary": 2, "glu_silu": 2}),
    "Glm": ({}, {"rms_norm": 5, "glu_silu": 2}),  # its rotary positions are interleaved
    "Granite": ({}, {"rms_norm": 5, "rotary": 2, "glu_silu": 2}),
    "StableLm": ({}, {"rotary": 2, "glu_silu": 2}),  # plain LayerNorm; a part of a head turns
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, {}),
}


def outcome(model: Any) -> dict[str, Tensor]:
    """Logits, and the gradients of norms and of the embedding."""
    trained = {
        name: one for name, one in model.named_parameters() if "norm" in name or "embed_tokens" in name or "wte" in name
    }
    for one in trained.values():
        one.requires_grad_()
    logits = model(input_ids=TOKENS[:, :4]).logits
    gradients = torch.autograd.grad(logits.square().mean(), list(trained.values()))
    return {"logits": logits.detach(), **dict(zip(trained, gradients, strict=True))}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_is_the_same(way: str, family: str) -> None:
    options, expected = FAMILIES[family]
    model = random_model(family, **options)
    for name, values in model.named_parameters():
        if "norm" in name:  # ones would hide a weight that is left out
            nn.init.normal_(values, 0.5, 0.2)
    state = torch.get_rng_state()
    ours = copy.deepcopy(model)
    fuse(ours, torch.float32, HOPPER, CPU if way == "triton" else None)
    assert torch.equal(torch.get_rng_state(), state)
    assert fused(ours) == expected
    assert fused(model) == {}
    twin = copy.deepcopy(ours)  # a plan makes one of fewer layers: each module's forward is its own
    assert all(vars(one)["forward"].__self__ is one for one in twin.modules() if "forward" in vars(one))
    none_worse(outcome(ours), outcome(model), outcome(doubled(model)))


def test_what_computes_something_else_stays_as_it_is() -> None:
    class Deep(type(random_model("Llama").model.norm)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.001

    class Capped(type(random_model("Llama").model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1) * self.up_proj(x))

    class Gated(type(random_model("Llama").model.norm)):  # type: ignore[misc]
        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return super().forward(x if gate is None else x * gate)

    class Dropping(type(random_model("Llama").model.layers[0].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.1, self.training)

    model = random_model("Llama", num_hidden_layers=3)
    model.model.norm.__class__, model.model.layers[0].input_layernorm.__class__ = Deep, Gated
    model.model.layers[1].mlp.__class__, model.model.layers[2].mlp.__class__ = Capped, Dropping
    fuse(model, torch.float32, HOPPER)
    assert fused(model) == {"rms_norm": 5, "rotary": 3, "glu_silu": 1}


def test_a_cpu_takes_the_plain_ways_and_an_old_card_nothing() -> None:
    half, full, mps = torch.bfloat16, torch.float32, torch.device("mps")
    for dtype, capability, device, expected in [
        (half, 0, CPU, FAMILIES["Llama"][1]),
        (full, 0, CPU, {}),
        (half, 0, mps, {}),
        (half, 7.0, None, {}),
    ]:
        model = random_model("Llama")
        fuse(model, dtype, capability, device)
        assert fused(model) == expected


@pytest.mark.parametrize("how", ["raises", "is wrong"])
def test_a_kernel_that_fails_on_the_device_is_told_and_left(
    how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(gate: Tensor, up: Tensor | None, act: str) -> Tensor:
        if how == "raises":
            raise RuntimeError("no image for this GPU\nand more")
        return glu.glu(gate, up, act) * (1.0 if gate.dtype == torch.float64 else 1.01)

    monkeypatch.setattr(proof, "glu", broken)
    monkeypatch.setattr(language, "HERE", True)
    proof.prove.cache_clear()
    model = random_model("Llama")
    try:
        fuse(model, torch.float32, HOPPER, CPU)
    finally:
        proof.prove.cache_clear()
    assert fused(model) == {}
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ("does not run (RuntimeError: no image for this GPU)" if how == "raises" else "is off by") in line
    assert "transformers' own code" in line


def test_without_triton_a_run_on_a_card_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing.language, "HERE", False)
    model = random_model("Llama")
    fuse(model, torch.float32, HOPPER, CPU)
    assert fused(model) == {}
