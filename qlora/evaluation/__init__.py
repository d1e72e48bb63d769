"""Evaluation: what the model makes of held-out data, and what it answers. Leaves the model as it was."""

from __future__ import annotations

from qlora.evaluation.generate import answer, answers, room
from qlora.evaluation.score import HeldOut, score

__all__ = ["HeldOut", "answer", "answers", "room", "score"]
