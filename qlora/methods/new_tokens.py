"""New tokens: added to a copy of the tokenizer, and only their rows of the embedding and the head train.

    embedding    e(id) = rows[j]  where id is new token j, the base's row elsewhere           rows [n, D]
    head         logits = [ h Wᵀ , h rowsᵀ ]       the new tokens' logits stand at their ids

As PEFT's trainable tokens on a base that was resized first, but nothing of the vocabulary's size is copied: the base's
matrices stay as they are, and the new rows stand beside them. A tied head uses the embedding's rows, any other has its own.
Rows begin as the mean of all rows, which is how a token looks that nothing is known of (Hewitt 2021, "Initializing New
Word Embeddings for Pretrained Language Models").

The ids are the tokenizer's next free ones. They may fall inside a vocabulary that was padded to a round number, and then
take the place of unused rows. Where the tokenizer has more tokens than the model has rows (Gemma 3), the rows between are
added too.

While it is disabled the base answers as it would have before the first step: its own rows and logits, and for the new
tokens the mean.

Knows tokenizers, embeddings and heads; must not know data or the training loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora.errors import MethodError, ModelError, listed
from qlora.methods.layout import PREFIX, Fields, Layout
from qlora.methods.merge import Merge
from qlora.methods.method import Method
from qlora.methods.planted import Planted, unplanted
from qlora.methods.targets import leaf
from qlora.model import anatomy
from qlora.model.base import Base
from qlora.model.tokenizer import add_tokens, load_tokenizer
from qlora.recipe.methods import NewTokens

ROWS_AT_ONCE = 4096  # of the embedding, when its mean is taken
DELTA = "trainable_tokens_delta"  # PEFT's name for the rows, which are no difference in spite of it
# What save_pretrained of older tokenizers wrote; its values would contradict a tokenizer with more tokens.
STALE = ("special_tokens_map.json", "added_tokens.json")


class NewRows(Planted):
    """What the planted embedding and head share: ``values`` [n, D], the rows of the sorted ``ids``.

    ``mean`` [D] is what every row began as; ``size`` is the vocabulary's with the new tokens.
    """

    ids: Tensor
    mean: Tensor

    def __init__(self, base: nn.Module, values: nn.Parameter, ids: tuple[int, ...], old: int, mean: Tensor) -> None:
        super().__init__(base)
        self.values = values
        self.old = old
        self.size = max(old, ids[-1] + 1)
        self.inside = sum(number < old for number in ids)
        """How many of the ids the base has rows for."""
        self.register_buffer("ids", torch.tensor(ids, device=values.device), persistent=False)
        self.register_buffer("mean", mean, persistent=False)

    @torch.no_grad()
    def merged(self, name: str, values: Tensor) -> Tensor:
        """``weight`` [V, D] with the new rows in it, and a head's ``bias`` [V] with zeros behind it."""
        made = torch.cat([values, values.new_zeros(self.size - self.old, *values.shape[1:])])
        if name == "weight":
            made[self.ids.to(made.device)] = self.values.to(made)
        return made

    def extra_repr(self) -> str:
        return f"new={len(self.values)}, size={self.size}"


class NewTokenEmbedding(NewRows):
    """An embedding that also knows the new tokens."""

    @property
    def num_embeddings(self) -> int:
        """Rows with the new ones."""
        return self.size

    def forward(self, ids: Tensor) -> Tensor:
        """[…] → […, D] in the dtype of the base."""
        place = torch.searchsorted(self.ids, ids.to(self.ids.dtype)).clamp(max=len(self.ids) - 1)
        new = self.ids[place] == ids
        if not self.enabled:
            new = new & (ids >= self.old)
        rows: Tensor = self.base(ids.masked_fill(new, 0))
        if self.enabled:
            chosen = F.embedding(place, self.values.to(rows.dtype))
        else:
            chosen = self.mean.to(rows.dtype)
        # Gemma 3 scales inside its embedding, as does PEFT's
        scale = getattr(self.base, "embed_scale", None)
        if scale is not None:
            chosen = chosen * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(new[..., None], chosen, rows)


