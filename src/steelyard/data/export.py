"""Write preferences back: annotated rows, repaired sets, and the published strength format.

The suffix chooses the container: .jsonl, .csv (each also with .gz) or .parquet. Files appear whole or not at all (a
temporary file beside the target, then a rename), and nothing is overwritten unasked. JSON has no NaN: it is written as
null.
"""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from steelyard.data.dialogues import parse_turns
from steelyard.data.formats import (
    ANNOTATION_COLUMNS,
    CHOSEN_SCORES,
    JUDGE_LABEL,
    MEAN,
    PUBLISHED_COLUMNS,
    REJECTED_SCORES,
    STD,
)
from steelyard.data.load import Loaded, Problem
from steelyard.errors import InputError
from steelyard.types import Message, Preference, Prompt, Strength

_OWN_COLUMNS = ("id", "prompt", "chosen", "rejected", "flip_prob", "margin", "weight")
_STALE_COLUMNS = {*PUBLISHED_COLUMNS, *ANNOTATION_COLUMNS, "prompt_ids", "chosen_ids", "rejected_ids"}
"""Columns that describe the labels or tokens of the input; after a repair they may say the opposite."""


def write_annotated(
    loaded: Loaded,
    strengths: Mapping[str, Strength],
    out: str | Path,
    *,
    reasons: Mapping[str, str] | None = None,
    overwrite: bool = False,
    overwrite_columns: bool = False,
) -> Path:
    """Write every readable input row, in order and untouched, with the columns of `ANNOTATION_COLUMNS` added.

    `strengths` maps preference ids to strengths. Rows without a preference, and preferences without a strength,
    get nulls and a `reason` (for preferences from `reasons`, by id, where there is one). Returns the path. Raises
    `InputError` when `out` exists and `overwrite` is false, when it is the input (always), when the input has one of
    the columns and `overwrite_columns` is false, or when `strengths` names unknown ids.
    """
    out = Path(out)
    if out.exists() and out.samefile(loaded.path):
        raise InputError(f"{out}: is the input file; write to another name")
    unknown = set(strengths) - {preference.id for preference in loaded.preferences}
    if unknown:
        raise InputError(f"{loaded.path}: has no preference with id {', '.join(sorted(unknown)[:5])}")
    if not overwrite_columns:
        refuse_annotated(loaded)
    rows = []
    for row, outcome in zip(loaded.rows, loaded.outcomes, strict=True):
        if isinstance(outcome, Problem):
            added = _annotation(None, f"{outcome.kind}: {outcome.message}")
        else:
            id = loaded.preferences[outcome].id
            added = _annotation(strengths.get(id), (reasons or {}).get(id, "not scored"))
        rows.append({**row, **added})
    return _write(rows, out, overwrite=overwrite)


def refuse_annotated(loaded: Loaded) -> None:
    """Raise InputError if the rows have one of the columns that `write_annotated` adds."""
    taken = [name for name in ANNOTATION_COLUMNS if any(name in row for row in loaded.rows)]
    if taken:
        raise InputError(
            f"{loaded.path}: already has the columns {', '.join(taken)}; remove or rename them (in Python, they can "
            "be replaced with overwrite_columns=True)"
        )


def write_preferences(preferences: Sequence[Preference], out: str | Path, *, overwrite: bool = False) -> Path:
    """Write a (repaired) set: id, prompt, chosen, rejected, flip_prob, margin, weight, and the rows' other columns.

    A text prompt gives text columns, a conversation gives messages, so TRL reads the file, too. Reading it back
    with `load_preferences` gives equal preferences, but for `source` and `row`. Strengths, judge labels and token
    ids of the input rows are left out: they describe the labels as they were. (CSV has no null: nulls in other
    columns come back as empty text.) Raises `InputError` when there is nothing to write or `out` exists and
    `overwrite` is false.
    """
    if not preferences:
        raise InputError(f"{out}: there are no preferences to write")
    rows = []
    for p in preferences:
        text = isinstance(p.prompt, str)
        own = {
            "id": p.id,
            "prompt": p.prompt if text else _message_rows(cast("tuple[Message, ...]", p.prompt)),
            "chosen": p.chosen if text else _message_rows((Message("assistant", p.chosen),)),
            "rejected": p.rejected if text else _message_rows((Message("assistant", p.rejected),)),
            "flip_prob": p.flip_prob,
            "margin": p.margin,
            "weight": p.weight,
        }
        extra = {k: v for k, v in p.row.items() if k not in _STALE_COLUMNS and k not in _OWN_COLUMNS}
        rows.append(own | extra)
    return _write(rows, Path(out), overwrite=overwrite)


