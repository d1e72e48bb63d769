"""The model card: README.md of what a run exported, in the form that hubs read, from the run folder's files alone.

    ---                 base, licence, library, tags: YAML that hubs act on
    # name              what it is
    results             held-out loss before and after
    how it was made     data, steps, time, the recipe
    how to load it      in the programs that take this form, with their flags

Says what the files say and no more: what a model is fit for, its author has to add. Knows run folders; must not know models.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from qlora.errors import redacted
from qlora.files.durable import write_text
from qlora.machine.disk import bytes_text
from qlora.recipe import parts_of
from qlora.reporting.figures import (
    change_text,
    count_text,
    duration_text,
    exact_text,
    shares_text,
    significant,
    summarise,
)
from qlora.reporting.records import Json, Records, number, read_records, section, whole

CARD = "README.md"
RELATION = {"merged": "finetune", "gguf": "quantized", "nf4": "quantized"}
LIBRARY = {"merged": "transformers", "nf4": "transformers", "gguf": "gguf", "gguf-adapter": "gguf"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
PLACES = re.compile(r"(?<![\w./:])(?:~|[A-Za-z]:)?[/\\](?:[^\s'\",\]}/\\]+[/\\])+")
"""The folders of an absolute path."""
MOST_README = 1024**2  # of a base's, which is read for its licence


def write_card(
    run: Path,
    out: Path,
    form: str,
    *,
    base_folder: Path | None = None,
    told: Sequence[str] = (),
    shell: Sequence[str] = (),
    opened: tuple[str, int | None] | None = None,
) -> Path:
    """Write the card of what ``run`` exported as ``form`` (merged, nf4, adapter, gguf, gguf-adapter) into ``out``.

    ``base_folder``: the base's, whose own card may name a licence; ``told``: sentences of the export to be kept with it; ``shell``:
    lines that open an adapter, beside Python's; BASE stands for its base. ``opened``: of an adapter, what its base is opened by,
    a folder or a hub id, and the token that a classifier's is padded with.
    """
    text = card(read_records(Path(run)), Path(out), form, licence_of(base_folder), told, shell, opened)
    write_text(Path(out) / CARD, text)
    return Path(out) / CARD


def card(
    records: Records,
    out: Path,
    form: str,
    licence: str | None,
    told: Sequence[str] = (),
    shell: Sequence[str] = (),
    opened: tuple[str, int | None] | None = None,
) -> str:
    """The card as Markdown with YAML in front."""
    summary, data = summarise(records), section(records.plan, "data")
    classifies = records.recipe is not None and records.recipe.objective.classifies
    base = str(
        section(records.plan, "model").get("name") or (records.recipe and records.recipe.model.name) or "its base"
    )
    by, pad = opened or (base, None)
    known = HUB_ID.fullmatch(base) is not None
    base = _code(base if known else _without_places(base).removeprefix("…/"))
    methods = [part.name for part in parts_of(records.recipe.method)] if records.recipe else []
    front: dict[str, Any] = {
        # of a base that is on no hub, a hub would look for it
        **({"base_model": base, "base_model_relation": RELATION.get(form, "adapter")} if known else {}),
        "library_name": LIBRARY.get(form, "peft"),
        **({"license": licence} if licence else {}),
        "tags": ["qlora", *methods],
    }
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", "",
        f"# {records.name}", "",
        f"{_what(form)} `{base}`, trained with {' and '.join(methods) or 'a method'} by qlora"
        + (f": {count_text(summary.trainable)} of {count_text(summary.parameters)} parameters." if summary.trainable else "."),
        f"Its licence is the base's, {licence}, and whatever its data ask for." if licence
        else "The base's folder names no licence: see where the base comes from, and what its data ask for.",
        "", "## Results", "",
    ]  # fmt: skip
    if summary.before and summary.after:
        unit = "pair" if summary.after.pairs else "example" if classifies else "token"
        lines += [
            "| | before | after | |", "|---|--:|--:|--:|",
            f"| held-out loss, nats per {unit} | {significant(summary.before.loss)} | {significant(summary.after.loss)} | "
            f"{change_text(summary.before.loss, summary.after.loss)} |",
            *(_classes(records.evaluation) if classifies else [
                f"| perplexity | {significant(summary.before.perplexity)} | {significant(summary.after.perplexity)} | |"
            ]),
            "", f"On {exact_text(summary.after.target_tokens)} held-out {'examples' if classifies else 'tokens with loss'}."
            if not summary.after.pairs else
            f"The chosen answer was ahead in {shares_text(summary.before, summary.after, 'ahead')} of {exact_text(summary.after.pairs)} "
            "held-out pairs (50 % is chance), of whose chosen answers the perplexity is.",
        ]  # fmt: skip
    else:
        lines.append("No held-out data: nothing is known of how good it is.")
    lines += ["", *(f"{sentence}\n" for sentence in told), "## How it was made", ""]
    lines += [f"- {fact}" for fact in _made(records, summary, data)]
    lines += [
        "",
        "<details><summary>The recipe</summary>",
        "",
        *_fenced(_without_places(records.recipe_text), "yaml"),
        "",
        "</details>",
        "",
    ]
    classes = records.recipe.classes if records.recipe else ()
    lines += ["## Loading it", "", *_loading(out, form, _code(by), shell, classes, pad), ""]
    return "\n".join(redacted(lines))


def _classes(evaluation: Json) -> list[str]:
    """The shares of a classifier as rows of the table."""
    before, after = (section(evaluation, "held_out", when, "classes") for when in ("before", "after"))
    names = {
        "accuracy": "accuracy",
        "precision": "precision, mean over classes",
        "recall": "recall, the same",
        "f1": "F1, the same",
    }
    found = {title: (number(before, key), number(after, key)) for key, title in names.items()}
    return [
        f"| {title} | {one:.3f} | {other:.3f} | |" for title, (one, other) in found.items() if None not in (one, other)
    ]


def licence_of(base_folder: Path | None) -> str | None:
    """The licence that a base's own card names in its YAML; None where there is none."""
    try:
        text = (base_folder / CARD).read_bytes()[:MOST_README].decode() if base_folder else ""
        _, front, _ = text.split("---\n", 2) if text.startswith("---\n") else ("", "", "")
        found = yaml.safe_load(front)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    name = found.get("license") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _what(form: str) -> str:
    return {
        "merged": "A merged model, in 16 bits, made of",
        "nf4": "A merged model in NF4, for bitsandbytes, made of",
        "gguf": "A merged model as a GGUF file, made of",
        "gguf-adapter": "An adapter as a GGUF file, for",
    }.get(form, "An adapter for")


