"""Sources: files and hub data sets become records.

    a name ► its files, in sorted order ► bytes (files) ► text (encoding) ► records ► without Arrow's nulls (filled)

Text files (.jsonl, .json, .csv, .tsv, .txt, packed or not) are read here, so that a mistake can be named with its line and no
value is converted; .parquet and hub data sets go through the `datasets` library, which is imported in this file alone. Local
files never touch the network. A record is a plain dict and knows where it came from; what its fields mean is not known here.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from qlora.data.encoding import decoded
from qlora.data.files import content, ending, require_whole, unpacker
from qlora.data.filled import Place, filled_in_file, filled_in_table, without
from qlora.data.values import json_fault, kind, once, read_json
from qlora.errors import DataError, DoesNotFitError, counted, disk_is_full, first_line, listed, nearest
from qlora.files.durable import expanded, from_here
from qlora.files.strangers import JsonObject


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its fields, and where it stands, for messages: ``line 7 of 'train.jsonl'``."""

    fields: JsonObject
    source: str
    unit: str
    number: int
    filled_in: bool = False
    """Whether nulls that Arrow filled in were taken out of it."""
    beside: tuple[str, ...] = ()
    """What its file holds beside the list that it stands in, and nobody reads: ``{"data": [...], "version": 1}``."""
    fault: str | None = None
    """Why there are no fields, as the end of a sentence that begins with ``place``; the records around it can be read."""

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number} of '{self.source}'"


def read_records(
    sources: str | tuple[str, ...], subset: str | None = None, split: str = "train", limit: int | None = None
) -> list[Record]:
    """Every record of a file, folder, pattern or hub data set, or of several, in order; the first ``limit`` of them all.

    ``subset`` and ``split`` choose within a hub data set. Raises DataError when a source is missing, empty, of another
    encoding or broken, naming the file and line.
    """
    records: list[Record] = []
    for source in (sources,) if isinstance(sources, str) else sources:
        if len(records) == limit:
            break
        for name in data_files(source) or [source]:
            if len(records) == limit:
                break
            found, features = _records(name, subset, split)
            mine = list(islice(found, None if limit is None else limit - len(records)))
            if not mine:
                raise DataError(f"'{name}' is empty; expected at least one record.")
            if features is None:
                filled = filled_in_file(one.fields for one in mine if one.fault is None)
            else:
                filled = filled_in_table(features)
            records += [_bare(one, filled) for one in mine] if filled else mine
    return records


def _bare(record: Record, filled: set[Place]) -> Record:
    """A record without the nulls that Arrow filled in."""
    fields = without(filled, record.fields)
    return replace(record, fields=fields, filled_in=fields != record.fields)


def data_files(source: str) -> list[str]:
    """The files that a source stands for, in sorted order: itself, or those of a folder or a pattern (``data/*.jsonl``).

    None for a hub data set, or where there is nothing. A folder's own files are meant, none of the folders inside it.
    """
    path = expanded(source)
    if path.is_dir():
        return [str(Path(source) / name) for name in _folder(path, source)]
    if path.exists() or not glob.has_magic(source):
        return [source] if path.exists() else []
    found = sorted(name for name in glob.glob(str(path), recursive=True) if _is_data(Path(name)))
    if not found:
        raise DataError(f"No data file matches '{source}'; expected files that end in {listed(_ENDINGS, 9)}.")
    return found


def _folder(path: Path, source: str) -> list[str]:
    """The names of a folder's data files. One that is named as a test set is not trained on because it lies there."""
    names = sorted(inside.name for inside in path.iterdir() if _is_data(inside))
    if not names:
        raise DataError(
            f"'{source}' is a folder in which no file ends in {listed(_ENDINGS, 9)}; name a folder or file inside it, or a "
            f"pattern, as in '{Path(source) / '**' / '*.jsonl'}'."
        )
    if {"dataset_info.json", "state.json"} <= set(names):
        command = f"import datasets; datasets.load_from_disk({str(path)!r}).to_parquet({path.name + '.parquet'!r})"
        raise DataError(f"'{source}' is what save_to_disk wrote; write it as Parquet: python -c {shlex.quote(command)}")
    apart = [name for name in names if _HELD_OUT.search(name)]
    others = [name for name in names if name not in apart]
    if apart and others:
        raise DataError(
            f"'{source}' is a folder that holds {listed(apart)} beside other files ({listed(others)}); name the files you "
            f"mean, or a pattern, as in '{Path(source) / 'train*'}'."
        )
    return names