class NewTokenHead(NewRows):
    """A head that also gives the new tokens' logits. ``values`` are the embedding's own where ``tied``."""

    def __init__(
        self, base: nn.Module, values: nn.Parameter, ids: tuple[int, ...], old: int, mean: Tensor, tied: bool
    ) -> None:
        super().__init__(base, values, ids, old, mean)
        self.tied = tied

    @property
    def out_features(self) -> int:
        """Logits with the new ones."""
        return self.size

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Rows that are tied are the embedding's."""
        return {} if self.tied else super().own_parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """[…, D] → […, size]."""
        logits: Tensor = self.base(hidden)
        if not self.enabled:
            beyond = F.linear(hidden, self.mean.to(hidden.dtype)[None]).expand(*hidden.shape[:-1], self.size - self.old)
            return torch.cat([logits, beyond], -1)
        new = F.linear(hidden, self.values.to(hidden.dtype))
        inside, beyond = new[..., : self.inside], new[..., self.inside :]
        if self.inside:
            replaced = self.ids[: self.inside]
            bias = getattr(unplanted(self.base), "bias", None)
            logits = logits.index_copy(-1, replaced, inside if bias is None else inside + bias[replaced])
        # ids at or behind the base's last row are all there, so their logits simply follow
        return torch.cat([logits, beyond], -1) if beyond.shape[-1] else logits