def write_published(
    preferences: Sequence[Preference],
    out: str | Path,
    *,
    chosen_scores_NM: NDArray[np.floating[Any]],
    rejected_scores_NM: NDArray[np.floating[Any]],
    judge_labels: Sequence[int | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the published strength format (`fnlp/hh-rlhf-strength-cleaned`).

    Row i holds both dialogues as lists of turns, the scores of the members that scored it (nan: did not), and of
    their margins d_m = chosen_m - rejected_m the mean and population std (arXiv 2401.06080, section 2.2).
    `judge_labels`: 1 prefers chosen, 0 rejected, None not judged (written as -1). Turns are bare texts where user
    and assistant take turns, "Human: ..." texts otherwise, so that no role is lost; a text prompt
    becomes one user turn. Raises `InputError` when the
    shapes do not match, a pair has no score, or `out` exists and `overwrite` is false.
    """
    chosen_NM, rejected_NM = np.asarray(chosen_scores_NM, float), np.asarray(rejected_scores_NM, float)
    n = len(preferences)
    if chosen_NM.ndim != 2 or chosen_NM.shape != rejected_NM.shape or chosen_NM.shape[0] != n or n == 0:
        raise InputError(
            f"{out}: scores must have shape (preferences, members) with at least one preference; got "
            f"{chosen_NM.shape} and {rejected_NM.shape} for {n} preferences"
        )
    labels = [None] * n if judge_labels is None else list(judge_labels)
    if len(labels) != n or any(label not in (None, 0, 1) for label in labels):
        raise InputError(f"{out}: judge_labels must hold 1, 0 or None for each of the {n} preferences")
    scored_NM = ~np.isnan(chosen_NM)
    if not np.array_equal(scored_NM, ~np.isnan(rejected_NM)) or not scored_NM.any(axis=1).all():
        raise InputError(f"{out}: each pair needs a member that scored both responses; nan marks no score for both")
    if np.isinf(chosen_NM).any() or np.isinf(rejected_NM).any():
        raise InputError(f"{out}: scores must be finite")
    rows = []
    for i, preference in enumerate(preferences):
        chosen_M, rejected_M = chosen_NM[i, scored_NM[i]], rejected_NM[i, scored_NM[i]]
        label = labels[i]
        rows.append(
            {
                "chosen": _turns(preference.prompt, preference.chosen),
                "rejected": _turns(preference.prompt, preference.rejected),
                JUDGE_LABEL: -1 if label is None else int(label),
                MEAN: float(np.mean(chosen_M - rejected_M)),
                STD: float(np.std(chosen_M - rejected_M)),
                CHOSEN_SCORES: chosen_M.tolist(),
                REJECTED_SCORES: rejected_M.tolist(),
            }
        )
    return _write(rows, Path(out), overwrite=overwrite)


# ---- rows ----------------------------------------------------------------------------------------------------


def _annotation(strength: Strength | None, reason: str) -> dict[str, Any]:
    if strength is None:
        return dict.fromkeys(ANNOTATION_COLUMNS) | {"reason": reason}
    s = strength
    values = (s.mean, s.std, s.votes, s.voters, s.p_flip, s.action, s.reason)
    return dict(zip(ANNOTATION_COLUMNS, values, strict=True))


def _message_rows(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def _turns(prompt: Prompt, response: str) -> list[str]:
    """The dialogue as turns: bare if reading them back gives the same roles, else with the speaker's name."""
    asked = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    messages = (*asked, Message("assistant", response))
    bare = [message.content for message in messages]
    if parse_turns(bare) == messages:
        return bare
    names = {"user": "Human", "assistant": "Assistant", "system": "System"}
    return [f"{names[message.role]}: {message.content}" for message in messages]


# ---- containers ----------------------------------------------------------------------------------------------


def _write(rows: Sequence[Mapping[str, Any]], out: Path, *, overwrite: bool) -> Path:
    writers = {".jsonl": _write_jsonl, ".csv": _write_csv, ".parquet": _write_parquet}
    name = out.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    if suffix not in writers or (suffix == ".parquet" and name.endswith(".gz")):
        raise InputError(f"{out}: the name must end with .jsonl, .csv (each also with .gz) or .parquet")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another name, or remove it (in Python: overwrite=True)")
    if not out.parent.is_dir():
        raise InputError(f"{out}: the folder {out.parent} does not exist")
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if name.endswith(".gz"):
                # No name and no time inside, so that equal rows give equal bytes.
                with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed:
                    writers[suffix](rows, cast(IO[bytes], packed), out)
            else:
                writers[suffix](rows, file, out)
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return out


def _write_jsonl(rows: Iterable[Mapping[str, Any]], file: IO[bytes], out: Path) -> None:
    for row in rows:
        file.write(_json(row, out).encode("utf-8") + b"\n")


def _write_csv(rows: Sequence[Mapping[str, Any]], file: IO[bytes], out: Path) -> None:
    columns = _columns(rows)
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    # The default line end, \r\n, makes the writer quote lone carriage returns, too.
    writer = csv.writer(text)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name), out) for name in columns])
    text.flush()
    text.detach()


