"""The kinds of tasks by name. Knows that each is there and nothing of it."""

from __future__ import annotations

from qlora.evaluation.tasks.choice import CHOICE
from qlora.evaluation.tasks.classification import CLASSIFICATION
from qlora.evaluation.tasks.generation import GENERATION
from qlora.evaluation.tasks.last_word import LAST_WORD
from qlora.evaluation.tasks.numeric import NUMERIC
from qlora.evaluation.tasks.structured import STRUCTURED
from qlora.evaluation.tasks.task import Kind
from qlora.evaluation.tasks.text import TEXT

KINDS: dict[str, Kind] = {
    "choice": CHOICE,
    "last_word": LAST_WORD,
    "classification": CLASSIFICATION,
    "numeric": NUMERIC,
    "generation": GENERATION,
    "json": STRUCTURED,
    "text": TEXT,
}
