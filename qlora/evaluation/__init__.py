"""Evaluation: the loss on held-out data, and answers to prompts. Leaves the model as it was."""

from __future__ import annotations

from qlora.evaluation.generate import answer, answers, room
from qlora.evaluation.score import HeldOut, score

__all__ = ["HeldOut", "answer", "answers", "room", "score"]
