"""Files as people have them: each previewed and trained for two steps, or refused, and what was said of it.

    python benchmarks/real_files.py --files path/to/folder [--tokenizer smollm2-135m-instruct] [--only 012 013] [--previews]

``--files`` holds data files of any kind. A file that is refused is tried again with the ``data.…=…`` that the refusal names,
as somebody would who does what it says. The model is a small random one with the tokenizer of ``--tokenizer``. Prints a table
row for each file, and with ``--previews`` an example of it as the model sees it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qlora.data.report import Report
from qlora.errors import QloraError
from qlora.model.checkpoint import open_checkpoint
from qlora.planning.rows import load_recipe_data
from qlora.recipe import DEFAULT_MODEL, ModelSection, Recipe
from qlora.runs.train import train

# data.form=preference, data.columns='{prompt: question}', data.on_bad_record=skip
_OFFER = re.compile(r"(data\.(?!max_length)\w+=(?:'\{[^']*\}'|[\w-]+))")
_LONGER = re.compile(r"([\d,]+) would keep")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=Path, required=True)
    parser.add_argument("--tokenizer", default=DEFAULT_MODEL)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names")
    parser.add_argument("--previews", action="store_true")
    parser.add_argument("--max-length", type=int, default=1024)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")

    counts = {"unaided": 0, "as told": 0, "refused": 0}
    lines = ["| file | outcome | what was found, or said |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        model = _small_model(options.tokenizer, Path(scratch) / "model")
        for path in sorted(options.files.iterdir()):
            if options.only and not path.name.startswith(tuple(options.only)):
                continue
            outcome, told = _tried(path, model, options.max_length, Path(scratch) / "run", options.previews)
            counts[outcome] += 1
            lines.append(f"| {path.name} | {outcome} | {told.replace('|', '&#124;')} |")
            print(lines[-1], flush=True)
    print("\n".join(["", *lines, "", ", ".join(f"{name}: {count}" for name, count in counts.items())]))


def _small_model(tokenizer: str, folder: Path) -> Path:
    checkpoint = open_checkpoint(ModelSection(name=tokenizer), weights=False)
    theirs = checkpoint.tokenizer
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
        "pad_token_id": theirs.pad_token_id,
    }
    config = LlamaConfig(
        vocab_size=len(theirs), max_position_embeddings=8192, tie_word_embeddings=True, **sizes, **ends
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    theirs.save_pretrained(folder)
    return folder


def _tried(path: Path, model: Path, max_length: int, folder: Path, previews: bool) -> tuple[str, str]:
    """(outcome, what there is to say), at most three tries."""
    given: list[str] = []
    said: list[str] = []
    for _ in range(3):
        try:
            report = _trained(_recipe(path, model, max_length, folder, given), previews)
        except QloraError as error:
            said.append(str(error).replace(f"{path.parent}/", "").replace("\n", " "))
            offers = [word.replace("'", "") for word in _OFFER.findall(said[-1])]
            offers += [f"data.max_length={length.replace(',', '')}" for length in _LONGER.findall(said[-1])]
            new = next(
                (word for word in offers if word.split("=")[0] not in {old.split("=")[0] for old in given}), None
            )
            if new is None:
                return "refused", " → ".join([*given, said[-1]])
            given.append(new)
            continue
        told = str(report).replace("\n", "; ").replace(f"{path.parent}/", "")
        return ("as told" if given else "unaided"), " → ".join([*said, *given, told])
    return "refused", " → ".join([*given, said[-1]])


def _recipe(path: Path, model: Path, max_length: int, folder: Path, given: list[str]) -> Recipe:
    values = {
        "model": {"name": str(model), "quantization": "none", "compute_dtype": "fp32"},
        "data": {"train": str(path), "max_length": max_length},
        "training": {"steps": 2, "batch_size": 1},
        "memory": {"rehearse": False},
        "folder": str(folder),
        "overwrite": True,
    }
    return Recipe.from_dict(values, *given)


def _trained(recipe: Recipe, previews: bool) -> Report:
    data = load_recipe_data(recipe, open_checkpoint(recipe.model, weights=False))
    if previews:
        print(f"\n{data.preview(0)}\n", flush=True)
    train(recipe, quiet=True)
    return data.report


if __name__ == "__main__":
    main()
