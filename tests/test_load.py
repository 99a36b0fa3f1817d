"""Files of every kind, what is found in them, and splitting by prompt."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steelyard.data.load import _unique, load_demonstrations, load_preferences, load_prompts
from steelyard.data.split import prompt_key, ranks, split_by_prompt
from steelyard.errors import InputError
from steelyard.types import Message, Preference

GOOD: dict[str, Any] = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
TEXT: list[dict[str, Any]] = [
    {"prompt": f"Why {i}?", "chosen": "Because.", "rejected": "No.", "note": f"n{i}"} for i in range(3)
]
MESSAGES: list[dict[str, Any]] = [
    {
        "prompt": [{"role": "user", "content": f"Why {i}?"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for i in range(3)
]
HH: list[dict[str, Any]] = [
    {
        "chosen": f"\n\nHuman: Why {i}?\n\nAssistant: Because.",
        "rejected": f"\n\nHuman: Why {i}?\n\nAssistant: No.",
    }
    for i in range(3)
]
STRENGTH: list[dict[str, Any]] = [
    {
        "chosen": [f"Why {i}?", "Because."],
        "rejected": [f"Why {i}?", "No."],
        "GPT4 label": -1,
        "mean preference difference": 1.0,
        "std preference difference": 1.0,
        "chosen score list": [1.0, 3.0],
        "rejected score list": [1.0, 1.0],
    }
    for i in range(3)
]
FORMATS: dict[str, list[dict[str, Any]]] = {"trl text": TEXT, "trl messages": MESSAGES, "hh": HH, "strength": STRENGTH}


def lines(*rows: object) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def put(folder: Path, content: bytes, name: str = "prefs.jsonl") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def write(folder: Path, container: str, rows: Sequence[dict[str, Any]]) -> Path:
    if container in ("jsonl", "jsonl.gz"):
        return put(folder, lines(*rows), f"prefs.{container}")
    if container in ("json", "json.gz"):
        return put(folder, json.dumps(rows, indent=1).encode(), f"prefs.{container}")
    if container in ("csv", "csv.gz"):
        plain = folder / "plain"
        with plain.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
        return put(folder, plain.read_bytes(), f"prefs.{container}")
    if container == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), folder / "prefs.parquet")
        return folder / "prefs.parquet"
    import datasets

    datasets.Dataset.from_list(list(rows)).save_to_disk(folder / "prefs")
    return folder / "prefs"


@pytest.mark.parametrize("container", ["jsonl", "jsonl.gz", "json", "json.gz", "csv", "csv.gz", "parquet", "folder"])
@pytest.mark.parametrize("format", FORMATS)
def test_each_format_from_each_container(tmp_path: Path, format: str, container: str) -> None:
    loaded = load_preferences(write(tmp_path, container, FORMATS[format]))
    assert loaded.report.format == format.split()[0]
    assert (loaded.report.rows, loaded.report.usable, loaded.report.counts) == (3, 3, {})
    assert loaded.outcomes == [0, 1, 2]
    for i, p in enumerate(loaded.preferences):
        assert prompt_key(p.prompt) == f"Why {i}?"
        assert (p.chosen, p.rejected, p.row) == ("Because.", "No.", loaded.rows[i])
    if format == "trl text":
        assert loaded.rows == TEXT
        assert loaded.preferences[2].row["note"] == "n2"
    if format == "strength":
        strength = loaded.strengths[loaded.preferences[0].id]
        assert (strength.mean, strength.std, strength.votes, strength.voters) == (1.0, 1.0, 1.5, 2)


def test_ids_and_sources(tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"id": "a"}, GOOD | {"id": 7}, GOOD | {"id": "a"}, GOOD | {"id": "a#2"}, GOOD | {"id": None}]
    path = put(tmp_path, b"\n" + lines(*rows), "my.prefs.jsonl.gz")
    loaded = load_preferences(path)
    assert [p.id for p in loaded.preferences] == ["my.prefs:2", "a", "7", "a#2", "a#2#2", "my.prefs:7"]
    assert loaded.preferences[0].source == f"{path}:2"
    repeated = [str(problem) for problem in loaded.report.problems if problem.kind == "duplicate-id"]
    assert repeated == [f"{path}:5: id a is also at line 3"]
    with pytest.raises(InputError, match=r"jsonl:1: id must be a text or a whole number, got float 1\.5"):
        load_preferences(put(tmp_path, lines(GOOD | {"id": 1.5})))


def test_one_id_for_all_rows_takes_no_longer_than_ids_of_their_own() -> None:
    class Counting(dict[str, int]):
        asked = 0

        def __contains__(self, key: object) -> bool:
            self.asked += 1
            return super().__contains__(key)

    used = Counting()
    assert [_unique("a", used) for _ in range(500)] == ["a", *(f"a#{n}" for n in range(2, 501))]
    assert used.asked < 1500
    assert [_unique(id, used) for id in ("b#2", "b", "b", "a#2", "a")] == ["b#2", "b", "b#3", "a#2#2", "a#501"]


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (b'{"prompt": "q", "chosen": "a"', "json", "not valid JSON: Expecting ',' delimiter at column 30"),
        (b'{"prompt": "caf\xe9"}', "encoding", "not UTF-8: byte 0xe9 at byte offset 75"),
        (b"[1, 2]", "not-object", "a row must be a JSON object {...}, got list"),
        (b'{"a": "\\ud800", "prompt": "q"}', "encoding", "half of a surrogate pair"),
        (b"[" * 100_000, "json", "not readable JSON"),
        (b'{"prompt": "q", "response": "a"}', "schema", "columns received: prompt, response; known formats: hh"),
        (b'{"prompt": "", "chosen": "a", "rejected": "b"}', "empty", "prompt is empty"),
        (b'{"prompt": "q", "chosen": " ", "rejected": "b"}', "empty", "chosen is empty"),
        (b'{"prompt": "q", "chosen": "a", "rejected": "\\n"}', "empty", "rejected is empty"),
        (b'{"prompt": "q", "chosen": "a", "rejected": 5}', "type", "rejected must be text, got int 5"),
        (b'{"prompt": "q", "chosen": "a", "rejected": "b", "flip_prob": -1}', "value", "flip_prob must lie in [0, 1]"),
        (
            json.dumps(HH[0]).encode(),
            "schema",
            "hh, the file like trl: mend it, move it to another file, or name the format (in Python: format='trl')",
        ),
        (b'{"prompt": "q", "chosen": "a", "rejected": "b", "strength_mean": 1, "p_flip": 2}', "value", "p_flip must"),
    ],
)
def test_malformed_rows_name_file_and_line(tmp_path: Path, raw: bytes, kind: str, message: str) -> None:
    path = put(tmp_path, lines(GOOD) + raw + b"\n" + lines(GOOD | {"chosen": "Since."}, GOOD | {"chosen": "So."}))
    assert len(lines(GOOD)) == 60  # and 15 bytes stand before the latin-1 byte in its line
    with pytest.raises(InputError) as caught:
        load_preferences(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: 1 of 4 rows are malformed ({kind} 1):\n  {path}:2: ")
    assert message in text
    assert "--on-invalid skip" in text

    loaded = load_preferences(path, on_invalid="skip")
    assert [p.chosen for p in loaded.preferences] == ["Because.", "Since.", "So."]
    assert (loaded.report.rows, loaded.report.usable, loaded.report.counts) == (4, 3, {kind: 1})
    (problem,) = loaded.report.problems
    assert (problem.kind, problem.file, problem.line) == (kind, str(path), 2)
    assert f"{kind}: 1 (malformed, skipped)\n    {path}:2: " in loaded.report.text()
    readable = kind not in ("json", "encoding", "not-object")
    assert len(loaded.rows) == 3 + readable
    assert loaded.unusable == ([problem] if readable else [])


def test_the_first_ten_problems_and_the_total(tmp_path: Path) -> None:
    rows = [GOOD] + [GOOD | {"chosen": "" if i % 2 else 3} for i in range(13)]
    with pytest.raises(InputError) as caught:
        load_preferences(put(tmp_path, lines(*rows)))
    text = str(caught.value)
    assert "13 of 14 rows are malformed (type 7, empty 6)" in text
    assert "prefs.jsonl:2: " in text
    assert "prefs.jsonl:11: " in text
    assert "prefs.jsonl:12: " not in text
    assert "and 3 more" in text


def test_a_file_without_one_good_row_is_refused_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 of 2 rows are malformed") as caught:
        load_preferences(put(tmp_path, lines("{", "[]")), on_invalid="skip")
    assert "--on-invalid" not in str(caught.value)
    with pytest.raises(InputError, match=r"Mend the file\.$"):
        load_preferences(put(tmp_path, lines("{", "[")))  # nothing would be left


def test_findings_are_reported_and_never_stop(tmp_path: Path) -> None:
    rows = [
        GOOD,
        GOOD | {"rejected": "Because."},
        GOOD,
        GOOD | {"chosen": "No.", "rejected": "Because."},
        {"prompt": "Cut?", "chosen": 'He said "yes."', "rejected": "I would say that"},
    ]
    path = put(tmp_path, lines(*rows))
    loaded = load_preferences(path)
    assert loaded.report.counts == {"contradiction": 1, "duplicate": 1, "identical": 1, "no-end-mark": 1}
    assert len(loaded.rows) == 5
    assert [problem.line for problem in loaded.unusable] == [2]
    assert [x for x in loaded.outcomes if isinstance(x, int)] == [0, 1, 2, 3]
    found = {problem.kind: str(problem) for problem in loaded.report.problems}
    assert found["identical"] == f"{path}:2: chosen and rejected are equal: the pair says nothing"
    assert found["duplicate"] == f"{path}:3: the same pair as {path}:1"
    assert found["contradiction"] == f"{path}:4: labelled the other way round at {path}:1"
    assert loaded.left_out("all else") == "all else; 1 pairs left out: chosen equals rejected"
    text = loaded.report.text()
    assert text.startswith(f"{path}: 5 rows read, 4 usable (format: trl)\n")
    assert "no-end-mark: 1" in text


def test_an_identical_implicit_pair_is_no_information_either(tmp_path: Path) -> None:
    rows = [{"chosen": "Q: a? b.", "rejected": "Q: a? b."}, {"chosen": "Q: a? b.", "rejected": "Q: a? c."}]
    loaded = load_preferences(put(tmp_path, lines(*rows)))
    assert loaded.report.counts == {"identical": 1}
    assert loaded.preferences[0].prompt == "Q: a?"


def test_byte_order_mark_blank_lines_and_line_separators(tmp_path: Path) -> None:
    odd = GOOD | {"chosen": "one\u2028two\x85three."}
    raw = b"\xef\xbb\xbf" + json.dumps(odd, ensure_ascii=False).encode() + b"\r\n\r\n" + lines(GOOD)
    loaded = load_preferences(put(tmp_path, raw))
    assert [p.chosen for p in loaded.preferences] == [odd["chosen"], "Because."]
    assert loaded.preferences[1].source.endswith(":3")


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = put(tmp_path, lines(*TEXT, "{broken"))
    assert load_preferences(path, limit=3).report.rows == 3
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        load_preferences(path, limit=0)


def test_the_format_can_be_named(tmp_path: Path) -> None:
    path = put(tmp_path, lines(GOOD))
    with pytest.raises(InputError, match=r"prefs\.jsonl:1: chosen must start with 'Human:'"):
        load_preferences(path, format="hh")
    with pytest.raises(InputError, match="format must be auto, hh, trl, strength, got 'alpaca'"):
        load_preferences(path, format="alpaca")
    with pytest.raises(InputError, match="on_invalid must be error or skip, got 'warn'"):
        load_preferences(path, on_invalid="warn")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prefs.txt", b"x", "the name must end with one of .jsonl, .json, .csv"),
        ("prefs.jsonl", b"", "holds no rows"),
        ("prefs.jsonl", b"\n\n", "holds no rows"),
        ("prefs.json", b"[]", "holds no rows"),
        ("prefs.csv", b"", "holds no rows"),
        ("prefs.csv", b"prompt,chosen,rejected\n", "holds no rows"),
        ("prefs.csv", b"prompt,prompt\n1,2\n", "prefs.csv:1: the header names a column twice"),
        ("prefs.csv", b'prompt,chosen,rejected\nq,a,b\nq,"a,b\n', "prefs.csv:3: not valid CSV in the row"),
        ("prefs.csv", "prompt,chosen\r\nq,a\r\n".encode("utf-16"), "prefs.csv:1: not UTF-8: byte 0xff at byte"),
        ("prefs.csv", "prompt,chosen\r\nq,a\r\n".encode("utf-16-le"), "prefs.csv:1: not UTF-8: it holds NUL bytes"),
        ("prefs.json", b'[{"a": 1},\n{"b" 2}]', "prefs.json:2: not valid JSON in this object: Expecting ':'"),
        ("prefs.json", b'[{"a": 1}\n{"b": 2}]', "prefs.json:1: not valid JSON: ',' or ']' must follow"),
        ("prefs.json", b'[{"a": 1}] x', "prefs.json:1: not valid JSON: more text follows"),
        ("prefs.json", b'[{"a": "\xe9"}]', "not UTF-8: byte 0xe9 at byte offset 8"),
        ("prefs.parquet", b"PAR1 not really", "damaged or unreadable after row 0"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        load_preferences(put(tmp_path, content, name), on_invalid="skip")


def test_damaged_gzip_and_missing_file(tmp_path: Path) -> None:
    whole = gzip.compress(lines(*[GOOD | {"id": i} for i in range(5000)]))
    (tmp_path / "half.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "plain.jsonl.gz").write_bytes(lines(GOOD))
    for name in ("half.jsonl.gz", "plain.jsonl.gz"):
        with pytest.raises(InputError, match=f"{name}: damaged or unreadable after row"):
            load_preferences(tmp_path / name)
    with pytest.raises(InputError, match="no such file or folder"):
        load_preferences(tmp_path / "none.jsonl")


def test_json_array_rows_carry_their_line(tmp_path: Path) -> None:
    content = json.dumps([GOOD, 5, GOOD | {"chosen": ""}], indent=2).encode()
    with pytest.raises(InputError) as caught:
        load_preferences(put(tmp_path, content, "prefs.json"))
    assert "prefs.json:7: a row must be a JSON object" in str(caught.value)
    assert "prefs.json:8: chosen is empty" in str(caught.value)


def test_csv_rows_over_several_lines(tmp_path: Path) -> None:
    content = (
        b'id,prompt,chosen,rejected,margin,note\n1,q,"two\nlines, one ""cell""",b.,0.5,\n,q,[1, 2].,b.,,x\n'.replace(
            b"[1, 2].", b'"[1, 2]"'
        )
        + b"3,q,a.\n"
        + b"4,q,\xe9,b.,1,x\n"
        + b"5,q,a.,b.,much,x\n"
    )
    path = put(tmp_path, content, "prefs.csv")
    with pytest.raises(InputError) as caught:
        load_preferences(path)
    assert "prefs.csv:5: 3 cells, but the header has 6 columns" in str(caught.value)
    assert f"prefs.csv:6: not UTF-8: byte 0xe9 at byte offset {content.index(0xE9)}" in str(caught.value)
    assert "prefs.csv:7: margin must be a number, got str 'much'" in str(caught.value)
    loaded = load_preferences(path, on_invalid="skip")
    first, second = loaded.preferences
    assert (first.id, first.chosen, first.margin) == ("1", 'two\nlines, one "cell"', 0.5)
    assert (second.id, second.chosen, second.margin) == ("prefs:4", "[1, 2]", 0.0)
    assert second.row["margin"] == ""


