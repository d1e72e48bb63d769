"""qlora: fine-tune a large language model on the card you have.

    import qlora
    run = qlora.train(qlora.Recipe.from_yaml("quickstart.yaml"))

Names are imported when they are first used, so that ``import qlora`` is quick and ``qlora doctor`` runs without torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qlora.data import Data, load_data
    from qlora.errors import QloraError
    from qlora.evaluation import answer, answers
    from qlora.methods import AdaptedModel, Adapters, apply_method, combine, load_adapter, save_adapter, save_combined
    from qlora.model import Base, load_base, quantise
    from qlora.planning.accounting import Account, account
    from qlora.planning.plan import Plan, Survey, plan, survey
    from qlora.recipe import (
        IA3,
        AdaLoRA,
        BitFit,
        Bottleneck,
        Combined,
        DoRA,
        Full,
        LoRA,
        MemorySection,
        Modules,
        NewTokens,
        PrefixTuning,
        PromptTuning,
        PTuning,
        Recipe,
    )
    from qlora.reporting import write_report
    from qlora.runs.run import Run, evaluate, load_run, merge, preview, resume, train
    from qlora.training import Step, Trainer

# While it is imported, bitsandbytes advises a package of faster CPU inference kernels, which training does not use.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_HOMES = {
    "planning.accounting": ("Account", "account"),
    "recipe": (
        "IA3",
        "AdaLoRA",
        "BitFit",
        "Bottleneck",
        "Combined",
        "DoRA",
        "Full",
        "LoRA",
        "MemorySection",
        "Modules",
        "NewTokens",
        "PTuning",
        "PrefixTuning",
        "PromptTuning",
        "Recipe",
    ),
    "data": ("Data", "load_data"),
    "errors": ("QloraError",),
    "evaluation": ("answer", "answers"),
    "methods": (
        "AdaptedModel",
        "Adapters",
        "apply_method",
        "combine",
        "load_adapter",
        "save_adapter",
        "save_combined",
    ),
    "model": ("Base", "load_base", "quantise"),
    "reporting": ("write_report",),
    "planning.plan": ("Plan", "Survey", "plan", "survey"),
    "runs.run": ("Run", "evaluate", "load_run", "merge", "preview", "resume", "train"),
    "training": ("Step", "Trainer"),
}

__all__ = [
    "IA3",
    "Account",
    "AdaLoRA",
    "AdaptedModel",
    "Adapters",
    "Base",
    "BitFit",
    "Bottleneck",
    "Combined",
    "Data",
    "DoRA",
    "Full",
    "LoRA",
    "MemorySection",
    "Modules",
    "NewTokens",
    "PTuning",
    "Plan",
    "PrefixTuning",
    "PromptTuning",
    "QloraError",
    "Recipe",
    "Run",
    "Step",
    "Survey",
    "Trainer",
    "account",
    "answer",
    "answers",
    "apply_method",
    "combine",
    "evaluate",
    "load_adapter",
    "load_base",
    "load_data",
    "load_run",
    "merge",
    "plan",
    "preview",
    "quantise",
    "resume",
    "save_adapter",
    "save_combined",
    "survey",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"qlora.{home}"), name)
    raise AttributeError(f"module 'qlora' has no attribute '{name}'")
