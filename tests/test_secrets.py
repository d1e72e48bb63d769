"""Secrets leave the program nowhere, foreign code runs only aloud, and no text moves the cursor of a terminal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora.chat import talk
from qlora.cli import main
from qlora.errors import REDACTED, DataError, ModelError, redacted, visible
from qlora.model.foreign_code import foreign_code, say_foreign_code
from qlora.model.tokenizer import load_tokenizer
from qlora.runs import train as run
from qlora.training.log import MetricsLog, Progress
from tests.tiny import tiny_values

TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZ01234567"
SECRETS = {
    "the hub": TOKEN,
    "a server of models": "sk-proj-0aBcDeFgHiJkLmNoPqRs",
    "GitHub": "ghp_0123456789abcdefABCDEF0123456789abcd",
    "Amazon": "AKIAIOSFODNN7EXAMPLE",
    "Google": "AIzaSyA0123456789abcdefghijklmnopqrstuv",
    "GitLab": "glpat-0123456789abcdefghij",
    "Slack": "xoxb-0123456789-abcdef",
}
HARMLESS = [
    "hf_hub_download of org/model failed", "risk-averse sk-learn-is-a-long-name", "ssh://git@github.com/org/name",
    "https://huggingface.co/org/model?revision=main", "tokens a second", "key: value", "C:/Users/me:x@y",
]  # fmt: skip


@pytest.mark.parametrize("name", SECRETS)
def test_keys_are_known_by_their_shape(name: str) -> None:
    secret = SECRETS[name]
    for text in (secret, f"'{secret}'", f"token={secret}&x", f"https://h/{secret}/x", f"Bearer {secret}."):
        assert secret not in redacted(text)
        assert REDACTED in redacted(text)
    assert redacted({secret: [secret, (1, secret)], "n": 2.5}) == {REDACTED: [REDACTED, (1, REDACTED)], "n": 2.5}


def test_passwords_and_signatures_in_addresses() -> None:
    assert redacted("https://me:pa55@host/x and git@host") == f"https://{REDACTED}@host/x and git@host"
    signed = redacted("GET https://cdn.host/f?X-Amz-Signature=0a1b2c3d4e5f&size=3&Key-Pair-Id=ABCDEFGHIJ failed")
    assert signed == f"GET https://cdn.host/f?X-Amz-Signature={REDACTED}&size=3&Key-Pair-Id={REDACTED} failed"
    assert redacted("authorization: Bearer abc.def-ghi_jkl") == f"authorization: Bearer {REDACTED}"


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("MY_DB_PASSWORD", "correct horse")
    monkeypatch.setenv("LONG_SECRET", "0123456789abcdef-and-more")
    monkeypatch.setenv("SHORT_TOKEN", "true")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "never-ever")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/me/.cache/token")
    text = "0123456789abcdef-and-more 0123456789abcdef correct horse true never-ever /home/me/.cache/token"
    expected = f"{REDACTED} {REDACTED} {REDACTED} true never-ever /home/me/.cache/token"
    assert redacted(text) == expected
    assert str(DataError(text)) == expected


def test_errors_say_no_secret(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The hub's own words, another library's, and a defect with its traceback."""
    monkeypatch.setenv("HF_TOKEN", "my-own-token-0123")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError(f"401 for https://me:{TOKEN}@hub/x, authorization: Bearer my-own-token-0123")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("qlora.model.hub._require_room", lambda *_: None)
    assert main(["train", str(recipe_file), "model.name=org/private"]) == 2
    for broken in (OSError, RuntimeError):

        def break_down(*_: Any, kind: Any = broken, **__: Any) -> None:
            raise kind(f"{TOKEN} and my-own-token-0123")

        monkeypatch.setattr(run, "train", break_down)
        assert main(["train", str(recipe_file)]) in (1, 2)
    said = capfd.readouterr()
    assert "could not be downloaded" in said.err
    assert "Traceback" in said.err
    assert said.err.count(REDACTED) >= 4
    for secret in (TOKEN, "my-own-token-0123"):
        assert secret not in said.err + said.out


def test_a_run_folder_holds_no_secret(
    tiny_model: Path,
    chat_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A token where none belongs: in the name of the model's folder. The recipe stays as its author wrote it."""
    model = tmp_path / TOKEN
    shutil.copytree(tiny_model, model)
    values = tiny_values(model, chat_data, tmp_path / "run")
    values["training"]["steps"] = 1
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    monkeypatch.setattr("qlora.planning.plan.Plan.why", ("a reason with " + TOKEN,), raising=False)
    assert main(["train", str(recipe)]) == 0
    said = capfd.readouterr()
    assert TOKEN not in said.err + said.out
    told = {
        path.relative_to(tmp_path / "run").as_posix()
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and TOKEN.encode() in path.read_bytes()
    }
    assert told <= {"recipe.yaml"}
    assert REDACTED in (tmp_path / "run/report.html").read_text(encoding="utf-8")


def test_metrics_and_notes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "loss": 2.5, "note": f"lost {TOKEN}"})
    assert json.loads(log.path.read_text(encoding="utf-8")) == {"step": 1, "loss": 2.5, "note": f"lost {REDACTED}"}
    Progress(3).say(f"{TOKEN} \x1b]0;title\x07")
    assert capfd.readouterr().err == f"{REDACTED} \\x1b]0;title\\x07\n"


