"""Documents of files: text, JSONL, JSON, CSV, TSV and parquet, also compressed. Errors name file and line."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import os
import re
import stat
import string
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from softpick.experiment.failures import first_line
from softpick.experiment.files import SCRATCH

__all__ = ["Corpus", "DataError", "check_text", "json_lines", "read_corpus", "text_files"]

_TEXT = (".txt", ".md", ".rst", ".py", ".text")
_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (*_TEXT, *_LINES, ".json", *_TABLES, ".parquet")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # of a table
_NAMED = 5  # kinds of files that were left out and are named
_DIGITS = 4000  # of an integer that Python reads; a longer one is no text, and nothing here asks how large it is


class DataError(ValueError):
    """The data cannot be used; the message says which file, which line and what was expected."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, and a sentence that says what they are."""

    documents: tuple[str, ...]
    description: str

    @property
    def characters(self) -> int:
        """Total length."""
        return sum(map(len, self.documents))


@dataclass
class _Found:
    """What reading met besides text."""

    nulls: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    no_files: Counter[str] = field(default_factory=Counter)
    folders: int = 0


def read_corpus(path: str | Path, text_field: str = "text", characters: int | None = None) -> Corpus:
    """Documents of a file, or of all files below a directory whose names end like text (sorted by path).

    A text file is one document; a line of JSONL, an object of a JSON array, a row of CSV, TSV or parquet is one document,
    taken from ``text_field``; a row whose text is null has none. Each file may be compressed (``.gz``, ``.bz2``, ``.xz``,
    ``.zst``). Files of a directory that end otherwise, folders that are linked to, and what is no file are left out, with a
    warning; the description counts them. Not counted is what softpick itself writes below it: ``.softpick*``, and a folder
    with ``.softpick`` in it. A pipe is read to its end, after a warning.

    Args:
        path: file or directory.
        text_field: name of the field (JSON) or column (CSV, TSV, parquet) with the text.
        characters: no more than so many; the document that would go beyond is cut. None reads everything.

    Raises:
        DataError: path empty, missing, a device, not readable, of an unknown kind or without text; a line or file without
            the field.
    """
    if not os.fspath(path):
        raise DataError("data: expected a path, got ''")
    path = Path(path)
    found = _Found()
    with _file_errors(path):
        if not path.exists():
            raise DataError(f"data: {path} does not exist")
        _check_kind(path)
        files = _files_below(path, found) if path.is_dir() else [path]
    documents: list[str] = []
    total, cut = 0, False
    for text in (text for file in files for text in _read_file(file, text_field, found, characters)):
        if _empty(text):
            continue
        if characters is not None and total + len(text) > characters:
            cut = True
            text = text[: characters - total]
        if not _empty(text):
            documents.append(text)
            total += len(text)
        if cut:
            break
    if not documents:
        raise DataError(f"data: {path} has no text in it")
    kind = "1 document" if len(documents) == 1 else f"{len(documents)} documents"
    name = str(path).encode("utf-8", "backslashreplace").decode()  # a name on disk may be no Unicode
    description = f"{name}: {kind}, {total / 1e6:.3g} million characters"
    if cut:
        description += " (its beginning: more are not used)"
    if found.nulls:
        description += f"; {found.nulls} without text (null) left out"
    left_out = _left_out(found)
    if left_out:
        description += f"; {left_out}"
        warnings.warn(f"data: {name}: {left_out}", stacklevel=2)
    return Corpus(tuple(documents), description)


def _check_kind(path: Path) -> None:
    mode = path.stat().st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        kind = "socket" if stat.S_ISSOCK(mode) else "device"
        raise DataError(f"data: {path} is a {kind}; expected a file, a directory or a pipe")
    if stat.S_ISFIFO(mode):
        warnings.warn(f"data: {path}: reading from a pipe, until the program that writes to it closes it", stacklevel=3)


def _empty(text: str) -> bool:
    return not text.strip().strip("\0" + string.whitespace)


def _left_out(found: _Found) -> str:
    """What of a directory is not read, or nothing."""
    parts = []
    for kinds, one, many in (
        (found.left_out, "file of other kinds", "files of other kinds"),
        (found.no_files, "entry that is not a file", "entries that are not files"),
    ):
        count = sum(kinds.values())
        if count:
            named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(_NAMED))
            more = ", ..." if len(kinds) > _NAMED else ""
            parts.append(f"{count} {one if count == 1 else many} left out ({named}{more})")
    if found.folders:
        parts.append(f"{found.folders} linked {'folder' if found.folders == 1 else 'folders'} left out")
    return "; ".join(parts)


