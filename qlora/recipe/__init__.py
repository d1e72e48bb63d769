"""The recipe: what is wanted, in one typed and frozen schema.

    schema (what every section shares) ─► methods (a section for each method), tasks ─► config (the recipe itself)
    reading (YAML, overrides, mistakes as sentences) · reference (the fields as Markdown)

Knows YAML and pydantic; must not know torch, a model or a data set.
"""

from __future__ import annotations

from qlora.recipe.config import DEFAULT_MODEL as DEFAULT_MODEL
from qlora.recipe.config import DataSection as DataSection
from qlora.recipe.config import DeviceSection as DeviceSection
from qlora.recipe.config import EvaluationSection as EvaluationSection
from qlora.recipe.config import MemorySection as MemorySection
from qlora.recipe.config import ModelSection as ModelSection
from qlora.recipe.config import Recipe as Recipe
from qlora.recipe.config import TrainingSection as TrainingSection
from qlora.recipe.methods import IA3 as IA3
from qlora.recipe.methods import AdaLoRA as AdaLoRA
from qlora.recipe.methods import AnyMethod as AnyMethod
from qlora.recipe.methods import BitFit as BitFit
from qlora.recipe.methods import Bottleneck as Bottleneck
from qlora.recipe.methods import Combined as Combined
from qlora.recipe.methods import DoRA as DoRA
from qlora.recipe.methods import Dtype as Dtype
from qlora.recipe.methods import Full as Full
from qlora.recipe.methods import LoRA as LoRA
from qlora.recipe.methods import LowRankSection as LowRankSection
from qlora.recipe.methods import MethodSection as MethodSection
from qlora.recipe.methods import Modules as Modules
from qlora.recipe.methods import NewTokens as NewTokens
from qlora.recipe.methods import OneMethod as OneMethod
from qlora.recipe.methods import PrefixTuning as PrefixTuning
from qlora.recipe.methods import PromptTuning as PromptTuning
from qlora.recipe.methods import PTuning as PTuning
from qlora.recipe.methods import TargetedSection as TargetedSection
from qlora.recipe.methods import VirtualTokens as VirtualTokens
from qlora.recipe.methods import named as named
from qlora.recipe.methods import parts_of as parts_of
from qlora.recipe.objectives import DPO as DPO
from qlora.recipe.objectives import IPO as IPO
from qlora.recipe.objectives import ORPO as ORPO
from qlora.recipe.objectives import AnyObjective as AnyObjective
from qlora.recipe.objectives import Classification as Classification
from qlora.recipe.objectives import TokensObjective as TokensObjective
from qlora.recipe.reference import about as about
from qlora.recipe.reference import choices as choices
from qlora.recipe.reference import reference as reference
from qlora.recipe.schema import Section as Section
from qlora.recipe.tasks import TaskSection as TaskSection
