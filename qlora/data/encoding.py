"""Encodings: a file's bytes become text.

    UTF-8, with a byte order mark or without    read
    UTF-16 and UTF-32 with a mark               read: the mark says which; PowerShell and Excel write it
    anything else                               refused, with what it most likely is, how it would then read, and the
                                                command that converts it

Nothing is guessed in silence: almost any bytes are some text in Windows-1252. Knows bytes and letters; must not know records.
"""

from __future__ import annotations

import codecs
import re
import shlex

from qlora.data.files import ending, unpacker
from qlora.errors import DataError
from qlora.files.durable import expanded

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins with UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip file; rename it to end in .gz",
    b"(\xb5/\xfd": "a zstd file; rename it to end in .zst",
    b"BZh": "a bzip2 file; rename it to end in .bz2",
    b"PK\x03\x04": "a zip archive, as Excel's .xlsx is one; unpack it, or save the table as CSV",
    b"PAR1": "a Parquet file; rename it to end in .parquet",
}
_WESTERN = "ÀÁÂÃÄÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÕÖØÙÚÛÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüœ€…‚„‘’“”–—•°§£©®™«»¿¡\xa0"
_ALONE = rf"(?<![^\x00-\x7f])[{_WESTERN}]{{1,3}}(?![^\x00-\x7f])"  # accents stand between plain letters
_CENTRAL = "ĄĆĘŁŃŚŹŻąćęłńśźżČĎĚŇŘŠŤŮŽčďěňřšťůžŐŰőűĂÂÎŞŢăâîşţÁÉÍÓÖÚÜÝáéíóöúüýÄäßôëç€…‚„‘’“”–—•°§«»\xa0"
_LIKELY = (
    # as Python and iconv call it, as people do, and what is to be expected in it; of equals the first
    ("CP1252", "Windows-1252 (Latin-1)", _ALONE),
    ("CP1250", "Windows-1250 (Central European)", rf"[{_CENTRAL}]"),
    ("CP1251", "Windows-1251 (Cyrillic)", "[А-яЁёІіЇїЄєҐґ«»“”„…–—№\xa0]"),
    ("MACINTOSH", "Mac Roman", _ALONE),
    ("CP932", "Shift-JIS (Japanese)", "[ぁ-んァ-ヶー、。「」・！？一-龠]"),
    ("CP949", "EUC-KR (Korean)", "[가-힣]"),
    ("GB18030", "GBK (Chinese)", "[一-龠，。、“”！？：；（）《》]"),
)
_SAMPLE = 64 * 1024  # bytes looked at


def decoded(content: bytes, source: str) -> str:
    """The text of the file ``source``, without its mark. Raises DataError in a sentence that says what to do."""
    marked = next((name for mark, name in _MARKS if content.startswith(mark)), None)
    try:
        if marked is None and (bare := _bare_utf16(content)):
            raise DataError(
                f"'{source}' is {bare} without a byte order mark; expected UTF-8. Convert it: {_convert(bare, source)}"
            )
        return content.decode(marked or "utf-8")
    except UnicodeDecodeError as error:
        if other := next((kind for start, kind in _OTHER_KINDS.items() if content.startswith(start)), None):
            if program := unpacker(expanded(source)):
                raise DataError(
                    f"'{source}' is packed twice; unpack it once: {program} -dk {shlex.quote(source)}"
                ) from None
            raise DataError(f"By its first bytes '{source}' is {other}.") from None
        line = content.count(b"\n", 0, error.start) + 1
        place = f"byte 0x{content[error.start]:02x} at offset {error.start} (line {line})"
        if marked and marked != "utf-8-sig":
            raise DataError(
                f"'{source}' begins as {marked.upper()} does and then is none: {error.reason} at offset {error.start}; "
                "is it whole?"
            ) from None
        raise DataError(f"'{source}' is not UTF-8: {place}; {_advice(content, error, line, source)}") from None


def _bare_utf16(content: bytes) -> str | None:
    """UTF-16 by the NUL beside each plain letter. In UTF-8 no text has them, yet they are valid there."""
    begin = content[:_SAMPLE]
    even, odd = begin[::2].count(0), begin[1::2].count(0)
    least = len(begin) // 8
    if len(begin) < 4 or len(begin) % 2 or 10 * min(even, odd) > max(even, odd) or max(even, odd) < max(least, 2):
        return None
    return "UTF-16LE" if odd > even else "UTF-16BE"


def _advice(content: bytes, error: UnicodeDecodeError, line: int, source: str) -> str:
    """What a file is that is not UTF-8, and what to do."""
    start = error.start
    begin = content.rfind(b"\n", 0, start) + 1
    sample = content[begin : start + _SAMPLE]
    as_utf8 = content[: start + _SAMPLE].decode("utf-8", "replace")
    broken = as_utf8.count("\ufffd")
    if len(as_utf8) - len(as_utf8.encode("ascii", "ignore")) > 2 * broken:
        if error.reason == "unexpected end of data":
            return "it ends within a character: is it whole?"
        return "its other letters are UTF-8, so mend that place by hand: converting the file would spoil the others."
    if re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", sample):
        return "nor is it text of another encoding, by its control characters: is it what its name says?"
    shares = []
    for code, name, expected in _LIKELY:
        text = sample.decode(code, "replace")
        high = len(re.findall(r"[^\x00-\x7f]", text)) or 1
        shares.append((sum(map(len, re.findall(expected, text))) / high, code, name, text))
    share, code, name, text = max(shares, key=lambda one: one[0])
    if share < 0.7:
        command = _convert("ENCODING", source)
        return f"its encoding is not recognised. Find out which it is, and convert it: {command}"
    letter = next(at for at, sign in enumerate(text) if sign > "\x7f")
    begin = text.rfind("\n", 0, letter) + 1
    shown = text[max(begin, letter - 20) : letter + 20].split("\n")[0].strip()
    return f"it is most likely {name}, and line {line} reads “{shown}”. If that is right, convert it: {_convert(code, source)}"


def _convert(code: str, source: str) -> str:
    """The command that writes the file as UTF-8 beside itself."""
    path = expanded(source)
    stem = path.name.removesuffix("".join(path.suffixes[-2:] if unpacker(path) else path.suffixes[-1:]))
    old, new = shlex.quote(str(path)), shlex.quote(str(path.with_name(f"{stem}.utf8{ending(path)}")))
    if program := unpacker(path):
        return f"{program} -dc {old} | iconv -f {code} -t UTF-8 > {new}"
    return f"iconv -f {code} -t UTF-8 {old} > {new}"
