"""Chat: what is remembered, what is not, and what does not fit."""

from __future__ import annotations

from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest

from qlora.chat import Conversation, talk
from qlora.errors import RunError
from qlora.recipe import Recipe
from qlora.runs.evaluate import chat_tokenizer
from qlora.runs.export import merge
from qlora.runs.train import train
from tests.tiny import conversations, tiny_values, write_lines

SHORT = ("training.steps=1", "data.held_out_fraction=0", "evaluation.prompts=0")


@pytest.fixture(scope="module")
def chat_run(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "run"
    return train(Recipe.from_dict(tiny_values(tiny_model, chat_data, folder), *SHORT), quiet=True).folder


def test_conversation_remembers_both_sides(chat_run: Path) -> None:
    conversation = Conversation(chat_run)
    first = conversation.say("fox 3?", max_new_tokens=5)
    conversation.say("and then?", max_new_tokens=5)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert [message["content"] for message in conversation.messages[:3]] == ["fox 3?", first, "and then?"]
    seen: list[int] = []

    class Streamer:
        def put(self, value: Any) -> None:
            seen.append(value.numel())

        def end(self) -> None:
            seen.append(-1)

    assert Conversation(chat_run).say("fox 3?", max_new_tokens=5, streamer=Streamer()) == first
    assert seen[-1] == -1
    assert seen[0] > 5


def test_an_answer_that_was_cut_is_said_to_be(
    chat_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = ["whole", "half […]"]
    monkeypatch.setattr("qlora.chat.answers", lambda *given, cut: [answered.pop(0)])
    monkeypatch.setattr("qlora.chat.room", lambda *given: None)  # the tiny model has positions for 256 tokens in all
    conversation = Conversation(chat_run)
    assert (conversation.say("fox 3?"), conversation.was_cut) == ("whole", False)
    assert (conversation.say("and then?"), conversation.was_cut) == ("half", True)
    assert conversation.messages[-1]["content"] == "half"  # the mark is not remembered as the model's words
    answered += ["half […]"]
    talk(chat_run, StringIO("fox 3?\n"))
    assert capsys.readouterr().out == "[… the answer was cut here, after 256 tokens]\n"


def test_too_long_conversation_is_refused_and_not_remembered(
    chat_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(chat_run)
    with pytest.raises(RunError, match="the model reads 256"):
        conversation.say("fox " * 300)
    assert conversation.messages == []
    talk(chat_run, StringIO("fox " * 300 + "\n"))  # said, and the talk goes on
    assert "the model reads 256" in capsys.readouterr().out


def test_positions_that_the_method_takes_are_counted(tiny_model: Path, chat_data: Path, tmp_path: Path) -> None:
    values = tiny_values(tiny_model, chat_data, tmp_path / "run")
    values["method"] = {"name": "prefix_tuning", "tokens": 8}
    conversation = Conversation(train(Recipe.from_dict(values, *SHORT), quiet=True).folder)
    with pytest.raises(RunError, match="the model reads 248"):
        conversation.say("fox " * 300)


def test_stretched_positions_are_counted(chat_run: Path) -> None:
    """``max_position_embeddings`` alone says 256."""
    conversation = Conversation(chat_run)
    conversation.model.model.config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}  # type: ignore[union-attr, assignment]
    conversation.say("fox " * 100, max_new_tokens=200)
    with pytest.raises(RunError, match="the model reads 1024"):
        conversation.say("fox " * 1000)


def test_own_template_is_used_in_chat(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        encoding="utf-8",
    )
    data = write_lines(tmp_path / "chat.jsonl", conversations(6))
    values = tiny_values(tiny_model, data, tmp_path / "run")
    folder = train(Recipe.from_dict(values, *SHORT, f"data.chat_template={template}"), quiet=True).folder
    text = chat_tokenizer(folder).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "user: Hi</s>"
    assert (folder / "adapter/chat_template.jinja").read_text(encoding="utf-8") == template.read_text(encoding="utf-8")
    merged = merge(folder)
    assert (merged.folder / "chat_template.jinja").read_text(encoding="utf-8") == template.read_text(encoding="utf-8")


def test_raw_text_is_continued_and_nothing_remembered(tiny_model: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "text.jsonl", [{"text": f"the fox said {n} hello there"} for n in range(6)])
    values = tiny_values(tiny_model, data, tmp_path / "run")
    folder = train(Recipe.from_dict(values, *SHORT), quiet=True).folder
    conversation = Conversation(folder)
    assert conversation.say("the fox", max_new_tokens=4) == conversation.say("the fox", max_new_tokens=4)
    assert conversation.messages == []
    with pytest.raises(RunError, match="the model reads 256"):
        conversation.say("the fox " * 300)


def test_bytes_that_are_no_text_are_said_and_not_remembered(chat_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TextIOWrapper(BytesIO(b"Wie hei\xdft du?\n"), encoding="utf-8", errors="surrogateescape") as lines:
        talk(chat_run, lines)
    assert "some of its bytes are not UTF-8" in capsys.readouterr().out
