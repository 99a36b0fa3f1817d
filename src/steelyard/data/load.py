"""Read preferences, prompts and demonstrations from files, and say what was found in them.

Files: JSON Lines, a JSON array, CSV (each also as .gz), Parquet, and folders written by `datasets`' save_to_disk.
JSON Lines and CSV are read line by line. Every problem names file and line (for Parquet and folders: the row,
counted from 1). No row is lost: `Loaded.rows` keeps each readable row as it came, and `Loaded.outcomes` says
what became of it.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Generic, Literal, TypeVar, cast

from steelyard.data.formats import (
    CHOSEN_SCORES,
    FORMATS,
    MEAN,
    PUBLISHED_COLUMNS,
    REJECTED_SCORES,
    Row,
    RowError,
    detect_format,
    read_demonstration,
    read_prompt,
    read_strength,
)
from steelyard.errors import InputError
from steelyard.types import Preference, Prompt, Strength

OnInvalid = Literal["error", "skip"]
T = TypeVar("T")

FINDINGS = {
    "identical": "chosen equals rejected: no information, left out",
    "duplicate": "exact duplicate of an earlier pair, kept",
    "contradiction": "the same pair labelled both ways, kept",
    "duplicate-id": "id used before, made unique",
    "repeated-prompt": "prompt seen before",
    "no-end-mark": "pairs with a response that ends without an end mark (cut off?)",
}
"""Kinds of problem that concern what rows say. Every other kind is a malformed row."""

_NUMBERS = {"flip_prob", "margin", "weight", "strength_mean", "strength_std", "votes", "voters", "p_flip"}
_NUMBERS |= set(PUBLISHED_COLUMNS) - {CHOSEN_SCORES, REJECTED_SCORES}
_STRUCTURED = {"prompt", "chosen", "rejected", "messages", "completion", "response", "turns"}
_END_MARK = re.compile(r"""([.!?…。！？؟।]["'”’»)\]}*_]*|```)\s*$""")
_SUFFIXES = ".jsonl, .json, .csv (each also with .gz), .parquet, or a folder written by datasets' save_to_disk"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something found in one row. `kind` is a key of `FINDINGS` or the kind of a malformed row."""

    kind: str
    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What reading a file found. `counts` holds the number of every kind met; `problems` lists all but
    "no-end-mark" and "repeated-prompt", which are counted only."""

    file: str
    format: str
    rows: int
    usable: int
    counts: Mapping[str, int]
    problems: tuple[Problem, ...]

    def text(self, *, examples: int = 3) -> str:
        """The report for a person: one line for the file, one for each kind met, with its first examples."""
        lines = [f"{self.file}: {self.rows} rows read, {self.usable} usable (format: {self.format})"]
        for kind in sorted(self.counts, key=lambda kind: (kind in FINDINGS, kind)):
            what = FINDINGS.get(kind, "malformed, skipped")
            lines.append(f"  {kind}: {self.counts[kind]} ({what})")
            found = [problem for problem in self.problems if problem.kind == kind]
            lines += [f"    {problem}" for problem in found[:examples]]
            if len(found) > examples:
                lines.append(f"    and {len(found) - examples} more")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Loaded:
    """Preferences of a file, with every readable row of it in order.

    `outcomes[i]` is the index in `preferences` of what `rows[i]` became, or the problem that kept it out.
    `strengths` holds, by id, the strengths that the rows carried already.
    """

    path: Path
    preferences: list[Preference]
    rows: list[Row]
    outcomes: list[int | Problem]
    strengths: dict[str, Strength]
    report: LoadReport

    @property
    def unusable(self) -> list[Problem]:
        """Why rows became no preference, in order: identical pairs, and malformed rows that were skipped."""
        return [outcome for outcome in self.outcomes if isinstance(outcome, Problem)]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt of a prompt file; `row` is the untouched input row."""

    id: str
    prompt: Prompt
    source: str
    row: Row


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One prompt with the response to imitate; `row` is the untouched input row."""

    id: str
    prompt: Prompt
    response: str
    source: str
    row: Row


@dataclass(frozen=True, slots=True)
class Records(Generic[T]):
    """What `load_prompts` and `load_demonstrations` return: the items and the report."""

    items: list[T]
    report: LoadReport


# ---- the three loaders ---------------------------------------------------------------------------------------


def load_preferences(
    path: str | Path,
    *,
    format: str = "auto",
    on_invalid: OnInvalid = "error",
    limit: int | None = None,
    split: str | None = None,
) -> Loaded:
    """Read comparisons.

    `format` is a name of `formats.FORMATS`, or "auto": the format that most of the first 100 rows have, which
    all must have. `limit` reads only the first rows; `split` names a split of a folder. A row's id is its `id`, or
    "file-stem:line". Identical pairs never stop the reading: they are left out and reported.
    Raises `InputError` for an unreadable file and, unless `on_invalid` is "skip", for malformed rows.
    """
    if format not in ("auto", *FORMATS):
        raise InputError(f"format must be auto, {', '.join(FORMATS)}, got {format!r}")
    read = _read(Path(path), on_invalid, limit, split)
    name = _majority_format(read.plain) if format == "auto" else format
    strengths: dict[str, Strength] = {}

    def parse(row: Row, id: str, source: str) -> Preference:
        preference = _parse_preference(row, name, format == "auto", id, source)
        strength = read_strength(row)
        if preference.chosen == preference.rejected:
            raise RowError("identical", "chosen and rejected are equal: the pair says nothing")
        if strength is not None:
            strengths[id] = strength
        return preference

    parsed = _parse(read, parse)
    preferences: list[Preference] = []
    outcomes: list[int | Problem] = []
    for row, item in zip(read.rows, parsed, strict=True):
        if isinstance(item, Problem):
            outcomes.append(item)
        else:
            outcomes.append(len(preferences))
            preferences.append(replace(item, row=row))
    cut_off = sum(not (_END_MARK.search(p.chosen) and _END_MARK.search(p.rejected)) for p in preferences)
    report = _report(read, name, parsed, len(preferences), _compare(preferences, read.file), {"no-end-mark": cut_off})
    return Loaded(Path(path), preferences, read.rows, outcomes, strengths, report)


def load_prompts(
    path: str | Path,
    *,
    on_invalid: OnInvalid = "error",
    limit: int | None = None,
    split: str | None = None,
) -> Records[PromptRow]:
    """Read prompts: a column `prompt` (text or messages), `turns` (the first), or the prompts of preferences.

    A file of preferences gives each prompt once; other files keep repeated prompts. Raises like `load_preferences`.
    """
    read = _read(Path(path), on_invalid, limit, split)
    parsed = _parse(read, lambda row, id, source: PromptRow(id, read_prompt(row), source, row))
    items: list[PromptRow] = []
    seen: set[Prompt] = set()
    repeated = 0
    for row, item in zip(read.rows, parsed, strict=True):
        if isinstance(item, Problem):
            continue
        again = item.prompt in seen
        repeated += again
        seen.add(item.prompt)
        if not (again and row.get("rejected") is not None):
            items.append(replace(item, row=row))
    return Records(items, _report(read, "prompts", parsed, len(items), [], {"repeated-prompt": repeated}))


def load_demonstrations(
    path: str | Path,
    *,
    on_invalid: OnInvalid = "error",
    limit: int | None = None,
    split: str | None = None,
) -> Records[Demonstration]:
    """Read demonstrations for SFT: `prompt` with `response` or `completion` (text or messages), or `messages`.

    Of a dialogue the last turn of the assistant is the response. Raises like `load_preferences`.
    """
    read = _read(Path(path), on_invalid, limit, split)
    parsed = _parse(read, lambda row, id, source: Demonstration(id, *read_demonstration(row), source, row))
    items = [
        replace(item, row=row) for row, item in zip(read.rows, parsed, strict=True) if not isinstance(item, Problem)
    ]
    return Records(items, _report(read, "demonstrations", parsed, len(items), [], {}))


# ---- from rows to items --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Read:
    """The rows of a file: as they came, and `plain`, the same with a CSV's texts turned into numbers and lists."""

    file: str
    rows: list[Row]
    plain: list[Row]
    lines: list[int]
    unreadable: list[Problem]
    skip: bool


def _read(path: Path, on_invalid: str, limit: int | None, split: str | None) -> _Read:
    if on_invalid not in ("error", "skip"):
        raise InputError(f"on_invalid must be error or skip, got {on_invalid!r}")
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, got {limit}")
    file = str(path)
    rows: list[Row] = []
    lines: list[int] = []
    unreadable: list[Problem] = []
    for line, row in read_rows(path, split=split):
        if isinstance(row, RowError):
            unreadable.append(Problem(row.kind, file, line, str(row)))
        else:
            rows.append(row)
            lines.append(line)
        if limit is not None and len(rows) + len(unreadable) >= limit:
            break
    if not rows and not unreadable:
        raise InputError(f"{file}: holds no rows")
    plain = [_from_cells(row) for row in rows] if _suffix(path) == ".csv" else rows
    return _Read(file, rows, plain, lines, unreadable, on_invalid == "skip")


def _parse(read: _Read, parse: Callable[[Row, str, str], T]) -> list[T | Problem]:
    """Parse each row, or say why not. Raises `InputError` for malformed rows unless they are to be skipped."""
    parsed: list[T | Problem] = []
    stem = Path(read.file).name.removesuffix(".gz").rpartition(".")
    used: set[str] = set()
    for row, line in zip(read.plain, read.lines, strict=True):
        try:
            id = _unique(_row_id(row) or f"{stem[0] or stem[2]}:{line}", used)
            parsed.append(parse(row, id, f"{read.file}:{line}"))
        except RowError as error:
            parsed.append(Problem(error.kind, read.file, line, str(error)))
    bad = read.unreadable + [p for p in parsed if isinstance(p, Problem) and p.kind not in FINDINGS]
    if bad and (not read.skip or len(bad) == len(parsed) + len(read.unreadable)):
        raise InputError(_refusal(read, sorted(bad, key=lambda problem: problem.line)))
    return parsed


def _refusal(read: _Read, bad: list[Problem]) -> str:
    kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(problem.kind for problem in bad).most_common())
    total = len(read.rows) + len(read.unreadable)
    lines = [f"{read.file}: {len(bad)} of {total} rows are malformed ({kinds}):"]
    last = ""
    for problem in bad[:10]:
        same = problem.message == last
        lines.append(f"  {problem.file}:{problem.line}: (the same)" if same else f"  {problem}")
        last = problem.message
    if len(bad) > 10:
        lines.append(f"  and {len(bad) - 10} more")
    skip = "" if read.skip else ", or leave these rows out with --on-invalid skip (on_invalid='skip')"
    return "\n".join([*lines, f"Mend the file{skip}."])


