"""Public chat templates × kinds of conversations: what is trained of each, judged without the code that makes the mask.

    python benchmarks/templates.py --folder path/to/templates [path/to/others …] [--only NAME]

A folder holds .jinja files: TRL's wheel has them in ``trl/chat_templates``, llama.cpp in ``models/templates``, vLLM in
``examples``. Every turn of a conversation says words that stand nowhere else, so that the text of the trained tokens shows
what is learnt: each answer's words once and in order, the end of its turn, no word of a question, a result or a role.
Tokenizers have a token for each byte and one for each special token that a template mentions or writes.

Prints a Markdown table for each folder: ``right``; ``right, 3`` where something stands in other words, which sentence 3 below
tells; ``left out, 4`` where something is not trained, and sentence 4 says so; ``refused, 5``; ``WRONG`` with what is. The last column
has the tokens at which answers stop.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora.data.chat import ChatTemplate
from qlora.data.mistakes import BadRecords
from qlora.data.parsing import parse
from qlora.data.rendering import CutOff, Refused, Renderer, one_child
from qlora.data.sources import Record
from qlora.errors import DataError
from qlora.model.loss import IGNORE_INDEX

TAGS = "s|think|sop|sep|tool_call|tool_response|arg_key|arg_value|user|assistant"
BRACKETS = "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|CALL_ID|ARGS|THINK|gMASK"
SPECIAL = re.compile(
    r"<\|[^\s'\"|{}<>]+\|>|<｜[^\s'\"{}<>]+?｜>|<\|[\w\"]+>|<[\w\"]+\|>|<SPECIAL_\d+>|<seed:[a-z_]+>|\]~!?b[\[\]]|\[e~\["
    rf"|<(?:start|end|begin|beginning)_[a-z_]+>|</?(?:{TAGS})>|\[/?(?:{BRACKETS})\]"
)
ENDS = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|eot|eom|end|return|call|END_OF_TURN_TOKEN|end_of_text|endoftext|end_of_msg|role_end|user|system|"
    r"observation|assistant_end|tools_suffix|calls|eos|message_sep)\|>|<end_of_(?:turn|utterance|sentence)>|<(?:turn|tool_response)\|>|<\|tool_response>|</s>|<SPECIAL_1[12]>"
    r"|<｜end▁of▁sentence｜>|<seed:eos>|\[e~\[|</assistant>|<sep>|<｜hy_eos[^｜]*｜>"
)
"""What ends a turn in the families that are known; GLM's answers end where somebody else begins."""
HEADER = "since the template's generation prompt has none there"
ROLES = re.compile(r"\b(?:user|system|developer|assistant|model|human)\b", re.IGNORECASE)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weatherfn",
        "description": "tooldescribed",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "citydescribed"}}},
    },
}


def call(word: str, number: int) -> dict[str, Any]:
    """A call whose arguments hold what templates write in different ways: quotes, lines, other scripts, numbers, objects."""
    arguments = {
        "city": f"{word}town",
        "days": number,
        "note": f'{word}first "so" it\'s\n<b> & ünï {word}last',
        "where": {"inner": [f"{word}inner", 2.75]},
    }
    return {"type": "function", "function": {"name": "weatherfn", "arguments": arguments}}