def text_files(path: Path) -> list[Path]:
    """The files that :func:`read_corpus` reads of a file or a directory, in its order; none where there are none."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    try:
        return _files_below(path, _Found())
    except (DataError, OSError):
        return []


def _files_below(path: Path, found: _Found) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    files = []
    for root, folders, names in os.walk(path, onerror=fail):
        if SCRATCH in folders and Path(root) != path:  # an output folder in which softpick works
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(SCRATCH)]
        found.folders += sum(os.path.islink(os.path.join(root, name)) for name in folders)
        for file in (Path(root) / name for name in names if not name.startswith(SCRATCH)):
            if file.is_file() and _kind(file)[0] in _SUFFIXES:
                files.append(file)
            elif not file.is_file():
                found.no_files[
                    "pipe" if file.is_fifo() else "device or socket" if file.exists() else "broken link"
                ] += 1
            elif not file.name.startswith("."):
                found.left_out["".join(file.suffixes[-2:]) or "without an ending"] += 1
    if not files:
        left_out = _left_out(found)
        raise DataError(
            f"data: no files below {path} end in {', '.join(_SUFFIXES)} (or one of them and {', '.join(_COMPRESSED)})"
            + (f"; {left_out}" if left_out else "")
        )
    return sorted(files)


def _kind(file: Path) -> tuple[str, str]:
    """The ending of a file's name without that of a compression, and the compression's (or none)."""
    last = file.suffix.lower()
    return (file.with_suffix("").suffix.lower(), last) if last in _COMPRESSED else (last, "")


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextmanager
def _file_errors(file: Path, error_class: type[ValueError] = DataError, what: str = "data") -> Iterator[None]:
    """Within the block, errors of disks and damaged archives become one sentence that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise error_class(f"{what}: {file} cannot be read ({reason})") from None


def _open(file: Path) -> BinaryIO:
    """The bytes of a file, without its compression."""
    compression = _kind(file)[1]
    if compression == ".zst":
        try:
            import pyarrow as pa
        except ModuleNotFoundError:
            raise DataError(f"data: {file} needs pyarrow: pip install pyarrow") from None
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(file)), "zstd"))
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers.get(compression, open)(file, "rb")


def _read_file(file: Path, name: str, found: _Found, characters: int | None) -> Iterator[str]:
    kind = _kind(file)[0]
    with _file_errors(file):
        if kind in _LINES:
            yield from _texts(json_lines(file), file, name, found)
        elif kind == ".json":
            yield from _texts(_json(file), file, name, found)
        elif kind in _TABLES:
            yield from _read_table(file, name, found)
        elif kind == ".parquet":
            yield from _read_parquet(file, name, found)
        else:  # whatever else the caller named is tried as text
            with _open(file) as stream:
                most = -1 if characters is None else 4 * characters + 16  # bytes, of more than so many characters
                content = stream.read(most)
                yield _decoded(content, str(file), 1, cut=len(content) == most)


def _decoded(
    content: bytes,
    where: str,
    line: int,
    error_class: type[ValueError] = DataError,
    what: str = "data",
    cut: bool = False,
) -> str:
    try:
        return codecs.getincrementaldecoder("utf-8-sig")().decode(content, final=not cut)
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        at = error.start - (content.rfind(b"\n", 0, error.start) + 1)
        raise error_class(f"{what}: {where} is not UTF-8 text (line {line}, byte {at})") from None


def check_text(value: Any, where: str, error_class: type[ValueError] = DataError) -> str:
    """``value``, if it is text that can be written down.

    Args:
        value: of a record.
        where: for the message: the setting, the file, the line and the field.
        error_class: what is raised.

    Raises:
        DataError: it is no string, or has half of a character in it (a lone surrogate).
    """
    if not isinstance(value, str):
        raise error_class(f"{where} is {type(value).__name__}, not a string")
    half = re.search("[\ud800-\udfff]", value)
    if half:
        raise error_class(
            f"{where} has half of a character in it (a lone surrogate, U+{ord(half[0]):04X}, at {half.start()})"
        )
    return value


def _texts(records: Iterable[tuple[str, Any]], file: Path, name: str, found: _Found) -> Iterator[str]:
    """The field of each record."""
    for where, record in records:
        if not isinstance(record, dict) or name not in record:
            fields = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            raise DataError(f"data: {file}, {where}: no field {name!r} (found {fields}); see text_field")
        if record[name] is None:
            found.nulls += 1
            continue
        yield check_text(record[name], f"data: {file}, {where}: field {name!r}")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else math.inf