def _row_id(row: Row) -> str:
    value = row.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RowError("type", f"id must be a text or a whole number, got {type(value).__name__} {value!r}")
    return str(value)


def _unique(id: str, used: set[str]) -> str:
    """The id, or with the first free "#2", "#3", ... behind it."""
    n, unique = 1, id
    while unique in used:
        n += 1
        unique = f"{id}#{n}"
    used.add(unique)
    return unique


def _majority_format(rows: Sequence[Row]) -> str:
    names: Counter[str] = Counter()
    for row in rows[:100]:
        try:
            names[detect_format(row)] += 1
        except RowError:
            continue
    return names.most_common(1)[0][0] if names else "auto"


def _parse_preference(row: Row, name: str, detected: bool, id: str, source: str) -> Preference:
    own = detect_format(row) if detected else name
    preference = FORMATS[name if name in FORMATS else own](row, id=id, source=source)
    if own != name and name in FORMATS:
        raise RowError("schema", f"the row looks like format {own}, the file like {name}: mend it or name the format")
    return preference


def _compare(preferences: Sequence[Preference], file: str) -> list[Problem]:
    """Exact duplicates and contradictory labels, each reported at the later row."""
    first: dict[tuple[Prompt, str, str], Preference] = {}
    found: list[Problem] = []
    for p in preferences:
        line = int(p.source.rpartition(":")[2])
        same = first.setdefault((p.prompt, p.chosen, p.rejected), p)
        if same is not p:
            found.append(Problem("duplicate", file, line, f"the same pair as {same.source}"))
        swapped = first.get((p.prompt, p.rejected, p.chosen))
        if swapped is not None:
            found.append(Problem("contradiction", file, line, f"labelled the other way round at {swapped.source}"))
    return found


