"""Rows of a file, one at a time: JSON Lines, a JSON array, CSV (each also as .gz), Parquet, a `datasets` folder."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from steelyard.data.dialogues import RowError
from steelyard.data.formats import Row
from steelyard.errors import InputError

_SUFFIXES = ".jsonl, .json, .csv (each also with .gz), .parquet, or a folder written by datasets' save_to_disk"


def read_rows(path: str | Path, *, split: str | None = None) -> Iterator[tuple[int, Row | RowError]]:
    """Yield (line, row) for each row of a file, a `RowError` in place of a row that cannot be read.

    Raises `InputError` when the file as a whole cannot be read: missing, of unknown kind, damaged.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if split is not None and not path.is_dir():
        raise InputError(f"{path}: split={split!r} is only for folders written by datasets' save_to_disk")
    if path.is_dir():
        reader = _folder_rows
    else:
        readers = {".jsonl": _json_lines, ".json": _json_file, ".csv": _csv_rows, ".parquet": _parquet_rows}
        if suffix(path) not in readers:
            raise InputError(f"{path}: the name must end with one of {_SUFFIXES}")
        reader = readers[suffix(path)]
    line = 0
    try:
        for line, row in reader(path, split):
            yield line, row
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, _arrow_error()) as error:
        raise InputError(f"{path}: damaged or unreadable after row {line}: {error}") from error


def suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _arrow_error() -> type[Exception]:
    import pyarrow as pa

    error: type[Exception] = pa.ArrowException
    return error


def _open(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _decode(raw: bytes, line: int, start: int) -> str | RowError:
    """A line as text; `start` is its first byte's place in the file (unpacked, if it is a .gz)."""
    if line == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = start + error.start
        return RowError(
            "encoding", f"not UTF-8: byte 0x{raw[error.start]:02x} at byte offset {at} (convert the file to UTF-8)"
        )


def _json_lines(path: Path, split: str | None) -> Iterator[tuple[int, Row | RowError]]:
    start = 0
    with _open(path) as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                text = _decode(raw, line, start)
                yield line, text if isinstance(text, RowError) else _json_object(text)
            start += len(raw)


def _json_object(text: str) -> Row | RowError:
    try:
        # Without its line end, so that an error's column is one of this line.
        value = json.loads(text.rstrip("\r\n"))
    except json.JSONDecodeError as error:
        return RowError("json", f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowError("json", f"not readable JSON: {error}")
    return _object(value, text)


def _object(value: object, text: str) -> Row | RowError:
    if not isinstance(value, dict):
        return RowError("not-object", f"a row must be a JSON object {{...}}, got {type(value).__name__}")
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return RowError("encoding", "holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def _json_file(path: Path, split: str | None) -> Iterator[tuple[int, Row | RowError]]:
    """A .json file: an array of objects if it starts with "[", else JSON Lines."""
    with _open(path) as file:
        head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith(b"["):
        yield from _json_lines(path, split)
        return
    with _open(path) as file:
        raw = file.read().removeprefix(b"\xef\xbb\xbf")
    text = _decode(raw, 0, 0)
    if isinstance(text, RowError):
        raise InputError(f"{path}: {text}")
    decoder, space, line = json.JSONDecoder(), re.compile(r"[ \t\r\n]*"), 1
    at = text.index("[") + 1
    counted = 0
    while True:
        at = _skip(space, text, at)
        line, counted = line + text.count("\n", counted, at), at
        if text.startswith("]", at):
            if text[at + 1 :].strip():
                raise InputError(f"{path}:{line}: not valid JSON: more text follows the array; mend the file")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            message = getattr(error, "msg", str(error))
            raise InputError(f"{path}:{line}: not valid JSON in this object: {message}; mend the file") from error
        yield line, _object(value, text[at:end])
        at = _skip(space, text, end)
        if not text.startswith((",", "]"), at):
            raise InputError(f"{path}:{line}: not valid JSON: ',' or ']' must follow this object; mend the file")
        at += text.startswith(",", at)


def _skip(space: re.Pattern[str], text: str, at: int) -> int:
    match = space.match(text, at)
    return match.end() if match else at


def _csv_rows(path: Path, split: str | None) -> Iterator[tuple[int, Row | RowError]]:
    bad: dict[int, RowError] = {}

    def texts(file: IO[bytes]) -> Iterator[str]:
        start = 0
        for line, raw in enumerate(file, 1):
            text = _decode(raw, line, start)
            start += len(raw)
            if line == 1 and b"\0" in raw and isinstance(text, str):
                text = RowError("encoding", "not UTF-8: it holds NUL bytes, as UTF-16 does (convert the file to UTF-8)")
            if isinstance(text, RowError):
                bad[line] = text
                text = raw.decode("utf-8", "replace")
            yield text

    first = 1
    old_limit = csv.field_size_limit(2**31 - 1)
    try:
        with _open(path) as file:
            reader = csv.reader(texts(file), strict=True)
            header = next(reader, None)
            if header is None:
                return
            if bad or len(set(header)) != len(header):
                why = next(iter(bad.values()), "the header names a column twice")
                raise InputError(f"{path}:1: {why}")
            first = reader.line_num + 1
            for cells in reader:
                if cells:
                    wrong = next((bad[line] for line in range(first, reader.line_num + 1) if line in bad), None)
                    if wrong is None and len(cells) != len(header):
                        wrong = RowError("csv", f"{len(cells)} cells, but the header has {len(header)} columns")
                    yield first, wrong or dict(zip(header, cells, strict=True))
                first = reader.line_num + 1
    except csv.Error as error:
        if 1 in bad:  # Another encoding looks like broken CSV, too.
            raise InputError(f"{path}:1: {bad[1]}") from error
        raise InputError(f"{path}:{first}: not valid CSV in the row that starts here: {error}; mend it") from error
    finally:
        csv.field_size_limit(old_limit)


def _parquet_rows(path: Path, split: str | None) -> Iterator[tuple[int, Row | RowError]]:
    import pyarrow.parquet as pq

    line = 0
    for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            line += 1
            yield line, row


def _folder_rows(path: Path, split: str | None) -> Iterator[tuple[int, Row | RowError]]:
    import datasets

    index = path / "dataset_dict.json"
    if index.exists():
        names = json.loads(index.read_text(encoding="utf-8"))["splits"]
        if (split is None and len(names) > 1) or (split is not None and split not in names):
            got = "none was named" if split is None else f"got {split!r}"
            raise InputError(
                f"{path}: name one of its splits {', '.join(names)}, by its folder ({path / names[0]}) or in Python by "
                f"split={names[0]!r}; {got}"
            )
        path = path / (split or names[0])
    elif split is not None:
        raise InputError(f"{path}: holds one data set without splits; leave split={split!r} out")
    if not (path / "state.json").exists():
        raise InputError(f"{path}: a folder must be one written by datasets' save_to_disk (no state.json in it)")
    yield from enumerate(datasets.load_from_disk(str(path)), 1)