def _parsed(text: str, where: str, wanted: str, error_class: type[ValueError], what: str) -> Any:
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise error_class(f"{what}: {where}: not JSON ({error.msg}); {wanted}") from None
    except RecursionError:
        raise error_class(f"{what}: {where}: nested too deeply; {wanted}") from None


def json_lines(
    file: Path,
    wanted: str = "one object a line",
    error_class: type[ValueError] = DataError,
    what: str = "data",
) -> Iterator[tuple[str, Any]]:
    """The records of a JSONL file, each with ``line N``; empty lines have none.

    Args:
        file: perhaps compressed.
        wanted: what a line should be, for the message.
        error_class: what is raised.
        what: the setting that named the file, for the message.

    Raises:
        DataError: a file that cannot be read, a line that is not UTF-8 or not JSON.
    """
    with _file_errors(file, error_class, what), _open(file) as stream:
        lines = (_decoded(line, str(file), number, error_class, what) for number, line in enumerate(stream, 1))
        yield from _records(lines, file, wanted, error_class, what)


def _records(
    lines: Iterable[str], file: Path, wanted: str, error_class: type[ValueError], what: str
) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield f"line {number}", _parsed(line, f"{file}, line {number}", wanted, error_class, what)


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    """The records of a .json file: an array of objects, one object, or an object a line."""
    with _open(file) as stream:
        text = _decoded(stream.read(), str(file), 1)
    first, _, more = text.lstrip().partition("\n")  # no other character ends a line: strings may have them
    if more.strip() and not first.startswith("["):
        try:
            json.loads(first, parse_int=_integer)
        except (ValueError, RecursionError):
            pass
        else:
            yield from _records(text.split("\n"), file, "one object a line", DataError, "data")
            return
    try:
        whole = json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise DataError(f"data: {file}, line {error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise DataError(f"data: {file}: nested too deeply; expected an array of objects") from None
    if isinstance(whole, list):
        yield from ((f"object {number}", record) for number, record in enumerate(whole, 1))
    else:
        yield "object 1", whole


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _read_table(file: Path, name: str, found: _Found) -> Iterator[str]:
    with _open(file) as stream:
        decoded = (_decoded(line, str(file), number) for number, line in enumerate(stream, 1))
        first = next(decoded, "")
        old = "\r" in first.rstrip("\r\n")  # lines end with a carriage return alone
        lines = (line for text in chain([first], decoded) for line in (_LINE.findall(text) if old else [text]))
        csv.field_size_limit(sys.maxsize)
        rows = csv.reader(lines, delimiter=_TABLES[_kind(file)[0]], strict=True)
        try:
            header = next(rows, [])
            if header.count(name) != 1:
                raise DataError(
                    f"data: {file}, line 1: expected one column {name!r}, found {', '.join(map(repr, header))}; see text_field"
                )
            for row in rows:
                if row and len(row) != len(header):
                    raise DataError(
                        f"data: {file}, line {rows.line_num}: expected {len(header)} columns, got {len(row)}"
                    )
                if row:
                    yield check_text(row[header.index(name)], f"data: {file}, line {rows.line_num}: column {name!r}")
        except csv.Error as error:
            kind = _kind(file)[0].removeprefix(".").upper()
            raise DataError(f"data: {file}, line {rows.line_num}: not {kind} ({error})") from None


def _read_parquet(file: Path, name: str, found: _Found) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise DataError(f"data: {file} needs pyarrow: pip install pyarrow") from None
    row = 0
    with _open(file) as stream:
        try:
            table = pq.ParquetFile(stream if _kind(file)[1] == "" else io.BytesIO(stream.read()))
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"data: {file} is not a parquet file ({first_line(error)})") from None
        if name not in table.schema_arrow.names:
            columns = ", ".join(map(repr, table.schema_arrow.names))
            raise DataError(f"data: {file}: no column {name!r} (found {columns}); see text_field")
        batches = table.iter_batches(columns=[name])
        while True:
            try:
                batch = next(batches, None)
                values = [] if batch is None else batch.column(0).to_pylist()
            except (pa.ArrowException, OSError, ValueError) as error:
                reason = "text that is not UTF-8" if isinstance(error, UnicodeDecodeError) else first_line(error)
                raise DataError(f"data: {file}: cannot be read after row {row} ({reason})") from None
            if batch is None:
                return
            for value in values:
                row += 1
                if value is None:
                    found.nulls += 1
                else:
                    yield check_text(value, f"data: {file}, row {row}: column {name!r}")
