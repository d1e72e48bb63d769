"""The law of the mask: it covers exactly what the assistant said, with its end-of-turn token, whatever the template."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from qlora.data.chat import ChatTemplate
from qlora.data.examples import Example
from qlora.data.parsing import parse
from qlora.data.rendering import Renderer
from qlora.data.sources import Record
from qlora.errors import DataError
from qlora.model.loss import IGNORE_INDEX
from tests.data import conftest as families
from tests.data.conftest import make_tokenizer

TALK = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "Fine, thank you."},
    {"role": "user", "content": "And you? 日本"},
    {"role": "assistant", "content": "The lazy dog. ünïcödé 🦊"},
]
SYSTEM = {"role": "system", "content": "You are helpful"}


def conversations(*turns: list[dict[str, Any]], **fields: Any) -> Any:
    records = [Record({"messages": list(one), **fields}, "a.jsonl", "line", n) for n, one in enumerate(turns, 1)]
    return parse(records).conversations


def encode(tokenizer: Any, talk: list[dict[str, Any]], train_on: str = "assistant", **fields: Any) -> list[Example]:
    return ChatTemplate(tokenizer).encode(conversations(talk, **fields), train_on)[0]


def trained_runs(tokenizer: Any, example: Example) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = [[]]
    for label in example.labels.tolist():
        if label != IGNORE_INDEX:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize(
    ("template", "end", "before"),
    [
        (families.CHATML, "<|end|>", ""),
        (families.LLAMA3, "<|end|>", ""),
        (families.MISTRAL, "</s>", " "),  # the space after [/INST] is the model's to write: its prompt has none
        (families.GEMMA, "<|end|>", ""),
        (families.DEEPSEEK, "<|end|>", ""),
        (families.GENERATION, "<|end|>", ""),
        (None, "</s>", ""),
    ],
    ids=["chatml", "llama3", "mistral", "gemma", "deepseek", "generation", "default"],
)
def test_the_mask_covers_exactly_the_answers(template: str | None, end: str, before: str) -> None:
    tokenizer = make_tokenizer(template)
    (example,) = encode(tokenizer, TALK)
    answers = [before + message["content"] + end for message in TALK if message["role"] == "assistant"]
    assert trained_runs(tokenizer, example) == answers
    (last,) = encode(tokenizer, TALK, "completion")
    assert trained_runs(tokenizer, last) == answers[1:]
    (everything,) = encode(tokenizer, TALK, "all")
    assert everything.target_tokens == len(everything.ids) - 1


@pytest.mark.parametrize("template", [families.CHATML, families.MISTRAL, families.QWEN3, families.GENERATION, None])
@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"masked": True}], ids=["weight", "train", "masked"])
def test_an_answer_that_is_marked_is_seen_and_not_trained(template: str | None, mark: dict[str, Any]) -> None:
    tokenizer = make_tokenizer(template)
    talk = [
        TALK[0],
        {**TALK[1], "content": "5, I think.", **mark},
        *TALK[2:],
        TALK[0],
        {**TALK[1], "content": "No: 4."},
    ]
    examples = encode(tokenizer, talk)
    trained = "".join("".join(trained_runs(tokenizer, example)) for example in examples)
    assert "5, I think." not in trained
    assert "lazy dog" in trained
    assert "No: 4." in trained
    assert all("5, I think." in tokenizer.decode(example.ids) for example in examples)
    (one,) = conversations(talk)
    _, ids, answer = ChatTemplate(tokenizer).prompt(one)
    assert answer == TALK[3]["content"]  # the first answer that is to be learnt
    assert "5, I think." in tokenizer.decode(ids)


@pytest.mark.parametrize("template", [families.CHATML, families.LLAMA3, families.GEMMA, families.MISTRAL])
def test_the_ids_are_those_of_apply_chat_template(template: str) -> None:
    tokenizer = make_tokenizer(template, adds_bos=True)
    (example,) = encode(tokenizer, TALK)
    assert example.ids.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"]
    assert example.ids.tolist().count(tokenizer.bos_token_id) == ("bos_token" in template)  # never two


def test_a_template_that_rewrites_earlier_turns_gives_one_example_an_answer() -> None:
    tokenizer = make_tokenizer(families.QWEN3)
    first, second = encode(tokenizer, TALK)
    assert trained_runs(tokenizer, first) == ["<think>\n\n</think>\n\nFine, thank you.<|end|>"]
    assert trained_runs(tokenizer, second) == ["<think>\n\n</think>\n\nThe lazy dog. ünïcödé 🦊<|end|>"]
    # the second one's history is what the model would see: the first answer without its thoughts
    assert tokenizer.decode(second.ids).count("<think>") == 1


@pytest.mark.parametrize(
    ("name", "ends", "end_of_turn"),
    [
        ("NEWLINE", ["<|end|>\n", "<|end|>\n"], "<|end|>"),
        ("EOS_LAST", ["<|end|>", "<|end|>\n</s>"], "<|end|>"),
        ("TWO_ENDS", ["<|end|></s>", "<|end|></s>"], "</s>"),
        ("PARTS", ["<|end|>", "<|end|>"], "<|end|>"),
        ("NO_END", ["[INST]", "[INST]"], "[INST]"),
    ],
)
def test_the_end_of_turn_is_trained_wherever_it_stands(name: str, ends: list[str], end_of_turn: str) -> None:
    tokenizer = make_tokenizer(getattr(families, name))
    chat = ChatTemplate(tokenizer)
    ((example,),) = chat.encode(conversations(TALK), "assistant")
    before = "\n" if name == "NO_END" else ""  # its prompt ends before the newline
    assert trained_runs(tokenizer, example) == [
        before + turn["content"] + end for turn, end in zip(TALK[1::2], ends, strict=True)
    ]
    assert tokenizer.convert_ids_to_tokens(chat.end_tokens[0]) == end_of_turn


def test_earlier_turns_may_end_otherwise() -> None:
    """Without blocks each answer is trained with the end that the model gives it; blocks say themselves what is trained."""
    tokenizer = make_tokenizer(families.OTHER_END)
    first, second = encode(tokenizer, TALK)
    assert trained_runs(tokenizer, first) == ["Fine, thank you.</s>"]
    assert trained_runs(tokenizer, second) == ["The lazy dog. ünïcödé 🦊</s>"]
    assert "Fine, thank you.<|end|>" in tokenizer.decode(second.ids)
    blocks = families.GENERATION.replace(
        "['content'] + '<|end|>' }}{% endg", "['content'] + ('</s>' if loop.last else '<|end|>') }}{% endg"
    )
    tokenizer = make_tokenizer(blocks)
    (example,) = encode(tokenizer, TALK)
    assert trained_runs(tokenizer, example) == ["Fine, thank you.<|end|>", "The lazy dog. ünïcödé 🦊</s>"]


def test_a_question_that_is_rewritten_once_it_is_answered_gives_the_prompt_and_the_answer() -> None:
    tokenizer = make_tokenizer(families.MOVED_SYSTEM)
    first, second = encode(tokenizer, [SYSTEM, *TALK])
    asked = "<s>[INST] You are helpful\n\nHello there[/INST]"
    assert tokenizer.decode(first.ids) == asked + " Fine, thank you.</s>"
    assert tokenizer.decode(second.ids) == (
        "<s>[INST] Hello there[/INST] Fine, thank you.</s>[INST] You are helpful\n\nAnd you? 日本[/INST] "
        "The lazy dog. ünïcödé 🦊</s>"
    )
    assert trained_runs(tokenizer, first) == [" Fine, thank you.</s>"]
    assert trained_runs(tokenizer, second) == [" The lazy dog. ünïcödé 🦊</s>"]
    (alone,) = encode(tokenizer, [SYSTEM, *TALK], "completion")
    assert alone.ids.tolist() == second.ids.tolist()
    assert len(encode(tokenizer, TALK)) == 1  # without a system text nothing is rewritten
    (short,) = encode(tokenizer, [SYSTEM, {"role": "user", "content": "?"}, TALK[1]])
    assert tokenizer.decode(short.ids) == "<s>[INST] You are helpful\n\n?[/INST] Fine, thank you.</s>"


def test_the_end_of_turn_is_trained_when_it_is_also_the_pad() -> None:
    tokenizer = make_tokenizer(families.CHATML, pad="<|end|>")
    (example,) = encode(tokenizer, TALK)
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.pad_token_id == end
    assert example.labels.tolist().count(end) == 2


def test_a_generation_block_without_the_end_of_turn_is_refused() -> None:
    template = families.GENERATION.replace("+ '<|end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|end|>' }}")
    # nor is one with the first of two
    half = template.replace("}}{% endgeneration %}{{ '<|end|>' }}", "+ '<|end|>' }}{% endgeneration %}{{ '</s>' }}")
    for wrong, token in ((template, "<|end|>"), (half, "</s>")):
        with pytest.raises(
            DataError, match=rf"Line 1 of 'a.jsonl'.*end-of-turn token {re.escape(token)} would carry no loss"
        ):
            encode(make_tokenizer(wrong), TALK)


def test_a_refused_system_turn_moves_into_the_first_user_turn() -> None:
    tokenizer = make_tokenizer(families.GEMMA)
    chat = ChatTemplate(tokenizer)
    ((example,),) = chat.encode(conversations([SYSTEM, *TALK]), "assistant")
    assert "<|start|>user\nYou are helpful\n\nHello there<|end|>" in tokenizer.decode(example.ids)
    assert any("system" in note for note in chat.dialect.notes)


def test_a_template_that_ignores_the_system_turn_does_not_lose_it() -> None:
    silent = families.CHATML.replace(
        "{{ '<|start|>'", "{% if message['role'] == 'system' %}{% continue %}{% endif %}{{ '<|start|>'"
    )
    (example,) = encode(make_tokenizer(silent), [SYSTEM, *TALK])
    assert "You are helpful\n\nHello there" in make_tokenizer().decode(example.ids)


def test_the_default_template_adds_no_tokens_and_bos_once() -> None:
    tokenizer = make_tokenizer(None, adds_bos=True)
    size = len(tokenizer)
    (example,) = encode(tokenizer, TALK)
    assert len(tokenizer) == size
    assert tokenizer.chat_template is None
    text = tokenizer.decode(example.ids)
    assert text.startswith("<s>### User:\nHello there\n\n### Assistant:\nFine, thank you.</s>\n\n### User:\n")
    assert example.ids.tolist().count(tokenizer.bos_token_id) == 1


def test_tools_are_passed_to_a_template_that_knows_them_and_written_out_for_others() -> None:
    call = {"from": "function_call", "value": json.dumps({"name": "tip", "arguments": {"bill": 50}})}
    fields = {
        "conversations": [
            {"from": "human", "value": "Hi"},
            call,
            {"from": "observation", "value": "20"},
            {"from": "gpt", "value": "Twenty"},
        ],
        "tools": json.dumps([{"name": "tip", "parameters": {}}]),
    }
    parsed = parse([Record(fields, "a.jsonl", "line", 1)])
    knows = make_tokenizer(families.TOOLS)
    ((example,),) = ChatTemplate(knows).encode(parsed.conversations, "assistant")
    assert "<|start|>toolstip<|end|>" in knows.decode(example.ids)
    assert trained_runs(knows, example) == ['<call>tip{"bill": 50}<|end|>', "Twenty<|end|>"]
    for template in (families.CHATML, families.GEMMA):
        plain = make_tokenizer(template)
        ((example,),) = ChatTemplate(plain).encode(parsed.conversations, "assistant")
        assert '[{"name": "tip", "parameters": {}}]' in plain.decode(example.ids)
        assert trained_runs(plain, example) == [call["value"] + "<|end|>", "Twenty<|end|>"]


@pytest.mark.parametrize(
    "call",
    [
        "tip(50)",
        "3",
        "null",
        "[]",
        "[null]",
        '{"arguments": {}}',
        '{"name": 3, "arguments": {}}',
        '{"name": "tip", "arguments": [50]}',
        '{"name": "tip", "arguments": "50"}',
        '{"name": "tip", "arguments": {"bill": "\\ud83d"}}',
        '{"name": "tip", "arguments": {"bill": %s}}' % ("9" * 5000),
        '{"name": "tip", "arguments": %s}' % ("[" * 100_000),
    ],
)
def test_a_function_call_that_is_none_is_refused_where_the_template_needs_one(call: str) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": call}]
    talk = parse([Record({"conversations": turns}, "a.jsonl", "line", 1)]).conversations
    with pytest.raises(
        DataError, match=r"^Line 1 of 'a.jsonl' has a function call that is not a JSON object with name"
    ):
        ChatTemplate(make_tokenizer(families.TOOLS)).encode(talk, "assistant")
    plain = make_tokenizer(families.CHATML)
    ((example,),) = ChatTemplate(plain).encode(talk, "assistant")
    assert trained_runs(plain, example) == [call + "<|end|>"]  # elsewhere it is text as any other


def test_tool_calls_reach_every_template() -> None:
    function = {"name": "tip", "arguments": {"bill": 50}}
    calls = [{"id": "call1", "type": "function", "function": function}]
    result = {"role": "tool", "content": "20", "tool_call_id": "call1"}
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": calls}, result, TALK[1]]
    for template, text in ((families.TOOLS, '<call>tip{"bill": 50}'), (families.CHATML, json.dumps(function))):
        tokenizer = make_tokenizer(template)
        (example,) = encode(tokenizer, talk)
        assert trained_runs(tokenizer, example) == [f"{text}<|end|>", "Fine, thank you.<|end|>"]


def test_results_of_parallel_calls_are_one_user_turn_where_there_is_no_tool_turn() -> None:
    """Templates that want roles to alternate refuse two."""
    calls = [{"function": {"name": "tip", "arguments": {"bill": bill}}} for bill in (50, 60)]
    results = [{"role": "tool", "content": content} for content in ("10", "12")]
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": calls}, *results, TALK[1]]
    for template, text in ((families.MISTRAL, "[INST] 10\n\n12 [/INST]"), (families.TOOLS, "<|start|>tool\n12<|end|>")):
        tokenizer = make_tokenizer(template)
        (example,) = encode(tokenizer, talk)
        assert text in tokenizer.decode(example.ids)


def test_ids_of_calls_are_renamed_where_the_template_demands_it_and_each_is_its_own() -> None:
    calls = [{"id": "call_0", "type": "function", "function": {"name": name, "arguments": {}}} for name in "abc"]
    results = [{"role": "tool", "content": "20", "tool_call_id": "call_0"} for _ in calls]
    del calls[2]["id"], results[2]["tool_call_id"]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    talk = [TALK[0], turn, *results, {**turn, "tool_calls": calls[:1]}, results[0], TALK[1]]
    tools = [{"name": "a"}]
    nine = make_tokenizer(families.NINE)
    (example,) = encode(nine, talk, tools=tools)
    assert re.findall(r"call\w+", nine.decode(example.ids)) == [
        *("call00001", "call00002", "call00003", "call00001", "call00002", "call00003", "call00004", "call00004")
    ]
    free = make_tokenizer(families.NINE.replace("call.id | length != 9 or '_' in call.id", "false"))
    (example,) = encode(free, talk, tools=tools)
    assert re.findall(r"call\w+", free.decode(example.ids)) == [
        *("call_0", "call_0", "call00003", "call_0", "call_0", "call00003", "call_0", "call_0")
    ]


def test_the_answer_that_is_a_call_is_shown_as_the_call() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Łódź"}}}
    talk = [{"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    (one,) = conversations(talk)
    assert ChatTemplate(make_tokenizer()).prompt(one)[2] == '{"name": "weather", "arguments": {"town": "Łódź"}}'


def test_a_tokenizer_with_several_templates() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": families.LLAMA3, "tool_use": families.TOOLS}
    chat = ChatTemplate(tokenizer)
    plain, using = conversations(TALK)[0], conversations(TALK, tools=[{"name": "tip"}])[0]
    texts = [tokenizer.decode(example.ids) for (example,) in chat.encode([using, plain, using], "assistant")]
    assert [text.split("<|end|>")[0] for text in texts[:2]] == [
        "<|start|>toolstip",
        "<s><|start|>user<|start|>\n\nHello there",
    ]
    assert texts[0] == texts[2]
    assert tokenizer.decode(chat.prompt(using)[1]).startswith("<|start|>toolstip")
    tokenizer.chat_template = {"rag": families.CHATML, "tool_use": families.TOOLS}
    with pytest.raises(
        DataError, match=r"several chat templates \(rag, tool_use\), none of them named 'default'.*data\.chat_template"
    ):
        ChatTemplate(tokenizer)


THOUGHTFUL = [
    *(TALK[0], {**TALK[1], "reasoning_content": "Well.\nSo."}, TALK[2]),
    {"role": "assistant", "content": "<think>\nHm 🦊\n</think>\n\nThe lazy dog."},
]
AS_TEXT = "reasoning stands as text in the answer, since the chat template has no place for it (1 record)"
STAYS = "reasoning stays in the answer, from which the chat template would take it (1 record)"


@pytest.mark.parametrize(
    ("name", "runs", "notes"),
    [
        (
            "CHATML",
            [
                "<think>\nWell.\nSo.\n</think>\n\nFine, thank you.<|end|>",
                "<think>\nHm 🦊\n</think>\n\nThe lazy dog.<|end|>",
            ],
            [AS_TEXT],
        ),
        (  # its prompt opens the thoughts
            "CUT_THOUGHTS",
            ["Well.\nSo.\n</think>\n\nFine, thank you.<|end|>", "Hm 🦊\n</think>\n\nThe lazy dog.<|end|>"],
            [AS_TEXT, STAYS],
        ),
        (
            "THINKING",
            ["<t>Well.\nSo.</t>Fine, thank you.<|end|>", "<think>\nHm 🦊\n</think>\n\nThe lazy dog.<|end|>"],
            [],
        ),
    ],
)
def test_reasoning_is_trained_where_the_template_has_a_place_and_elsewhere_as_text(
    name: str, runs: list[str], notes: list[str]
) -> None:
    tokenizer = make_tokenizer(getattr(families, name))
    chat = ChatTemplate(tokenizer)
    (examples,) = chat.encode(conversations(THOUGHTFUL), "assistant")
    assert [run for example in examples for run in trained_runs(tokenizer, example)] == runs
    assert len(examples) == (2 if name == "THINKING" else 1)  # it shows the last answer's alone
    assert sorted(chat.notes) == sorted(notes)


@pytest.mark.parametrize("begin", ["", "<think>\n", "Well. <think>\n"])
def test_thoughts_stay_in_an_answer_that_holds_their_end_alone_or_begins_otherwise(begin: str) -> None:
    tokenizer = make_tokenizer(families.CUT_THOUGHTS)
    talk = [TALK[0], {"role": "assistant", "content": f"{begin}Hm.\n</think>\n\nYes."}]
    ((example,),) = (chat := ChatTemplate(tokenizer)).encode(conversations(talk), "assistant")
    (run,) = trained_runs(tokenizer, example)
    opened = begin.partition("<think>")[0]
    assert run == f"{opened and begin}Hm.\n</think>\n\nYes.<|end|>"
    assert chat.notes == [STAYS]


def test_text_beside_calls_is_trained_before_the_calls_as_the_template_writes_them() -> None:
    calls = [{"function": {"name": "tip", "arguments": {"bill": 50}}}]
    talk = [
        TALK[0],
        {"role": "assistant", "content": "Let me see.", "tool_calls": calls},
        {"role": "tool", "content": "20"},
    ]
    (conversation,) = conversations([*talk, TALK[1]], tools=[{"name": "tip"}])
    tokenizer = make_tokenizer(families.TOOLS)  # which leaves it out, as Llama 3.1's does
    kept, dropped = ChatTemplate(tokenizer), ChatTemplate(tokenizer, dropped_content="drop")
    ((example,),) = kept.encode([conversation], "assistant")
    assert trained_runs(tokenizer, example) == [
        'Let me see.\n\n<call>tip{"bill": 50}<|end|>',
        "Fine, thank you.<|end|>",
    ]
    assert kept.notes == [
        "text stands before the function calls, since the chat template has no place for it (1 record)"
    ]
    ((example,),) = dropped.encode([conversation], "assistant")
    assert trained_runs(tokenizer, example) == ['<call>tip{"bill": 50}<|end|>', "Fine, thank you.<|end|>"]
    assert dropped.notes == ["the chat template leaves out text of answers (1 record)"]


@pytest.mark.parametrize("name", ["CHATML", "CUT_THOUGHTS"])
def test_reasoning_that_the_template_drops_is_dropped_or_refused_on_request(name: str) -> None:
    tokenizer = make_tokenizer(getattr(families, name))
    chat = ChatTemplate(tokenizer, dropped_content="drop")
    ((example,), _) = chat.encode(conversations(THOUGHTFUL[:2], TALK), "assistant")
    assert trained_runs(tokenizer, example) == ["Fine, thank you.<|end|>"]
    assert chat.notes == ["the chat template leaves out reasoning of answers (1 record)"]
    refusing = ChatTemplate(tokenizer, dropped_content="refuse")
    with pytest.raises(
        DataError, match=r"^Line 2 of 'a.jsonl' has reasoning in an answer, which the chat template .* leaves out"
    ):
        refusing.encode(conversations(TALK, THOUGHTFUL), "assistant")


def test_texts_are_made_and_tokenised_group_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many conversations there are, no more rendered texts wait for the tokenizer than a group has."""
    monkeypatch.setattr("qlora.data.chat._GROUP", 4)
    waiting, most, tokenizer = 0, 0, make_tokenizer()
    render = Renderer.render

    def rendered(*arguments: Any, **options: Any) -> Any:
        nonlocal waiting, most
        texts = render(*arguments, **options)
        waiting += len(texts)
        most = max(most, waiting)
        return texts

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            nonlocal waiting
            waiting -= len(texts)
            return tokenizer(texts, **options)

    chat = ChatTemplate(Counting())
    monkeypatch.setattr(Renderer, "render", rendered)
    talks = conversations(*[TALK] * 23)
    assert [len(one) for one in chat.encode(talks, "assistant")] == [1] * 23
    assert (waiting, most) == (0, 4)


