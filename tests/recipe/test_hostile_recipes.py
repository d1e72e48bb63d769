"""Recipes from strangers: whatever they hold, the answer is one sentence, soon, and nothing is run or written."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from qlora.cli import main
from qlora.errors import RecipeError
from qlora.files.strangers import MAX_LEVELS, MAX_RECIPE, MAX_VALUES
from qlora.recipe import Recipe
from qlora.recipe.reading import MOST_MISTAKES

SOON = 10.0  # seconds of a core, on a slow one
DATA = "data: {train: x}\n"
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)
RECIPES: dict[str, tuple[str | bytes, str]] = {
    "a billion laughs": (LAUGHS, "it has '&a' at line 1"),
    "an anchor": ("data: &a [b]", r"it has '&a' at line 1, column 7; write the values out, anchors are not followed"),
    "an alias of nothing": ("data:\n  train: *x", r"it has '\*x' at line 2, column 10; write the values out"),
    "a merge": (DATA + "training: {<<: {epochs: 3}}", "'!!merge' .* stands for no plain value"),
    "Python": ("data: !!python/object/apply:os.system ['touch made']", "'!!python/object/apply:os.system'"),
    "Python's names": ("data: !!python/name:os.system", "'!!python/name:os.system'"),
    "a tag of one's own": ("data: !x {train: y}", "stands for no plain value"),
    "a set": (DATA + "method: {target_modules: !!set {a, b}}", "'!!set'"),
    "bytes": (DATA + "folder: !!binary aGk=", "'!!binary'"),
    "an ordered map": (DATA + "method: !!omap [a: 1]", "'!!omap'"),
    "an empty number": (DATA + "training: {epochs: !!int ''}", "not valid YAML"),
    "a truth that is none": (DATA + "overwrite: !!bool x", "not valid YAML"),
    "a date that is none": (DATA + "folder: !!timestamp x", "not valid YAML"),
    "an impossible date": (DATA + "folder: 2024-13-45", "not valid YAML"),
    "a number to the base of sixty": (DATA + f"training: {{epochs: {'1:' * 400}1.5}}", "a number of more than 64 characters"),
    "many digits": (DATA + f"training: {{epochs: {'9' * 100_000}}}", "a number of more than 64 characters"),
    "many hexadecimal digits": (DATA + f"training: {{epochs: 0x{'f' * 100_000}}}", "a number of more than 64 characters"),
    "a number too large to count": (DATA + "training: {epochs: 999999999999999999999}", "expected a number below 2⁵³"),
    "a float too large": (DATA + "training: {learning_rate: 1.0e+999}", "finite number|less than or equal"),
    "a NUL": (b"folder: \x00", "not valid YAML"),
    "an escaped NUL": (DATA + r'folder: "a\0b"', "no text may hold"),
    "half a character": (DATA + r'folder: "\ud800"', "no text may hold"),
    "no character": (DATA + r'folder: "\U7fffffff"', "not valid YAML"),
    "not UTF-8": (b"folder: \xe9", "UTF-8"),
    "UTF-16": ("folder: a".encode("utf-16"), "UTF-8"),
    "a list as a key": ("? [a]\n: b", "a key that is no plain text"),
    "a mapping as a key": ("{{a: b}: c}", "a key that is no plain text"),
    "a key twice in a list": (DATA + "method:\n- {r: 4,\n   r: 8}", "'method.0.r' stands twice, at lines 3 and 4"),
    "two documents": ("data: x\n---\ndata: y", "not valid YAML"),
    "a large file": ("#" * (MAX_RECIPE + 1), f"at most {MAX_RECIPE:,}"),
    "many values": (DATA + f"x: [{'1,' * 100_000}]", f"more than {MAX_VALUES:,} values"),
    "nested": ("[" * 200_000, f"nested more than {MAX_LEVELS} levels"),
    "nested in blocks": ("- " * 100_000, f"nested more than {MAX_LEVELS} levels"),
    "many mistakes": (DATA + "".join(f"k{number}: 1\n" for number in range(3000)), f"and {3000 - MOST_MISTAKES:,} more"),
    "many wrong files": (f"data: {{train: [{'1,' * 9000}]}}", "more"),
    "many methods": (DATA + f"method: [{'{},' * 9000}]", "more than once"),
    "many tokens": (DATA + f"method: {{name: new_tokens, tokens: [{'a,' * 9000}]}}", "more than once"),
    "rows that are negative": (DATA + "method: {name: new_tokens, tokens: [a], ids: [-1]}", "method.ids"),
    "a long value": (DATA + f"training: {{epochs: {'x' * 100_000}}}", "'training.epochs' .line 2. is 'xxx"),
    "a long key": (DATA + f"? {'x' * 100_000}\n: 1", "is not a known key"),
    "orders to a terminal": (DATA + '"\\e[2J": 1', r"'\\x1b\[2J' .line 2. is not a known key"),
    "a revision that is a path": (DATA + "model: {revision: ../../../etc/passwd}", "expected a branch, tag or commit"),
    "a revision that is absolute": (DATA + "model: {revision: /etc/passwd}", "expected a branch, tag or commit"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.sampled
def test_recipe_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, said = RECIPES[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.process_time()
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.from_yaml(path)
    assert time.process_time() - began < SOON
    assert len(str(caught.value)) < 3000
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]


OVERRIDES = {
    "no value": ("training.epochs", "expected section.key=value"),
    "no key": ("=1", "expected section.key=value"),
    "very deep": (".".join("a" * 5000) + "=1", "expected section.key=value"),
    "very long": ("a" * 10**6, "expected section.key=value"),
    "a number of a list with 5,000 digits": (f"method.{'9' * 5000}.r=1", "in a list of 1"),
    "a superscript": ("method.².r=1", "in a list of 1"),
    "a negative number": ("method.-1.r=1", "in a list of 1"),
    "an anchor in itself": ("data.train=&a [*a]", "it has '&a' at line 1"),
    "Python": ("data.train=!!python/object/apply:os.system ['true']", "stands for no plain value"),
    "nested": ("data.train=" + "[" * 10_000, "nested more than"),
    "a long value": ("training.epochs=" + "x" * 10**5, "is 'xxx"),
    "not YAML": ("data.train=[", "not valid YAML"),
    "half a character": ("folder=\ud800", "not valid YAML|no text may hold"),
}


@pytest.mark.parametrize("name", OVERRIDES)
def test_override_is_refused(name: str) -> None:
    override, said = OVERRIDES[name]
    with pytest.raises(RecipeError, match=said) as caught:
        Recipe.from_dict({"data": {"train": "x"}, "method": [{"name": "lora"}]}, override)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["a billion laughs", "Python", "an escaped NUL", "not UTF-8", "a long value"])
def test_command_line_says_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text, _ = RECIPES[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert main(["train", str(path)]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("qlora: ")
    assert errors.count("\n") == 1
    assert "Traceback" not in errors
    assert [item.name for item in tmp_path.iterdir()] == ["recipe.yaml"]
