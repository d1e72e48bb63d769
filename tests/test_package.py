"""The package as a whole: what it exports, what importing it costs, and who owns which library."""

from __future__ import annotations

import ast
import functools
import importlib
import os
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import qlora

ROOT = Path(__file__).parents[1]
PACKAGES = ["qlora", *(f"qlora.{m.name}" for m in pkgutil.iter_modules(qlora.__path__) if m.ispkg)]
# the only files that may import these when they run, whole folders by a trailing slash
OWNERS = {
    "bitsandbytes": {
        "qlora/model/late_compile.py",
        "qlora/model/nf4.py",
        "qlora/training/optim.py",
        "qlora/export/nf4.py",
    },
    "transformers": {
        "qlora/model/",
        "qlora/quickstart/",
        "qlora/data/sandbox.py",
        "qlora/planning/",
        "qlora/runs/",
        "qlora/evaluation/likelihood.py",
        "qlora/chat.py",
    },
    "datasets": {"qlora/data/sources.py"},
    "accelerate": {"qlora/training/"},
    "huggingface_hub": {"qlora/model/", "qlora/export/hub.py"},
    "jinja2": {"qlora/data/", "qlora/reporting/page.py"},
    "peft": set(),
    "pickle": set(),
    "yaml": {"qlora/reporting/card.py", "qlora/recipe/config.py", "qlora/files/strangers.py"},
}


@functools.cache
def imports_of(path: Path) -> set[str]:
    """The top-level packages that a file imports, wherever in it, but for what only a type checker reads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    unread = {
        inside
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inside in ast.walk(node)
    }
    found = set()
    for node in set(ast.walk(tree)) - unread:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_what_can_be_imported(name: str) -> None:
    package = importlib.import_module(name)
    exported = getattr(package, "__all__", [])
    assert len(set(exported)) == len(exported)
    for item in exported:
        assert getattr(package, item) is not None


def test_dir_shows_the_public_names() -> None:
    """As ``__init__.pyi`` lists them for type checkers, each re-exported by ``as``."""
    shown = dir(qlora)
    assert {"Recipe", "LoRA", "load_base", "Trainer", "train"} <= set(shown)
    stub = (ROOT / "qlora/__init__.pyi").read_text(encoding="utf-8")
    lines = [line for line in stub.splitlines() if line.startswith("from ")]
    assert [line.partition(" import ")[2] for line in lines] == [
        f"{line.rpartition(' ')[2]} as {line.rpartition(' ')[2]}" for line in lines
    ]
    assert sorted(line.rpartition(" ")[2] for line in lines) == shown
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        qlora.trian  # noqa: B018


def test_a_wheel_carries_every_file() -> None:
    """Modules come by themselves; a template, a sheet and the files for type checkers must be named."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    carried = {
        path
        for package, names in named.items()
        for name in names
        for path in (ROOT / ("qlora" if package == "*" else package.replace(".", "/"))).glob(f"**/{name}")
    }
    others = {path for path in (ROOT / "qlora").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == carried


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


@pytest.mark.skipif(sys.platform != "linux", reason="torch has segments that expand on Linux alone")
@pytest.mark.parametrize("chosen", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_comes_in_segments_that_expand_unless_chosen_otherwise(chosen: str | None) -> None:
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    expected = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"} if chosen is None else {chosen: "backend:native"}
    if chosen is not None:
        environment |= expected
    code = f"import os, qlora; print({{name: os.environ[name] for name in {names} if name in os.environ}})"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    assert ast.literal_eval(found) == expected


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, "20000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_do_not_spin_for_long_unless_asked_to(before: dict[str, str], after: str) -> None:
    """Said before torch is loaded, which reads it once."""
    code = "import os, qlora; print(os.environ.get('GOMP_SPINCOUNT'))"
    ours = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**ours, **before}, check=False, cwd=ROOT
    )
    assert done.stdout.split() == [after], done.stderr


def test_a_run_begins_without_torchs_compiler() -> None:
    code = "import sys, qlora.runs.train, qlora.chat; print('torch._inductor.compile_fx' in sys.modules, 'bitsandbytes' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["False", "True"]


def test_what_is_compiled_later_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.model import late_compile

    asked: list[dict[str, object]] = []
    monkeypatch.setattr(late_compile, "_compile", lambda function, **options: asked.append(options) or function)
    plain, with_options = late_compile._later(max), late_compile._later(dynamic=False)(min)
    assert not asked
    assert (plain(1, 2), plain(3, 2), with_options(1, 2)) == (2, 3, 1)
    assert asked == [{}, {"dynamic": False}]


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
