"""(IA)³: vectors that rescale keys, values and the MLP's inner activations (Liu et al. 2022, arXiv:2205.05638).

    keys, values       y = l ⊙ (x Wᵀ + b)              l [out], begins as ones
    MLP's last linear  y = (l ⊙ x) Wᵀ + b              l [in], begins as ones

On disk a vector is a matrix as PEFT has it: ``ia3_l`` [out, 1] or [1, in]. Here it is a vector, so that weight decay,
which is for matrices, does not pull it from one to zero. Where queries, keys and values come from one fused linear, the
vector spans them all, as in PEFT. Knows this formula and what families call these linears; must not know how W is
stored, adapter files, or the training loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.errors import MethodError, listed
from qlora.methods.layout import Fields, Layout
from qlora.methods.lora import any_transposed
from qlora.methods.method import Method
from qlora.methods.planted import Planted
from qlora.methods.targets import choose_targets, find_linears, leaf, matches, target_names
from qlora.model.anatomy import fused_experts
from qlora.model.nf4 import features, is_transposed
from qlora.recipe.methods import IA3

# What families call the linears that make keys and values; the first line of which all names are there counts.
KEYS_AND_VALUES = (
    ("k_proj", "v_proj"),  # Llama, Mistral, Qwen, Gemma, OPT, GPT-J, GPT-Neo, Phi, BART, CLIP, …
    ("self.key", "self.value"),  # BERT and its descendants
    ("attention.key", "attention.value"),  # ALBERT
    ("key_proj", "value_proj"),  # DeBERTa v2 and v3
    ("k_lin", "v_lin"),  # DistilBERT
    ("Attention.k", "Attention.v"),  # T5: SelfAttention and EncDecAttention
    ("kv_b_proj",),  # DeepSeek V2 and V3
    ("qkv_proj",),  # Phi-3, CodeGen: fused with the queries, from here on
    ("query_key_value",),  # GPT-NeoX, Bloom, Falcon
    ("c_attn",),  # GPT-2, GPT-BigCode
    ("Wqkv",),  # MPT, ModernBERT
    ("self.in_proj",),  # DeBERTa
)
# What they call the linear that ends an MLP.
MLP_ENDS = (
    ("down_proj",),  # Llama, Mistral, Qwen, Gemma, Phi-3, MPT, DeepSeek, …
    ("mlp.c_proj",),  # GPT-2, GPT-BigCode, GPT-Neo, Starcoder2
    ("fc2",),  # OPT, Phi, BART, CLIP, ViT
    ("fc_out",),  # GPT-J, CodeGen
    ("dense_4h_to_h",),  # GPT-NeoX, Bloom, Falcon
    ("mlp.Wo",),  # ModernBERT
    ("feed_forward.w2",),  # LFM2
    ("ffn_output",),  # ALBERT
    ("ffn.lin2",),  # DistilBERT
    ("DenseReluDense.wo",),  # T5
    ("output.dense",),  # BERT and its descendants
)


class Ia3Linear(Planted):
    """A frozen linear with ``ia3_l`` before it (``feedforward``, [in]) or after it ([out]).

    The product is taken in the dtype of ``ia3_l``, because a number near one has few steps around it in bf16.
    """

    def __init__(self, base: nn.Module, ia3_l: Tensor, feedforward: bool) -> None:
        super().__init__(base)
        self.ia3_l = nn.Parameter(ia3_l)
        self.feedforward = feedforward

    def forward(self, x: Tensor) -> Tensor:
        """[…, in] → […, out] in the dtype of ``x``."""
        if not self.enabled:
            return self.base(x)
        if self.feedforward:
            return self.base((x * self.ia3_l).to(x.dtype))
        y: Tensor = self.base(x)
        return (y * self.ia3_l).to(y.dtype)

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight``, [out, in] (Conv1D: [in, out]) in fp32, its rows or columns rescaled; ``bias`` [out] with the rows."""
        scale = self.ia3_l.to(values)
        if name == "weight":
            # l runs along the last dimension of W for its columns, and of Conv1D's for its rows
            last = self.feedforward is not is_transposed(self.base)
            values.mul_(scale if last else scale.unsqueeze(1))
        elif name == "bias" and not self.feedforward:
            values.mul_(scale)
        return values

    def extra_repr(self) -> str:
        return f"{'input' if self.feedforward else 'output'}={len(self.ia3_l)}"


