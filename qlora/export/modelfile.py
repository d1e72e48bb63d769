"""Ollama's Modelfile: where the weights are, what a conversation looks like in Go's templates, where an answer ends, how to sample.

Of the chat template in a GGUF file Ollama uses none but those that it knows by heart; with any other it would hand the model the
bare question. So the Jinja template is asked how it renders a few conversations, and written in Go where that gives the same texts.
Knows chat templates and generation_config.json; must not know weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""generation_config.json's words and Ollama's."""
ROLES = {"s": "system", "u": "user", "a": "assistant"}
CONVERSATIONS = ("u", "su", "uau", "suauau")
Turns = list[dict[str, str]]


def write_modelfile(
    folder: Path, file: str, stops: Sequence[str], tokenizer: Any, template: str | None, sampling: dict[str, Any]
) -> None:
    """Write ``Modelfile`` for the GGUF file ``file`` in ``folder``; ``sampling`` is what generation_config.json says."""
    lines = [f"FROM ./{file}"]
    if template is not None and (go := go_template(tokenizer, template)) is not None:
        lines.append(f'TEMPLATE """{go}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    given = {theirs: sampling[ours] for ours, theirs in SAMPLING.items() if isinstance(sampling.get(ours), int | float)}
    lines += [f"PARAMETER {name} {value}" for name, value in given.items() if sampling.get("do_sample", True)]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_adapter_modelfile(folder: Path, file: str, base: str) -> None:
    """Write one for the adapter ``file``: Ollama has to be told the base, which must be the one that was trained on."""
    lines = [
        f"# {' '.join(base.split())} as a GGUF file, or its name in Ollama, in place of BASE",
        "FROM BASE",
        f"ADAPTER ./{file}",
    ]
    (folder / "Modelfile").write_text("\n".join(lines) + "\n", encoding="utf-8")


def go_template(tokenizer: Any, template: str) -> str | None:
    """``template`` in Go's language, for texts without tools; None where turns are not written one after the other, each the same
    way whatever stands beside it, and where it asks for the date."""

    # llama.cpp begins texts with it by itself
    first = tokenizer.bos_token if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else ""

    def rendered(turns: Turns, ask: bool) -> str:
        text = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=ask)
        return str(text).removeprefix(first)

    try:
        parts = _parts(rendered)
        for roles in CONVERSATIONS if parts else ():
            turns = [_turn(role, f"{number}. {{x}}") for number, role in enumerate(roles)]
            if _written(parts, turns) != rendered(turns, True):
                return None
    except Exception:  # a template is a program, and may raise anything
        return None
    if not parts or "strftime_now" in template or any("{{" in text or '"""' in text for text in parts.values()):
        return None
    blocks = "{{ else ".join(
        f'if eq .Role "{role}" }}}}{parts[f"{role} before"]}{{{{ .Content }}}}{parts[f"{role} after"]}'
        for role in ROLES.values()
    )
    default = (
        f'{{{{ if ne (index .Messages 0).Role "system" }}}}{parts["default"]}{{{{ end }}}}' if parts["default"] else ""
    )
    return f"{default}{{{{ range .Messages }}}}{{{{ {blocks}{{{{ end }}}}{{{{ end }}}}{parts['answer']}"


def _parts(rendered: Callable[[Turns, bool], str]) -> dict[str, str]:
    """What stands before and after each role's content, in place of a system turn, and before an answer; empty where that is not so."""
    turns = [_turn(role, f"qlora-{number}-content") for number, role in enumerate("suau")]
    alone, asked = rendered(turns[1:2], False), rendered(turns[1:2], True)
    texts = [rendered(turns[:count], False) for count in (1, 2, 4)]
    if not all(longer.startswith(shorter) for shorter, longer in [*pairwise(["", *texts]), (alone, asked)]):
        return {}
    said = [texts[0], texts[1][len(texts[0]) :], texts[2][len(texts[1]) :]]
    parts = {"answer": asked[len(alone) :]}
    for turn, text in zip(turns, said, strict=False):
        before, found, after = text.partition(turn["content"])
        if not found:
            return {}
        if turn["role"] == "assistant":  # another turn follows, as it stands in a conversation that goes on
            after = after.removesuffix(f"{parts['user before']}{turns[3]['content']}{parts['user after']}")
        parts |= {f"{turn['role']} before": before, f"{turn['role']} after": after}
    return parts | {"default": alone.removesuffix(f"{parts['user before']}{turns[1]['content']}{parts['user after']}")}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": ROLES[role], "content": content}


def _written(parts: dict[str, str], turns: Turns) -> str:
    """What the Go template makes of ``turns``."""
    said = [parts[f"{turn['role']} before"] + turn["content"] + parts[f"{turn['role']} after"] for turn in turns]
    return ("" if turns[0]["role"] == "system" else parts["default"]) + "".join(said) + parts["answer"]
