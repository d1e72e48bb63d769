"""Endings: which tokens end an answer of a chat template, found by trying it, and where in a text they do.

    ends        <|end|>, </s>              the last answer's first, then an earlier one's where it is another (gpt-oss)
    calls       <|call|>                   what ends an answer with function calls, where that is another
    closing     what is written behind a last answer that the template leaves without an end (GLM), or that nothing ends (Alpaca)

Knows how to ask a template for texts; must not know tokens' numbers, masks, or what a conversation is about.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from qlora.data.dialect import Dialect
from qlora.data.rendering import Refused

_ANSWER, _THOUGHTS = "qlora-answer", "qlora-thoughts"
_USER, _REPLY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": _ANSWER}


class Endings:
    """How the answers of a template end. ``render(messages, tools, asked)`` gives a text or raises Refused; ``special`` are the
    tokenizer's special tokens, ``eos`` among them; ``states_mask``: the template has ``{% generation %}`` blocks."""

    def __init__(
        self, render: Callable[..., str], dialect: Dialect, special: Sequence[str], eos: str | None, states_mask: bool
    ) -> None:
        self.render, self.dialect, self.special = render, dialect, tuple(special)
        self.tokens, self.closing = self._turn_ends(eos, states_mask)
        self.calls = self._ends_of_calls()
        """What ends an answer with function calls, where it is another token than ends the rest (gpt-oss): one or none."""
        self.always_asks = self._asks_behind_answers()
        """Whether the template begins a next answer behind a finished one too, asked or not (Command R7B)."""
        self.thoughts_alike = self._ends_thoughts_alike()
        """Whether the token that ends an answer ends its reasoning too (Solar Open): no stop token can tell the two apart."""

    def end(self, text: str) -> int:
        """Where the answer that ends ``text`` ends: behind its end-of-turn token, before white space that follows it."""
        bare = text.rstrip()
        return len(bare) if bare.endswith(self.special) else len(text)

    def end_within(self, whole: str, text: str) -> int:
        """Where the answer that ends ``text`` ends in ``whole``; -1 when ``whole`` is another text before that.

        What follows the end of turn may be for the last turn alone, as the eos token of Phi-3's template.
        """
        end = self.end(text)
        while not whole.startswith(text[:end]):
            token = max((token for token in self.special if text.endswith(token, 0, end)), key=len, default="")
            end = len(text[: end - len(token)].rstrip())
            if not token or not text.endswith(self.tokens, 0, end):
                return -1
        return end

    def unclosed(self, text: str, answer: Mapping[str, object]) -> str:
        """What ``text``, which ends with an answer, lacks to its end of turn."""
        closing = self.closing["calls" if answer.get("tool_calls") else "answer"]
        token = next(iter(self._leading(closing)), "")
        # not just any special token: GLM's calls end with </tool_call>, which ends no turn
        return "" if token and text.rstrip().endswith((token, *self.tokens)) else closing

    def _turn_ends(self, eos: str | None, states_mask: bool) -> tuple[tuple[str, ...], dict[str, str]]:
        """(The special tokens that end an answer: the last one's first, then an earlier one's where it is another;
        what to write behind a last answer, and behind last calls, that the template leaves without any)."""
        closed, longer = self.text([_USER, _REPLY]), self.text([_USER, _REPLY, _USER])
        last, earlier = (text.rpartition(_ANSWER)[2] for text in (closed, longer))
        finals, nexts = self._leading(last), self._leading(earlier)
        if not (finals or nexts or states_mask) and eos and _ANSWER in closed:  # Alpaca, Falcon: text alone
            self.dialect.notes[f"answers end with {eos}, since the chat template writes nothing that ends them"] = None
            return (eos,), {"answer": eos, "calls": eos}
        both = [a for a, b in zip(finals, nexts, strict=False) if a == b]
        if finals or not nexts:
            ends = dict.fromkeys([*(both or finals)[-1:], *nexts[: 0 if both else 1]])
            final = max((token for token in self.special if last.rstrip().endswith(token)), key=len, default="")
            if both and last.count(both[-1]) > 1 and final and earlier.startswith(last.rstrip()):
                ends = {final: None}  # the other closes a part of an answer, not the turn (Kimi K3)
            return tuple(ends), {"answer": "", "calls": ""}
        self.dialect.notes[
            f"a last answer ends with {nexts[0]}, which follows every other, since the chat template leaves it without an end"
        ] = None
        calling = _calling(1)
        result = {"role": "tool", "content": "result", "tool_call_id": "call00000", "name": "f"}
        before, called = self.text([_USER, calling]), self.text([_USER, calling, result])
        closing = {"answer": earlier.removeprefix(last)}
        # a template may write last calls otherwise than earlier ones (Apriel): then they end as other answers do
        closing["calls"] = called.removeprefix(before) if called.startswith(before) else closing["answer"]
        for kind, text in closing.items():
            token = next(iter(self._leading(text)), "")
            closing[kind] = text[: text.find(token) + len(token)]
        return (nexts[0],), closing

    def _ends_of_calls(self) -> tuple[str, ...]:
        if not self.dialect.calls:
            return ()
        asked = self.text([_USER])
        called = self.text([_USER, _calling(2)]).removeprefix(asked)
        called = called[: self.end(called)] + self.unclosed(called, _calling(2))
        token = max((token for token in self.special if called.endswith(token)), key=len, default="")
        # one that stands between two calls as well ends a call, not the turn; one inside other answers would cut them short
        plain = self.text([_USER, _REPLY]).removeprefix(asked)
        other = token and token not in self.tokens and called.count(token) == 1 and token not in plain
        return (token,) if other else ()

    def _ends_thoughts_alike(self) -> bool:
        if not (self.tokens and self.dialect.reasoning):
            return False
        answer = {**_REPLY, self.dialect.reasoning: _THOUGHTS}
        thought, found, _ = self.text([_USER, answer]).partition(_ANSWER)
        return bool(found) and self.tokens[0] in thought.rpartition(_THOUGHTS)[2] and _THOUGHTS in thought

    def _asks_behind_answers(self) -> bool:
        question, closed, longer = (self.text(turns) for turns in ([_USER], [_USER, _REPLY], [_USER, _REPLY, _USER]))
        same_end = question[len(question) - alike(question[::-1], closed[::-1]) :]
        return (
            question == self.text([_USER], asked=True)
            and any(token in same_end for token in self.special)
            and not longer.startswith(closed)  # so it is more than what ends every turn
        )

    def text(self, messages: Sequence[Mapping[str, object]], asked: bool = False) -> str:
        """A conversation made up to try the template; nothing when it is refused."""
        try:
            return self.render(self.dialect.parted(messages), None, asked)
        except Refused:
            return ""

    def _leading(self, text: str) -> list[str]:
        """The special tokens, side by side, that a text begins with, white space aside."""
        found: list[str] = []
        text = text.lstrip()
        while token := max((token for token in self.special if text.startswith(token)), key=len, default=""):
            found.append(token)
            text = text.removeprefix(token)
        return found


def _calling(count: int) -> dict[str, object]:
    """An answer, made up to try a template, that calls a function so many times."""
    function = {"name": "f", "arguments": {"a": 1}}
    calls = [{"id": f"call0000{number}", "type": "function", "function": function} for number in range(count)]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def alike(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginnings."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