def test_a_date_in_the_template_does_not_change_with_the_day() -> None:
    dated = "{{ strftime_now('%d %b %Y') }} {{ date_string }}" + families.CHATML
    (example,) = encode(make_tokenizer(dated), TALK)
    assert make_tokenizer().decode(example.ids).startswith("26 Jul 2024 26 Jul 2024<|start|>user")


def test_what_a_template_refuses_names_the_record() -> None:
    twice = [TALK[0], TALK[0], TALK[1]]
    with pytest.raises(DataError, match=r"Line 2 of 'a.jsonl' is refused.*roles must alternate"):
        ChatTemplate(make_tokenizer(families.MISTRAL)).encode(conversations(TALK, twice), "assistant")


def test_templates_run_in_a_sandbox() -> None:
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}" + families.CHATML
    with pytest.raises(DataError, match="is refused by the chat template"):
        encode(make_tokenizer(evil), TALK)


def test_the_template_file(write: Any) -> None:
    chat = ChatTemplate(make_tokenizer(families.MISTRAL), write("own.jinja", families.CHATML))
    assert chat.text == families.CHATML
    with pytest.raises(DataError, match="not valid Jinja: line 1"):
        ChatTemplate(make_tokenizer(), write("bad.jinja", "{% for x %}"))
    with pytest.raises(DataError, match=r"chat_template 'nowhere.jinja' cannot be read"):
        ChatTemplate(make_tokenizer(), "nowhere.jinja")