def _made(records: Records, summary: Any, data: dict[str, object]) -> list[str]:
    facts = []
    for name, title in (("train", "training"), ("held_out", "held-out")):
        count, tokens = whole(section(data, name), "examples"), whole(section(data, name), "target_tokens")
        if count:
            facts.append(f"{exact_text(count)} {title} examples, {exact_text(tokens)} tokens with loss")
    planned = summary.steps_planned
    facts.append(
        f"{exact_text(summary.steps_done)} {'steps' if summary.finished or not planned else f'of {exact_text(planned)} steps'}"
    )
    device = records.environment.get("device_name") or records.environment.get("device")
    if summary.seconds:
        facts.append(f"{duration_text(summary.seconds)} of training on {device or 'its device'}")
    if summary.peak_memory:
        facts.append(f"at most {bytes_text(int(summary.peak_memory))} of memory in a step")
    return facts


def _loading(
    out: Path, form: str, base: str, shell: Sequence[str], classes: Sequence[str], pad: int | None
) -> list[str]:
    maker = "AutoModelForSequenceClassification" if classes else "AutoModelForCausalLM"
    if form in ("merged", "nf4"):
        bits = "" if form == "merged" else "  # bitsandbytes; the configuration says so"
        python = [f"from transformers import {maker}, AutoTokenizer", ""]
        python += [
            f'model = {maker}.from_pretrained("PATH"){bits}',
            'tokenizer = AutoTokenizer.from_pretrained("PATH")',
        ]
        serve = ["", *_fenced("vllm serve PATH\npython -m sglang.launch_server --model-path PATH", "sh")]
        return [*_fenced("\n".join(python), "python"), *([] if classes else serve)]
    if form == "adapter":
        labels = f", id2label={dict(enumerate(classes))}, pad_token_id={pad}" if classes else ""
        python = ["from peft import PeftModel", f"from transformers import {maker}", ""]
        python += [
            f'base = {maker}.from_pretrained("{base}"{labels})',
            'model = PeftModel.from_pretrained(base, "PATH")',
        ]
        served = "\n".join(shell).replace("BASE ", f"{quote(base)} ")
        return [*_fenced("\n".join(python), "python"), *(["", *_fenced(served, "sh")] if shell else [])]
    file = next((path.name for path in sorted(out.glob("*.gguf"))), "model.gguf")
    if form == "gguf":
        ollama = "\nollama create NAME -f Modelfile" if (out / "Modelfile").is_file() else ""
        return _fenced(f"llama-cli -m {file}{ollama}", "sh")
    return _fenced(f"llama-cli -m BASE.gguf --lora {file}", "sh")


def _without_places(text: str) -> str:
    """A text that leaves this machine, without the folders of its paths: ``/home/me/my.jsonl`` → ``…/my.jsonl``."""
    return PLACES.sub("…/", text)


def _code(text: str) -> str:
    """A stranger's name inside code: no end of it, no line of its own."""
    return " ".join(text.replace("`", "'").replace('"', "'").split())


def _fenced(text: str, kind: str) -> list[str]:
    """A block of code with a fence longer than any in ``text``."""
    fence = "```"
    while fence in text:
        fence += "`"
    return [f"{fence}{kind}", text.rstrip("\n"), fence]
