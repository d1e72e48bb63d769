"""Every causal language model and every model of images and text that transformers knows: what becomes of it here.

    nice python benchmarks/families.py                        all types, ten to twenty minutes; goes on where it was
    python benchmarks/families.py --only llama qwen3 --again  some of them, anew
    python benchmarks/families.py --pages                     the pages again from the rows that are there

Of each type a tiny random checkpoint is made, then loaded in NF4, planned, trained for two steps, merged and exported, each held
against plain transformers and PEFT in fp32 (``tests/families/judge.py`` has the laws). A process and a time limit for each type: a
crash or a hang is a row too. The rows are kept in ``--rows``, a JSON object a line, with the versions in the first; the tables are
made from them alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "2026-11-28-families.jsonl"
PLANS = "2026-11-28-plans.md"
SECONDS = 60.0
OUTCOMES = ("works", "works, packing off", "refused", "crashes", "silently wrong", "not judged")
COLUMNS = {
    "type": "type", "class": "class", "year": "year", "outcome": "outcome", "logits": "logits", "gradients": "gradients", "packing": "packing", "padding": "padding",
    "targets": "LoRA on", "without gradient": "no gradient", "dense": "in 16 bits", "merged": "merged", "peft": "PEFT",
    "plan": "plan", "plain": "transformers + PEFT",
}  # fmt: skip


# --- the rows ----------------------------------------------------------------------------------------------------------


def judged(kind: str, seconds: float) -> dict[str, Any]:
    """The row of ``kind``, made in a process of its own."""
    context = multiprocessing.get_context("fork")  # everything is imported once; the child has one thread
    there, here = context.Pipe()
    child = context.Process(target=_judge, args=(kind, there))
    child.start()
    there.close()
    row: dict[str, Any] = {"type": kind, "outcome": "crashes"}
    try:
        row = here.recv() if here.poll(seconds) else row | {"why": f"it was stopped after {seconds:.0f} seconds"}
    except EOFError:
        child.join()
        row |= {"why": f"its process ended with {child.exitcode}"}
    child.kill()
    child.join()
    return row


def _judge(kind: str, there: Any) -> None:
    from tests.families.judge import judge

    with tempfile.TemporaryDirectory() as folder:
        there.send(judge(kind, Path(folder)))


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("transformers", "torch", "peft", "bitsandbytes", "accelerate")
    return {"python": ".".join(map(str, sys.version_info[:2])), **{name: version(name) for name in names}}


def read_rows(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """(the versions, the newest row of each type)"""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    return (lines[0] if lines else {}), {row["type"]: row for row in lines[1:]}


def write_rows(path: Path, about: dict[str, str], rows: Iterable[dict[str, Any]]) -> None:
    ordered = sorted(rows, key=lambda row: str(row["type"]))
    path.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in [about, *ordered]), encoding="utf-8"
    )


# --- the pages ---------------------------------------------------------------------------------------------------------


class Sentences:
    """Numbers what is said, each once, whatever type and class it is said of."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, sentence: str, row: dict[str, Any]) -> int:
        for words, sign in (
            (str(row.get("class")), "CLASS"),
            (rf" \(model type '{re.escape(row['type'])}'\)", ""),
            (rf"this {re.escape(row['type'])} model", "this model"),
            (r"(16 bits: ).*?\. Set", r"\1…. Set"),
            (r"'[\w.]+weight'", "'…'"),
            (r"\d+\.\d+|\d+e-\d+|\d+(?=%| from the example)|(?<=rounding gives )\d+", "N"),
        ):
            sentence = re.sub(words, sign, sentence)
        return self.numbers.setdefault(sentence, len(self.numbers) + 1)


def cell(row: dict[str, Any], key: str, sentences: Sentences) -> str:
    value = row.get(key)
    if key == "outcome":
        said = [*row.get("sentences", []), *([row["why"]] if row.get("why") else [])]
        return ", ".join([str(value), " ".join(str(sentences.number(one, row)) for one in said)]).removesuffix(", ")
    if key == "dense" and value is not None:
        return f"{value:.1%}"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.0e}"
    if isinstance(value, list):
        return " ".join(f"`{one}`" for one in value)
    if (
        value is None
        or key in ("type", "class", "year", "packing")
        or value == "works"
        or str(value).startswith("trains")
    ):
        return str(value or "")
    head, _, _ = str(value).partition(":")
    return f"{'fails' if head == 'fails' or key in ('peft', 'plan') else head}, {sentences.number(str(value), row)}"


SINCE = 2023


def aim(rows: Iterable[dict[str, Any]]) -> str:
    """How many of the younger decoders that plain transformers and PEFT train are trained here too, and which are not."""
    trained = [
        row
        for row in rows
        if row.get("decoder") and (row.get("year") or 0) >= SINCE and row.get("plain", "").startswith("trains")
    ]
    lacking = [row for row in trained if row["outcome"] not in OUTCOMES[:2]]
    named = f" (not {', '.join(str(row['type']) for row in lacking)})" if lacking else ""
    return (
        f"Of {len(trained)} decoders from {SINCE} on that plain transformers and PEFT train, {len(trained) - len(lacking)} are trained "
        f"here: {1 - len(lacking) / max(1, len(trained)):.1%}{named}."
    )