def test_a_prompt_ends_in_the_generation_prompt() -> None:
    tokenizer = make_tokenizer(families.CHATML)
    messages, ids, answer = ChatTemplate(tokenizer).prompt(conversations(TALK)[0])
    assert messages == TALK[:1]
    assert tokenizer.decode(ids) == "<|start|>user\nHello there<|end|>\n<|start|>assistant\n"
    assert answer == "Fine, thank you."


def test_a_template_that_changes_words_gets_none_in_their_place() -> None:
    """What is kept from a template stands in it as a word of ours, which such a template would have trained."""
    cut = "message['content'].split('</think>')[-1]"
    template = families.CUT_THOUGHTS.replace(cut, f"({cut} | upper)")
    assert template != families.CUT_THOUGHTS
    tokenizer = make_tokenizer(template)
    talk = [TALK[0], {"role": "assistant", "content": "<think>\nHm\n</think>\n\nFine"}]
    chat = ChatTemplate(tokenizer)
    ((example,),) = chat.encode(conversations(talk), "assistant")
    assert trained_runs(tokenizer, example) == ["\n\nFINE<|end|>"]
    assert "the chat template leaves out reasoning of answers (1 record)" in chat.notes


NASTY = {
    "city": "Oslo",
    "days": 12,
    "note": 'it\'s "so"\nünï <b>',
    "where": {"inner": ["Bergen", 2.5]},
    "when": None,
    "no": False,
}
CALLS = [{"function": {"name": "tip", "arguments": NASTY}}]
CALLING = [
    *(TALK[0], {"role": "assistant", "content": "", "tool_calls": CALLS}, {"role": "tool", "content": "20"}),
    {"role": "assistant", "content": "In Oslo 12, in Bergen 2.5."},
]
LEFT_OUT = ["the chat template leaves out a function call of answers (1 record)"]


