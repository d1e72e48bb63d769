"""Records as people write them, each a trap: what is trained of it (in ⟦…⟧), or why it is refused.

    python benchmarks/data_cases.py [--tokenizer smollm2-135m-instruct]

Every case is a file of its own, read as ``qlora preview`` reads it with nothing but ``data.train`` set. Prints a table row for
each: the case, the first example (special tokens as signs of their own) or the refusal, and the notes. Run it on two commits to
see what changed.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import re
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from qlora.data.load import load_data
from qlora.errors import QloraError
from qlora.model.checkpoint import open_checkpoint
from qlora.recipe import DEFAULT_MODEL, DataSection, ModelSection

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
NEWLINE_INSIDE = (
    "{% for m in messages %}{% if m['role']=='assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}"
    "{{ m['content'] + '<|im_end|>\\n' }}{% endgeneration %}{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
CUTS_THOUGHTS = (
    "{% for m in messages %}{% if m['role']=='assistant' and '</think>' in m['content'] %}{{ '<|im_start|>assistant\\n' + "
    "m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
CALLS_ALONE = (
    "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant\\n"
    "' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% else %}"
    + TURN
    + "{% endif %}"
    "{% endfor %}" + ASK
)
FORGETFUL = (
    "{% for m in messages %}{% if (m['role'] == 'system' and not loop.first) or (m['role'] == 'user' and loop.nextitem is defined and "
    "loop.nextitem['role'] == 'user') %}{% continue %}{% endif %}" + TURN + "{% endfor %}" + ASK
)
EOS_LAST = (
    "{% for m in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PARTS_ALONE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% for p in m['content'] %}{% if p is mapping %}{{ p.text }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    + ASK
)
SYSTEM_MOVED = (
    "{% if messages[0]['role']=='system' %}{% set s = messages[0]['content'] + '\\n' %}{% set rest = messages[1:] %}{% else %}"
    "{% set s = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m['role']=='user' %}{{ '<|im_start|>user\\n' + (s if "
    "loop.index0 >= rest | length - 2 else '') + m['content'] + '<|im_end|>\\n' }}{% else %}"
    + TURN
    + "{% endif %}{% endfor %}"
    + ASK
)


class Case(NamedTuple):
    """One file: its records or its bytes, its name, and the tokenizer's chat template where it is another."""

    what: str
    content: list[Any] | bytes | str
    name: str = "a.jsonl"
    template: str | dict[str, str] | None = None