def test_very_long_csv_cells(tmp_path: Path) -> None:
    content = f"prompt,chosen,rejected\nq,{'a' * 200_000},b\n".encode()
    assert len(load_preferences(put(tmp_path, content, "prefs.csv")).preferences[0].chosen) == 200_000
    assert csv.field_size_limit() == 131_072


def test_folders_with_splits(tmp_path: Path) -> None:
    import datasets

    both = datasets.DatasetDict({name: datasets.Dataset.from_list(TEXT[:n]) for name, n in (("train", 2), ("test", 1))})
    both.save_to_disk(tmp_path / "both")
    assert len(load_preferences(tmp_path / "both", split="train").preferences) == 2
    assert load_preferences(tmp_path / "both", split="test").preferences[0].source == f"{tmp_path / 'both'}:1"
    for split, got in ((None, "none was named"), ("dev", "got 'dev'")):
        with pytest.raises(InputError, match=rf"splits train, test, by its folder \(.*both/train\) or .*{got}"):
            load_preferences(tmp_path / "both", split=split)
    assert len(load_preferences(tmp_path / "both" / "train").preferences) == 2
    datasets.DatasetDict({"only": datasets.Dataset.from_list(TEXT)}).save_to_disk(tmp_path / "one")
    assert len(load_preferences(tmp_path / "one").preferences) == 3
    with pytest.raises(InputError, match=re.escape("without splits; leave split='x' out")):
        load_preferences(tmp_path / "one" / "only", split="x")
    with pytest.raises(InputError, match="written by datasets' save_to_disk"):
        load_preferences(tmp_path)
    with pytest.raises(InputError, match="split='x' is only for folders"):
        load_preferences(put(tmp_path, lines(GOOD)), split="x")