def said(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def calling(content: str, *calls: dict[str, Any], **fields: Any) -> dict[str, Any]:
    numbered = [{"id": f"call_{call['function']['arguments']['days']}", **call} for call in calls]
    return said("assistant", content, tool_calls=numbered, **fields)


def result(word: str, number: int) -> dict[str, Any]:
    return said("tool", f"{word}result", tool_call_id=f"call_{number}", name="weatherfn")


ONE = [said("user", "askone"), said("assistant", "replyone more words.")]
TWO = [said("user", "asktwo"), said("assistant", "replytwo 日本 of it.")]
THREE = [said("user", "askthree"), said("assistant", "replythree\n\nin paragraphs.")]
CALL = [said("user", "askcall"), calling("", call("oslo", 48213)), result("oslo", 48213)]
AGAIN = [said("user", "askagain"), calling("", call("rome", 59327)), result("rome", 59327)]
KINDS: dict[str, list[dict[str, Any]]] = {
    "plain": ONE,
    "system": [said("system", "ruleone"), *ONE],
    "several turns": [said("system", "ruleone"), *ONE, *TWO, *THREE],
    "a later system text": [said("system", "ruleone"), *ONE, said("system", "ruletwo"), *TWO],
    "two questions": [said("user", "askzero"), *ONE],
    "call and result": [said("system", "ruleone"), *CALL, said("assistant", "replycall")],
    "two rounds of calls": [*CALL, said("assistant", "replycall"), *AGAIN, said("assistant", "replyagain")],
    "parallel calls": [
        said("user", "askcall"),
        *(calling("", call("oslo", 48213), call("rome", 59327)), result("oslo", 48213), result("rome", 59327)),
        said("assistant", "replycall"),
    ],
    "text beside a call": [
        said("user", "askcall"),
        *(calling("besidecall, said first.", call("oslo", 48213)), result("oslo", 48213)),
        said("assistant", "replycall"),
    ],
    "ends with a call": [said("user", "askcall"), calling("", call("oslo", 48213))],
    "reasoning": [
        *(ONE[0], {**ONE[1], "reasoning_content": "thoughtone\nat length."}),
        *(TWO[0], {**TWO[1], "reasoning_content": "thoughttwo"}),
    ],
    "<think> inside": [
        *(ONE[0], said("assistant", "<think>\nthoughtone\n</think>\n\nreplyone")),
        *(TWO[0], said("assistant", "<think>\nthoughttwo\n</think>\n\nreplytwo")),
    ],
    "reasoning, then a call": [
        said("user", "askcall"),
        *(calling("", call("oslo", 48213), reasoning_content="thoughtcall"), result("oslo", 48213)),
        said("assistant", "replycall", reasoning_content="thoughtreply"),
    ],
}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A token for each byte, and for each special token in the template and in what it writes."""
    special = {"<s>": None, "</s>": None, **dict.fromkeys(SPECIAL.findall(template))}
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    for messages in (KINDS["plain"], KINDS["system"], KINDS["call and result"]):
        try:
            special |= dict.fromkeys(SPECIAL.findall(Renderer(template, names).text(messages, [WEATHER], True)))
        except (Refused, CutOff):
            continue
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([*special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = template
    return tokenizer


def trained_texts(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Any]) -> list[str]:
    """The text of each run of trained tokens."""
    texts = []
    for example in examples:
        runs: list[list[int]] = [[]]
        for label in example.labels.tolist():
            if label != IGNORE_INDEX:
                runs[-1].append(label)
            else:
                runs.append([])
        texts += [tokenizer.decode(run) for run in runs if run]
    return texts


def words_of(value: object) -> list[str]:
    """The words, that stand nowhere else, of a text, or of all values of a call's arguments; numbers too."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [word for one in inner for word in words_of(one)]
    if isinstance(value, str):
        return re.findall(r"\b(?:ask|reply|beside|thought|rule|oslo|rome)[a-z]+\b", value)
    return [json.dumps(value)]


def pieces(message: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """(kind, its words) of what an answer says."""
    thoughts, _, text = message["content"].rpartition("</think>")
    calls = [call["function"] for call in message.get("tool_calls", [])]
    found = [
        ("reasoning", words_of(message.get("reasoning_content", "") + thoughts)),
        ("text", words_of(text)),
        *(("a function call", [call["name"], *words_of(call["arguments"])]) for call in calls),
    ]
    return [one for one in found if one[1]]


def judged(messages: list[dict[str, Any]], runs: list[str]) -> tuple[list[str], list[str]]:
    """(the kinds of things that are not trained, what is wrong otherwise)"""
    text, wrong = "\0".join(runs), []
    missing: dict[str, None] = {}
    answers = [message for message in messages if message["role"] == "assistant"]
    at = 0
    for number, message in enumerate(answers, start=1):
        said_first = at
        for kind, words in pieces(message):
            for word in words:
                found = text.find(word, said_first)
                if found < 0:
                    missing[kind] = None
                elif kind != "a function call":
                    wrong += [f"'{word}' {text.count(word)} times"] * (text.count(word) > 1)
                    wrong += [f"'{word}' out of order"] * (found < at and not message.get("tool_calls"))
                at = max(at, found + len(word) if found >= 0 else 0)
        behind = text[at:].split("\0")[0]
        ends = list(ENDS.finditer(behind))
        if not ends or SPECIAL.search(behind, ends[-1].end()):
            if message.get("tool_calls"):
                missing["the end of function calls"] = None
            else:
                wrong.append(f"no end of turn behind answer {number}, but '{behind[:60]}'")
    asked = [word for one in messages if one["role"] not in ("assistant",) for word in words_of(one["content"])]
    asked += ["result", "described"]
    wrong += [f"'{word}' of a question or a result is trained" for word in asked if word in text]
    for word in ("oslotown", "rometown"):  # the first argument; templates may write a function's name twice
        wrong += [f"'{word}' {text.count(word)} times"] * (text.count(word) > 1)
    return list(missing), wrong


AROUND = {"system": "a system text", "user": "a user's turn", "tool": "the result of a function"}


class Sentences:
    """Numbers the sentences of the notes and refusals, each once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, sentence: str) -> str:
        sentence = re.sub(r" \(\d+ records\)|^the conversation |[.]$", "", sentence)
        return str(self.numbers.setdefault(sentence, len(self.numbers) + 1))


def outcome(chat: ChatTemplate, messages: list[dict[str, Any]], sentences: Sentences) -> tuple[str, str]:
    """What became of a conversation: in one word, and as the table's cell."""
    fields: dict[str, Any] = {"messages": messages}
    if any("tool_calls" in message for message in messages):
        fields["tools"] = [WEATHER]
    conversations = parse([Record(fields, "benchmark", "line", 1)]).conversations
    begun = dict(chat.dialect.notes)
    chat.dialect.records.clear()
    bad = BadRecords()
    (examples,) = chat.encode(conversations, "assistant", bad)
    notes, chat.dialect.notes = chat.notes, begun
    if bad.found:
        return "refused", f"refused, {sentences.number(bad.found[0][1])}"
    runs = trained_texts(chat.tokenizer, examples)
    missing, wrong = judged(messages, runs)
    read = chat.tokenizer.decode(examples[-1].ids) if examples else ""
    others = [
        one
        for one in messages
        if one["role"] != "assistant" and any(word not in read for word in words_of(one["content"]))
    ]
    unread = {AROUND[one["role"]] for one in others}
    told_unread = {kind for kind in AROUND.values() if f"leaves out {kind} (" in " ".join(notes)}
    wrong += [f"{kind} is not read, and nobody is told" for kind in unread - told_unread]
    wrong += [f"{kind} is said to be left out, and is read" for kind in told_unread - unread]
    told = [kind for kind in ("reasoning", "text", "a function call") if f"leaves out {kind} of" in " ".join(notes)]
    told += ["the end of function calls"] * ("which ends function calls, untrained" in " ".join(notes))
    wrong += [f"{kind} is missing, and nobody is told" for kind in missing if kind not in told]
    wrong += [f"{kind} is said to be missing, and is there" for kind in told if kind not in missing]
    if wrong:
        return "WRONG", f"**WRONG**: {'; '.join(wrong)}".replace("\n", "⏎").replace("|", "\\|")
    inside = ENDS.sub("", "".join(runs).replace("<|start|>assistant", ""))  # gpt-oss: an answer of two messages
    if ROLES.search(inside):
        blocks = re.search(r"{%-?\s*generation", chat.text)
        notes.append(f"a header is trained, {'as the template says itself' if blocks else HEADER}")
    word = "left out" if missing or unread else "right"
    return word, ", ".join([word, " ".join(map(sentences.number, notes))]).removesuffix(", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", nargs="+", type=Path, required=True)
    parser.add_argument("--only", default="", help="a part of the names of the templates to try")
    options = parser.parse_args()
    sentences = Sentences()
    for folder in options.folder:
        totals: Counter[str] = Counter()
        print(
            f"\n## {folder.name}\n\n| template | {' | '.join(KINDS)} | answers stop at |\n|{'---|' * (len(KINDS) + 2)}"
        )
        for file in sorted(folder.glob("*.jinja"), key=lambda file: file.name.lower()):
            if options.only not in file.stem:
                continue
            try:
                with one_child():  # it takes longer to start than to render
                    tokenizer = tokenizer_of(file.read_text(encoding="utf-8"))
                    chat = ChatTemplate(tokenizer)
                    cells = [outcome(chat, messages, sentences) for messages in KINDS.values()]
            except DataError as error:
                cells, ends = [("refused", f"refused, {sentences.number(str(error))}")] * len(KINDS), ""
            else:
                ends = " ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(list(chat.end_tokens)))
            totals.update(word for word, _ in cells)
            print(
                f"| {file.stem} | {' | '.join(cell for _, cell in cells)} | {ends.replace('|', chr(92) + '|')} |",
                flush=True,
            )
        print(f"\n{totals.total():,} cells: {', '.join(f'{count:,} {word}' for word, count in totals.most_common())}.")
    print("\n## Sentences\n")
    print("\n".join(f"{number}. {sentence}" for sentence, number in sentences.numbers.items()))


if __name__ == "__main__":
    main()