def not_read(source: str) -> list[str]:
    """What else is in a folder, by name: files of other kinds, folders, and nothing that is hidden."""
    path = expanded(source)
    if not path.is_dir():
        return []
    others = (inside for inside in path.iterdir() if not inside.name.startswith(".") and not _is_data(inside))
    return sorted(f"{inside.name}/" if inside.is_dir() else inside.name for inside in others)


def _is_data(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".") and _is_known(path)


def _is_known(path: Path) -> bool:
    return ending(path) in (_READERS if unpacker(path) else _ENDINGS)  # Parquet is packed in itself


def _records(source: str, subset: str | None, split: str) -> tuple[Iterator[Record], Any]:
    """The records of one file or hub data set, and the features of the table they come from, if they do."""
    if not is_here(source):
        return _hub(source, subset, split, missing=_near(expanded(source)))
    path = expanded(source)
    if ending(path) == ".parquet":
        return _parquet(path, source)
    return _READERS[ending(path)](decoded(content(path, source), source), source), None


def is_here(source: str) -> bool:
    """Whether it is one file of a kind that is read here; False for what may be a hub data set. Raises DataError for neither."""
    path = expanded(source)
    known = _is_known(path)
    if path.exists():
        if not known:
            advice = next((_OTHER_FILES[end] for end in _OTHER_FILES if path.name.lower().endswith(end)), "")
            raise DataError(
                f"'{source}' ends in '{path.suffix}'; expected one of {listed(_ENDINGS, 9)}, text also packed as in .jsonl.gz."
                f"{advice.replace('{}', shlex.quote(str(path)), 1).replace('{}', shlex.quote(f'{path.stem}.parquet'))}"
            )
        require_whole(path, source)
        return True
    in_a_folder = path.suffix and str(path.parent) != "." and path.parent.is_dir()
    known = known or (path.suffix != "" and "Did you mean" in _near(path))  # my.jsnl, where there is a my.jsonl
    if known or in_a_folder or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise DataError(f"There is no data file '{source}'.{_near(path)}{from_here(source)}")
    return False


def _near(path: Path) -> str:
    """Which file of that folder may have been meant."""
    if not path.parent.is_dir():
        return f" Its folder '{path.parent}' does not exist either."
    if path.is_symlink():
        return f" It is a link to '{os.readlink(path)}', where there is nothing."
    names = sorted(p.name for p in path.parent.iterdir() if _is_known(p))
    hint = nearest(path.name, names)
    return hint or (f" Its folder holds {listed(names)}." if names else "")


def _json_lines(text: str, source: str) -> Iterator[Record]:
    """A record a line. A list of records under this name is read as one."""
    return _json(text, source) if text.lstrip().startswith("[") else _lines(text, source)


def _lines(text: str, source: str) -> Iterator[Record]:
    """A record a line; or one after the other, if each is written over several lines."""
    # split at \n alone: str.splitlines would also break at U+2028, which JSON allows inside a string
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    values = [_value(line) for _, line in lines]
    if any(isinstance(value, ValueError) for value in values) and (several := _objects(text)):
        yield from (_record(value, source, "line", number) for number, value in several)
        return
    for (number, line), value in zip(lines, values, strict=True):
        if isinstance(value, ValueError | RecursionError):
            fault = f"has broken JSON ({json_fault(value)}): {_beginning(line)}"
            yield Record({}, source, "line", number, fault=fault)
        else:
            yield _record(value, source, "line", number)


