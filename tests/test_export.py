"""What is written comes back, whole, and nothing is overwritten unasked."""

from __future__ import annotations

import csv
import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from steelyard.data.export import write_annotated, write_preferences, write_published
from steelyard.data.load import Loaded, load_preferences
from steelyard.errors import InputError
from steelyard.types import Message, Preference, Strength

CONTAINERS = ["jsonl", "jsonl.gz", "csv", "csv.gz", "parquet"]
ROWS: list[dict[str, Any]] = [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "id": "a", "note": "é\u2028"},
    {"prompt": "Why?", "chosen": "Same.", "rejected": "Same.", "id": "b", "note": "x"},
    {"prompt": "", "chosen": "Lost.", "rejected": "Gone.", "id": "c", "note": "y"},
    {"prompt": "How?", "chosen": 'So,\r\n"so"\rso.', "rejected": "No.", "id": "d", "note": "z"},
]
STRONG = Strength(mean=2.5, std=0.5, votes=3.0, voters=4, p_flip=0.125, action="review", reason="members disagree")


def load(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Loaded:
    path = folder / "prefs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_preferences(path, on_invalid="skip")


def content(preferences: list[Preference]) -> list[Preference]:
    return [replace(p, source="", row={}) for p in preferences]


@pytest.mark.parametrize("container", CONTAINERS)
def test_annotated_rows_keep_their_order_and_content(tmp_path: Path, container: str) -> None:
    out = write_annotated(load(tmp_path), {"a": STRONG}, tmp_path / f"out.{container}")
    back = load_preferences(out, on_invalid="skip")
    assert [{k: row[k] for k in ROWS[0]} for row in back.rows] == ROWS
    assert back.strengths == {"a": STRONG}
    assert [row["reason"] for row in back.rows] == [
        "members disagree",
        "identical: chosen and rejected are equal: the pair says nothing",
        "empty: prompt is empty",
        "not scored",
    ]
    nothing = "" if "csv" in container else None
    assert [row["strength_mean"] for row in back.rows[1:]] == [nothing] * 3
    assert list(back.rows[1]) == [
        *ROWS[0],
        *("strength_mean", "strength_std", "votes", "voters", "p_flip", "suggested_action", "reason"),
    ]


def test_annotation_refusals(tmp_path: Path) -> None:
    loaded, out = load(tmp_path), tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"prefs\.jsonl: is the input file; write to another name"):
        write_annotated(loaded, {}, loaded.path, overwrite=True)
    with pytest.raises(InputError, match="has no preference with id b, z"):
        write_annotated(loaded, {"z": STRONG, "b": STRONG}, out)
    again = load_preferences(write_annotated(loaded, {"a": STRONG}, out), on_invalid="skip")
    with pytest.raises(InputError, match=r"already has the columns strength_mean, .*overwrite_columns=True"):
        write_annotated(again, {}, tmp_path / "two.jsonl")
    weak = replace(STRONG, mean=-1.0)
    two = write_annotated(again, {"a": weak}, tmp_path / "two.jsonl", overwrite_columns=True)
    assert load_preferences(two, on_invalid="skip").strengths == {"a": weak}