@pytest.mark.parametrize(
    ("written", "notes"),
    [
        ("(call.function.arguments | tojson)", []),
        ("(call.function.arguments | tojson | tojson)", []),
        ("(call.function.arguments | string)", []),
        ("(call.function.arguments | dictsort | string)", []),
        ("''", LEFT_OUT),
        ("(call.function.arguments.keys() | list | string)", LEFT_OUT),
        ("((call.function.arguments | tojson).replace('Bergen', ''))", LEFT_OUT),
        ("((call.function.arguments | tojson).replace('12', ''))", LEFT_OUT),
    ],
)
def test_arguments_that_a_template_leaves_out_are_told(written: str, notes: list[str]) -> None:
    """The next answer says the same words, as answers do: that does not hide it."""
    chat = ChatTemplate(make_tokenizer(families.TOOLS.replace("(call.function.arguments | tojson)", written)))
    chat.encode(conversations(CALLING, tools=[{"name": "tip"}]), "assistant")
    assert chat.notes == notes


def test_a_second_call_of_the_same_function_that_a_template_leaves_out_is_told() -> None:
    template = families.TOOLS.replace("in message.tool_calls %}", "in message.tool_calls[:1] %}")
    other = {"function": {"name": "tip", "arguments": {"city": "Tromsø"}}}
    talk = [CALLING[0], {**CALLING[1], "tool_calls": [*CALLS, other]}, *CALLING[2:]]
    for shape, notes in ((families.TOOLS, []), (template, LEFT_OUT)):
        chat = ChatTemplate(make_tokenizer(shape))
        chat.encode(conversations(talk, tools=[{"name": "tip"}]), "assistant")
        assert chat.notes == notes


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("TOOLS", ["<|end|>"]),
        ("CALL_ENDS", ["<|end|>", "</s>"]),
        ("RESULT_OPENS", ["<|end|>", "[INST]"]),
        ("RESULT_FOLLOWS", ["[INST]", "[/INST]"]),
        ("EACH_CALL_ENDS", ["<|end|>"]),
        ("THOUGHTS_END", ["<|end|>"]),
        ("PARTS_END", ["<|end|>"]),
        ("REWRITTEN_CALLS", ["[INST]"]),
    ],
)
def test_answers_and_calls_stop_at_what_ends_them(name: str, ends: list[str]) -> None:
    """A token that stands inside an answer as well would stop it too early."""
    tokenizer = make_tokenizer(getattr(families, name))
    chat = ChatTemplate(tokenizer)
    assert tokenizer.convert_ids_to_tokens(list(chat.end_tokens)) == ends
    (parallel,) = conversations([*CALLING[:1], {**CALLING[1], "tool_calls": CALLS * 2}], tools=[{"name": "tip"}])
    ((example,),) = chat.encode([parallel], "assistant")
    (said,) = trained_runs(tokenizer, example)
    assert said.endswith(ends[-1])
    assert said.count("Bergen") == (1 if name == "CALL_ENDS" else 2)  # which writes the first call alone, as gpt-oss


