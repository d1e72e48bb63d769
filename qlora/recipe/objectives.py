"""The recipe's ``objective`` section: what a step minimises, one class for each, told apart by ``name``.

Knows pydantic; must not know how a loss is computed (``training/objectives``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from qlora.recipe.schema import Section, name_of


class ObjectiveSection(Section):
    """What every objective has."""

    pairs: ClassVar[bool] = False
    """Whether it compares a chosen answer with a rejected one, so that the data are pairs."""
    refers: ClassVar[bool] = False
    """Whether it asks how likely answers were before training."""
    classifies: ClassVar[bool] = False
    """Whether it learns the label of a text, with a head of its own."""


class TokensObjective(ObjectiveSection):
    """The next token: cross-entropy over the target tokens of each row."""

    name: Literal["tokens"] = "tokens"
    """`tokens`."""


class DPO(ObjectiveSection):
    """Direct preference optimisation (arXiv:2305.18290): −log σ(r⁺ − r⁻), where the reward r is `beta` times how much likelier an
    answer became than it was before training."""

    pairs: ClassVar[bool] = True
    refers: ClassVar[bool] = True

    name: Literal["dpo"] = "dpo"
    """`dpo`."""
    beta: float = Field(0.1, gt=0, le=100)
    """How much a change of an answer's log-probability counts; a larger one keeps the model nearer to what it was."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The share of pairs that are taken to be labelled the wrong way round (conservative DPO)."""


class IPO(ObjectiveSection):
    """Identity preference optimisation (arXiv:2310.12036): (d − 1 / 2`beta`)², where d is how much likelier a token of the chosen
    answer became than one of the rejected answer. Unlike DPO's, this loss stops pulling the two apart."""

    pairs: ClassVar[bool] = True
    refers: ClassVar[bool] = True

    name: Literal["ipo"] = "ipo"
    """`ipo`."""
    beta: float = Field(0.1, gt=0, le=100)
    """The inverse of twice the difference that is aimed at, in nats a token; τ in the paper."""


class ORPO(ObjectiveSection):
    """Odds-ratio preference optimisation (arXiv:2403.07691): the chosen text's cross-entropy a token, prompt included, less
    `beta` · log σ(log-odds of the chosen answer − log-odds of the rejected one). It needs no reference."""

    pairs: ClassVar[bool] = True

    name: Literal["orpo"] = "orpo"
    """`orpo`."""
    beta: float = Field(0.1, gt=0, le=100)
    """The weight of the odds ratio; λ in the paper."""


class Classification(ObjectiveSection):
    """The label of a text: cross-entropy of a new head, `score`, at the text's last token. The records have a text and a label, and
    the labels are those of the training data. [More](classification.md)."""

    classifies: ClassVar[bool] = True

    name: Literal["classification"] = "classification"
    """`classification`."""


AnyObjective = Annotated[
    Annotated[TokensObjective, Tag("tokens")]
    | Annotated[DPO, Tag("dpo")]
    | Annotated[IPO, Tag("ipo")]
    | Annotated[ORPO, Tag("orpo")]
    | Annotated[Classification, Tag("classification")],
    Discriminator(name_of),
]