def test_prompts(tmp_path: Path) -> None:
    path = put(tmp_path, lines({"prompt": "a"}, {"turns": ["b", "c"], "id": 9}, {"prompt": "a"}))
    prompts = load_prompts(path)
    assert [(p.id, p.prompt) for p in prompts.items] == [("prefs:1", "a"), ("9", "b"), ("prefs:3", "a")]
    assert prompts.report.counts == {"repeated-prompt": 1}
    distinct = load_prompts(put(tmp_path, lines(*HH, HH[0])))
    assert [p.prompt for p in distinct.items] == [(Message("user", f"Why {i}?"),) for i in range(3)]
    csv_file = put(tmp_path, b'prompt\n"[{""role"": ""user"", ""content"": ""q""}]"\n', "p.csv")
    assert load_prompts(csv_file).items[0].prompt == (Message("user", "q"),)
    broken = put(tmp_path, lines({"prompt": "a"}, {"question": "b"}))
    with pytest.raises(InputError, match=r"prefs\.jsonl:2: columns received: question; a prompt needs 'prompt'"):
        load_prompts(broken)
    with pytest.raises(InputError, match=r"or leave these rows out with on_invalid='skip' \(in Python\)\.$"):
        load_prompts(broken)  # no command that reads prompts has the option
    assert len(load_prompts(broken, on_invalid="skip").items) == 1


