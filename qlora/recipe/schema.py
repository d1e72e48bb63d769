"""The schema: what every section of a recipe shares.

Knows pydantic; must not know any section.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_validator

from qlora.files.strangers import shown

MOST = 2**53  # whole numbers are exact in a float up to here


class Section(BaseModel):
    """What every section shares: frozen, complete, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, protected_namespaces=()
    )

    former: ClassVar[Mapping[str, tuple[str, Mapping[bool, Mapping[str, object]]]]] = {}
    """Switches that are no more, by name: the key that took their place, and what true and false say today."""
    mistaken: ClassVar[Mapping[str, str]] = {}
    """Keys of another kind of file that a file of this one never has, with what it is then: ``a study (qlora study)``."""

    instead: ClassVar[Mapping[str, str]] = {}
    """Of keys that say the same in two ways: a key → the one that an override of it takes the place of."""

    @model_validator(mode="before")
    @classmethod
    def _as_it_is_called_now(cls, values: Any) -> Any:
        for name, (key, meanings) in cls.former.items():
            if not isinstance(values, dict) or name not in values:
                continue
            value = values[name]
            if key in values:
                raise ValueError(f"has both {key} and {name}, its former name; expected {key} alone")
            if not isinstance(value, bool):
                raise ValueError(f"has {name}: {shown(value)}; expected true or false, or better {key}")
            values = {**{other: kept for other, kept in values.items() if other != name}, **meanings[value]}
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read `epochs: true` as 1
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and bool not in (kind, *typing.get_args(kind)):
            raise ValueError(f"is {str(value).lower()}; expected {type_text(kind)}")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _countable(cls, value: object) -> object:
        # arithmetic with anything larger ends in an OverflowError somewhere, or takes for ever
        if isinstance(value, int) and abs(value) >= MOST:
            raise ValueError(f"is {shown(value)}; expected a number below 2⁵³")
        return value


def sections_of(annotation: object) -> dict[str, type[Section]]:
    """The sections that a field may hold: ``{"": DataSection}``, ``{"lora": LoRA, …}`` where a name tells them apart."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return {"": annotation}
    found: dict[str, type[Section]] = {}
    for part in typing.get_args(annotation):
        for section in sections_of(part).values():
            name = section.model_fields.get("name")
            # a task's name is its own, and tells no sections apart
            found["" if name is None or name.is_required() else str(name.default)] = section
    return found


def by_text(texts: Any) -> Any:
    """A mapping by texts: YAML reads {0: negative} with a number for a key, and {yes: …} with a truth value."""
    if not isinstance(texts, dict):
        return texts
    return {str(key).lower() if isinstance(key, bool) else str(key): text for key, text in texts.items()}


def name_of(value: object) -> str | None:
    """What tells the sections of a union apart: the ``name`` of a section, or of its values."""
    if isinstance(value, dict):
        return value.get("name", "lora" if value.get("from") else None)  # which the adapter there decides
    return getattr(value, "name", None)


def type_text(annotation: object) -> str:
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
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    names: dict[object, str] = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
