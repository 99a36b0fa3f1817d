"""Read reward-model benchmarks in their published layouts, from local files.

- RewardBench (arXiv 2403.13787; `allenai/reward-bench`, split `filtered`): `prompt`, `chosen`, `rejected`, `subset`.
- Its prior sets (`allenai/preference-test-sets`): one file each, `prompt` as text or messages, `chosen`, `rejected`.
- RewardBench 2 (arXiv 2506.01937; `allenai/reward-bench-2`): `id`, `prompt`, lists `chosen` and `rejected`, `subset`.
- RM-Bench (arXiv 2410.16184; `THU-KEG/RM-Bench`): `prompt`, `chosen` and `rejected` of three styles each (concise,
  detailed, detailed in Markdown), `domain`. The files of single domains have no `domain`: their name begins with it.

Any file type of `data.read` will do. A row that does not fit raises `InputError` with file, line and field: a
benchmark with rows left out is another benchmark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from steelyard.data.dialogues import RowError
from steelyard.data.formats import Row
from steelyard.data.read import read_rows
from steelyard.errors import InputError
from steelyard.types import Message, Prompt

# Domain -> (the kinds of rows it is made of, rows in the published files: for math by the paper's count).
RM_BENCH: dict[str, tuple[tuple[str, ...], int]] = {
    "chat": ((), 129),
    "math": ((), 529),
    "code": ((), 228),
    "safety": (("safety-refuse", "safety-response"), 441),
}
RM_BENCH_STYLES = 3


@dataclass(frozen=True, slots=True)
class Item:
    """One row: a prompt and its responses, the first `correct` of them being the right ones."""

    prompt: Prompt
    responses: tuple[str, ...]
    correct: int
    subset: str
    id: str
    source: str


def read_rewardbench(path: str) -> list[Item]:
    """RewardBench: pairs with a subset. Raises InputError."""
    return list(_items(path, _pair))


def read_prior_set(path: str, name: str) -> list[Item]:
    """One of RewardBench's prior sets; the whole file is the subset `name`. Raises InputError."""
    return list(_items(path, partial(_pair, subset=name)))


def read_rewardbench2(path: str) -> list[Item]:
    """RewardBench 2: one right response and some wrong ones; in `Ties` several right ones. Raises InputError."""
    return list(_items(path, _best_of))


def read_rm_bench(paths: Sequence[str]) -> list[Item]:
    """RM-Bench, in one file or in one for each domain: three right responses, then three wrong. Raises InputError."""
    found: list[Item] = []
    for path in paths:
        stem = Path(path).name.lower()
        named = next((stem.split(".")[0].split("_")[0] for d in RM_BENCH if stem.startswith(d)), "")
        found += _items(path, partial(_styles, named=named))
    return found


def _items(path: str, parse: Callable[[Row, str], Item]) -> Iterator[Item]:
    empty = True
    for line, row in read_rows(path):
        source, empty = f"{path}:{line}", False
        if isinstance(row, RowError):
            raise InputError(f"{source}: {row}")
        yield parse(row, source)
    if empty:
        raise InputError(f"{path}: holds no rows")


def _pair(row: Row, source: str, subset: str = "") -> Item:
    responses = (_text(row, "chosen", source), _text(row, "rejected", source))
    return Item(_prompt(row, source), responses, 1, subset or _text(row, "subset", source), _id(row, source), source)


def _best_of(row: Row, source: str) -> Item:
    chosen, rejected = _texts(row, "chosen", source), _texts(row, "rejected", source)
    subset, id = _text(row, "subset", source), _id(row, source)
    for name, count in (
        ("num_correct", len(chosen)),
        ("num_incorrect", len(rejected)),
        ("total_completions", len(chosen) + len(rejected)),
    ):
        if row.get(name) is not None and row[name] != count:
            raise _wrong(source, name, f"the number of responses it counts, {count}", row[name])
    if subset.lower() == "ties":
        kind, colon, number = id.partition(":")
        if kind not in ("ref", "tied") or not colon or not number.isdigit():
            raise _wrong(source, "id", "'ref:NUMBER' or 'tied:NUMBER' in the subset Ties", id)
        if kind == "tied" and len(chosen) < 2:
            raise _wrong(source, "chosen", "at least two right responses in a tied row", len(chosen))
    elif len(chosen) != 1:
        raise _wrong(source, "chosen", "exactly one response outside the subset Ties", len(chosen))
    return Item(_prompt(row, source), (*chosen, *rejected), len(chosen), subset, id, source)


def _styles(row: Row, source: str, named: str) -> Item:
    chosen, rejected = _texts(row, "chosen", source), _texts(row, "rejected", source)
    for name, texts in (("chosen", chosen), ("rejected", rejected)):
        if len(texts) != RM_BENCH_STYLES:
            raise _wrong(source, name, "three responses (concise, detailed, detailed in Markdown)", len(texts))
    domain = _text(row, "domain", source) if row.get("domain") is not None or not named else named
    return Item(_prompt(row, source), (*chosen, *rejected), RM_BENCH_STYLES, domain, _id(row, source), source)


def _prompt(row: Row, source: str) -> Prompt:
    """Text is one user turn. In messages the published reader takes the roles from the places: the user begins."""
    value = row.get("prompt")
    if not isinstance(value, list):
        return _text(row, "prompt", source)
    turns: list[Message] = []
    for i, turn in enumerate(value):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise _wrong(source, f"prompt[{i}]", "a message {'role', 'content'}", turn)
        turns.append(Message("assistant" if i % 2 else "user", turn["content"]))
    if not turns or turns[-1].role != "user":
        raise _wrong(source, "prompt", "an odd number of messages: the user asks last", len(turns))
    return tuple(turns)


def _text(row: Row, name: str, source: str) -> str:
    if not isinstance(row.get(name), str):
        raise _wrong(source, name, "a text", row.get(name), row)
    return str(row[name])


def _texts(row: Row, name: str, source: str) -> tuple[str, ...]:
    value = row.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise _wrong(source, name, "a list of texts", value, row)
    return tuple(value)


def _id(row: Row, source: str) -> str:
    value = row.get("id")
    return source if value is None else str(value)


def _wrong(source: str, name: str, must: str, got: Any, row: Row | None = None) -> InputError:
    shown = repr(got)
    received = f"; columns received: {', '.join(map(str, row))}" if row is not None and row.get(name) is None else ""
    return InputError(
        f"{source}: field {name!r} must be {must}, got {shown if len(shown) <= 60 else shown[:57] + '...'}{received}"
    )
