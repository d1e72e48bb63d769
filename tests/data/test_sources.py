"""Every file kind gives the same records, and every bad file a sentence that says where."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qlora.data.sources import read_records
from qlora.errors import DataError, DoesNotFitError

PAIRS = [{"prompt": "null", "completion": "007"}, {"prompt": 'b\u2028, "c"\nd', "completion": ""}]


def fields(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(*arguments, **options)]


def test_every_kind_of_file_gives_the_same_records(write: Any, tmp_path: Path) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(PAIRS[0]))
    writer.writeheader()
    writer.writerows(PAIRS)
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "a.parquet")
    lines = "\n\n".join(json.dumps(pair, ensure_ascii=False) for pair in PAIRS)
    for path in (
        write("a.jsonl", lines.encode()),
        write("bom.jsonl", b"\xef\xbb\xbf" + lines.encode()),
        write("a.json", json.dumps(PAIRS)),
        write("b.json", json.dumps({"data": PAIRS})),
        write("a.csv", table.getvalue().encode()),
        str(tmp_path / "a.parquet"),
    ):
        assert fields(path) == PAIRS, path
    assert fields(write("a.txt", "one\n\ntwo\n")) == [{"text": "one\n\ntwo\n"}]


def test_records_know_their_line_over_several_files_and_a_limit(write: Any) -> None:
    first, second = write("a.jsonl", '\n{"a": 1}\n\n{"a": 2}'), write("b.jsonl", '{"a": 3}\n{"a": 4}\n{broken')
    records = read_records((first, second), limit=4)  # the broken line is behind the limit
    assert [record.fields["a"] for record in records] == [1, 2, 3, 4]
    assert [record.place for record in records[1:3]] == [f"line 4 of '{first}'", f"line 1 of '{second}'"]
    assert len(read_records((first, "not there.jsonl"), limit=2)) == 2


BAD_FILES = [
    ("a.jsonl", "", "is empty"),
    ("a.jsonl", "\n \n", "is empty"),
    ("a.json", "", "is empty"),
    ("a.json", "[]", "is empty"),
    ("a.csv", "prompt,completion\n", "is empty"),
    ("a.txt", " \n", "is empty"),
    ("a.jsonl", b'{"a": 1}\n{"b": "caf\xe9"}\n', r"not UTF-8: byte 0xe9 at offset 19 \(line 2\)"),
    ("a.csv", b"a,b\n1,\xff\n", r"not UTF-8: byte 0xff at offset 6 \(line 2\)"),
    ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', r"broken JSON at line 3 \(.*\): \{\"a\": 2$"),
    ("a.json", '[{"a": 1},\n {"a" 2}]', r"broken JSON at line 2 \(.*\): \{\"a\" 2\}\]"),
    ("a.json", '{"a": 1}\n{"a": 2}', r"one JSON object a line; rename it to end in .jsonl"),
    ("a.json", '{"rows": []}', r"one JSON object with the fields rows; expected a list"),
    ("a.json", "3", r"holds a number \(3\); expected a list"),
    ("a.jsonl", '{"a": 1}\n["a"]\n', r"Line 2 of '.*' is a list; expected an object"),
    ("a.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", r"line 2 \(it has an integer of more than 4,300 digits\): {"),
    ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, r"broken JSON at line 2 \(it is nested too deeply\): \[\["),
    ("a.json", "[" + "9" * 5000 + "]", "cannot be read as JSON: it has an integer of more than 4,300 digits; expected"),
    ("a.json", "[" * 100_000, "cannot be read as JSON: it is nested too deeply; expected a list of plain records"),
    ("a.json", '[{"a": 1}, null]', r"Record 2 of '.*' is null; expected an object"),
    ("a.csv", "a,b\n1,2\n3,4,5\n", r"Row 2 of '.*' has 3 fields where the header has 2 \(a, b\)"),
    ("a.csv", ",".join(f"c{n}" for n in range(50_000)) + "\n1\n", "has 1 fields where the header has 50000"),
    ("a.csv", "text\n" + '"' + "x" * 2**20, "not valid CSV"),
    ("a.jsonl", '\0{"text": "a"}', "broken JSON at line 1"),
    ("a.csv", "a,a\n1,2\n", "names a column twice"),
    ("a.csv", 'a,b\n1,"2\n', r"not valid CSV after row 0"),
    ("a.parquet", b"PAR1 not really", r"a.parquet' cannot be read"),
    ("a.xlsx", b"x", r"ends in '.xlsx'; expected one of .jsonl, .json, .csv, .parquet, .txt"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), BAD_FILES)
def test_a_bad_file_is_refused_in_a_sentence(write: Any, name: str, content: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        read_records(write(name, content))
    assert len(str(caught.value)) < 4000


def test_a_missing_file_hints_at_its_neighbours(write: Any, tmp_path: Path) -> None:
    write("train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no data file '.*trian.jsonl'. Did you mean 'train.jsonl'\?"):
        read_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"Its folder holds train.jsonl"):
        read_records(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataError, match="does not exist either"):
        read_records(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(DataError, match=r"is a folder; expected a data file.*holds train.jsonl"):
        read_records(str(tmp_path))


def test_hub_data_sets_go_through_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, subset: str | None, split: str) -> Any:
        asked.append((name, subset, split))
        if name == "org/none":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/none' doesn't exist")
        if name == "org/far":
            raise ConnectionError("no route")
        if split == "tset":
            raise ValueError("Unknown split \"tset\". Should be one of ['train'].")
        return datasets.Dataset.from_list(PAIRS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read_records("org/name", "small", "train", limit=1)
    assert asked == [("org/name", "small", "train")]
    assert [record.fields for record in records] == PAIRS[:1]
    assert records[0].place == "row 1 of 'org/name'"
    with pytest.raises(DataError, match="'org/none' is neither a file here nor a data set on the hub"):
        read_records("org/none")
    with pytest.raises(DataError, match="the hub cannot be reached"):
        read_records("org/far")
    with pytest.raises(DataError, match=r"hub data set 'org/name' cannot be read: Unknown split \"tset\""):
        read_records("org/name", split="tset")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_not_the_datas_fault(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    import datasets

    full = OSError(number, os.strerror(number))

    def load(name: str, subset: str | None, split: str) -> Any:
        if name == "org/wrapped":
            raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from full
        if name == "org/rust":
            raise RuntimeError(f"Data processing error: (os error {number})")
        raise full

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("org/plain", "org/wrapped"):
        with pytest.raises(OSError) as caught:
            read_records(name)
        assert caught.value is full
    with pytest.raises(RuntimeError, match="os error"):  # the command line knows these words
        read_records("org/rust")


def test_a_download_that_cannot_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, subset: str | None, split: str) -> Any:
        if name == "org/large":
            raise OSError("Not enough disk space. Needed: 3.00 TiB (download: 1.00 TiB, generated: 2.00 TiB")
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DoesNotFitError, match=r"'org/large' does not fit on the disk \(.* 3.00 TiB\); make room"):
        read_records("org/large")
    with pytest.raises(DataError, match="'org/locked' cannot be read"):
        read_records("org/locked")


def test_local_files_never_touch_the_network(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a local file went to the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="no data file"):
        read_records("data/missing.jsonl")
    with pytest.raises(DataError, match="no data file"):
        read_records("./org/name")
    assert fields(write("a.jsonl", [{"a": 1}])) == [{"a": 1}]


@pytest.mark.parametrize("name", ["~nobody-has-this-name/a.jsonl", "~nobody-has-this-name"])
def test_a_home_that_nobody_has_is_no_file(name: str) -> None:
    with pytest.raises(DataError, match="There is no data file"):
        read_records(name)