BESIDE = [
    *(TALK[0], {**CALLING[1], "content": "Let me see."}, {"role": "tool", "content": "twenty"}),
    {"role": "assistant", "content": "The lazy dog."},
]


def test_a_result_is_not_trained_where_the_end_of_its_prompt_stands_before_it() -> None:
    """Gemma 4 goes on with the turn that called, so that the prompt's end is found at the beginning of that turn alone."""
    tokenizer = make_tokenizer(families.RESULT_IN_TURN)
    with pytest.raises(DataError, match=r"cannot be masked: .* renders the turns before answer 4 differently"):
        encode(tokenizer, BESIDE, tools=[{"name": "tip"}])
    (example,) = encode(tokenizer, BESIDE[:2], tools=[{"name": "tip"}])
    (run,) = trained_runs(tokenizer, example)
    assert run.endswith("[INST]Let me see.<|end|>")


def test_text_beside_calls_is_left_out_where_a_result_may_not_follow_text() -> None:
    """Kept as text, the calls would be none for the template, and it would refuse their results."""
    tokenizer = make_tokenizer(families.RESULT_AFTER_CALLS)
    chat = ChatTemplate(tokenizer)
    ((example,),) = chat.encode(conversations(BESIDE, tools=[{"name": "tip"}]), "assistant")
    call, answer = trained_runs(tokenizer, example)
    assert call.startswith('<call>tip{"city": "Oslo"')
    assert answer == "The lazy dog.<|end|>"
    assert chat.notes == ["the chat template leaves out text of answers (1 record)"]