class NewTokensLayout(Layout):
    """PEFT's TrainableTokensConfig, or the field of another config that says the same; the tokenizer stands beside it."""

    method: NewTokensMethod
    peft_type = "TRAINABLE_TOKENS"
    only = {"init_weights": (True, False, None)}  # noqa: RUF012
    read = frozenset({"token_indices", "target_modules", "trainable_token_indices"})

    def key(self, name: str) -> str:
        """PEFT's key, which has one part more where the rows go with another method's adapter."""
        infix = "" if self.alone else "token_adapter."
        return f"{PREFIX}{name.removesuffix('values')}{infix}{DELTA}"

    def tensors(self) -> dict[str, Tensor]:
        """The rows. PEFT's own config of this method names those of a tied head once more."""
        found = super().tensors()
        if self.alone:
            found |= {key: found[other].clone() for key, other in self._doubled().items()}
        return found

    def _doubled(self) -> dict[str, str]:
        """The key that a tied head's rows would have → that of the embedding's, which they are."""
        embedding, *head = self.method.planted.items()
        tied = [path for path, layer in head if isinstance(layer, NewTokenHead) and layer.tied]
        return {self.key(f"{path}.values"): self.key(f"{embedding[0]}.values") for path in tied}

    def fitted(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Without the whole embedding and head, which PEFT saves beside the rows when a base was resized.

        Raises MethodError where a head's rows are not the embedding's in spite of a tied base.
        """
        whole = {
            f"{PREFIX}{path}.{inside}"
            for path in self.method.planted
            for inside in ("weight", "base_layer.weight", "token_adapter.base_layer.weight")
        }
        kept = {key: values for key, values in tensors.items() if key not in whole}
        for key, other in self._doubled().items():
            doubled = kept.pop(key, kept.get(other))
            if doubled is not None and self.alone:
                kept[key] = doubled
            if doubled is not None and other in kept and not torch.equal(doubled, kept[other]):
                raise MethodError(
                    f"This adapter has other rows in {key} than in {other}, but the head of '{self.method.base.name}' is tied to its "
                    "embedding; use the base that it was trained on."
                )
        return kept

    def peft_config(self, every_path: list[str]) -> Fields:
        """PEFT's TrainableTokensConfig, or the field of another config that says the same.

        PEFT matches the plain end of a path, and finds a tied head by itself.
        """
        names = [
            leaf(path) if sum(other.endswith(leaf(path)) for other in every_path) == 1 else path
            for path, layer in self.method.planted.items()
            if layer.own_parameters()
        ]
        ids = list(self.method.ids)
        if self.alone:
            return {"token_indices": ids, "target_modules": names, "init_weights": True}
        return {"trainable_token_indices": ids if len(names) == 1 else dict.fromkeys(names, ids)}

    @classmethod
    def section_of(cls, values: Fields, folder: Path) -> Fields | None:
        """The section of a config that trains rows; what their texts are, the tokenizer beside it says."""
        found = values.get("token_indices" if values.get("peft_type") == cls.peft_type else "trainable_token_indices")
        if found is None or (not found and values.get("peft_type") != cls.peft_type):
            return None
        lists = list(found.values()) if isinstance(found, dict) else [found]
        ids = lists[0] if lists else []
        whole = isinstance(ids, list) and ids and all(type(number) is int and 0 <= number < 2**31 for number in ids)
        if not whole or sorted(set(ids)) != ids or any(other != ids for other in lists):
            raise MethodError(
                f"The adapter in '{folder}' trains the token rows {found!r:.80}; expected the same rising ids for every module."
            )
        try:
            tokenizer = load_tokenizer(folder)
        except ModelError as error:
            raise MethodError(
                f"The adapter in '{folder}' trains the rows of the tokens {listed(ids)}, and no tokenizer beside it says what "
                f"they are: {error}"
            ) from None
        texts = [token for token in tokenizer.convert_ids_to_tokens(ids) if token is not None]
        special = any(
            tokenizer.added_tokens_decoder[number].special for number in ids if number in tokenizer.added_tokens_decoder
        )
        return {"name": "new_tokens", "tokens": tuple(texts), "ids": tuple(ids), "special": special}

    def save_beside(self, folder: Path) -> None:
        """The tokenizer with the new tokens."""
        if self.method.base.tokenizer is not None:
            self.method.base.tokenizer.save_pretrained(folder)


class NewTokensMerge(Merge):
    """An embedding and a head with a row more for each new token."""

    method: NewTokensMethod

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The embedding and the head, with a row for each new token."""
        path, _, inside = name.rpartition(".")
        layer = self.method.planted.get(path)
        return (layer.size, *shape[1:]) if isinstance(layer, NewRows) and inside in ("weight", "bias") else shape

    def config(self, values: dict[str, Any]) -> dict[str, Any]:
        """The size of the vocabulary with the new tokens."""
        return {**values, "vocab_size": self.method.sizes[1]}

    def finish(self, folder: Path) -> None:
        """Write the tokenizer with the new tokens over the base's."""
        for name in STALE:
            (folder / name).unlink(missing_ok=True)
        self.method.layout.save_beside(folder)


class NewTokensMethod(Method):
    """How new tokens come into the tokenizer, the embedding and the head."""

    place = "embeddings"
    layout_class = NewTokensLayout
    merge_class = NewTokensMerge
    section: NewTokens

    def __init__(self, section: NewTokens, base: Base, seed: int = 0, values_follow: bool = False) -> None:
        super().__init__(section, base, seed, values_follow)
        self.ids: tuple[int, ...] = ()
        """The rows that train, rising."""
        self.tokenizers: tuple[Any, Any] = (base.tokenizer, base.tokenizer)
        """The base's own, and the one with the new tokens."""
        self.sizes = (0, 0)
        """Rows of the embedding, before and after."""

    def new_layers(self, model: nn.Module) -> dict[str, Planted]:
        """The tokens are in a copy of the base's tokenizer, which takes its place when the rows are planted.

        Raises MethodError for tokens that the base has already, a model without a tokenizer, or an embedding of another
        kind.
        """
        embedding, head = anatomy.embedding(model), anatomy.head(model)
        if not isinstance(embedding, nn.Embedding) or not (
            type(embedding).forward is nn.Embedding.forward or hasattr(embedding, "embed_scale")
        ):
            raise MethodError(
                f"method new_tokens needs a model with an ordinary embedding of tokens, and '{self.base.name}' has "
                f"{'none' if embedding is None else 'a ' + type(embedding).__name__}; leave the method out."
            )
        old = embedding.num_embeddings
        tokenizer = self._tokenizer(old)
        paths = {id(module): path for path, module in model.named_modules()}
        values, mean = self._first_rows(embedding.weight)
        planted: dict[str, Planted] = {
            paths[id(embedding)]: NewTokenEmbedding(embedding, values, self.ids, old, mean),
        }
        if head is not None:
            weight: Any = unplanted(head).weight
            tied = weight is embedding.weight
            if not tied:
                values, mean = self._first_rows(weight)
            planted[paths[id(head)]] = NewTokenHead(head, values, self.ids, old, mean, tied)
        self.tokenizers = self.base.tokenizer, tokenizer
        self.sizes = old, max(old, self.ids[-1] + 1)
        return planted

    def _tokenizer(self, old: int) -> Any:
        """The tokenizer with the new tokens, whose rows become ``self.ids``; None where only shapes are wanted."""
        count, base = len(self.section.tokens), self.base
        if base.tokenizer is None and self.device.type == "meta":
            self.ids = tuple(range(old, old + count))
            return None
        if base.tokenizer is None:
            raise MethodError(
                f"method new_tokens adds tokens to a tokenizer, and '{base.name}' has none; load it with one."
            )
        vocabulary = base.tokenizer.get_vocab()
        if known := [token for token in self.section.tokens if vocabulary.get(token, old) < old]:
            raise MethodError(
                f"The tokenizer of '{base.name}' has {listed([repr(token) for token in known])} already, so they are no new "
                "tokens; leave them out of method.tokens."
            )
        tokenizer = add_tokens(base.tokenizer, self.section.tokens, self.section.special)
        found = {tokenizer.get_vocab()[token] for token in self.section.tokens}
        # below a new row there must be no hole: the matrices grow up to it
        self.ids = tuple(sorted(found | set(range(old, max(found) + 1))))
        if self.section.ids is not None and self.section.ids != self.ids:
            raise MethodError(
                f"The new tokens {listed(self.section.tokens)} have the ids {listed(self.section.ids)} in this adapter, but "
                f"{listed(self.ids)} with the tokenizer of '{base.name}'; use the base that it was trained on."
            )
        return tokenizer

    @torch.no_grad()
    def _first_rows(self, weight: Tensor) -> tuple[nn.Parameter, Tensor]:
        """(rows [n, D] to train, the mean [D] of all rows of ``weight`` that they begin as)."""
        mean = torch.zeros(weight.shape[1], device=self.device)
        if not weight.is_meta:  # there, shapes are wanted, or values follow
            for rows in weight.split(ROWS_AT_ONCE):
                mean += rows.to(mean.device).float().sum(0)  # it may be in host memory
            mean /= len(weight)
        mean = mean.to(self.dtype)
        return nn.Parameter(mean.repeat(len(self.ids), 1)), mean

    def _announce(self, model: nn.Module, which: int) -> None:
        """Give the base the tokenizer and the size before (0) or after (1)."""
        self.base.tokenizer = self.tokenizers[which]
        # a model's own loss folds its logits by these
        places: list[Any] = [model, getattr(model, "config", None)]
        for place in places:
            if getattr(place, "vocab_size", None) in self.sizes:
                place.vocab_size = self.sizes[which]

    def attach(self, model: nn.Module) -> None:
        """Put the rows and the tokenizer back in."""
        super().attach(model)
        self._announce(model, 1)

    def detach(self, model: nn.Module) -> None:
        """Give the base its own embedding, head and tokenizer back."""
        super().detach(model)
        self._announce(model, 0)