def talk(*said: Any, **beside: Any) -> dict[str, Any]:
    """A conversation of user and assistant in turn; a turn may be an object with more than its text."""
    turns = []
    for number, one in enumerate(said):
        role = "assistant" if number % 2 else "user"
        turns.append({"role": role, **one} if isinstance(one, dict) else {"role": role, "content": one})
    return {"messages": turns, **beside}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """An answer that calls a function."""
    return {"content": "", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


THINKS = {"content": "4.", "reasoning_content": "2 and 2."}
TOOL = {"type": "function", "function": {"name": "weather", "description": "", "parameters": {"type": "object"}}}
CASES = [
    Case("1 a turn's weight 0", [talk("2+2?", {"content": "5, I think.", "weight": 0}, "Sure?", {"content": "No: 4.", "weight": 1})]),
    Case("1 Axolotl's train flag", [talk("2+2?", {"content": "5.", "train": False}, "Sure?", "No: 4.")]),
    Case("1 KTO label", [talk("2+2?", "5.", label=False), talk("2+2?", "4.", label=True)]),
    Case("1 chosen and rejected", [{"prompt": "2+2?", "chosen": "4.", "rejected": "5."}]),
    Case("1 system beside", [{"instruction": "2+2?", "output": "4.", "system": "Be brief."}]),
    Case("1 history beside", [{"instruction": "Sure?", "output": "Yes.", "history": [["2+2?", "4."]]}]),
    Case("1 images", [talk("What is in <image>?", "A cat.", images=["cat.png"])]),
    Case("1 two answers by other names", [{"prompt": "2+2?", "response_0": "4.", "response_1": "5.", "better_response_id": 0}]),
    Case("1 flags of turns beside them", [talk("2+2?", "5.", "Sure?", "No: 4.", loss_mask=[0, 1])]),
    Case("1 a verdict by another name", [talk("2+2?", "5.", is_correct=False), talk("2+2?", "4.", is_correct=True)]),
    Case("1 documents", [talk("Who?", "Bob.", documents=[{"text": "Bob did it."}])]),
    Case("1 an unread field", [talk("2+2?", "4.", source="school")]),
    Case("2 reasoning_content", [talk("2+2?", THINKS)]),
    Case("2 <think> that the template cuts", [talk("2+2?", "<think>\n2 and 2.\n</think>\n\n4.")], template=CUTS_THOUGHTS),
    Case("2 text beside a call", [talk("Cold?", {**call("weather", city="Oslo"), "content": "Let me see."}, tools=[TOOL])], template=CALLS_ALONE),
    Case("2 a later system text that the template skips", [{"messages": [*talk("2+2?", "4.")["messages"], {"role": "system", "content": "Be brief."}, *talk("3+3?", "6.")["messages"]]}], template=FORGETFUL),
    Case("2 a question that the template skips", [{"messages": [{"role": "user", "content": "2+2?"}, *talk("Please.", "4.")["messages"]]}], template=FORGETFUL),
    Case("2 a speaker's name", [talk({"content": "2+2?", "name": "Ann"}, "4.")]),
    Case("2 a template that writes no answer", [talk("2+2?", "4.")], template=TURN.replace("m[", "messages[0][")),
    Case("2 a template of parts alone", [talk("2+2?", "4.")], template=PARTS_ALONE),
    Case("3 nulls that Arrow filled in", [talk("Cold?", call("weather", city="Oslo")), talk("1+2?", call("add", a=1, b=2))], "a.parquet"),
    Case("4 a newline inside {% generation %}", [talk("2+2?", "4.")], template=NEWLINE_INSIDE),
    Case("4 eos after the last turn", [talk("2+2?", "4.")], template=EOS_LAST),
    Case("4 the system text moves to the last question", [{"messages": [{"role": "system", "content": "Be brief."}, *talk("2+2?", "4.", "3+3?", "6.")["messages"]]}], template=SYSTEM_MOVED),
    Case("4 several templates, no default", [talk("2+2?", "4.")], template={"tool_use": CALLS_ALONE}),
    Case("6 bos and end in the data", [talk("2+2?", "4.<|im_end|>")]),
    Case("6 a prompt that is rendered already", [{"prompt": "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "completion": "4."}]),
    Case("6 eos in a text", [{"text": "Hello there<|im_end|>"}]),
    Case("7 one empty answer of 40", [*[talk(f"{n}+1?", f"{n + 1}.") for n in range(39)], talk("2+2?", "")]),
    Case("7 a broken line of 40", "\n".join([*(json.dumps(talk(f"{n}+1?", f"{n + 1}.")) for n in range(39)), '{"messages": ['])),
    Case("7 an empty system text", [{"messages": [{"role": "system", "content": ""}, *talk("2+2?", "4.")["messages"]]}]),
    Case("7 arguments encoded twice", [talk("Cold?", {"content": "", "tool_calls": [{"function": {"name": "weather", "arguments": json.dumps(json.dumps({"city": "Oslo"}))}}]})]),
    Case("8 UTF-16", json.dumps(talk("2+2?", "4.")).encode("utf-16")),
    Case("8 cp1252", json.dumps(talk("€?", "“4”."), ensure_ascii=False).encode("cp1252")),
    Case("8 semicolons", "prompt;completion\n2+2?;4.\n", "a.csv"),
    Case("8 semicolons, and commas in the header", "id;prompt, short;completion, long\n1;Who?;Bob, I think.\n", "a.csv"),
    Case("8 a list in .jsonl", json.dumps([talk("2+2?", "4.")])),
    Case("8 a Git-LFS pointer", "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1024\n"),
    Case("8 .jsonl.gz", gzip.compress(json.dumps(talk("2+2?", "4.")).encode()), "a.jsonl.gz"),
    Case("8 other keys of turns", [{"messages": [{"speaker": "human", "text": "2+2?"}, {"speaker": "bot", "text": "4."}]}]),
    Case("8 parts of text", [talk({"content": [{"type": "text", "text": "2+2?"}]}, {"content": [{"type": "text", "text": "4."}]})]),
    Case("8 conversations of role and content", [{"conversations": talk("2+2?", "4.")["messages"]}]),
    Case("8 question, context, answer", [{"question": "2+2?", "context": "Numbers.", "answer": "4."}]),
    Case("8 mr and ref", "mr,ref\nname[Alimentum],There is Alimentum.\n", "a.csv"),
    Case("8 a line that is a list of turns", [talk("2+2?", "4.")["messages"]]),
    Case("8 text beside its answer", [{"text": "Add two numbers.", "code": "a + b"}]),
    Case("8 turns of question and answer", [{"messages": [{"input": "2+2?", "output": "4."}]}]),
    Case("8 turns that are texts", [{"messages": ["2+2?", "4."]}]),
    Case("8 records under their ids", json.dumps({"a": talk("2+2?", "4.", id="a"), "b": talk("3+3?", "6.", id="b")}), "a.json"),
    Case("10 an answer that is cut off", [talk("2+2?", "4. " * 200), talk("3+3?", "6.")]),
    Case("10 held-out data in the training data", [talk("2+2?", "4."), talk("2+2?", "4.")]),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=DEFAULT_MODEL)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    tokenizer = open_checkpoint(ModelSection(name=options.tokenizer), weights=False).tokenizer
    print("| case | outcome | notes |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            outcome, notes = _outcome(case, tokenizer, Path(scratch))
            print("|".join(["", *(f" {_cell(cell)} " for cell in (case.what, outcome, notes)), ""]), flush=True)


def _outcome(case: Case, tokenizer: Any, folder: Path) -> tuple[str, str]:
    path = folder / case.name
    if case.name.endswith(".parquet"):
        from datasets import Dataset

        Dataset.from_list(case.content).to_parquet(path)
    elif isinstance(case.content, bytes):
        path.write_bytes(case.content)
    else:
        text = case.content if isinstance(case.content, str) else "\n".join(json.dumps(one) for one in case.content)
        path.write_text(text, encoding="utf-8")
    if case.template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = case.template
    held_out = {"held_out_fraction": 0.5} if "held-out" in case.what else {}
    try:
        data = load_data(DataSection(train=str(path), max_length=256, **held_out), tokenizer)
        shown = " ".join(
            str(data.preview(index)).split("\n", 1)[1] for index in range(min(2, data.report.train.examples))
        )
        return shown, "; ".join([*data.report.train.losses(), *data.report.notes])
    except QloraError as error:
        return f"refused: {error}".replace(f"{folder}/", ""), ""
    except Exception as error:  # what a user would see as a traceback
        return f"traceback: {type(error).__name__}: {error}".replace(f"{folder}/", ""), ""


def _cell(text: str) -> str:
    shown = re.sub(r"<\|im_start\|>system\nYou are a helpful AI assistant named SmolLM[^<]*<\|im_end\|>\n", "", text)
    shown = shown.replace("<|im_start|>", "‹").replace("<|im_end|>", "›").replace("\n", "⏎").replace("|", "&#124;")
    return shown if len(shown) <= 420 else f"{shown[:420]}…"


if __name__ == "__main__":
    main()