def _report(
    read: _Read,
    format: str,
    parsed: Sequence[Any],
    usable: int,
    found: list[Problem],
    counted: dict[str, int],
) -> LoadReport:
    problems = read.unreadable + [p for p in parsed if isinstance(p, Problem)] + found + _duplicate_ids(read)
    problems.sort(key=lambda problem: problem.line)
    counts = Counter(problem.kind for problem in problems)
    counts.update({kind: n for kind, n in counted.items() if n})
    rows = len(read.rows) + len(read.unreadable)
    return LoadReport(read.file, format, rows, usable, dict(sorted(counts.items())), tuple(problems))


def _duplicate_ids(read: _Read) -> list[Problem]:
    first: dict[str, int] = {}
    found: list[Problem] = []
    for row, line in zip(read.plain, read.lines, strict=True):
        value = row.get("id")
        if isinstance(value, (str, int)) and first.setdefault(str(value), line) != line:
            found.append(Problem("duplicate-id", read.file, line, f"id {value} is also at line {first[str(value)]}"))
    return found


def _from_cells(row: Row) -> Row:
    """A CSV row with empty cells as nulls, known numbers as numbers, messages and score lists as lists."""
    plain: dict[str, Any] = {}
    for name, text in row.items():
        value: Any = text
        if name in _NUMBERS or name == "id":
            value = text or None
        if name in _NUMBERS and text:
            try:
                value = float(text)
            except ValueError:
                value = text
        elif name in _STRUCTURED or name in (CHOSEN_SCORES, REJECTED_SCORES):
            value = _structured(name, text, published=bool(row.get(MEAN)))
        plain[name] = value
    return plain


