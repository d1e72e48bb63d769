"""The package as a whole: what it exports, what importing it costs, and who owns which library."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import qlora

ROOT = Path(__file__).parents[1]
PACKAGES = ["qlora", *(f"qlora.{m.name}" for m in pkgutil.iter_modules(qlora.__path__) if m.ispkg)]
# the only files that may import these, whole folders by a trailing slash
OWNERS = {
    "bitsandbytes": {"qlora/model/nf4.py", "qlora/training/optim.py", "qlora/doctor.py"},
    "transformers": {
        "qlora/model/",
        "qlora/planning/",
        "qlora/chat.py",
        "qlora/runs/run.py",
        "qlora/doctor.py",
    },
    "datasets": {"qlora/data/sources.py", "qlora/doctor.py"},
    "accelerate": {"qlora/training/loop.py", "qlora/doctor.py"},
    "huggingface_hub": {"qlora/model/"},
    "peft": set(),
    "pickle": set(),
    "yaml": {"qlora/recipe/config.py", "qlora/files/strangers.py"},
}


def imports_of(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_what_can_be_imported(name: str) -> None:
    package = importlib.import_module(name)
    exported = package.__all__
    assert list(exported) == sorted(set(exported), key=lambda item: (not item.isupper(), not item[0].isupper(), item))
    for item in exported:
        assert getattr(package, item) is not None


def test_top_level_names_are_listed_once() -> None:
    listed = [name for names in qlora._HOMES.values() for name in names]
    assert sorted(listed) == sorted(qlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        qlora.trian  # noqa: B018


def test_importing_qlora_is_quick() -> None:
    """``qlora doctor`` must run where torch does not, and a slip in a recipe must not wait for it."""
    code = (
        "import sys, qlora, qlora.cli, qlora.recipe.config, qlora.doctor\n"
        "status = qlora.cli.main(['train', 'none.yaml'])\n"
        "heavy = {'torch', 'transformers', 'bitsandbytes', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2, done.stderr


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_have_owners(library: str) -> None:
    files = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "qlora").rglob("*.py") if library in imports_of(path)
    }
    owners = OWNERS[library]
    strangers = {
        file for file in files if not any(file == own or (own.endswith("/") and file.startswith(own)) for own in owners)
    }
    assert not strangers, f"{library} is imported by {sorted(strangers)}"


def test_readme_draws_every_file() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "qlora").rglob("*.py"):
        if path.name != "__init__.py":
            assert f"─ {path.name} " in readme, f"{path.name} is not in the README's tree"
