"""The kinds of tasks by name. Knows each kind's class and nothing of it."""

from __future__ import annotations

from qlora.evaluation.tasks.choice import Choice
from qlora.evaluation.tasks.task import Kind

KINDS: dict[str, Kind] = {
    "choice": Choice(),
}
