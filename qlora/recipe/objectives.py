"""The recipe's ``objective`` section: what a step minimises, one class for each, told apart by ``name``.

Knows pydantic; must not know how a loss is computed (``training/objectives``).
"""

from __future__ import annotations

from typing import Literal

from qlora.recipe.schema import Section


class TokensObjective(Section):
    """The next token: cross-entropy over the target tokens of each row."""

    name: Literal["tokens"] = "tokens"
    """`tokens`: the one there is so far."""


AnyObjective = TokensObjective
"""With a second one a union told apart by name, as ``OneMethod`` is: ``Annotated[… | …, Discriminator(name_of)]``."""
