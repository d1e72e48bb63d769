"""The notebooks run from top to bottom on a tiny model: every cell but the one that installs qlora. They are those of their pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from notebooks import build

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "notebooks/source").glob("*.md"))
# settings of each that are others here: few steps, and the tiny model; RUN lies below a folder of the test's
SMALL = {"STEPS": 2, "BATCH_SIZE": 1, "MAX_LENGTH": 512, "RATES": [1e-3], "SEEDS": [0]}
OF_IPYTHON = {"In", "Out", "get_ipython", "exit", "quit", "open"}
SHOWN = {  # what some cell of each must have shown
    "1-your-own-data": ["<mark>", "expected: ", "quantised weights", "step 2 of 2", "srcdoc=", ".gguf", "adapter.zip"],
    "2-an-8b-model-on-a-t4": ["T4", "quantised weights", "step 2 of 2", "srcdoc=", "report.html"],
    "3-chat-and-several-adapters": ["step 2 of 2", "None: ", "python: "],
    "4-export": ["step 2 of 2", "vLLM", "| merged ", ".gguf", "TEMPLATE"],
    "5-compare-methods": ["srcdoc=", "bottleneck"],
    "6-your-own-loop": ["trainable parameters on cpu", "held out", "expected: ", "checkpoints/000002"],
}


def cells(page: Path, repository: str = "") -> list[Any]:
    return list(nbformat.reads(build.notebook(page, repository), as_version=4).cells)


def tagged(page: Path, tag: str, repository: str = "") -> Any:
    (found,) = (cell for cell in cells(page, repository) if tag in cell.metadata.get("tags", []))
    return found


def run(source: str) -> str:
    """All that a cell prints and shows, in whatever form; raises what it raises."""
    with capture_output() as captured:
        result = InteractiveShell.instance().run_cell(source, store_history=True)
    result.raise_error()
    shown = [str(value) for output in captured.outputs for value in output.data.values()]
    shown += [result.result._repr_html_()] if hasattr(result.result, "_repr_html_") else []
    assert "Warning" not in captured.stderr, captured.stderr
    return "\n".join([captured.stdout, *shown])


def with_settings(source: str, values: dict[str, Any]) -> str:
    for name, value in values.items():
        source = re.sub(rf"(?m)^{name} = .*$", lambda _, n=name, v=value: f"{n} = {v!r}", source)
    return source


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_it_runs_from_top_to_bottom(
    page: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.chdir(tmp_path)
    names = InteractiveShell.instance().user_ns
    for name in [name for name in names if not name.startswith("_") and name not in OF_IPYTHON]:
        del names[name]  # of another notebook
    said = []
    for cell in cells(page):
        if cell.cell_type == "code" and "install" not in cell.metadata.get("tags", []):
            said.append(run(with_settings(cell.source, {**SMALL, "MODEL": str(tiny_model)})))
    missing = [words for words in SHOWN[page.stem] if words not in "\n".join(said)]
    assert not missing, "\n".join(said)[-4000:]


def test_each_is_what_its_page_says_and_stored_without_outputs() -> None:
    assert {page.stem for page in PAGES} == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(SHOWN)
    repository = build.PROJECT.get("urls", {}).get("Repository", "")
    for page in PAGES:
        text = (ROOT / "notebooks" / f"{page.stem}.ipynb").read_text(encoding="utf-8")
        assert text == build.notebook(page, repository), "run: python notebooks/build.py"
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
        assert not [cell.id for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


def test_with_an_address_there_is_a_badge_and_nothing_to_fill_in() -> None:
    for page in PAGES:
        without, address = cells(page)[0].source, "https://github.com/someone/qlora"
        assert "colab-badge" not in without
        assert f"colab.research.google.com/github/someone/qlora/blob/main/notebooks/{page.stem}.ipynb" in (
            cells(page, f"{address}.git")[0].source
        )
        assert "fill in" in tagged(page, "parameters").source
        assert f'REPOSITORY = "{address}"\n' in tagged(page, "parameters", address).source


def test_alone_and_without_a_repository_it_says_what_to_set(tmp_path: Path) -> None:
    source = "\n".join(tagged(PAGES[0], tag).source for tag in ("parameters", "install"))
    result = subprocess.run([sys.executable, "-c", source], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert "set REPOSITORY" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_alone_it_clones_the_repository_that_is_set(tmp_path: Path) -> None:
    """``git`` and ``pip`` are stood in for by a function that writes down what they were asked."""
    stand_in = (
        "import json, subprocess, pathlib\n"
        "def run(words, check):\n"
        "    pathlib.Path(words[-1]).mkdir()\n"
        "    pathlib.Path('asked.json').write_text(json.dumps(words))\n"
        "subprocess.run, REPOSITORY = run, 'https://host/qlora.git'\n"
    )
    command = [sys.executable, "-c", stand_in + tagged(PAGES[0], "install").source]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    asked = json.loads((tmp_path / "asked.json").read_text(encoding="utf-8"))
    assert asked[:2] == ["git", "clone"]
    assert asked[-2:] == ["https://host/qlora.git", str(tmp_path / "qlora-source")]