def _structured(name: str, text: str, *, published: bool) -> Any:
    """The list that a cell holds as JSON: messages anywhere; texts or numbers only where the format has them."""
    if not text.lstrip().startswith("["):
        return None if text == "" and name not in ("prompt", "chosen", "rejected") else text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    messages = bool(value) and all(isinstance(item, dict) and "role" in item for item in value)
    listed = name in ("turns", CHOSEN_SCORES, REJECTED_SCORES) or (published and name in ("chosen", "rejected"))
    return value if messages or listed else text


# ---- from files to rows --------------------------------------------------------------------------------------


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
        if _suffix(path) not in readers:
            raise InputError(f"{path}: the name must end with one of {_SUFFIXES}")
        reader = readers[_suffix(path)]
    line = 0
    try:
        for line, row in reader(path, split):
            yield line, row
    except InputError:
        raise
    except (OSError, EOFError, zlib.error, _arrow_error()) as error:
        raise InputError(f"{path}: damaged or unreadable after row {line}: {error}") from error


def _suffix(path: Path) -> str:
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
            raise InputError(f"{path}: name one of its splits {', '.join(names)} (split=...); {got}")
        path = path / (split or names[0])
    elif split is not None:
        raise InputError(f"{path}: holds one data set without splits; leave split={split!r} out")
    if not (path / "state.json").exists():
        raise InputError(f"{path}: a folder must be one written by datasets' save_to_disk (no state.json in it)")
    yield from enumerate(datasets.load_from_disk(str(path)), 1)
