"""Every file kind gives the same records, and every bad file a sentence that says where."""

from __future__ import annotations

import bz2
import csv
import errno
import gzip
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qlora.data import files
from qlora.data.parsing import parse
from qlora.data.sources import not_read, read_records
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
    ("a.jsonl", '{"a": 1}\n\n{"a": 2\n', r"Line 3 of '.*' has broken JSON \(.*\): \{\"a\": 2\. .*Mend"),
    ("a.json", '[{"a": 1},\n {"a" 2}]', r"broken JSON at line 2 \(.*\); mend it: \{\"a\" 2\}\]"),
    ("a.json", '{"a": 1}\n{"a": 2\n', r"Line 2 of '.*' has broken JSON \(.*\): \{\"a\": 2\. .*Mend"),
    ("a.json", '[\n{"a": 1}\n]\n]', r"broken JSON at line 4 \(Extra data\); mend it: \]"),
    ("a.jsonl", '{"a": 1}\n{\n"a": 2\n}\n{', r"Line 2 of .* has broken JSON"),
    ("a.jsonl", '[{"a": 1},\n {"a" 2}]', r"broken JSON at line 2 \(.*\); mend it: \{\"a\" 2\}\]"),
    ("a.jsonl", '["a"]\n["b"]\n', r"Line 1 of '.*' \(and line 2\) is a list; expected an object"),
    ("a.json", '{"rows": [{}]}', r"one JSON object with the fields rows; expected a list .*; jq '\.\[\"rows\"\]' writes the list"),
    ("a.json", '{"input_ids": [3]}', r"one JSON object with the fields input_ids; expected a list .*\]\}\.$"),
    ("a.json", '{"rows": {}}', r"one JSON object with the fields rows; expected a list .*\.$"),
    ("a.json", "3", r"holds a number \(3\); expected a list"),
    ("a.jsonl", '{"a": 1}\n["a"]\n', r"Line 2 of '.*' is a list; expected an object"),
    ("a.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}", r"Line 2 .* \(it has an integer of more than 4,300 digits\): {"),
    ("a.jsonl", '{"a": 1}\n' + "[" * 100_000, r"Line 2 .* has broken JSON \(it is nested too deeply\): \[\["),
    ("a.json", "[" + "9" * 5000 + "]", "cannot be read as JSON: it has an integer of more than 4,300 digits; expected"),
    ("a.json", "[" * 100_000, "cannot be read as JSON: it is nested too deeply; expected a list of plain records"),
    ("a.json", '[{"a": 1}, null]', r"Record 2 of '.*' is null; expected an object"),
    ("a.csv", "a,b\n1,2\n3,4,5\n", r"Row 2 of '.*' has 3 fields where the header has 2 \(a, b\)"),
    ("a.csv", ",".join(f"c{n}" for n in range(50_000)) + "\n1\n", "has 1 field where the header has 50000"),
    ("a.csv", "text\n" + '"' + "x" * 2**20, "not valid CSV"),
    ("a.jsonl", '\0{"text": "a"}', r"Line 1 of .* has broken JSON"),
    ("a.csv", "a,a\n1,2\n", "names a column twice"),
    ("a.csv", 'a,b\n1,"2\n', r"not valid CSV after row 0"),
    ("a.parquet", b"not really", r"a.parquet' does not begin as a \.parquet file does; is it whole"),
    ("a.parquet", b"PAR1 cut", r"a.parquet' does not end as a \.parquet file does"),
    ("a.parquet", b"PAR1 not really PAR1", r"a.parquet' cannot be read"),
    ("a.json", '{"features": [{"name": "text"}], "rows": [{"row": {"text": "a long text"}}]}', r"jq '\.\[\"rows\"\]' writes"),
    ("a.csv", 'text\n"a \\"b\\" c"\n', "not valid CSV after row 0: .*; a quote inside a quoted field is written twice"),
    ("a.jsonl.gz", gzip.compress(gzip.compress(b"{}", mtime=0), mtime=0), r"is packed twice; unpack it once: gzip -dk .*a\.jsonl\.gz"),
    ("a.jsonl.zip", b"PK", r"ends in '.zip'; .* Unpack it: unzip .*a\.jsonl\.zip"),
    ("a.tar.gz", b"x", r"ends in '.gz'; .* Unpack it: tar -xzf .*a\.tar\.gz"),
    ("a.arrow", b"x", r"datasets\.Dataset\.from_file\(.* .*a\.arrow a\.parquet"),
    ("a.xlsx", b"x", r"ends in '.xlsx'; expected one of .jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet.* Save the table as CSV"),
    ("a.parquet.gz", b"x", r"ends in '.gz'; expected one of"),
    ("a.csv", "a;b\n1;2;3\n", r"has 3 fields where the header has 2 \(a, b\); quote fields that hold semicolons"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "sentence"), BAD_FILES)