def test_a_template_that_ends_answers_with_nothing_gets_the_eos() -> None:
    """As Alpaca's and Falcon's: a model would never learn to stop."""
    tokenizer = make_tokenizer(families.PLAIN_TEXT)
    chat = ChatTemplate(tokenizer)
    (examples,) = chat.encode(conversations(TALK), "assistant")
    assert [run for one in examples for run in trained_runs(tokenizer, one)] == [
        " Fine, thank you.\n</s>",
        " The lazy dog. ünïcödé 🦊\n</s>",
    ]
    assert tokenizer.decode(examples[1].ids).count("</s>") == 1  # earlier answers stay as the model will see them
    assert chat.notes == ["answers end with </s>, since the chat template writes nothing that ends them"]
    assert chat.end_tokens == (tokenizer.eos_token_id,)


def test_a_template_that_begins_a_next_answer_behind_every_text_is_refused() -> None:
    """What it begins would be trained as part of the last answer."""
    always = families.CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    with pytest.raises(DataError, match="begins a next answer behind every text, asked or not"):
        encode(make_tokenizer(always), TALK)
    (everything,) = encode(make_tokenizer(always), TALK, "all")
    assert everything.target_tokens == len(everything.ids) - 1


def test_a_template_for_tools_alone_is_used_with_tools() -> None:
    """Hermes' tool_use takes no conversation without."""
    tokenizer = make_tokenizer(families.TOOLS.replace("{% if tools %}", "{% if tools | length >= 0 %}"))
    (example,) = encode(tokenizer, CALLING, tools=[{"name": "tip"}])
    assert trained_runs(tokenizer, example)[1] == "In Oslo 12, in Bergen 2.5.<|end|>"
    assert trained_runs(tokenizer, example)[0].startswith('<call>tip{"city": "Oslo", ')
    with pytest.raises(DataError, match="is refused by the chat template"):
        encode(tokenizer, TALK)


