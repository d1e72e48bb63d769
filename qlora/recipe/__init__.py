"""The recipe: what is wanted, in one typed and frozen schema.

    schema (what every section shares) ─► methods (a section for each method), tasks ─► config (the recipe itself)
    reading (YAML, overrides, mistakes as sentences) · reference (the fields as Markdown)

Knows YAML and pydantic; must not know torch, a model or a data set.
"""

from __future__ import annotations

from qlora.recipe.config import (
    DEFAULT_MODEL,
    DataSection,
    DeviceSection,
    EvaluationSection,
    MemorySection,
    ModelSection,
    Recipe,
    TrainingSection,
)
from qlora.recipe.methods import (
    IA3,
    AdaLoRA,
    AnyMethod,
    BitFit,
    Bottleneck,
    Combined,
    DoRA,
    Dtype,
    Full,
    LoRA,
    LowRankSection,
    MethodSection,
    Modules,
    NewTokens,
    OneMethod,
    PrefixTuning,
    PromptTuning,
    PTuning,
    TargetedSection,
    VirtualTokens,
    named,
    parts_of,
)
from qlora.recipe.objectives import DPO, IPO, ORPO, AnyObjective, Classification, TokensObjective
from qlora.recipe.reference import about, choices, reference
from qlora.recipe.schema import Section
from qlora.recipe.tasks import TaskSection

__all__ = [
    "DEFAULT_MODEL",
    "DPO",
    "IA3",
    "IPO",
    "ORPO",
    "AdaLoRA",
    "AnyMethod",
    "AnyObjective",
    "BitFit",
    "Bottleneck",
    "Classification",
    "Combined",
    "DataSection",
    "DeviceSection",
    "DoRA",
    "Dtype",
    "EvaluationSection",
    "Full",
    "LoRA",
    "LowRankSection",
    "MemorySection",
    "MethodSection",
    "ModelSection",
    "Modules",
    "NewTokens",
    "OneMethod",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Recipe",
    "Section",
    "TargetedSection",
    "TaskSection",
    "TokensObjective",
    "TrainingSection",
    "VirtualTokens",
    "about",
    "choices",
    "named",
    "parts_of",
    "reference",
]
