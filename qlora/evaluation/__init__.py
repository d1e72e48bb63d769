"""Evaluation: the loss on held-out data, answers to prompts, and what became of the weights. Leaves the model as it was."""

from __future__ import annotations

from qlora.evaluation.change import Change, change_of, directions_of, overlaps
from qlora.evaluation.generate import answer, answers, room
from qlora.evaluation.latency import Latency, latency_of
from qlora.evaluation.score import HeldOut, Verdict, score, verdict

__all__ = [
    "Change",
    "HeldOut",
    "Latency",
    "Verdict",
    "answer",
    "answers",
    "change_of",
    "directions_of",
    "latency_of",
    "overlaps",
    "room",
    "score",
    "verdict",
]