def test_a_block_that_leaves_out_the_end_of_calls_is_told() -> None:
    """As a training template of Gemma's does; the model may know that end from before."""
    call = "{{ '<call>' + call.function.name + (call.function.arguments | tojson) + '</s>' }}"
    block = call.replace("{{ ", "{% generation %}{{ ").replace(
        "'</s>' }}", "'[/INST]' }}{% endgeneration %}{{ '</s>' }}"
    )
    assert call in families.CALL_ENDS
    chat = ChatTemplate(make_tokenizer(families.CALL_ENDS.replace(call, block)))
    chat.encode(conversations(CALLING[:2], tools=[{"name": "tip"}]), "assistant")
    assert "the chat template leaves </s>, which ends function calls, untrained (1 record)" in chat.notes


def test_less_white_space_behind_the_last_result_is_no_other_prompt() -> None:
    """As in Hermes' tool_use; a system text that moves would be another prompt, and is made one example an answer."""
    template = families.TOOLS.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% if message['role'] == 'tool' %}{{ '</r>' if loop.last else '</r>\n' }}{% endif %}",
    )
    tokenizer = make_tokenizer(template)
    examples = encode(tokenizer, CALLING, tools=[{"name": "tip"}])
    assert [run for one in examples for run in trained_runs(tokenizer, one)][-1] == "In Oslo 12, in Bergen 2.5.<|end|>"
    assert tokenizer.decode(examples[-1].ids).endswith(
        "</r><|end|>\n<|start|>assistant\nIn Oslo 12, in Bergen 2.5.<|end|>\n"
    )


def test_an_end_that_reasoning_shares_is_told_where_there_is_reasoning() -> None:
    """As Solar Open's <|end|>: no stop token can tell the two apart."""
    template = families.CHATML.replace(
        "{% for message in messages %}",
        "{% for message in messages %}{% if message.reasoning %}{{ '<|start|>think\n' + message.reasoning + '<|end|>\n' }}{% endif %}",
    )
    chat = ChatTemplate(make_tokenizer(template))
    told = "<|end|> ends the reasoning as well as the answer, so that generation stops behind the reasoning"
    chat.encode(conversations(TALK), "assistant")
    assert not [note for note in chat.notes if told in note]
    chat.encode(conversations([TALK[0], {**TALK[1], "reasoning_content": "Well."}]), "assistant")
    assert f"{told} (1 record)" in chat.notes


def test_reasoning_that_goes_with_the_text_beside_calls_is_told_once() -> None:
    chat = ChatTemplate(make_tokenizer(families.RESULT_AFTER_CALLS))
    talk = [BESIDE[0], {**BESIDE[1], "content": "", "reasoning_content": "Well."}]
    chat.encode(conversations(talk, tools=[{"name": "tip"}]), "assistant")
    assert chat.notes == ["the chat template leaves out reasoning of answers (1 record)"]