def table_page(about: dict[str, str], rows: dict[str, dict[str, Any]], day: str) -> str:
    sentences = Sentences()
    lines = [
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
        *(
            "| " + " | ".join(cell(row, key, sentences).replace("|", "\\|") for key in COLUMNS) + " |"
            for row in rows.values()
        ),
    ]
    count = Counter(str(row["outcome"]) for row in rows.values())
    total = ", ".join(f"{count[outcome]} {outcome}" for outcome in OUTCOMES if count[outcome])
    return "\n".join(
        [
            "# Every family that transformers knows",
            "",
            "    python benchmarks/families.py",
            "",
            f"{day} · CPU, fp32 · {', '.join(f'{name} {version}' for name, version in about.items())}.",
            f"**{len(rows)} types: {total}.**",
            "",
            "A tiny random checkpoint of each causal language model and each model of images and text: loaded in NF4, planned, trained",
            "for two steps, merged, exported. Differences are the largest of a logit (or hidden state), by the largest: *logits*: the base",
            "against plain transformers with the dequantised weights; *gradients*: behind the recompute boundary against without; *padding*: a row beside a longer one against it alone; *merged*: the",
            "merged checkpoint in plain transformers against the trained model; *PEFT*: PEFT with the exported adapter against it. *in 16",
            "bits*: of the bytes beside embeddings and head, what is not packed (tiny layers have more than real ones). A number behind a",
            "word is that of a sentence at the end. *not judged*: transformers itself cannot be given text alone, or needs a package that",
            "is not here.",
            "",
            *lines,
            "",
            f"**{aim(rows.values())}** A type's *year* is that in the head of its files in transformers, Llama's that of GPT-NeoX; a",
            "decoder is what is neither a half of an encoder-decoder nor an encoder that its configuration makes one.",
            "",
            "## Sentences",
            "",
            *(f"{number}. {sentence}" for sentence, number in sentences.numbers.items()),
            "",
        ]
    )


def models_page(about: dict[str, str], rows: dict[str, dict[str, Any]]) -> str:
    """docs/models.md."""
    by: dict[str, list[dict[str, Any]]] = {outcome: [] for outcome in OUTCOMES}
    for row in rows.values():
        by[row["outcome"]].append(row)

    def named(found: list[dict[str, Any]]) -> str:
        return ", ".join(f"`{row['type']}`" for row in found)

    sentences: dict[str, list[dict[str, Any]]] = {}
    counted = Sentences()
    for row in by["refused"]:
        counted.number(row["why"], row)
    texts = {number: text for text, number in counted.numbers.items()}
    for row in by["refused"]:
        sentences.setdefault(texts[counted.number(row["why"], row)], []).append(row)
    lines = [
        "# Which models can be trained",
        "",
        "A model's type stands in its config.json as `model_type`. This page is made from a run over tiny checkpoints of every type of",
        f"transformers {about['transformers']} ([the table](../benchmarks/results/{RESULTS.stem}.md), with each difference measured); "
        "`python benchmarks/families.py` makes both anew. Other versions may know more types.",
        "",
        aim(rows.values()),
        f"What ten models of 2026 need on cards of 12, 16 and 24 GB, and how they are held there: [the plans](../benchmarks/results/{PLANS}).",
        "Of a model of images and text the text is trained; its towers stay in their files, and a merge copies them.",
        "",
        f"- **Trained, with packing** ({len(by['works'])}): {named(by['works'])}.",
        f"- **Trained one example a row, in steps of like length, which `data.packing=auto` chooses** ({len(by['works, packing off'])}): {named(by['works, packing off'])}.",
    ]
    whole = [
        row for row in rows.values() if "recompute=none" in row.get("asked for", []) and row["outcome"] in OUTCOMES[:2]
    ]
    if whole:
        lines.append(
            f"- Of these with `training.recompute=none training.accumulation=micro_batch_major` ({len(whole)}): {named(whole)}."
        )
    for outcome, said in (("crashes", "Known to fail"), ("silently wrong", "Known to be wrong: do not use")):
        if by[outcome]:
            lines.append(f"- **{said}** ({len(by[outcome])}): {named(by[outcome])}.")
    lines += ["", f"## Refused ({len(by['refused'])})", ""]
    lines += [f"- {named(found)}: {text}" for text, found in sorted(sentences.items(), key=lambda item: -len(item[1]))]
    lines += [
        "",
        f"Not tried ({len(by['not judged'])}), since they do not go from text to text or could not be built: {named(by['not judged'])}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=RESULTS, help="where the rows are kept")
    parser.add_argument("--only", nargs="+", default=[], metavar="TYPE")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    parser.add_argument("--pages", action="store_true", help="judge nothing; only write the pages")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "models.md")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one type")
    options = parser.parse_args()
    about, rows = read_rows(options.rows)
    if not options.pages:
        sys.path.insert(0, str(ROOT))
        import peft  # noqa: F401
        import torch
        import transformers

        import qlora.planning.plan
        import qlora.runs.train  # noqa: F401
        import tests.families.judge  # noqa: F401
        from tests.families.checkpoints import origin, types

        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        if about != versions():
            about, rows = versions(), {}  # of other versions
        for kind in rows:
            rows[kind] |= origin(kind)
        for kind in options.only or types():
            if kind in rows and not options.again:
                continue
            rows[kind] = row = judged(kind, options.seconds) | origin(kind)
            print(f"{kind}: {row['outcome']}{': ' + row['why'][:200] if 'why' in row else ''}", flush=True)
            write_rows(options.rows, about, rows.values())
    rows = dict(sorted(rows.items()))
    options.rows.with_suffix(".md").write_text(table_page(about, rows, options.rows.name[:10]), encoding="utf-8")
    options.docs.write_text(models_page(about, rows), encoding="utf-8")


if __name__ == "__main__":
    main()