class Ia3Layout(Layout):
    """PEFT's IA3Config, and vectors as PEFT's matrices."""

    peft_type = "IA3"
    read = frozenset({"target_modules", "feedforward_modules", "fan_in_fan_out", "init_ia3_weights"})

    def tensors(self) -> dict[str, Tensor]:
        """Vectors as [1, in] or [out, 1]."""
        return {
            self.key(f"{path}.ia3_l"): layer.ia3_l.detach().unsqueeze(0 if layer.feedforward else 1)
            for path, layer in self.method.planted.items()
        }

    def peft_config(self, every_path: list[str]) -> Fields:
        planted = self.method.planted
        ends = {path for path, layer in planted.items() if layer.feedforward}
        names = target_names(planted, every_path)
        feedforward = sorted({leaf(path) for path in ends}) if names != sorted(planted) else sorted(ends)
        # PEFT takes a target for feedforward when its path ends with such a name, in the middle of a word too
        if {path for path in planted if path.endswith(tuple(feedforward))} != ends:
            names, feedforward = sorted(planted), sorted(ends)
        return {
            "target_modules": names,
            "feedforward_modules": feedforward,
            "exclude_modules": None,
            "fan_in_fan_out": any_transposed(planted),
            "init_ia3_weights": True,
            "modules_to_save": None,
        }

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields:
        """Raises MethodError for a pattern instead of names."""
        targets, ends = values.get("target_modules"), values.get("feedforward_modules") or []
        if not isinstance(targets, list) or not isinstance(ends, list):
            raise MethodError(
                f"The (IA)³ adapter sets target_modules={targets!r:.60} and feedforward_modules={ends!r:.60}; expected two "
                "lists of module names."
            )
        return {
            "name": "ia3",
            "target_modules": [name for name in targets if name not in ends],
            "feedforward_modules": ends,
        }


class Ia3Method(Method):
    """How the vectors are planted; nothing happens in the loss or between steps."""

    auto_dtype = torch.float32  # near 1, bf16 steps are 0.4 % apart
    by_rows = True
    layout_class = Ia3Layout
    section: IA3

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        ends = self._chosen(model, self.section.feedforward_modules, MLP_ENDS, "feedforward_modules")
        outs = self._chosen(model, self.section.target_modules, KEYS_AND_VALUES, "target_modules")
        if not ends and not outs:
            raise MethodError(
                "method.target_modules and method.feedforward_modules are both empty; name the linears to rescale in one."
            )
        planted: dict[str, Planted] = {}
        for path, linear in (outs | ends).items():
            feedforward = path in ends  # named in both it is one, as in PEFT
            ones = torch.ones(features(linear)[1 if feedforward else 0], device=self.device, dtype=self.dtype)
            planted[path] = Ia3Linear(linear, ones, feedforward)
        return {path: planted[path] for path, _ in model.named_modules() if path in planted}

    @staticmethod
    def _chosen(
        model: nn.Module, wanted: str | tuple[str, ...], known: Iterable[tuple[str, ...]], field: str
    ) -> dict[str, nn.Module]:
        if isinstance(wanted, tuple):
            return choose_targets(model, wanted, what="linear")
        if known is MLP_ENDS and (fused := fused_experts(model)):
            raise MethodError(
                f"The experts of {type(model).__name__} are fused into parameters of three dimensions ({listed(fused, 2)}), so "
                f"their last linears cannot be rescaled; name other linears in method.{field}, or none: method.{field}=[]."
            )
        paths = [path for path in find_linears(model) if not path.endswith("attention.output.dense")]
        for names in known:
            found = [path for path in paths if any(_named(name, path) for name in names)]
            if all(any(_named(name, path) for path in found) for name in names):
                return choose_targets(model, tuple(found))
        what = "keys or values" if field == "target_modules" else "the end of an MLP"
        raise MethodError(
            f"No linear of {type(model).__name__} is called what is known to make {what}; name such linears in "
            f"method.{field}, or leave them out with method.{field}=[]. The names there are "
            f"{listed(sorted({leaf(path) for path in paths}), 12)}."
        )


def _named(name: str, path: str) -> bool:
    """Whether ``path`` ends with ``name``; a name that begins with a capital letter may begin inside a word."""
    return path.endswith(name) if name[0].isupper() else matches(name, path)