def test_answers_stop_at_the_ends_of_every_named_template() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {
        "default": families.CHATML,
        "tool_use": families.TWO_ENDS.replace("<|end|></s>", "[INST]"),
    }
    ends = tokenizer.convert_ids_to_tokens(ChatTemplate(tokenizer).end_tokens)
    assert ends == ["<|end|>", "[INST]"]


def _user(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


@pytest.mark.parametrize(
    ("name", "turns", "told"),
    [
        ("FORGETFUL", [_user("Quick fox"), *TALK[:2]], "a user's turn"),
        ("FORGETFUL", [_user("Hello there"), *TALK[:2]], "a user's turn"),  # the same words twice, and one is left
        ("FORGETFUL", [*TALK[:2], {**SYSTEM, "content": "Be brief"}, *TALK[2:]], "a system text"),
        ("CHATML", [_user("Hello there", name="Fox"), *TALK[1:2]], "the name of who speaks"),
        ("CHATML", [_user("Hello there"), {**TALK[1], "name": "Dog"}], "the name of who speaks"),
        ("FORGETFUL", [SYSTEM, *TALK], None),
        ("CHATML", [_user("Hi"), {**TALK[1], "content": "Hi"}, _user("Hi"), *TALK[1:2]], None),
    ],
)
def test_what_others_say_is_looked_for_after_rendering(
    name: str, turns: list[dict[str, Any]], told: str | None
) -> None:
    tokenizer = make_tokenizer(getattr(families, name))
    chat = ChatTemplate(tokenizer, dropped_content="drop")
    chat.encode(conversations(turns, TALK, turns), "assistant")
    assert chat.notes == ([f"the chat template leaves out {told} (2 records)"] if told else [])
    if told:
        with pytest.raises(DataError, match=f"^Line 1 of 'a.jsonl' has {told}, which the chat template"):
            ChatTemplate(tokenizer, dropped_content="refuse").encode(conversations(turns), "assistant")


@pytest.mark.parametrize("template", [families.FORGETFUL, families.LAST_SYSTEM])
def test_a_later_system_text_is_kept_in_the_next_user_turn(template: str) -> None:
    turns = [SYSTEM, *TALK[:2], {**SYSTEM, "content": "Be brief"}, *TALK[2:]]
    tokenizer = make_tokenizer(template)
    chat = ChatTemplate(tokenizer)
    ((example,),) = chat.encode(conversations(turns), "assistant")
    assert "<|start|>user\nBe brief\n\nAnd you? 日本<|end|>" in tokenizer.decode(example.ids)
    assert "You are helpful" in tokenizer.decode(example.ids)
    assert len(trained_runs(tokenizer, example)) == 2
    assert chat.notes == [
        "a later system text stands in a user turn, since the chat template has no place for it (1 record)"
    ]


@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_a_result_that_the_template_leaves_out_is_kept_in_a_user_turn(keep: str) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    talk = [
        *TALK[:1],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        *({"role": "tool", "content": "twelve"}, TALK[1]),
    ]
    chat = ChatTemplate(make_tokenizer(families.NO_RESULTS), dropped_content=keep)
    ((example,),) = chat.encode(conversations(talk, tools=[{"name": "f"}]), "assistant")
    assert "<|start|>user\ntwelve<|end|>" in chat.tokenizer.decode(example.ids)
    assert chat.notes == ["results of functions stand in user turns, since the chat template has no tool turn"]


@pytest.mark.parametrize(
    ("asked", "said", "told"),
    [
        ("<|start|>user\nHello", "Fine", True),  # the template writes it, and the tokenizer does not call it special
        ("Hello", "Fine<|eot_id|>", True),  # another family's
        ("Hello", "Fine. <think>", False),
        ("<s>user\nHello", "Fine", True),
        ("[INST] Hello [/INST]", "Fine", True),
        ("<|im_start|>user\nHello", "Fine", True),
        ("Hello", "Fine</s>", False),  # stands once, and that is told
        ("Hello", "Fine</s>.", True),
    ],
)
def test_marks_of_a_template_inside_turns_are_told(asked: str, said: str, told: bool) -> None:
    chat = ChatTemplate(make_tokenizer())
    chat.encode(
        conversations(
            [_user("Hi"), {"role": "assistant", "content": "Yo"}, _user(asked), {**TALK[1], "content": said}]
        ),
        "all",
    )
    assert (
        any(note.startswith("turns hold special tokens, or other marks of a chat template") for note in chat.notes)
        == told
    )


def test_a_template_that_writes_no_answer_is_refused() -> None:
    other = families.CHATML.replace("in messages", "in other_messages")
    with pytest.raises(
        DataError, match=r"The chat template \(the tokenizer's own\) writes nothing of what the assistant says; give"
    ):
        ChatTemplate(make_tokenizer(other))
