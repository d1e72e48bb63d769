"""Chat: a conversation with a trained model in the terminal.

Knows a run, its chat template and generation; must not know training.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

from transformers import TextStreamer

from qlora.errors import RunError
from qlora.evaluation import answer, room
from qlora.run import chat_tokenizer, load_run

LONGEST_ANSWER = 256


class Conversation:
    """A model and what has been said so far."""

    def __init__(self, folder: str | Path) -> None:
        self.tokenizer = chat_tokenizer(folder)
        self.model = load_run(folder)
        self.messages: list[dict[str, str]] = []

    def say(self, text: str, max_new_tokens: int = LONGEST_ANSWER, streamer: Any = None) -> str:
        """The answer to ``text``, greedy; both are remembered. A run on raw text continues the text and remembers nothing."""
        asked = [*self.messages, {"role": "user", "content": text}]
        if self.tokenizer.chat_template is None:
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        else:
            ids = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        left = room(self.model, len(ids))
        if left is not None and left < max_new_tokens:
            raise RunError(
                f"That makes {len(ids)} tokens, but the model reads {left + len(ids)} with its answer of up to {max_new_tokens}; "
                "begin anew with /new, or ask in fewer words."
            )
        reply = answer(self.model, ids, max_new_tokens, streamer)
        if self.tokenizer.chat_template is not None:
            self.messages = [*asked, {"role": "assistant", "content": reply}]
        return reply


def talk(folder: str | Path, lines: TextIO | None = None) -> None:
    """Read questions line by line and print the answers as they come. ``/new`` forgets, ``/quit`` or end of input leaves."""
    source = lines or sys.stdin
    conversation = Conversation(folder)
    terminal = source.isatty()
    if terminal:
        print("Ask away. /new begins a new conversation, /quit leaves.")
    streamer = TextStreamer(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
    while True:
        if terminal:
            print("> ", end="", flush=True)
        line = source.readline()
        text = line.strip()
        if not line or text == "/quit":
            return
        if text == "/new":
            conversation.messages.clear()
        elif text:
            try:
                conversation.say(text, streamer=streamer)
            except RunError as error:
                print(error)