def test_a_bad_file_is_refused_in_a_sentence(write: Any, name: str, content: Any, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        parse(read_records(write(name, content)), "text")
    assert len(str(caught.value)) < 4000


def test_a_missing_file_hints_at_its_neighbours(write: Any, tmp_path: Path) -> None:
    write("train.jsonl", "{}")
    with pytest.raises(DataError, match=r"no data file '.*trian.jsonl'. Did you mean 'train.jsonl'\?"):
        read_records(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match=r"Its folder holds train.jsonl"):
        read_records(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataError, match="does not exist either"):
        read_records(str(tmp_path / "nowhere" / "train.jsonl"))


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


CAFE = '{"text": "café"}\n{"text": "x €"}\n'


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(write: Any, encoding: str) -> None:
    assert fields(write("a.jsonl", CAFE.encode(encoding))) == [{"text": "café"}, {"text": "x €"}]


def test_utf_16_big_endian_has_a_mark_too(write: Any) -> None:
    assert fields(write("a.csv", b"\xfe\xff" + "text\ncafé\n".encode("utf-16-be"))) == [{"text": "café"}]


ENCODINGS = {
    "cp1252": ("Preis,5 € für „Öl“", "Windows-1252", "CP1252"),
    "latin-1": ("Où est le café déjà vu,là", "Windows-1252", "CP1252"),
    "mac_roman": ("Où est le café déjà vu,là", "Mac Roman", "MACINTOSH"),
    "cp1250": ("Zażółć gęślą jaźń,Dzień dobry", "Windows-1250", "CP1250"),
    "cp1251": ("Привет как дела,Всё в порядке", "Windows-1251", "CP1251"),
    "cp932": ("こんにちは世界、元気ですか,はい", "Shift-JIS", "CP932"),
    "euc_kr": ("안녕하세요 세계,네 그렇습니다", "EUC-KR", "CP949"),
    "gbk": ("你好，今天的天气怎么样,很好", "GBK", "GB18030"),
    "utf-16-le": ("ab,cd", "UTF-16LE", "UTF-16LE"),
    "utf-16-be": ("ab,cd", "UTF-16BE", "UTF-16BE"),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_another_encoding_is_named_with_the_command_that_converts_it(write: Any, encoding: str) -> None:
    """The command is run: what it writes is the text as it was."""
    text, name, code = ENCODINGS[encoding]
    path = write("my file.csv", f"a,b\n{text}\n".encode(encoding))
    with pytest.raises(DataError) as caught:
        read_records(path)
    sentence = str(caught.value)
    assert name in sentence
    assert encoding.startswith("utf") or f"line 2 reads “{text[:10]}" in sentence
    assert not Path(path).with_name("my file.utf8.csv").exists()
    if shutil.which("iconv"):
        command = sentence[sentence.index(f"iconv -f {code} ") :]
        subprocess.run(command, shell=True, check=True)
        assert fields(path.replace(".csv", ".utf8.csv")) == [dict(zip("ab", text.split(","), strict=True))]


NOT_TEXT = [
    (
        "a.jsonl",
        CAFE.encode() + b'{"text": "caf\xe9"}',
        r"line 3\); its other letters are UTF-8, so mend that place by hand",
    ),
    ("a.jsonl", CAFE.encode() * 9 + b'{"text": "\xc3', "it ends within a character: is it whole"),
    ("a.jsonl", CAFE.encode("utf-16")[:-1], "begins as UTF-16 does .* is it whole"),
    ("a.txt", b"\x89PNG\r\n\x1a\n\0\0\xff", "nor is it text of another encoding"),
    ("a.jsonl", gzip.compress(CAFE.encode(), mtime=0), "is a gzip file; rename it to end in .gz"),
    ("a.csv", b"PK\x03\x04\xff\xfe", "is a zip archive, as Excel's"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), NOT_TEXT)
def test_what_is_no_text_is_said(write: Any, name: str, content: bytes, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        read_records(write(name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.csv.gz", "a.parquet"])
def test_a_git_lfs_pointer_is_not_trained_on(write: Any, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
    with pytest.raises(DataError, match=rf"Git-LFS pointer.*git -C .* lfs pull --include '\*\*/{name}'"):
        read_records(write(name, pointer))


TABLES = [
    ("a.csv", "prompt;completion\na, b;c\n"),
    ("a.csv", "prompt\tcompletion\na, b\tc\n"),
    ("a.csv", "sep=;\r\nprompt;completion\r\na, b;c\r\n"),
    ("a.csv", 'prompt,completion\n"a, b",c\n'),
    ("a.csv", "prompt;completion\na, b;c\n".encode("utf-16")),
    ("a.tsv", "prompt\tcompletion\na, b\tc\n"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content"), TABLES)
def test_the_header_says_what_separates_the_columns(write: Any, name: str, content: Any) -> None:
    assert fields(write(name, content)) == [{"prompt": "a, b", "completion": "c"}]


def test_other_separators_stay_text(write: Any) -> None:
    assert fields(write("a.csv", 'a,"b;c;d"\n1;2;3,4\n')) == [{"a": "1;2;3", "b;c;d": "4"}]
    assert fields(write("a.csv", 'text\n"1;2"\n')) == [{"text": "1;2"}]
    assert fields(write("a.tsv", "a, b\tc\n1\t2\n")) == [{"a, b": "1", "c": "2"}]
    # as many commas in the header as semicolons, or more: what most rows have is what separates
    assert fields(write("a.csv", "a;b, c\n1, 2;3\n4;5\n")) == [{"a": "1, 2", "b, c": "3"}, {"a": "4", "b, c": "5"}]
    assert fields(write("a.csv", "a, b, c;d, e|f\n1;2\n")) == [{"a, b, c": "1", "d, e|f": "2"}]
    assert fields(write("a.csv", "a|b;c\n1;2|3\n4|5\n")) == [{"a": "1;2", "b;c": "3"}, {"a": "4", "b;c": "5"}]


def test_json_is_read_by_what_it_is(write: Any) -> None:
    lines, array = "".join(json.dumps(pair) + "\n" for pair in PAIRS), json.dumps(PAIRS, indent=1)
    for path in (write("a.jsonl", array), write("a.json", lines), write("a.ndjson", lines)):
        assert fields(path) == PAIRS
    assert read_records(write("a.json", lines))[1].place.startswith("line 2 of")


def zstd(content: bytes) -> bytes:
    import pyarrow

    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as stream:
        stream.write(content)
    return bytes(out.getvalue())


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd}


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_are_read_whole_or_not_at_all(write: Any, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = PACKERS[suffix](CAFE.encode())
    assert fields(write(f"a.jsonl{suffix}", packed)) == [{"text": "café"}, {"text": "x €"}]
    assert len(fields(write(f"a.jsonl{suffix}", packed + packed))) == 4  # two streams, as parallel packers write them
    assert fields(write(f"a.csv{suffix}", PACKERS[suffix](b"a,b\n1,2\n"))) == [{"a": "1", "b": "2"}]
    assert fields(write(f"a.json{suffix}", PACKERS[suffix](b'[{"a": 1}]'))) == [{"a": 1}]
    for broken in (packed[:-4], packed[:20]):
        with pytest.raises(DataError, match=r"cannot be unpacked \(.*\); is it whole"):
            read_records(write(f"a.jsonl{suffix}", broken))
    with pytest.raises(DataError, match=rf"does not begin as a {suffix} file does; is it whole"):
        read_records(write(f"a.jsonl{suffix}", CAFE.encode()))
    monkeypatch.setattr(files, "MAX_UNPACKED", 2**20)
    bomb = write(f"a.txt{suffix}", PACKERS[suffix](b"a" * 2**24))
    with pytest.raises(DataError, match=r"unpacks to more than [\d,]+ bytes; .* unpack it: \w+ -dk .*a.txt"):
        read_records(bomb)


def test_a_packed_file_of_another_encoding_is_converted_through_its_unpacker(write: Any) -> None:
    with pytest.raises(DataError, match=r"gzip -dc \S*a.csv.gz \| iconv -f CP1252 -t UTF-8 > \S*/a.utf8.csv$"):
        read_records(write("a.csv.gz", gzip.compress("a,b\nÖl,5 €\n".encode("cp1252"))))


def test_a_folder_or_pattern_stands_for_its_files_in_order(write: Any, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "c.jsonl"):
        write(name, "text\na\n" if name == "a.csv" else f'{{"text": "{name[0]}"}}\n')
    write("README.md", "# no data")
    write(".hidden.jsonl", "{broken")
    (tmp_path / "more").mkdir()
    write("more/d.jsonl", '{"text": "d"}\n\n{broken')
    records = read_records(str(tmp_path))
    assert [one.fields["text"] for one in records] == ["a", "b", "c"]
    assert records[1].place == f"line 1 of '{tmp_path}/b.jsonl'"
    assert [one["text"] for one in fields(f"{tmp_path}/*.jsonl")] == ["b", "c"]
    assert [one["text"] for one in fields((f"{tmp_path}/c.*", str(tmp_path)), limit=3)] == ["c", "a", "b"]
    assert [one.place for one in read_records(f"{tmp_path}/**/*.jsonl") if one.fault] == [
        f"line 3 of '{tmp_path}/more/d.jsonl'"
    ]
    with pytest.raises(DataError, match="No data file matches"):
        read_records(f"{tmp_path}/*.txt")
    write("[1].jsonl", '{"text": "brackets"}')
    assert fields(f"{tmp_path}/[1].jsonl") == [{"text": "brackets"}]


def test_a_folder_is_not_trained_on_with_its_test_set(write: Any, tmp_path: Path) -> None:
    write("train.jsonl", '{"text": "a"}')
    write("test-00000.jsonl", '{"text": "b"}')
    with pytest.raises(DataError, match=r"holds test-00000.jsonl beside other files \(train.jsonl\).*/train\*'"):
        read_records(str(tmp_path))
    assert fields(f"{tmp_path}/train*") == [{"text": "a"}]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"is a folder in which no file ends in .jsonl"):
        read_records(str(tmp_path / "empty"))


def call(name: str, arguments: Any, **fields: Any) -> dict[str, Any]:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    return {"messages": turns, **fields}


def arguments(path: Path) -> list[Any]:
    turns = [one["messages"][1] for one in fields(str(path))]
    return [turn["tool_calls"][0]["function"]["arguments"] for turn in turns]


FILLED = [{"city": "Oslo"}, {"a": 1, "b": {"c": 2}}, {"b": {"d": [{"e": 1}, {"f": 2}]}}, {}]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json"])
def test_nulls_that_arrow_filled_in_are_dropped(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    table = Dataset.from_list([call(f"f{n}", each) for n, each in enumerate(FILLED)])
    write_table(table, tmp_path / name)
    assert arguments(tmp_path / name) == FILLED
    assert fields(str(tmp_path / name))[0]["messages"][0] == {"role": "user", "content": "Hi"}  # and no tool_calls


def test_a_part_of_a_table_knows_the_others_keys(tmp_path: Path) -> None:
    from datasets import Dataset

    table = Dataset.from_list([call(f"f{n}", each) for n, each in enumerate(FILLED)])
    for number in range(len(FILLED)):
        table.select([number]).to_parquet(tmp_path / f"part-{number}.parquet")
    assert arguments(tmp_path) == FILLED


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_a_null_that_every_row_gives_stays(tmp_path: Path, name: str) -> None:
    from datasets import Dataset

    given = [{"city": "Oslo", "units": None}, {"city": "Rome", "units": None}]
    write_table(Dataset.from_list([call("weather", each) for each in given]), tmp_path / name)
    assert arguments(tmp_path / name) == given


@pytest.mark.parametrize("as_text", [True, False], ids=["tools as text", "tools as objects"])
def test_a_null_that_the_functions_schema_allows_stays(tmp_path: Path, as_text: bool) -> None:
    from datasets import Dataset

    def tool(name: str, **properties: Any) -> Any:
        return {"function": {"name": name, "parameters": {"type": "object", "properties": properties}}}

    nullable = {"type": "string", "nullable": True}
    tools = [tool("weather", city={"type": "string"}, units=nullable), tool("stop", why=nullable)]
    shown = json.dumps(tools) if as_text else tools
    given = [
        ("weather", {"city": "Oslo", "units": None}),
        ("weather", {"city": "Rome", "units": "C"}),
        ("stop", {"why": None}),
    ]
    Dataset.from_list([call(*each, tools=shown) for each in given]).to_parquet(tmp_path / "a.parquet")
    assert arguments(tmp_path / "a.parquet") == [each for _, each in given]
    assert as_text or fields(str(tmp_path / "a.parquet"))[0]["tools"] == tools


def test_a_null_that_people_wrote_stays(write: Any) -> None:
    """The turns of these lines have different keys, which no table has."""
    given = [{"city": "Oslo", "units": None}, {"city": "Rome", "units": "C"}]
    assert arguments(write("a.jsonl", [call("weather", each) for each in given])) == given


def write_table(table: Any, path: Path) -> None:
    if path.suffix == ".parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, lines=path.suffix == ".jsonl")


def test_what_a_file_holds_is_told_or_read(write: Any, tmp_path: Path) -> None:
    records = [{"prompt": "Hi", "completion": "Yo"}]
    (one,) = read_records(write("a.json", json.dumps({"data": records, "version": 1, "note": None})))
    assert (one.fields, one.beside) == (records[0], ("version",))
    assert [one.fields for one in read_records(write("b.txt", json.dumps(records, indent=1)))] == records
    for twice in ('{"prompt": "a", "prompt": "b"}', '{"c": {"x": 1, "x": 2}}'):
        (one,) = read_records(write("c.jsonl", twice))
        assert "twice in one object" in str(one.fault)
    with pytest.raises(DataError, match="a table by columns, which this writes by rows: python -c 'import pandas"):
        read_records(write("d.json", json.dumps({"prompt": {"0": "Hi"}, "completion": {"0": "Yo"}})))
    with pytest.raises(
        DataError, match=r"its values look like the records, each under an id: jq '\[.\[\]\]' writes them"
    ):
        read_records(write("d.json", json.dumps(dict.fromkeys(("q1", "q2"), records[0]))))
    (one, _) = read_records(write("e.jsonl", '{"prompt": "Hi"},\n{"prompt": "Hi"} \n'))
    assert "a comma follows the object" in str(one.fault)
    (one,) = read_records(write("e.jsonl", "{'prompt': 'Hi'}"))
    assert "it is as Python prints it, not JSON" in str(one.fault)
    (tmp_path / "more").mkdir()
    for name in ("more/a.txt", "more/b.pdf", "more/.c"):
        write(name, "Hi")
    assert not_read(str(tmp_path / "more")) == ["b.pdf"]


def test_records_without_names_and_over_several_lines(write: Any) -> None:
    """A line that is a list of turns, or a text; objects that are written over several lines; JSON lines named as text."""
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    assert fields(write("a.jsonl", "\n".join([json.dumps(talk)] * 2))) == [{"messages": talk}] * 2
    assert (
        fields(write("a.jsonl", json.dumps(talk)))
        == fields(write("a.json", json.dumps(talk, indent=1)))
        == [{"messages": talk}]
    )
    assert fields(write("a.json", json.dumps({"id": 3, "messages": talk}))) == [{"id": 3, "messages": talk}]
    assert fields(write("a.json", json.dumps(["Hi", "Yo"]))) == [{"text": "Hi"}, {"text": "Yo"}]
    spread = "\n\n".join(json.dumps({"text": f"\u2028{n}"}, indent=1, ensure_ascii=False) for n in range(3))
    for name in ("a.jsonl", "a.json"):
        records = read_records(write(name, "\n" + spread + "\n"))
        assert [one.fields for one in records] == [{"text": f"\u2028{n}"} for n in range(3)]
        assert [one.place for one in records] == [f"line {n} of '{records[0].source}'" for n in (2, 6, 10)]
    assert fields(write("a.txt", '\n{"text": "a"}\n{"text": "b"}\n')) == [{"text": "a"}, {"text": "b"}]
    assert fields(write("b.txt", "{curly} text\n")) == [{"text": "{curly} text\n"}]


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    from datasets import Dataset

    path = tmp_path / "a.parquet"
    Dataset.from_dict({"text": []}).to_parquet(path)
    with pytest.raises(DataError, match="is empty; expected at least one record"):
        read_records(str(path))
