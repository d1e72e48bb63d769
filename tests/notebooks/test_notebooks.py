"""The notebook runs from top to bottom on a tiny model: every cell but the one that installs qlora."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from qlora.machine import DISTRIBUTION
from qlora.quickstart.data import write_data

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart-colab.ipynb"


def tagged(notebook: Any, tag: str) -> list[Any]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def texts(cell: Any) -> str:
    """What a cell that ran has printed, and the value of its last line; not what went to standard error."""
    wanted = [output for output in cell.outputs if output.get("name") != "stderr"]
    return "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the notebook's data and run go."""
    return tmp_path_factory.mktemp("notebook")


@pytest.fixture(scope="module")
def shown(folder: Path, tiny_model: Path) -> dict[str, str]:
    """Cell id → what it showed, after the whole notebook ran with other settings."""
    write_data(folder / "train.jsonl", folder / "held_out.jsonl")  # with them and another model nothing is fetched
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        (settings,), (install,) = tagged(notebook, "parameters"), tagged(notebook, "install")
        changed = {
            "MODEL": str(tiny_model),
            "DATA": str(folder / "train.jsonl"),
            "HELD_OUT": str(folder / "held_out.jsonl"),
            "STEPS": 3,
            "BATCH_SIZE": 2,
            "RUN": str(folder / "run"),
        }
        for name, value in changed.items():
            settings.source, count = re.subn(
                rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", settings.source
            )
            assert count == 1, f"the settings have no {name}"
        notebook.cells.remove(install)
        NotebookClient(
            notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
        ).execute()
    return {cell.id: texts(cell) for cell in notebook.cells if cell.cell_type == "code"}


def test_it_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 10
    assert not [cell.id for cell in code if cell.outputs or cell.execution_count is not None]
    (install,) = tagged(notebook, "install")
    assert f'DISTRIBUTION = "{DISTRIBUTION}"' in install.source


@pytest.mark.slow
def test_it_looks_at_machine_data_and_cost_first(shown: dict[str, str]) -> None:
    assert re.search(r"(?m)^ok +NF4 on cpu", shown["doctor"])
    assert '{"messages": [{"role": "user", "content": "What ' in shown["data"]
    assert shown["preview"].count("⟦") >= 2
    assert re.search(r"(?m)^ +quantised weights", shown["plan"])
    assert "trainable parameters on cpu" in shown["load"]


@pytest.mark.slow
def test_it_trains_and_measures_what_that_brought(shown: dict[str, str]) -> None:
    assert re.findall(r"(?m)^step (\d+)  loss ", shown["train"]) == ["1", "3"]
    measured = re.search(r"held-out loss (\S+) → (\S+) ", shown["after"])
    assert measured
    assert f"held-out loss {measured[1]}, perplexity" in shown["before"]
    assert float(measured[2]) < float(measured[1])
    assert shown["after"].count("  expected: ") == 3


@pytest.mark.slow
def test_it_leaves_an_adapter_and_a_merged_model_that_chats(shown: dict[str, str], folder: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "merged/chat_template.jinja"):
        assert (folder / "run" / name).stat().st_size > 0
    assert "14 of them adapted" in shown["export"]
    assert {"chat", "chat-again"} <= {cell for cell, text in shown.items() if re.fullmatch(r"'.*'|\".*\"", text, re.S)}


def test_alone_and_without_a_repository_it_says_what_to_set(tmp_path: Path) -> None:
    (settings,), (install,) = (tagged(nbformat.read(NOTEBOOK, as_version=4), tag) for tag in ("parameters", "install"))
    result = subprocess.run(
        [sys.executable, "-c", f"{settings.source}\n{install.source}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "set REPOSITORY" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_alone_it_clones_the_repository_that_is_set(tmp_path: Path) -> None:
    """``git`` and ``pip`` are stood in for by a script that writes down what they were asked."""
    (install,) = tagged(nbformat.read(NOTEBOOK, as_version=4), "install")
    stand_in = (
        "import json, subprocess, pathlib\n"
        "def run(words, check):\n"
        "    pathlib.Path(words[-1]).mkdir()\n"
        "    pathlib.Path('asked.json').write_text(json.dumps(words))\n"
        "subprocess.run, REPOSITORY = run, 'https://host/qlora.git'\n"
    )
    subprocess.run([sys.executable, "-c", stand_in + install.source], cwd=tmp_path, check=True, capture_output=True)
    asked = json.loads((tmp_path / "asked.json").read_text(encoding="utf-8"))
    assert asked[:2] == ["git", "clone"]
    assert asked[-2:] == ["https://host/qlora.git", str(tmp_path / "qlora-source")]
