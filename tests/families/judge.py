"""What becomes of a family: its tiny checkpoint loaded, trained, merged and exported, each step held against plain transformers.

    judge("qwen2", folder)  ─►  a row: outcome, the largest difference of each law, the sentence where it is refused

An outcome is one of ``OUTCOMES``. Logits are compared in fp32, as the largest difference by the largest logit; the bound is that of
two orders of adding up (``tests/rounding.py``). Knows qlora's verbs, transformers and PEFT; must not know which families there are.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qlora
from qlora.data.batches import collate
from qlora.errors import ModelError, QloraError
from qlora.methods.base import AdaptedModel
from qlora.methods.files import save_adapter
from qlora.model import anatomy
from qlora.model.checks import check_packing
from qlora.model.loss import batch_loss, hidden_states
from qlora.model.nf4 import packed_numbers
from qlora.recipe import ModelSection
from qlora.residence.layers import recomputing, unwrap_layers, wrap_layers
from qlora.residence.load import load_base
from tests.families.checkpoints import LETTERS, SPECIAL, model_class, save_family, takes_text
from tests.rounding import MODEL, difference, rounding
from tests.tiny import random_rows, stir, write_lines

WORKS, UNPACKED, REFUSED, CRASHES, WRONG = "works", "works, packing off", "refused", "crashes", "silently wrong"
NOT_JUDGED = "not judged"
OUTCOMES = (WORKS, UNPACKED, REFUSED, CRASHES, WRONG, NOT_JUDGED)
SAME = rounding(4 * MODEL)  # up to four layers, of which the parts are as deep as two of a plain model
LAWS = ("logits", "gradients", "padding", "leak", "merged", "peft")
RANK = 4


def judge(kind: str, folder: Path, whole: bool = True) -> dict[str, Any]:
    """The row of ``kind``; what is written goes into ``folder``. Not ``whole``: without a plan and a run by recipe, and without what
    transformers and PEFT make of it alone."""
    row: dict[str, Any] = {"type": kind, "class": model_class(kind).__name__}
    begun = time.perf_counter()
    try:
        save_family(folder / "model", kind)
        if whole:
            takes_text(kind, folder / "model")
    except Exception as error:
        return row | {"outcome": NOT_JUDGED, "why": _line(error)}
    if whole:
        row["plain"] = plain_peft(kind, folder / "model")
    try:
        _judge(row, kind, folder, whole)
    except QloraError as error:
        row |= {"outcome": REFUSED, "why": _said(error, folder)}
    except Exception as error:
        row |= {"outcome": CRASHES, "why": f"{_line(error)} ({_place(error)})"}
    row["seconds"] = round(time.perf_counter() - begun, 1)
    return row


def _judge(row: dict[str, Any], kind: str, folder: Path, whole: bool) -> None:
    checkpoint, ids = folder / "model", tokens()
    base = load_base(section_of(checkpoint))
    row["dense"] = dense_share(base.model)
    model = qlora.apply_method(base, qlora.LoRA(r=RANK, alpha=2 * RANK))
    row["targets"] = sorted({path.rpartition(".")[2] for path in model.planted})
    save_adapter(model, folder / "untrained")
    plain = merged_plain(kind, checkpoint, folder / "untrained", folder / "base")
    before = logits(model, ids)
    row["logits"] = difference(before, logits(plain, ids))
    packing = train(row, checkpoint, folder) if whole else packs(model)
    stir(model)
    expected = logits(model, ids)
    row["moved"] = difference(expected, before)
    plainly = gradients(model)
    row["without gradient"] = sorted(
        {".".join(name.split(".")[-3:-1]) for name, values in plainly.items() if values is None or not values.any()}
    )
    row["gradients"] = recomputed(model, plainly)
    row["padding"] = padding(model)
    if packing:
        row["leak"] = leak(model)
    save_adapter(model, folder / "adapter")
    row["merged"] = difference(
        logits(merged_plain(kind, checkpoint, folder / "adapter", folder / "merged"), ids), expected
    )
    row["peft"] = peft_difference(plain, folder / "adapter", ids, expected)
    wrong = [f"{name}: {row[name]}" for name in LAWS if not _holds(row.get(name))]
    if isinstance(row["gradients"], str):  # training is refused then, or goes without the boundary
        wrong = [one for one in wrong if not one.startswith("gradients")]
    if row["moved"] < SAME:
        wrong.append("the adapter changes nothing")
    row["packing"] = "on" if packing else "off"
    row["outcome"] = WRONG if wrong else WORKS if packing else UNPACKED
    if wrong:
        row["why"] = "; ".join(wrong)


def _holds(found: Any) -> bool:
    return found is None or (isinstance(found, float) and found <= SAME)


def tokens() -> Tensor:
    """[2, 24] ids of text."""
    return 3 + torch.arange(48).reshape(2, 24) * 7 % (SPECIAL - 3)


def section_of(checkpoint: Path) -> ModelSection:
    return ModelSection(name=str(checkpoint), compute_dtype="fp32")


def packs(model: AdaptedModel) -> bool:
    """Whether packed examples are apart, by the check before a run."""
    try:
        check_packing(model.model, tokens()[0].tolist())
    except ModelError:
        return False
    return True


def recipe(checkpoint: Path, run: Path) -> dict[str, Any]:
    """Two steps on raw text."""
    data = run.parent / "data.jsonl"
    if not data.exists():
        lengths = (5, 14, 9, 21, 7, 11, 6, 17, 8, 12, 10, 5)
        texts = [
            "".join(LETTERS[(line * 13 + at * 5) % len(LETTERS)] for at in range(n)) for line, n in enumerate(lengths)
        ]
        write_lines(data, [{"text": text} for text in texts])
    return {
        "model": {"name": str(checkpoint), "compute_dtype": "fp32"},
        "method": {"r": RANK, "alpha": 2 * RANK},
        "data": {"train": str(data), "max_length": 32, "packing": True},
        "training": {"steps": 2, "batch_size": 2, "learning_rate": 0.01, "save_every": 0},
        "evaluation": {"prompts": 1, "max_new_tokens": 2},
        "device": {"name": "cpu", "threads": 1},
        "folder": str(run),
        "overwrite": True,
    }  # fmt: skip


ADVICE = {
    "packing=by_length": ("data", {"packing": "auto"}),  # which is to choose that
    "recompute=none": ("training", {"recompute": "none", "accumulation": "micro_batch_major"}),
}
"""What a refusal may ask for, and where it belongs."""


def train(row: dict[str, Any], checkpoint: Path, folder: Path) -> bool:
    """Plan and train, doing as refusals say; whether it was with packing."""
    values = recipe(checkpoint, folder / "run")
    try:
        qlora.plan(qlora.Recipe.model_validate(values))
        row["plan"] = "works"
    except Exception as error:
        row["plan"] = _line(error)
    row["asked for"] = []
    while True:
        try:
            qlora.train(qlora.Recipe.model_validate(values), quiet=True)
            return values["data"]["packing"] is True
        except QloraError as error:
            asked = [key for key in ADVICE if key in str(error) and key not in row["asked for"]]
            if not asked:
                raise
            row["asked for"] += asked
            row.setdefault("sentences", []).append(_said(error, folder))
            for section, changes in (ADVICE[key] for key in asked):
                values[section] |= changes


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    """[2, 24, V] in fp32; of an adapted model by our own way through it."""
    network: Any = model.model if isinstance(model, AdaptedModel) else model
    found: Tensor = network(input_ids=ids, use_cache=False).logits.float()
    return found


def merged_plain(kind: str, checkpoint: Path, adapter: Path, out: Path) -> nn.Module:
    """The merge of a base and an adapter, opened in plain transformers as the class that made the checkpoint."""
    from qlora.export.merged import merge

    merge(checkpoint, adapter, out, compute_dtype="fp32", dtype="fp32", overwrite=True)
    model: nn.Module = model_class(kind).from_pretrained(out, dtype=torch.float32)
    return model.eval()


def peft_difference(plain: Any, adapter: Path, ids: Tensor, expected: Tensor) -> float | str:
    """How far PEFT is with our adapter on the base that we trained beside."""
    from peft import PeftModel

    try:
        return difference(logits(PeftModel.from_pretrained(plain, adapter), ids), expected)
    except Exception as error:
        return _line(error)


def gradients(model: AdaptedModel) -> dict[str, Tensor | None]:
    """Of the loss of three rows, by parameter; None where there is none."""
    loss, _ = batch_loss(model.model, collate(random_rows(3, packing=False), 0))
    loss.backward()
    found = {name: values.grad for name, values in model.trainable_parameters().items()}
    for values in model.trainable_parameters().values():
        values.grad = None
    return found


def recomputed(model: AdaptedModel, expected: Mapping[str, Tensor | None]) -> float | str:
    """How far gradients through the recompute boundary, two of three rows at once, are from those without it."""
    found: dict[str, Tensor | None] = {}
    for at_once in (2, 3):  # a family whose rows cannot be cut says so, and takes all at once
        try:
            wrap_layers(model.model, at_once)
            with recomputing(model.model):
                found = gradients(model)
            break
        except Exception as error:
            why = _line(error)
        finally:
            unwrap_layers(model.model)
    if not found:
        return why
    largest = max(values.abs().max().item() for values in expected.values() if values is not None)
    zero = torch.zeros(())
    apart = (
        (zero if found[name] is None else found[name]) - (zero if one is None else one)
        for name, one in expected.items()
    )
    return max(values.abs().max().item() for values in apart) / largest


@torch.no_grad()
def padding(model: AdaptedModel) -> float:
    """How far a row's hidden states beside a longer row are from those alone."""
    short, long = sorted(random_rows(2, packing=False, longest=20), key=lambda row: len(row.ids))
    beside = hidden_states(model.model, collate([short, long], 0))[:1, : len(short.ids)]
    return difference(beside, hidden_states(model.model, collate([short], 0)))


