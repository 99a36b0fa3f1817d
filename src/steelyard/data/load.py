"""Read preferences, prompts and demonstrations from files, and say what was found in them.

Files: JSON Lines, a JSON array, CSV (each also as .gz), Parquet, and folders written by `datasets`' save_to_disk.
JSON Lines and CSV are read line by line. Every problem names file and line (for Parquet and folders: the row,
counted from 1). No row is lost: `Loaded.rows` keeps each readable row as it came, and `Loaded.outcomes` says
what became of it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from steelyard.data.dialogues import RowError
from steelyard.data.formats import (
    CHOSEN_SCORES,
    FORMATS,
    MEAN,
    PUBLISHED_COLUMNS,
    REJECTED_SCORES,
    Row,
    detect_format,
    read_demonstration,
    read_prompt,
    read_strength,
)
from steelyard.data.read import read_rows, suffix
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.types import Preference, Prompt, Strength

OnInvalid = Literal["error", "skip"]
_OPTION = "--on-invalid skip (on_invalid: skip in YAML, on_invalid='skip' in Python)"  # commands on preferences have it
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

    def left_out(self, encoded: str = "") -> str:
        """One line on what became no preference, after `Encoded.text` on what became no tokens; empty if all did."""
        identical = self.report.counts.get("identical", 0)
        malformed = self.report.rows - self.report.usable - identical
        said = [f"{identical} pairs left out: chosen equals rejected"] * (identical > 0)
        return "; ".join(filter(None, [encoded, *said, f"{malformed} malformed rows skipped" if malformed else ""]))


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

    parsed = _parse(read, parse, _OPTION)
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
    plain = [_from_cells(row) for row in rows] if suffix(path) == ".csv" else rows
    return _Read(file, rows, plain, lines, unreadable, on_invalid == "skip")


def _parse(
    read: _Read, parse: Callable[[Row, str, str], T], option: str = "on_invalid='skip' (in Python)"
) -> list[T | Problem]:
    """Parse each row, or say why not. Raises `InputError`, naming `option`, for malformed rows not to be skipped."""
    parsed: list[T | Problem] = []
    stem = Path(read.file).name.removesuffix(".gz").rpartition(".")
    used: dict[str, int] = {}
    for row, line in zip(read.plain, read.lines, strict=True):
        try:
            id = _unique(_row_id(row) or f"{stem[0] or stem[2]}:{line}", used)
            parsed.append(parse(row, id, f"{read.file}:{line}"))
        except RowError as error:
            parsed.append(Problem(error.kind, read.file, line, str(error)))
    bad = read.unreadable + [p for p in parsed if isinstance(p, Problem) and p.kind not in FINDINGS]
    if bad and (not read.skip or len(bad) == len(parsed) + len(read.unreadable)):
        raise InputError(_refusal(read, sorted(bad, key=lambda problem: problem.line), option))
    return parsed


def _refusal(read: _Read, bad: list[Problem], option: str) -> str:
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
    skip = "" if read.skip or len(bad) == total else f", or leave these rows out with {option}"
    return "\n".join([*lines, f"Mend the file{skip}."])


def _row_id(row: Row) -> str:
    value = row.get("id")
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        raise RowError("type", f"id must be a text or a whole number, got {type(value).__name__} {value!r}")
    return str(value)


def _unique(id: str, used: dict[str, int]) -> str:
    """The id, or with the first free "#2", "#3", ... behind it; `used` holds the last number that each id got."""
    n, unique = used.get(id, 1), id
    while unique in used:
        n += 1
        unique = f"{id}#{n}"
    used[unique], used[id] = 1, n
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
        raise RowError(
            "schema",
            f"the row looks like format {own}, the file like {name}: mend it, move it to another file, or name "
            f"the format (in Python: format={name!r})",
        )
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


def say_if_shared(trained: str, held_out: str) -> None:
    """A warning on stderr if prompts of the file `held_out` are in the file `trained`, too."""
    seen = {prompt_key(p.prompt) for p in load_prompts(trained).items}
    held = {prompt_key(p.prompt) for p in load_prompts(held_out).items}
    if both := len(seen & held):
        print(
            f"warning: {held_out}: {both} of {len(held)} prompts are in {trained}, too: the examination then says "
            "little of prompts that the policy was not trained on",
            file=sys.stderr,
            flush=True,
        )
