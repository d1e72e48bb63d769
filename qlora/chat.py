"""Chat: a conversation with a trained model in the terminal.

Knows a run, its chat template and generation; must not know training. What the model writes cannot move the cursor.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from transformers import TextStreamer

from qlora.data.rendering import CutOff, Refused, Renderer, one_child
from qlora.errors import RunError, visible
from qlora.evaluation.generate import answers, room
from qlora.runs.evaluate import chat_tokenizer, load_run
from qlora.runs.folder import require_language_model

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

LONGEST_ANSWER = 256  # tokens
CUT = " […]"


class Conversation:
    """A model and what has been said so far."""

    def __init__(self, folder: str | Path) -> None:
        require_language_model(Path(folder), "chat")
        self.tokenizer = chat_tokenizer(folder)
        self.model = load_run(folder)
        self.messages: list[dict[str, str]] = []
        self.was_cut = False
        """Whether the last answer met its limit and not its end."""
        template = self.tokenizer.chat_template
        self._renderer = None if template is None else Renderer(template, self.tokenizer.special_tokens_map)

    def say(self, text: str, max_new_tokens: int = LONGEST_ANSWER, streamer: BaseStreamer | None = None) -> str:
        """The greedy answer to ``text``; both are remembered. A model of raw text continues it, and remembers nothing.

        Raises RunError when the conversation grows too long for the model, or its chat template refuses it.
        """
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RunError("That is no text: some of its bytes are not UTF-8. Send it as UTF-8.")
        asked = [*self.messages, {"role": "user", "content": text}]
        if self._renderer is None:
            ids = self.tokenizer(text, verbose=False)["input_ids"]
        else:
            try:
                rendered = self._renderer.text(asked, add_generation_prompt=True)
            except (Refused, CutOff) as error:
                how = "refuses this conversation" if isinstance(error, Refused) else "was stopped, as"
                raise RunError(f"The run's chat template {how}: {error}. Begin anew with /new.") from None
            ids = self.tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        left = room(self.model, len(ids))
        if left is not None and left < max_new_tokens:
            raise RunError(
                f"That makes {len(ids)} tokens, but the model reads {left + len(ids)} with its answer of up to {max_new_tokens}; "
                "begin anew with /new, or ask in fewer words."
            )
        reply = answers(self.model, [ids], max_new_tokens, streamer, cut=CUT)[0]
        self.was_cut, reply = reply.endswith(CUT), reply.removesuffix(CUT)
        if self._renderer is not None:
            self.messages = [*asked, {"role": "assistant", "content": reply}]
        return reply


class _Screen(TextStreamer):
    """Prints an answer as it comes."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(visible(text), stream_end)


@one_child()
def talk(folder: str | Path, lines: TextIO | None = None) -> None:
    """Read questions line by line and print the answers as they come. ``/new`` forgets; ``/quit`` or the input's end leaves."""
    source = lines or sys.stdin
    conversation = Conversation(folder)
    terminal = source.isatty()
    if terminal:
        print("Ask away. /new begins a new conversation, /quit leaves.")
    streamer = _Screen(conversation.tokenizer, skip_prompt=True, skip_special_tokens=True)
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
                if conversation.was_cut:
                    print(f"[… the answer was cut here, after {LONGEST_ANSWER} tokens]")
            except RunError as error:
                print(visible(error))