@torch.no_grad()
def leak(model: AdaptedModel) -> float:
    """How far an example's hidden states behind another in its row are from those alone."""
    (row,) = random_rows(2)
    start, end = row.spans()[1]
    alone = hidden_states(
        model.model,
        {"input_ids": torch.tensor(row.ids[None, start:end]).long(), "position_ids": torch.arange(end - start)[None]},
    )
    return difference(hidden_states(model.model, collate([row], 0))[:, start:end], alone)


def dense_share(model: nn.Module) -> float:
    """The share of the bytes, embeddings, positions and head apart, of what would stay in 16 bits."""
    outside = {id(module) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(anatomy.head(model))}
    packed = packed_numbers(model) / 2
    dense = 2 * sum(
        values.numel()
        for module in model.modules()
        if id(module) not in outside
        for values in module.parameters(recurse=False)
    )
    return round(dense / (dense + packed), 4)


def plain_peft(kind: str, checkpoint: Path) -> str:
    """Whether transformers and PEFT train it: NF4, LoRA on all linears, one step. In words."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    try:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = model_class(kind).from_pretrained(checkpoint, dtype=torch.float32, quantization_config=config)
        adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
        adapted.train()
        out = adapted(input_ids=tokens(), labels=tokens(), use_cache=False)
        out.loss.backward()
        trained = [values for values in adapted.parameters() if values.requires_grad]
        lacking = sum(values.grad is None for values in trained)
        return "trains" if not lacking else f"trains, {lacking} of {len(trained)} tensors without gradient"
    except Exception as error:
        return f"fails: {_line(error)}"


def _said(error: BaseException, folder: Path) -> str:
    """The whole sentence, without the folder that is another one each time."""
    return str(error).replace(f"{folder}/", "")


def _line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:240]


def _place(error: BaseException) -> str:
    """Where in qlora, or last of all, an exception came from."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/qlora/" in frame.filename] or frames
    return f"{'/'.join(Path(ours[-1].filename).parts[-2:])}:{ours[-1].lineno}"
