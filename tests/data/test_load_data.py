"""The whole pipeline: files in, rows and an honest report out."""

from __future__ import annotations

import gzip
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy
import pytest
from datasets import Dataset
from rich.console import Console

from qlora.data.load import Data, load_data
from qlora.errors import DataError
from qlora.model.loss import IGNORE_INDEX
from qlora.recipe import DataSection
from tests.data import conftest as families
from tests.data.conftest import LINES, make_tokenizer

PAIRS = [{"prompt": f"What is number {n}?", "completion": "It is " + "so " * (n % 7) + f"{n}."} for n in range(40)]


def load(path: str, tokenizer: Any, seed: int = 0, **fields: Any) -> Data:
    return load_data(DataSection(train=path, **{"max_length": 128, **fields}), tokenizer, seed)


def test_packed_and_unpacked_hold_the_same_tokens_and_targets(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", PAIRS)
    packed, alone = load(path, tokenizer), load(path, tokenizer, packing=False)
    assert len(packed.train) < len(alone.train) == 40
    assert packed.report.train.tokens == alone.report.train.tokens
    assert packed.report.train.target_tokens == alone.report.train.target_tokens
    by_example = {row.examples[0]: row for row in alone.train}
    for row in packed.train:
        for index, (begin, end) in zip(row.examples, row.spans(), strict=True):
            assert row.ids[begin:end].tolist() == by_example[index].ids.tolist()
            assert row.labels[begin:end].tolist() == by_example[index].labels.tolist()
        assert row.labels[row.positions == 0].tolist() == [IGNORE_INDEX] * len(row.examples)


def test_the_held_out_part_is_drawn_by_seed_and_shares_no_record(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", PAIRS)
    one, same, other = (load(path, tokenizer, seed, held_out_fraction=0.1) for seed in (0, 0, 1))
    assert one.report.held_out.records == 4
    assert one.report.train.records == 36
    assert one.fingerprint == same.fingerprint != other.fingerprint
    shown = [str(one.preview(index)).split("\n", 1)[1] for index in range(36)]
    held = [prompt.text for prompt in one.held_out_prompts(4)]
    assert len(set(held)) == 4
    assert not any(question in text for question in held for text in shown)
    assert load(path, tokenizer).held_out_prompts(3) == []
    with pytest.raises(DataError, match=r"held_out_fraction=0.9 of 1 record leaves none to train on"):
        load(path, tokenizer, limit=1, held_out_fraction=0.9)


def test_a_held_out_file_is_never_trained_on_and_read_in_the_same_form(write: Any, tokenizer: Any) -> None:
    path, held = write("a.jsonl", PAIRS), write("h.jsonl", PAIRS[:5])
    data = load(path, tokenizer, held_out=held, limit=10)
    assert (data.report.train.records, data.report.held_out.records) == (10, 5)
    with pytest.raises(DataError, match=r"Line 1 of '.*t.jsonl' lacks prompt, completion|has the form text"):
        load(path, tokenizer, held_out=write("t.jsonl", [{"text": "a"}]))


def test_held_out_prompts_end_in_the_generation_prompt_and_are_spread(write: Any, tokenizer: Any) -> None:
    data = load(write("a.jsonl", PAIRS), tokenizer, held_out=write("h.jsonl", PAIRS))
    prompts = data.held_out_prompts(4)
    assert [prompt.text for prompt in prompts] == [PAIRS[n]["prompt"] for n in (0, 10, 20, 30)]
    assert prompts[1].answer == PAIRS[10]["completion"]
    assert tokenizer.decode(prompts[1].ids).endswith("What is number 10?<|end|>\n<|start|>assistant\n")
    assert len(data.held_out_prompts(100)) == 40


def test_a_prompt_longer_than_every_held_out_example_is_passed_over(write: Any, tokenizer: Any) -> None:
    """The row of a dropped record is not there to be checked against the model's positions, so its question is not asked."""
    long = {"prompt": "What " * 12, "completion": "Yes " * 60}
    held = write("h.jsonl", [*PAIRS[:3], long])
    data = load(write("a.jsonl", PAIRS), tokenizer, held_out=held, max_length=64, too_long="drop")
    assert data.report.held_out.dropped == 1
    assert data.template is not None
    _, asked, _ = data.template.prompt(data.held_out_conversations[3])
    assert len(asked) < 64
    assert [prompt.text for prompt in data.held_out_prompts(4)] == [pair["prompt"] for pair in PAIRS[:3]]


def test_raw_text_is_split_not_cut_and_prompts_with_its_beginning(write: Any, tokenizer: Any) -> None:
    text = " ".join(LINES * 5)
    data = load(write("a.txt", text), tokenizer, max_length=16, held_out=write("h.txt", text))
    assert data.report.form == "text"
    rows = sorted(data.train, key=lambda row: row.examples)
    ids = {
        index: row.ids[begin:end] for row in rows for index, (begin, end) in zip(row.examples, row.spans(), strict=True)
    }
    assert tokenizer.decode(numpy.concatenate([ids[index] for index in sorted(ids)])) == text + "</s>"
    assert data.report.train.losses() == []
    assert data.report.train.target_tokens == data.report.train.tokens - data.report.train.examples
    with pytest.raises(DataError, match="raw text without turns"):
        load(write("b.txt", text), tokenizer, train_on="assistant")
    (prompt,) = load(write("c.txt", text), tokenizer, held_out=write("h.txt", text)).held_out_prompts(1)
    assert text.startswith(prompt.text + prompt.answer)


def test_what_is_lost_is_counted_in_tokens_and_shown(write: Any, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo " * 60}]
    rows = [
        {"messages": [turns[0], {"role": "assistant", "content": "Yo"}, {"role": "user", "content": "Bye"}]},
        {"messages": turns},
        {"messages": [{"role": "user", "content": "Hi " * 90}, {"role": "assistant", "content": "Yo"}]},
        {"messages": [turns[0]]},
    ]
    whole = load(write("a.jsonl", rows), tokenizer, max_length=4096).report.train
    report = load(write("a.jsonl", rows), tokenizer, max_length=64).report
    counts = report.train
    assert (counts.truncated, counts.dropped, counts.skipped, counts.unanswered_turns) == (1, 1, 1, 2)
    assert counts.tokens + counts.truncated_tokens + counts.dropped_tokens == whole.tokens
    assert counts.unanswered_tokens == sum(len(tokenizer(text)["input_ids"]) for text in ("Bye", "Hi"))
    for phrase in (
        "1 example truncated",
        "1 example dropped",
        "1 record skipped",
        "2 turns after the last answer to train left off",
    ):
        assert phrase in str(report)
    assert report.as_dict()["train"]["dropped_tokens"] == counts.dropped_tokens
    dropped = load(write("a.jsonl", rows), tokenizer, max_length=64, too_long="drop").report.train
    assert (dropped.truncated, dropped.dropped) == (0, 2)


def test_repr_says_how_much_there_is(write: Any, tokenizer: Any) -> None:
    data = load(write("a.jsonl", PAIRS), tokenizer, held_out_fraction=0.1)
    train, held = data.report.train, data.report.held_out
    assert repr(data) == (
        f"Data(prompt_completion: 36 examples in {len(data.train)} rows of at most 128 tokens, {train.target_tokens:,} target "
        f"tokens; 4 examples in {held.rows} rows held out)"
    )
    assert "; nothing held out)" in repr(load(write("a.jsonl", PAIRS), tokenizer))


def test_nothing_to_train_on_is_refused(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", PAIRS)
    with pytest.raises(
        DataError, match=r"All 40 examples are too long .* than data.max_length=8: 64 would keep them all"
    ):
        load(path, tokenizer, max_length=8, too_long="drop")
    with pytest.raises(DataError, match=r"No token of the data carries loss \(40 examples dropped"):
        load(path, tokenizer, max_length=8)
    with pytest.raises(
        DataError, match=r"No token of the data carries loss \(1 record skipped.*\); look at the records' answers\.$"
    ):
        load(write("b.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}]), tokenizer)
    with pytest.raises(DataError, match="None of the 1 held-out record leaves a token"):
        load(path, tokenizer, held_out=write("b.jsonl", [{"prompt": "Hi " * 99, "completion": "Yo"}]))


@pytest.mark.parametrize(
    ("record", "fields", "ids"),
    [
        ({"text": "<s>Hello there"}, {}, "<s>Hello there</s>"),
        ({"text": "<s> <s>Hello there</s></s>\n"}, {}, "<s>Hello there</s>"),
        ({"prompt": "Hi", "completion": "Fine.<|end|>"}, {"template": "CHATML"}, None),
        ({"prompt": "Hi", "completion": "Fine.<|end|></s>\n"}, {"template": "CHATML"}, None),
        ({"prompt": "Hi", "completion": "Fine.</s>"}, {"template": None}, None),
        ({"prompt": "<s>Hi", "completion": "Fine.<|end|>"}, {"template": "DEEPSEEK"}, None),
        ({"prompt": "Hi", "completion": "Fine.</s>"}, {"template": "EOS_LAST"}, None),
    ],
)
def test_tokens_at_the_ends_are_not_doubled(write: Any, record: Any, fields: Any, ids: str | None) -> None:
    """A record that holds them gives the very tokens that one without them gives, and the report says so."""
    template = fields.get("template")
    tokenizer = make_tokenizer(template and getattr(families, template), adds_bos=True)
    plain = [{"text": "Hello there"}, {"prompt": "Hi", "completion": "Fine."}]["prompt" in record]
    data, other = (load(write("a.jsonl", [plain, one]), tokenizer, packing=False) for one in (record, plain))
    assert [row.ids.tolist() for row in data.train] == [row.ids.tolist() for row in other.train]
    assert data.report.notes == ("1 record with a token at an end that is written there anyway; it stands there once",)
    assert other.report.notes == ()
    if ids:
        assert tokenizer.decode(data.train[0].ids) == ids


def test_training_on_every_token_of_a_chat_is_refused_unless_asked_for(write: Any) -> None:
    everything = "{% generation %}" + families.CHATML + "{% endgeneration %}"
    everything = everything.replace("<|end|>\n' }}{% endfor %}", "<|end|>' }}{% endfor %}")
    tokenizer = make_tokenizer(everything)
    path = write("a.jsonl", PAIRS)
    with pytest.raises(DataError, match="Every token of this prompt_completion data would be trained"):
        load(path, tokenizer)
    data = load(path, tokenizer, train_on="all")
    assert data.report.train.target_tokens == data.report.train.tokens - data.report.train.examples


def test_the_fingerprint_changes_with_a_token_a_label_or_the_packing(write: Any, tokenizer: Any) -> None:
    path = write("a.jsonl", PAIRS)
    prints = [
        load(path, tokenizer).fingerprint,
        load(path, tokenizer, train_on="all").fingerprint,
        load(path, tokenizer, packing=False).fingerprint,
        load(write("b.jsonl", [*PAIRS[:-1], {**PAIRS[-1], "completion": "Else"}]), tokenizer).fingerprint,
    ]
    assert len(set(prints)) == 4
    assert prints[0] == load(path, make_tokenizer()).fingerprint


def test_the_preview_shows_special_tokens_and_marks_what_is_trained(write: Any, tokenizer: Any) -> None:
    pair = {"prompt": "[bold]Hi[/bold] \x1b[31m", "completion": "日本 [red]"}
    preview = load(write("a.jsonl", [pair]), tokenizer).preview(0)
    expected = "<|start|>user\n[bold]Hi[/bold] \\x1b[31m<|end|>\n<|start|>assistant\n⟦日本 [red]<|end|>⟧\n"
    title, body = str(preview).split("\n", 1)
    assert body == expected == repr(preview).split("\n", 1)[1]
    assert title.startswith("prompt_completion example 0 of 1, in row 0: ")
    screen = io.StringIO()
    Console(file=screen, width=200, force_terminal=True, color_system="standard").print(preview)
    assert "[bold]Hi[/bold]" in screen.getvalue()  # markup in the data is text
    assert "\x1b[1;32m日本 [red]<|end|>" in screen.getvalue()
    with pytest.raises(DataError, match="no example 1; the training data has 1"):
        load(write("a.jsonl", [pair]), tokenizer).preview(1)


def test_the_tokenizer_is_left_as_it_is(write: Any) -> None:
    tokenizer = make_tokenizer(None)
    load(write("a.jsonl", PAIRS), tokenizer)
    assert tokenizer.chat_template is None
    assert tokenizer.get_vocab() == make_tokenizer(None).get_vocab()


@pytest.mark.parametrize("packing", [True, False])
def test_virtual_tokens_take_room_and_nothing_else(write: Any, tokenizer: Any, packing: bool) -> None:
    """Rows with them keep to max_length; texts are cut earlier; what is counted, shown and fingerprinted is the data."""
    path = write("a.jsonl", PAIRS)

    def loaded(max_length: int, virtual_tokens: int) -> Data:
        section = DataSection(train=path, held_out=path, max_length=max_length, packing=packing)
        return load_data(section, tokenizer, 0, virtual_tokens)

    plain, behind = loaded(64, 0), loaded(64, 24)
    assert max(len(row.behind_virtual_tokens(24).ids) for row in behind.train) <= 64
    assert max(len(row.ids) for row in behind.held_out if len(row.examples) == 1) <= 40
    assert behind.report.train.truncated > plain.report.train.truncated
    shown = [str(data.preview(0)).split("\n", 1)[1] for data in (behind, loaded(40, 0))]
    assert shown[0] == shown[1]
    lengths = [len(prompt.ids) for prompt in plain.held_out_prompts(40)]
    fitting = loaded(64, 64 - max(lengths)).held_out_prompts(40)  # the longest question would leave no room
    assert 0 < len(fitting) == sum(length < max(lengths) for length in lengths) < len(lengths)
    same = loaded(64 + 24, 24)  # room for the same examples
    if not packing:
        assert same.fingerprint == plain.fingerprint
    assert same.report.train.tokens == plain.report.train.tokens


def test_a_row_without_room_beside_the_virtual_tokens_is_refused(write: Any, tokenizer: Any) -> None:
    section = DataSection(train=write("a.jsonl", PAIRS), max_length=32)
    with pytest.raises(DataError, match=r"max_length=32 leaves no room .* 31 virtual tokens"):
        load_data(section, tokenizer, 0, 31)
    text = DataSection(train=write("a.txt", " ".join(LINES * 5)), max_length=32)
    data = load_data(text, tokenizer, 0, 30)
    assert max(len(row.ids) for row in data.train if len(row.examples) == 1) == 2


def test_a_folder_is_fingerprinted_with_its_files(write: Any, tmp_path: Path, tokenizer: Any) -> None:
    """Every file, packed ones by the bytes on the disk; and the folder, by which files it holds."""
    write("a.jsonl", PAIRS)
    write("b.jsonl.gz", gzip.compress(b'{"prompt": "Hi", "completion": "Yo"}'))
    data = load(str(tmp_path), tokenizer)
    folder, first, packed = data.files
    assert [one.name for one in data.files] == [str(tmp_path), f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl.gz"]
    assert packed.sha256 == hashlib.sha256((tmp_path / "b.jsonl.gz").read_bytes()).hexdigest()
    assert not any(one.change() for one in data.files)
    write("b.jsonl.gz", gzip.compress(b'{"prompt": "Hi", "completion": "No"}'))
    assert [one.change() for one in data.files] == [None, None, "has other content"]
    write("c.jsonl", PAIRS)
    assert folder.change() == "has other files"
    assert first.change() is None
    assert load(str(tmp_path), tokenizer).files[0].sha256 != folder.sha256


def test_a_folder_does_not_hold_what_is_held_out(write: Any, tmp_path: Path, tokenizer: Any) -> None:
    write("a.jsonl", PAIRS)
    b = write("b.jsonl", PAIRS)
    for train, held_out in ((str(tmp_path), b), (b, f"{tmp_path}/*.jsonl")):
        with pytest.raises(
            DataError, match=r"Both data.train and data.held_out hold .*b.jsonl; name the files of each"
        ):
            load(train, tokenizer, held_out=held_out)
    assert load(f"{tmp_path}/a*", tokenizer, held_out=b).held_out


def test_what_was_not_read_is_in_the_report(write: Any, tokenizer: Any) -> None:
    """Of the training data once, also where a part of it is held out; of a held-out file of its own beside it."""
    rows = [{**pair, "id": n} for n, pair in enumerate(PAIRS)]
    note = "fields that are not read: 'id' (40 records)"
    path = write("a.jsonl", rows)
    for data in (load(path, tokenizer), load(path, tokenizer, held_out_fraction=0.1)):
        assert data.report.notes == (note,)
        assert f"note: {note}" in str(data.report)
    bad = [*({**row, "prompt": f"Also: {row['prompt']}"} for row in rows), {"prompt": "Hi", "completion": ""}]
    data = load(path, tokenizer, held_out=write("h.jsonl", bad), on_bad_record="skip")
    skipped = "held-out data: data.on_bad_record=skip left out 1 of 41 records: has an empty 'completion' (1)"
    assert data.report.as_dict()["notes"] == [note, skipped, f"held-out data: {note}"]


def test_marked_answers_and_train_on_all_contradict(write: Any, tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "weight": 0}]
    path = write("a.jsonl", [{"messages": [*turns, turns[0], {"role": "assistant", "content": "Yes"}]}])
    assert "⟦Yes<|end|>⟧" in str(load(path, tokenizer).preview(0))
    with pytest.raises(DataError, match=r"data.train_on is 'all', but line 1 of .* marked not to be trained"):
        load(path, tokenizer, train_on="all")


def test_nulls_that_are_left_out_are_told(tmp_path: Path, tokenizer: Any) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "add", "arguments": {"a": 1}}]
    talks = [
        [
            {"role": "user", "content": "Hi", "tool_calls": None},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        ]
        for call in calls
    ]
    Dataset.from_list([{"messages": talk} for talk in talks]).to_parquet(tmp_path / "a.parquet")
    assert (
        "nulls that a table filled in are left out of 2 records"
        in load(str(tmp_path / "a.parquet"), tokenizer).report.notes
    )


PICKY = (
    "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('It is bad') }}{% endif %}" + families.CHATML
)  # fmt: skip


def test_a_record_that_the_template_refuses_is_one_bad_record(write: Any) -> None:
    """Not the end of all: it is left out with the others of its kind, and the rest is what it would be without it."""
    tokenizer = make_tokenizer(PICKY)
    bad, marked = {"prompt": "bad", "completion": "Yes."}, "<|end|> Yes.<|end|>"
    good = [*PAIRS[:-1], {"prompt": "Doubled?", "completion": f"Yes.{marked}"}]
    rows = [*good[:7], bad, *good[7:]]
    path = write("a.jsonl", rows)
    with pytest.raises(
        DataError,
        match=r"^Line 8 of '.*a.jsonl' is refused by the chat template .*: It is bad\. Mend it, or set .*=skip",
    ):
        load(path, tokenizer)
    data, plain = load(path, tokenizer, on_bad_record="skip"), load(write("g.jsonl", good), tokenizer)
    assert data.fingerprint == plain.fingerprint
    skipped = "data.on_bad_record=skip left out 1 of 41 records: is refused by the chat template (1)"
    assert data.report.notes == (skipped, *plain.report.notes)
    marks, doubled = plain.report.notes  # each counted once, though tried twice
    assert "1 record with a token at an end" in doubled
    assert marks.endswith("already (1 record)")
    held = load(write("g.jsonl", good), tokenizer, held_out=path, on_bad_record="skip")
    assert held.report.notes[0] == f"held-out data: {skipped}"
    assert len(held.held_out_prompts(100)) == len(held.held_out_conversations) == held.report.held_out.records == 40
    with pytest.raises(
        DataError,
        match=r"Line 1 of .* \(and line 2, .*, line 5\) is refused .* In all, 20 of 60 records have mistakes: is refused by",
    ):
        load(write("m.jsonl", [bad] * 20 + good), tokenizer)
    with pytest.raises(DataError, match=r"skip leaves out at most 10% of the records"):
        load(write("m.jsonl", [bad] * 20 + good), tokenizer, on_bad_record="skip")


@pytest.mark.parametrize(
    ("name", "lines", "bad", "kinds"),
    [
        ("a.jsonl", [f'{{"prompt": "Q{n}", "completion": "A{n}"}}' for n in range(40)], ['{"prompt": "Q', "[1]"],
         "has broken JSON (1), is a list (1)"),
        ("a.json", ["[", *(f'{{"prompt": "Q{n}", "completion": "A{n}"}},' for n in range(40)), '{"prompt": "Q", "completion": "A"}]'],
         ["3,", "[3],"], "is a number (1), is a list (1)"),
        ("a.csv", ["prompt,completion", *(f"Q{n},A{n}" for n in range(40))], ["Q,A,", "Q"],
         "has 3 fields where the header has 2 (1), has 1 field where the header has 2 (1)"),
    ],
)  # fmt: skip
def test_lines_that_are_no_records_are_bad_records(
    write: Any, tokenizer: Any, tmp_path: Path, name: str, lines: list[str], bad: list[str], kinds: str
) -> None:
    whole, broken = tmp_path / name, tmp_path / f"broken-{name}"
    whole.write_text("\n".join(lines), encoding="utf-8")
    broken.write_text("\n".join([*lines[:9], *bad, *lines[9:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"(Line|Record|Row) \d+ of .* In all, 2 of 4. records have mistakes: "):
        load(str(broken), tokenizer)
    data = load(str(broken), tokenizer, on_bad_record="skip")
    assert data.fingerprint == load(str(whole), tokenizer).fingerprint
    (note,) = data.report.notes
    assert note.startswith("data.on_bad_record=skip left out 2 of 4")
    assert note.endswith(f" records: {kinds}")


RIVALS = [
    {"prompt": f"What is number {n}?", "chosen": "It is " + "so " * (n % 7) + f"{n}.", "rejected": "No " * (1 + n % 5)}
    for n in range(20)
]


@pytest.mark.parametrize("packing", [True, False])
def test_the_sides_of_a_pair_share_a_row_and_nothing_but_their_answers_count(
    write: Any, tokenizer: Any, packing: bool
) -> None:
    path = write("p.jsonl", RIVALS)
    section = DataSection(train=path, max_length=100, packing=packing, held_out_fraction=0.1)
    data = load_data(section, tokenizer, pairs=True)
    assert "18 records, 18 pairs in" in str(data.report)
    assert (len(data.train) == 18) is not packing
    shown = []
    for row in data.train:
        assert len(row.ids) <= 2 * 100
        assert row.apart is not packing
        spans = list(zip(row.examples, row.spans(), strict=True))
        for (chosen, (begin, end)), (rejected, (start, stop)) in zip(spans[::2], spans[1::2], strict=True):
            assert (chosen % 2, rejected) == (0, chosen + 1)
            asked = numpy.flatnonzero(row.labels[begin:end] != IGNORE_INDEX)[0]
            assert row.ids[begin : begin + asked].tolist() == row.ids[start : start + asked].tolist()
            said = [tokenizer.decode(labels[labels >= 0]) for labels in (row.labels[begin:end], row.labels[start:stop])]
            shown.append(said)
    texts = [[record[side] for side in ("chosen", "rejected")] for record in RIVALS]
    ends = [[text.strip() for text in pair] for pair in texts]
    assert all([text.replace("<|end|>", "").strip() for text in said] in ends for said in shown)
    assert "pair 0 of 18, rejected, in row" in str(data.preview(1))


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_a_pair_is_cut_alike_and_left_out_whole(write: Any, tokenizer: Any, too_long: str) -> None:
    """One pair whose chosen side is too long, one whose question alone fills a row, one that fits."""
    long = [
        {"prompt": "Hi", "chosen": "so " * 60, "rejected": "No"},
        {"prompt": "why " * 60, "chosen": "so", "rejected": "No"},
        {"prompt": "Hi", "chosen": "so", "rejected": "No"},
    ]
    section = DataSection(train=write("p.jsonl", long), max_length=32, packing=False, too_long=too_long)  # type: ignore[arg-type]
    data = load_data(section, tokenizer, pairs=True)
    counts = data.report.train
    assert counts.dropped == (2 if too_long == "truncate" else 4)
    assert (counts.truncated, counts.cut_answers) == ((1, 1) if too_long == "truncate" else (0, 0))
    sides = [[len(one.ids) for one in row.sequences()] for row in data.train]
    assert [max(side) <= 32 for side in sides] == [True] * len(sides)
    assert len(sides) == (2 if too_long == "truncate" else 1)
    with pytest.raises(DataError, match=r"data.train_on is 'all', but the objective compares the last answers"):
        load_data(section.model_copy(update={"train_on": "all"}), tokenizer, pairs=True)