def _write_parquet(rows: Sequence[Mapping[str, Any]], file: IO[bytes], out: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, real = pa.string(), pa.float64()
    types = dict(zip(ANNOTATION_COLUMNS, (real, real, real, pa.int64(), real, text, text), strict=True))
    arrays = {}
    for name in _columns(rows):
        try:
            arrays[name] = pa.array([row.get(name) for row in rows], type=types.get(name))
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise InputError(f"{out}: column {name} does not fit Parquet ({error}); write .jsonl instead") from error
    try:
        pq.write_table(pa.table(arrays), file)
    except pa.ArrowException as error:
        raise InputError(f"{out}: {error}; write .jsonl instead") from error


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(value: Any, out: Path) -> Any:
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
        return value
    return _json(value, out)


def _json(value: Any, out: Path) -> str:
    def other(item: Any) -> Any:
        if isinstance(item, (datetime.date, datetime.time)):
            return item.isoformat()
        if isinstance(item, decimal.Decimal):
            return str(item)
        raise InputError(f"{out}: a value of type {type(item).__name__} has no JSON form; write .parquet instead")

    try:
        return json.dumps(value, ensure_ascii=False, default=other, allow_nan=False)
    except InputError:
        raise
    except ValueError:
        pass
    try:
        return json.dumps(_without_nan(value), ensure_ascii=False, default=other, allow_nan=False)
    except InputError:
        raise
    except ValueError:
        raise InputError(f"{out}: an infinite number has no JSON form; write .parquet instead") from None


def _without_nan(value: Any) -> Any:
    """Null for NaN, as tables' missing numbers are read."""
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, Mapping):
        return {k: _without_nan(v) for k, v in value.items()}
    return [_without_nan(v) for v in value] if isinstance(value, (list, tuple)) else value


def fits_json(rows: Iterable[Mapping[str, Any]]) -> bool:
    """Whether rows can be written as JSON: those of Parquet files may hold bytes (images)."""
    try:
        for row in rows:
            _json(row, Path())
    except InputError:
        return False
    return True