def test_demonstrations(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [{"prompt": "q", "response": "a"}, {"prompt": "q", "completion": "a"}, {"messages": messages}]
    items = load_demonstrations(put(tmp_path, lines(*rows))).items
    assert [d.prompt for d in items] == ["q", "q", (Message("user", "q"),)]
    assert [d.response for d in items] == ["a"] * 3
    assert items[2].row == rows[2]
    with pytest.raises(InputError, match=r"prefs\.jsonl:1: columns received: prompt; a demonstration needs"):
        load_demonstrations(put(tmp_path, lines({"prompt": "q"})))


def pairs(n: int, *, repeat: int = 3) -> list[Preference]:
    return [Preference(f"{i}.{k}", f"prompt {i}", "a", f"b{k}") for i in range(n) for k in range(repeat)]


def test_split_is_by_prompt_stable_and_near_the_share() -> None:
    all_pairs = pairs(400)
    train, validation = split_by_prompt(all_pairs, validation_share=0.25, seed=1)
    assert sorted(p.id for p in train + validation) == sorted(p.id for p in all_pairs)
    assert not {p.prompt for p in train} & {p.prompt for p in validation}
    # Binomial over 400 prompts: 100 expected, standard deviation 8.7.
    assert 65 <= len({p.prompt for p in validation}) <= 135
    assert [p.id for p in train] == [p.id for p in all_pairs if p in train]

    fewer, kept = split_by_prompt(all_pairs[::7], validation_share=0.25, seed=1)
    assert {p.id for p in fewer} <= {p.id for p in train}
    assert {p.id for p in kept} <= {p.id for p in validation}
    _, larger = split_by_prompt(all_pairs, validation_share=0.5, seed=1)
    assert {p.id for p in validation} < {p.id for p in larger}
    _, other = split_by_prompt(all_pairs, validation_share=0.25, seed=2)
    assert {p.id for p in other} != {p.id for p in validation}


def test_split_does_not_change_between_versions() -> None:
    _, validation = split_by_prompt(pairs(20, repeat=1), validation_share=0.2, seed=0)
    assert [p.id for p in validation] == ["12.0", "16.0", "17.0", "19.0"]


def test_split_by_first_turn_keeps_dialogues_together() -> None:
    def dialogue(i: int, length: int) -> Preference:
        turns = [Message("user" if t % 2 == 0 else "assistant", f"{i}.{t}") for t in range(length)]
        return Preference(f"{i}/{length}", tuple(turns), "a", "b")

    found = split_by_prompt(
        [dialogue(i, n) for i in range(40) for n in (1, 3, 5)], validation_share=0.3, seed=0, by="first turn"
    )
    train, validation = ({p.id.split("/")[0] for p in side} for side in found)
    assert not train & validation


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_split_refuses_a_share_without_effect(share: float) -> None:
    with pytest.raises(InputError, match="validation_share must lie between 0 and 1"):
        split_by_prompt(pairs(10), validation_share=share, seed=0)


def test_split_refuses_an_empty_side() -> None:
    with pytest.raises(InputError, match=r"leaves the validation side empty \(1 distinct"):
        split_by_prompt(pairs(1), validation_share=1e-9, seed=0)
    with pytest.raises(InputError, match="leaves the training side empty"):
        split_by_prompt(pairs(1), validation_share=1 - 1e-9, seed=0)


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4)))
def test_ranks_are_the_places_among_the_distinct_texts_in_order(keys: list[str]) -> None:
    assert ranks(keys).tolist() == np.unique(np.array(keys, dtype=str), return_inverse=True)[1].tolist()
