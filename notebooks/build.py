"""Make the notebooks from the pages in notebooks/source: text becomes text, and each ```python block a cell to run.

    python notebooks/build.py

The first block of a page holds its settings, which the tests replace; behind it comes the cell that installs qlora, the same in all.
The address of the repository stands in pyproject.toml, under [project.urls]. While it is not there, the notebooks say what to fill in.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
INSTALL = """\
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

here = Path.cwd()
source = next((folder for folder in (here, *here.parents) if (folder / "qlora/quickstart/quickstart.yaml").is_file()), None)
if source is None:  # this notebook stands alone, as it does on Colab
    source = here / "qlora-source"
    if not source.is_dir():
        if not REPOSITORY:
            sys.exit("This notebook is in no checkout of qlora: set REPOSITORY above to the address that git clone takes.")
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, str(source)], check=True)
try:
    metadata.version("{distribution}")
except metadata.PackageNotFoundError:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", str(source)], check=True)
os.chdir(source)
print("working in", source)"""


def cells(page: str, name: str, repository: str) -> list[dict[str, Any]]:
    """The cells of a page. ``repository``: its address, empty where there is none."""
    badge = ""
    if match := re.match(r"https://github\.com/([^/]+/[^/]+?)(\.git)?/?$", repository):
        address = f"https://colab.research.google.com/github/{match[1]}/blob/main/notebooks/{name}.ipynb"
        badge = f"\n\n[![Open in Colab]({BADGE})]({address})"
    asked = "" if repository else "  # fill in what git clone takes; empty inside a checkout"
    found: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"(?m)^```python\n(.*?)^```\n", page, flags=re.S)):
        text = part.strip("\n")
        if number % 2 == 0 and text.strip():
            found.append(cell("markdown", text + (badge if number == 0 else ""), len(found)))
        elif number == 1:
            found.append(
                cell("code", f"REPOSITORY = {json.dumps(repository)}{asked}\n{text}", len(found), "parameters")
            )
            install = INSTALL.replace("{distribution}", PROJECT["name"])
            found.append(cell("code", install, len(found), "install"))
        elif number % 2:
            found.append(cell("code", text, len(found)))
    return found


def cell(kind: str, text: str, number: int, *tags: str) -> dict[str, Any]:
    made: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {"tags": list(tags)} if tags else {}}
    if kind == "code":
        made |= {"execution_count": None, "outputs": []}
    return made | {"source": text.splitlines(keepends=True)}


def notebook(page: Path, repository: str) -> str:
    """The notebook of a page, as its file has it."""
    metadata = {
        "accelerator": "GPU",
        "colab": {"gpuType": "T4", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    found = cells(page.read_text(encoding="utf-8"), page.stem, repository)
    return (
        json.dumps(
            {"cells": found, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False
        )
        + "\n"
    )


if __name__ == "__main__":
    for page in sorted((HERE / "source").glob("*.md")):
        address = PROJECT.get("urls", {}).get("Repository", "")
        (HERE / f"{page.stem}.ipynb").write_text(notebook(page, address), encoding="utf-8")
