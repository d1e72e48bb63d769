"""Sources: files and hub data sets become records.

Text files (.jsonl, .json, .csv, .txt) are read here, so that a mistake can be named with its line and no value is
converted; .parquet and hub data sets go through the `datasets` library, which is imported in this file alone. Local
files never touch the network. A record is a plain dict and knows where it came from; what its fields mean is not known here.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qlora.data.values import capital, json_fault, kind
from qlora.errors import DataError, DoesNotFitError, disk_is_full, first_line, listed, nearest
from qlora.files.durable import expanded
from qlora.files.strangers import JsonObject


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its fields, and where it stands, for messages: ``line 7 of 'train.jsonl'``."""

    fields: JsonObject
    source: str
    unit: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.unit} {self.number} of '{self.source}'"


def read_records(
    sources: str | tuple[str, ...], subset: str | None = None, split: str = "train", limit: int | None = None
) -> list[Record]:
    """Every record of a file or hub data set, or of several, in order; the first ``limit`` of them all.

    ``subset`` and ``split`` choose within a hub data set. Raises DataError when a source is missing, empty, not UTF-8
    or broken, naming the line.
    """
    records: list[Record] = []
    for source in (sources,) if isinstance(sources, str) else sources:
        left = None if limit is None else limit - len(records)
        if left == 0:
            break
        found = 0
        for record in _records(source, subset, split):
            records.append(record)
            found += 1
            if found == left:
                break
        if not found:
            raise DataError(f"'{source}' is empty; expected at least one record.")
    return records


def _records(source: str, subset: str | None, split: str) -> Iterator[Record]:
    path = expanded(source)
    reader = _READERS.get(path.suffix.lower())
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix.lower() in _READERS)
        holds = f"it holds {listed(inside)}" if inside else f"no file in it ends in {listed(_READERS, 9)}"
        raise DataError(f"'{source}' is a folder; expected a data file or a list of them ({holds}).")
    if path.exists():
        if reader is None:
            raise DataError(f"'{source}' ends in '{path.suffix}'; expected one of {listed(_READERS, 9)}.")
        return reader(path, source)
    if reader is not None or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise DataError(f"There is no data file '{source}'.{_near(path)}")
    return _hub(source, subset, split, missing=_near(path))


def _near(path: Path) -> str:
    """Which file of that folder may have been meant."""
    if not path.parent.is_dir():
        return f" Its folder '{path.parent}' does not exist either."
    names = sorted(p.name for p in path.parent.iterdir() if p.suffix.lower() in _READERS)
    hint = nearest(path.name, names)
    return hint or (f" Its folder holds {listed(names)}." if names else "")


def _text(path: Path, source: str) -> str:
    """The file's text, without a byte order mark."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"'{source}' cannot be read: {error.strerror}.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"'{source}' is not UTF-8: byte 0x{content[error.start]:02x} at offset {error.start} (line {line}); "
            f"convert it, for example with: iconv -f LATIN1 -t UTF-8."
        ) from None


def _json_lines(path: Path, source: str) -> Iterator[Record]:
    # split at \n alone: str.splitlines would also break at U+2028, which JSON allows inside a string
    for number, line in enumerate(_text(path, source).split("\n"), start=1):
        if not line.strip():
            continue
        yield Record(_object(_parsed(line, source, number), f"line {number} of '{source}'"), source, "line", number)


def _json(path: Path, source: str) -> Iterator[Record]:
    text = _text(path, source)
    if not text.strip():
        return
    values = _parsed(text, source)
    if isinstance(values, dict):
        inner = values.get("data")
        if not isinstance(inner, list):
            raise DataError(
                f"'{source}' is one JSON object with the fields {listed(values)}; expected a list of records, "
                f'or {{"data": [...]}}.'
            )
        values = inner
    if not isinstance(values, list):
        raise DataError(f"'{source}' holds {kind(values)}; expected a list of records.")
    for number, value in enumerate(values, start=1):
        yield Record(_object(value, f"record {number} of '{source}'"), source, "record", number)


def _parsed(text: str, source: str, number: int | None = None) -> object:
    """What the JSON ``text`` holds: line ``number`` of the file, or all of it."""
    try:
        found: object = json.loads(text)
        return found
    except (ValueError, RecursionError) as error:
        fault = json_fault(error)
        if number is None and isinstance(error, json.JSONDecodeError):
            before = text[: error.pos]
            if error.msg == "Extra data" and before.count("\n") == before.rstrip().count("\n") + 1:
                raise DataError(f"'{source}' holds one JSON object a line; rename it to end in .jsonl.") from None
            number, text = error.lineno, text.split("\n")[error.lineno - 1]
        if number is None:
            raise DataError(f"'{source}' cannot be read as JSON: {fault}; expected a list of plain records.") from None
        start = text.strip()
        shown = start if len(start) <= 60 else start[:60] + "…"
        raise DataError(f"'{source}' has broken JSON at line {number} ({fault}): {shown}") from None


def _object(value: object, place: str) -> JsonObject:
    if not isinstance(value, dict):
        raise DataError(f"{capital(place)} is {kind(value)}; expected an object with named fields.")
    return value


def _plain_text(path: Path, source: str) -> Iterator[Record]:
    """A .txt file is one document: cutting it at blank lines would put an end-of-text after each paragraph."""
    text = _text(path, source)
    if text.strip():
        yield Record({"text": text}, source, "document", 1)


def _csv(path: Path, source: str) -> Iterator[Record]:
    """Every field stays the text that stands in the file; a row that does not match the header is refused by number."""
    text = _text(path, source)
    if not text.strip():
        return
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # the default refuses fields above 128 KiB
    rows = (row for row in csv.reader(io.StringIO(text, newline=""), strict=True) if row)
    number = 0
    try:
        header = next(rows)
        if len(set(header)) != len(header):
            raise DataError(f"'{source}' names a column twice in its header: {listed(header, 20)}.")
        for number, row in enumerate(rows, start=1):
            if len(row) != len(header):
                raise DataError(
                    f"Row {number} of '{source}' has {len(row)} fields where the header has {len(header)} "
                    f"({listed(header)}); quote fields that hold commas."
                )
            yield Record(dict(zip(header, row, strict=True)), source, "row", number)
    except csv.Error as error:
        raise DataError(f"'{source}' is not valid CSV after row {number}: {error}.") from None


def _parquet(path: Path, source: str) -> Iterator[Record]:
    from datasets import Dataset

    with _quiet(source), tempfile.TemporaryDirectory() as cache:
        rows = Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True).to_list()
    for number, row in enumerate(rows, start=1):
        yield Record(row, source, "row", number)


def _hub(name: str, subset: str | None, split: str, missing: str) -> Iterator[Record]:
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
    for number, row in enumerate(table, start=1):
        yield Record(dict(row), name, "row", number)


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


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _plain_text}
