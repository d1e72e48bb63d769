"""The schema: what every section of a recipe shares.

Knows pydantic; must not know any section.
"""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from qlora.files.strangers import shown

MOST = 2**53  # whole numbers are exact in a float up to here


class Section(BaseModel):
    """What every section shares: frozen, complete, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic would read `epochs: true` as 1
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool:
            raise ValueError(f"is {str(value).lower()}; expected {type_text(kind)}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: Any) -> Any:
        # arithmetic with anything larger ends in an OverflowError somewhere, or takes for ever
        if isinstance(value, int) and abs(value) >= MOST:
            raise ValueError(f"is {shown(value)}; expected a number below 2⁵³")
        return value


def type_text(annotation: Any) -> str:
    """``Literal['a', 'b'] | None`` → ``a, b or null``."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(part) for part in typing.get_args(annotation))
    if origin is tuple:
        return "list of " + type_text(typing.get_args(annotation)[0])
    if origin is Annotated:
        return type_text(typing.get_args(annotation)[0])
    if origin is dict:
        key, value = typing.get_args(annotation)
        return f"mapping of {type_text(key)} to {type_text(value)}"
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
