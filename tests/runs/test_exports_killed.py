"""An export that is killed leaves what was there, whole, and the next one begins anew and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import qlora
from qlora.cli import main
from qlora.files import durable
from tests.tiny import tiny_values

pytestmark = pytest.mark.slow
FORMS = {
    "merged": ["merged", "base=dequantized"],
    "nf4": ["nf4"],
    "portable": ["adapter"],
    "gguf-q8_0": ["gguf", "base=dequantized"],
    "gguf-adapter": ["gguf-adapter"],
}


@pytest.fixture(scope="module")
def exported(tiny_model: Path, chat_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with every export of it."""
    run = tmp_path_factory.mktemp("killed") / "run"
    values = tiny_values(tiny_model, chat_data, run)
    values["training"] |= {"steps": 2}
    values["evaluation"] = {"prompts": 0, "held_out_rows": 1}
    qlora.train(qlora.Recipe.from_dict(values), quiet=True)
    for form, words in FORMS.items():
        assert main(["export", str(run), *words]) in ends(form)
    return run


def ends(form: str) -> tuple[int, ...]:
    """The exit statuses of a whole export; a random model may lose more than four bits are held to."""
    return (0, 4) if form == "nf4" else (0,)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leftovers(run: Path) -> list[str]:
    return [path.name for path in run.iterdir() if durable.is_leftover(path.name)]


def killed_at(owner: Any, name: str, call: int, words: list[str]) -> int:
    """Run the command in a child that is killed in the ``call``-th call of ``owner.name``; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    plain, left = getattr(owner, name), [call]

    def deadly(*given: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(*given, **named)

    setattr(owner, name, deadly)
    main(words)
    os._exit(0)  # never reached its end


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "moment",
    [(durable, "sync", 2), (Path, "rename", 2)],
    ids=["half flushed", "after the old one moved"],
)
def test_a_kill_loses_nothing(exported: Path, tmp_path: Path, form: str, moment: tuple[Any, str, int]) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run"))
    before = files_in(run / form)
    words = ["export", str(run), *FORMS[form], "overwrite=true"]
    assert killed_at(*moment, words) == signal.SIGKILL
    # what was written aside, under a name that nothing reads; the plain LoRA of a GGUF adapter is in the system's folder
    assert leftovers(run) or form == "gguf-adapter"
    assert not (run / form).is_dir() or files_in(run / form) == before
    durable.clear_leftovers(run, form)
    assert files_in(run / form) == before  # whatever the moment was
    assert not leftovers(run)


@pytest.mark.parametrize("form", ["merged", "nf4", "gguf-q8_0"])
def test_a_kill_between_two_tensors_is_begun_again(exported: Path, tmp_path: Path, form: str) -> None:
    from qlora.export.source import Source

    run = Path(shutil.copytree(exported, tmp_path / "run"))
    before = files_in(run / form)
    shutil.rmtree(run / form)
    assert killed_at(Source, "tensor", 9, words := ["export", str(run), *FORMS[form]]) == signal.SIGKILL
    assert not (run / form).exists()
    assert main(words) in ends(form)
    assert files_in(run / form) == before
    assert not leftovers(run)