# --- terminals -------------------------------------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]8;;http://x\x07\x9b31m\r\b\x00\u202e\u2066\u2028\ud800"


def test_what_moves_a_cursor_is_shown() -> None:
    shown = visible(f"a{ESCAPES}b")
    assert shown == r"a\x1b[2J\x1b]8;;http://x\x07\x9b31m\r\x08\x00\u202e\u2066\u2028\ud800b"
    assert visible("日本\u3000ünï 👩\u200d💻\n\tकि") == "日本\u3000ünï 👩\u200d💻\n\tकि"


def test_answers_and_errors_move_no_cursor(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    generation = run.Generation(f"p{ESCAPES}", f"e{ESCAPES}", None, f"a{ESCAPES}")
    made = run.Run(tmp_path / "x\x1b[2J", 1, 1, None, None, [generation])
    monkeypatch.setattr(run, "train", lambda recipe: made)
    assert main(["train", str(recipe_file)]) == 0

    def fail(*_: Any) -> None:
        raise DataError(ESCAPES)

    monkeypatch.setattr(run, "train", fail)
    assert main(["train", str(recipe_file)]) == 2
    said = capfd.readouterr()
    assert not {"\x1b", "\x07", "\x9b", "\r", "\b", "\0", "\u202e"} & set(said.out + said.err)
    assert r"\x1b[2J" in said.out
    assert r"\x1b[2J" in said.err


def test_a_conversation_moves_no_cursor(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import io

    from tests.data.conftest import make_tokenizer

    class Talker:
        was_cut = False

        def __init__(self, folder: Path) -> None:
            self.tokenizer = make_tokenizer()

        def say(self, text: str, streamer: Any) -> None:
            import torch

            ids = self.tokenizer(f"{text}\x1b[2J there\x1b]0;x\x07 end")["input_ids"]
            streamer.put(torch.tensor([[1]]))
            for one in ids:
                streamer.put(torch.tensor([one]))
            streamer.end()

    monkeypatch.setattr("qlora.chat.Conversation", Talker)
    talk("run", io.StringIO("hello\n"))
    assert capfd.readouterr().out.strip() == r"hello\x1b[2J there\x1b]0;x\x07 end"


# --- foreign code ----------------------------------------------------------------------------------------------------


def with_code(tiny_model: Path, folder: Path, native: bool) -> Path:
    """A checkpoint whose tokenizer comes with Python code, in a file and in another repository."""
    shutil.copytree(tiny_model, folder)
    place = folder / "tokenizer_config.json"
    values = json.loads(place.read_text(encoding="utf-8"))
    values["auto_map"] = {"AutoTokenizer": ["own_tokenizer.Slow", "org/other--fast.Fast"]}
    values["tokenizer_class"] = values["tokenizer_class"] if native else "OwnTokenizer"
    place.write_text(json.dumps(values), encoding="utf-8")
    code = f"open({str(folder / 'ran')!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Slow\n"
    (folder / "own_tokenizer.py").write_text(code, encoding="utf-8")
    return folder


def test_a_tokenizers_own_code_is_refused_in_a_sentence(tiny_model: Path, tmp_path: Path) -> None:
    folder = with_code(tiny_model, tmp_path / "model", native=False)
    with pytest.raises(
        ModelError,
        match=r"comes with its own Python code \(org/other: fast\.py, own_tokenizer\.py\).*trust_remote_code",
    ):
        load_tokenizer(folder)
    native = with_code(tiny_model, tmp_path / "native", native=True)
    assert load_tokenizer(native).is_fast  # transformers' own class does
    assert not (folder / "ran").exists()
    assert not (native / "ran").exists()


def test_foreign_code_is_said_once_before_it_runs(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = with_code(tiny_model, tmp_path / "model", native=False)
    for _ in range(2):
        say_foreign_code(folder)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "runs with your rights: org/other: fast.py, own_tokenizer.py." in said
    say_foreign_code(tiny_model)  # none there, nothing said
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("value", [None, 3, [], {"A": None}, {"A": [None, "x.Y"]}, "x.Y", {"A": {"b": "c"}}])
def test_any_auto_map_is_read(tmp_path: Path, value: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": value}), encoding="utf-8")
    assert foreign_code(tmp_path) == (["x.py"] if "x.Y" in json.dumps(value) else [])
    (tmp_path / "config.json").write_text("[" * 99999, encoding="utf-8")
    assert foreign_code(tmp_path) == []