CONVERSATION = (Message("system", "Be kind."), Message("user", "Hi\n\nHuman: x"))
TEXTS = [
    Preference("a", "Why?", "Because.", "No.", 0.1, 1 / 3, 1.0, "f:1", {"note": "n", "chosen": "old"}),
    Preference("b", " padded ", "line\r\nline", "lone\rreturn", 1.0, -2.5, 0.0, "f:2", {"note": "m"}),
]
CHATS = [
    Preference("c", CONVERSATION, "Hello.", " Go.", 0.25, 0.0, 2.0),
    Preference("d", CONVERSATION[1:], "Yes.", "[1, 2]"),
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("preferences", [TEXTS, CHATS], ids=["text", "messages"])
def test_preferences_come_back_equal(tmp_path: Path, preferences: list[Preference], container: str) -> None:
    out = write_preferences(preferences, tmp_path / f"out.{container}")
    assert content(load_preferences(out).preferences) == content(preferences)


def test_text_and_messages_may_share_a_jsonl_but_not_a_parquet(tmp_path: Path) -> None:
    out = write_preferences(TEXTS + CHATS, tmp_path / "out.jsonl")
    assert content(load_preferences(out).preferences) == content(TEXTS + CHATS)
    with pytest.raises(InputError, match=r"column prompt does not fit Parquet .*write \.jsonl instead"):
        write_preferences(TEXTS + CHATS, tmp_path / "out.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_extra_columns_stay_and_stale_measurements_go(tmp_path: Path) -> None:
    row = {"topic": "t", "votes": 3, "GPT4 label": 1, "mean preference difference": 2.0, "chosen_ids": [1], "weight": 9}
    out = write_preferences([replace(TEXTS[0], row=row), TEXTS[1]], tmp_path / "out.jsonl")
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    own = ["id", "prompt", "chosen", "rejected", "flip_prob", "margin", "weight"]
    assert list(rows[0]) == [*own, "topic"]
    assert rows[0]["weight"] == 1.0
    assert list(rows[1]) == [*own, "note"]


def test_published_format_by_hand(tmp_path: Path) -> None:
    nan = np.nan
    preferences = [
        Preference("a", "Why?", "Because.", "No."),
        Preference("b", CONVERSATION, "Hello.", "Go."),
    ]
    out = write_published(
        preferences,
        tmp_path / "out.jsonl",
        chosen_scores_NM=np.array([[3.0, 1.0, nan], [0.0, -1.0, 4.0]]),
        rejected_scores_NM=np.array([[1.0, 1.0, nan], [1.0, 0.0, 0.0]]),
        judge_labels=[0, None],
    )
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == {
        "chosen": ["Why?", "Because."],
        "rejected": ["Why?", "No."],
        "GPT4 label": 0,
        "mean preference difference": 1.0,
        "std preference difference": 1.0,
        "chosen score list": [3.0, 1.0],
        "rejected score list": [1.0, 1.0],
    }
    # Margins -1, -1, 4: mean 2/3, variance (2 (5/3)^2 + (10/3)^2) / 3 = 50/9.
    assert rows[1]["mean preference difference"] == pytest.approx(2 / 3)
    assert rows[1]["std preference difference"] == pytest.approx(np.sqrt(50) / 3)
    assert rows[1]["chosen"] == ["System: Be kind.", "Human: Hi\n\nHuman: x", "Assistant: Hello."]
    assert rows[1]["GPT4 label"] == -1

    back = load_preferences(out)
    assert back.report.format == "strength"
    assert [p.prompt for p in back.preferences] == [(Message("user", "Why?"),), CONVERSATION]
    assert [(s.votes, s.voters) for s in back.strengths.values()] == [(1.5, 2), (1.0, 3)]


@pytest.mark.parametrize("container", CONTAINERS)
def test_published_format_round_trips(tmp_path: Path, container: str) -> None:
    scores = np.array([[0.1, 0.2], [0.3, 1e-9]])
    out = write_published(
        CHATS, tmp_path / f"out.{container}", chosen_scores_NM=scores, rejected_scores_NM=scores[::-1]
    )
    back = load_preferences(out)
    expected = [(p.prompt, p.chosen, p.rejected) for p in CHATS]
    assert [(p.prompt, p.chosen, p.rejected) for p in back.preferences] == expected
    # Margins (-0.2, 0.2 - 1e-9) and their negation.
    assert [s.mean for s in back.strengths.values()] == pytest.approx([-5e-10, 5e-10], rel=1e-6)
    assert [s.std for s in back.strengths.values()] == pytest.approx([0.2, 0.2])


def test_published_refusals(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    good = np.zeros((2, 3))
    holed = good.copy()
    holed[0, 0] = np.nan
    for chosen, rejected, message in (
        (np.zeros((3, 2)), np.zeros((3, 2)), r"must have shape \(preferences, members\)"),
        (good, np.zeros((2, 2)), "must have shape"),
        (good, holed, "nan marks no score for both"),
        (good * np.nan, good * np.nan, "each pair needs a member"),
        (good + np.inf, good, "scores must be finite"),
    ):
        with pytest.raises(InputError, match=message):
            write_published(CHATS, out, chosen_scores_NM=chosen, rejected_scores_NM=rejected)
    with pytest.raises(InputError, match="judge_labels must hold 1, 0 or None for each of the 2"):
        write_published(CHATS, out, chosen_scores_NM=good, rejected_scores_NM=good, judge_labels=[1, -1])
    assert not out.exists()


def test_an_existing_file_is_kept_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        write_preferences(TEXTS, out)
    assert out.read_text(encoding="utf-8") == "precious"
    write_preferences(TEXTS, out, overwrite=True)
    assert len(load_preferences(out).preferences) == 2


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="a value of type bytes has no JSON form"):
        write_preferences([replace(TEXTS[0], row={"x": b"raw"})], out, overwrite=True)
    assert out.read_text(encoding="utf-8") == "precious"
    assert list(tmp_path.iterdir()) == [out]


def test_names_and_folders_are_checked(tmp_path: Path) -> None:
    for name in ("out.txt", "out", "out.parquet.gz", "out.json"):
        with pytest.raises(InputError, match="the name must end with"):
            write_preferences(TEXTS, tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        write_preferences(TEXTS, tmp_path / "none" / "out.jsonl")
    with pytest.raises(InputError, match="there are no preferences to write"):
        write_preferences([], tmp_path / "out.jsonl")


def test_gzip_bytes_depend_on_the_rows_alone(tmp_path: Path) -> None:
    one = write_preferences(TEXTS, tmp_path / "one.jsonl.gz")
    two = write_preferences(TEXTS, tmp_path / "two.jsonl.gz")
    assert one.read_bytes() == two.read_bytes()


def test_other_values_in_cells(tmp_path: Path) -> None:
    row = {"day": datetime.date(2024, 5, 1), "tags": ["x", "y"], "ok": True, "none": None, "n": 3}
    out = write_preferences([replace(TEXTS[0], row=row)], tmp_path / "out.csv")
    with out.open(newline="", encoding="utf-8") as file:
        (cells,) = csv.DictReader(file)
    assert [cells[name] for name in row] == ['"2024-05-01"', '["x", "y"]', "true", "", "3"]
    parquet = write_preferences([replace(TEXTS[0], row=row)], tmp_path / "out.parquet")
    (back,) = pq.read_table(parquet).to_pylist()
    assert {name: back[name] for name in row} == row
