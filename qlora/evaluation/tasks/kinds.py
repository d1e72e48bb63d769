"""The kinds of tasks by name. Knows each kind's class and nothing of it."""

from __future__ import annotations

from qlora.evaluation.tasks.choice import Choice
from qlora.evaluation.tasks.classification import Classification
from qlora.evaluation.tasks.generation import Generation
from qlora.evaluation.tasks.last_word import LastWord
from qlora.evaluation.tasks.numeric import Numeric
from qlora.evaluation.tasks.structured import Structured
from qlora.evaluation.tasks.task import Kind
from qlora.evaluation.tasks.text import Text

KINDS: dict[str, Kind] = {
    "choice": Choice(),
    "last_word": LastWord(),
    "classification": Classification(),
    "numeric": Numeric(),
    "generation": Generation(),
    "json": Structured(),
    "text": Text(),
}