def _value(text: str) -> object:
    """What JSON holds, as a line of a file, or the exception that it raised."""
    try:
        return read_json(text)
    except (ValueError, RecursionError) as error:
        return error


def _objects(text: str) -> list[tuple[int, object]]:
    """(line, JSON value) one after the other; nothing where the text is not that from its beginning to its end."""
    decoder = json.JSONDecoder(object_pairs_hook=once)
    found: list[tuple[int, object]] = []
    end = len(text.rstrip())
    at, line = len(text) - len(text.lstrip()), 1 + text.count("\n", 0, len(text) - len(text.lstrip()))
    while at < end:
        begin, first = at, line
        try:
            value, at = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            return []
        while at < end and text[at].isspace():
            at += 1
        found.append((first, value))
        line += text.count("\n", begin, at)
    return found


def _json(text: str, source: str) -> Iterator[Record]:
    """A list of records, by itself or as ``{"data": [...]}``. JSON lines under this name are read as such."""
    if not text.strip():
        return
    try:
        values = read_json(text)
    except (ValueError, RecursionError) as error:
        first = text[: error.pos] if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" else ""
        if "\n" in first and ("\n" not in first.strip() or first.lstrip().startswith("{")):
            yield from _lines(text, source)
            return
        raise _broken(error, text, source) from None
    beside: tuple[str, ...] = ()
    if isinstance(values, dict):
        inner = [values] if any(map(_are_turns, values.values())) else values.get("data")
        if not isinstance(inner, list):
            lists = {name: str(value) for name, value in values.items() if isinstance(value, list) and value}
            most = sorted(lists, key=lambda name: -len(lists[name]))  # the records are longer than what describes them
            within = next((name for name in most if isinstance(values[name][0], list | dict)), None)
            write = (
                ""
                if within is None
                else f"; jq {shlex.quote(f'.[{json.dumps(within)}]')} writes the list that is in it"
            )
            raise DataError(
                f"'{source}' is one JSON object with the fields {listed(values, 12)}; expected a list of records, "
                f'or {{"data": [...]}}{write or _by_ids(values) or _by_columns(values, source)}.'
            )
        if inner is values.get("data"):
            beside = tuple(name for name, value in values.items() if name != "data" and value not in (None, "", [], {}))
        values = inner
    if not isinstance(values, list):
        raise DataError(f"'{source}' holds {kind(values)}; expected a list of records.")
    if _are_turns(values):
        values = [values]  # one conversation
    for number, value in enumerate(values, start=1):
        yield replace(_record(value, source, "record", number), beside=beside)


def _by_ids(values: JsonObject) -> str:
    """What to do with records that stand under their ids; nothing for another object."""
    records = [
        one for one in values.values() if isinstance(one, dict) and any(isinstance(said, str) for said in one.values())
    ]
    alike = len(records) == len(values) > 1 and any(not name.isdigit() for name in set.intersection(*map(set, records)))
    return "; its values look like the records, each under an id: jq '[.[]]' writes them as a list" if alike else ""


def _by_columns(values: JsonObject, source: str) -> str:
    """What to do with a table that pandas wrote a column at a time; nothing for another object."""
    if (
        len(values) < 2
        or len({len(column) if isinstance(column, list | dict) else -1 for column in values.values()} - {-1, 0}) != 1
    ):
        return ""
    command = f"import pandas; pandas.read_json({source!r}).to_json({source + 'l'!r}, orient='records', lines=True)"
    return f"; it looks like a table by columns, which this writes by rows: python -c {shlex.quote(command)}"


def _are_turns(value: object) -> bool:
    """Whether it is a conversation, of turns as most have them, and no list of records."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and any(names <= turn.keys() for names in _TURN) for turn in value)


def _broken(error: ValueError | RecursionError, text: str, source: str) -> DataError:
    """The sentence for a file whose JSON is broken as a whole."""
    fault = json_fault(error)
    if not isinstance(error, json.JSONDecodeError):
        return DataError(f"'{source}' cannot be read as JSON: {fault}; expected a list of plain records.")
    line = text.split("\n")[error.lineno - 1]
    return DataError(f"'{source}' has broken JSON at line {error.lineno} ({fault}); mend it: {_beginning(line)}")


def _beginning(line: str) -> str:
    start = line.strip()
    return start if len(start) <= 60 else start[:60] + "…"


def _record(value: object, source: str, unit: str, number: int) -> Record:
    if isinstance(value, str):
        value = {"text": value}
    if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value):
        value = {"messages": value}  # a conversation without a name for its turns
    if isinstance(value, dict):
        return Record(value, source, unit, number)
    return Record({}, source, unit, number, fault=f"is {kind(value)}; expected an object with named fields")


def _plain_text(text: str, source: str) -> Iterator[Record]:
    """A .txt file is one document: cutting it at blank lines would put an end-of-text after each paragraph. JSON lines under
    this name are read as such."""
    if _begins_with_an_object(text):
        yield from _lines(text, source)
    elif _holds_records(text):
        yield from _json(text, source)
    elif text.strip():
        yield Record({"text": text}, source, "document", 1)


def _holds_records(text: str) -> bool:
    """Whether it is one JSON value: a list of objects, or a conversation."""
    value = _value(text) if text.lstrip()[:1] in ("[", "{") else None
    if isinstance(value, dict):
        return any(map(_are_turns, value.values()))
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _begins_with_an_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text.lstrip().split("\n", 1)[0]), dict)
    except (ValueError, RecursionError):
        return False


def _csv(text: str, source: str, separators: str = ",;\t|") -> Iterator[Record]:
    """Every field stays the text that stands in the file; a row that does not match the header is refused by number.

    What separates fields is what cuts the most rows into as many as the header has, and then what cuts into the most: Excel writes
    semicolons where the comma is a decimal's, and commas stand in the cells.
    """
    if not text.strip():
        return
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the default refuses fields above 128 KiB
    told = re.match(r"sep=([,;\t|])\r?\n", text)  # Excel's own first line
    text = text[told.end() :] if told else text
    separator = max(told[1] if told else separators, key=partial(_fits, text))  # of equals the first
    rows = _rows(text, separator)
    number = 0
    try:
        header = next(rows)
        if len(set(header)) != len(header):
            raise DataError(f"'{source}' names a column twice in its header: {listed(header, 20)}.")
        for number, row in enumerate(rows, start=1):
            if len(row) == len(header):
                yield Record(dict(zip(header, row, strict=True)), source, "row", number)
                continue
            fault = (
                f"has {counted(len(row), 'field')} where the header has {len(header)} ({listed(header)}); quote fields that hold "
                f"{_SEPARATORS[separator]}"
            )
            yield Record({}, source, "row", number, fault=fault)
    except csv.Error as error:
        raise DataError(
            f"'{source}' is not valid CSV after row {number}: {error}; a quote inside a quoted field is written twice."
        ) from None


def _fits(text: str, separator: str) -> tuple[float, int]:
    """(The share of rows that this cuts into as many as the header, how many those are), by the beginning of a file."""
    begin, counts = text[:_HEADER], list[int]()
    try:
        for row in _rows(begin, separator):
            if not counts and '"' in "".join(row):  # it cut through quotes: a,"b;c"
                return 0, 0
            counts.append(len(row))
    except csv.Error:  # a quote ends before another separator, or is cut off here
        counts = counts if begin != text else counts[:1]
    header, *rows = counts or [0]
    return sum(count == header for count in rows) / max(len(rows), 1) if header > 1 else 0, header


def _rows(text: str, separator: str) -> Iterator[list[str]]:
    return (row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True) if row)


def _parquet(path: Path, source: str) -> tuple[Iterator[Record], Any]:
    from datasets import Dataset
    from pyarrow import parquet

    with _quiet(source):
        if not parquet.read_metadata(path).num_rows:  # `datasets` would not say so
            return iter(()), None
    with _quiet(source), tempfile.TemporaryDirectory() as cache:
        table = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        rows = table.to_list()
    return (Record(row, source, "row", number) for number, row in enumerate(rows, start=1)), table.features


def _hub(name: str, subset: str | None, split: str, missing: str) -> tuple[Iterator[Record], Any]:
    """A hub data set, kept in the `datasets` library's own cache. That library runs no code of a data set."""
    import datasets

    nowhere = datasets.exceptions.DatasetNotFoundError
    try:
        with _quiet(name, known=(nowhere, ConnectionError, ValueError)):
            table = datasets.load_dataset(name, subset, split=split)
    except nowhere:
        raise DataError(f"'{name}' is neither a file here nor a data set on the hub.{missing}") from None
    except ConnectionError:
        raise DataError(
            f"'{name}' is not a file here, and the hub cannot be reached for a data set.{missing}"
        ) from None
    except ValueError as error:  # an unknown subset or split; the library's message lists those that exist
        raise DataError(
            f"The hub data set '{name}' cannot be read: {first_line(error)}; set data.subset and data.split to what it has."
        ) from None
    return (Record(dict(row), name, "row", number) for number, row in enumerate(table, start=1)), table.features


@contextmanager
def _quiet(source: str, known: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Run the `datasets` library without progress bars, and say its failures in a sentence, all but the ``known``.

    A full disk is no fault of the data: it goes on as it is, also from inside the error that the library wraps it in.
    """
    import datasets

    bars = datasets.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")  # tells of each retry; the sentence at the end tells it all
    level, hub_level = datasets.logging.get_verbosity(), hub.level
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    hub.setLevel(logging.ERROR)
    try:
        yield
    except known:
        raise
    except Exception as error:
        causes: list[BaseException] = [error]  # the library wraps the reason: "An error occurred while generating …"
        while (inner := causes[-1].__cause__ or causes[-1].__context__) is not None:
            causes.append(inner)
        if full := next(filter(disk_is_full, causes), None):
            raise full from None
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and "Not enough disk space" in str(cause):  # it looks before a large download
            raise DoesNotFitError(
                f"'{source}' does not fit on the disk ({first_line(cause).split(' (')[0]}); make room, or name a folder "
                "on another disk in HF_HOME."
            ) from None
        raise DataError(
            f"'{source}' cannot be read ({first_line(cause)}); is it whole, and what its name says?"
        ) from None
    finally:
        datasets.logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            datasets.enable_progress_bars()


_READERS: dict[str, Callable[[str, str], Iterator[Record]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".tsv": partial(_csv, separators="\t,;|"),
    ".txt": _plain_text,
}
_ENDINGS = (*_READERS, ".parquet")
_TURN = ({"role", "content"}, {"from", "value"})
_ARROW = " To write it as Parquet: python -c 'import sys, datasets; datasets.Dataset.from_file(sys.argv[1]).to_parquet(sys.argv[2])' {} {}"
_OTHER_FILES = {
    ".tar.gz": " Unpack it: tar -xzf {}",
    ".tgz": " Unpack it: tar -xzf {}",
    ".tar": " Unpack it: tar -xf {}",
    ".zip": " Unpack it: unzip {}",
    ".xz": " Unpack it: xz -dk {}",
    ".7z": " Unpack it: 7z x {}",
    ".xlsx": " Save the table as CSV.",
    ".arrow": _ARROW,
    ".feather": _ARROW.replace("datasets; datasets.Dataset.from_file(", "pandas; pandas.read_feather("),
}
"""What to do with a file that is not read here, by how its name ends: {} is its path, and the second the name to write."""
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_HEADER = 64 * 1024  # characters that are looked at for what separates columns
_HELD_OUT = re.compile(r"(?:^|[^a-z])(?:tests?|dev|val|valid|validation|eval|held.?out)(?:[^a-z]|$)", re.IGNORECASE)
