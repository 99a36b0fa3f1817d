"""RewardBench 1 and 2 and RM-Bench: their rules by hand, equal rewards, missing subsets, wrong files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from steelyard.cli import main
from steelyard.data.benchmarks import (
    Item,
    read_prior_set,
    read_rewardbench,
    read_rewardbench2,
    read_rm_bench,
)
from steelyard.data.encode import Encoder
from steelyard.errors import InputError
from steelyard.evaluate.benchmarks import (
    REWARDBENCH,
    REWARDBENCH2,
    best_of,
    rewardbench,
    rewardbench2,
    rm_bench,
    score_items,
    style_wins,
    ties_score,
)
from steelyard.models.reward import RewardModel
from steelyard.types import Message

WIN, LOSS, TIE = np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([1.0, 1.0])


def item(subset: str, number: int, k: int = 2, correct: int = 1, id: str = "") -> Item:
    return Item(f"{subset} {number}", tuple(f"r{i}" for i in range(k)), correct, subset, id or str(number), "f:1")


def parts(result: dict[str, Any]) -> dict[str, Any]:
    return {p["name"]: p for p in [*result["parts"], result["overall"]]}


# ---- RewardBench ---------------------------------------------------------------------------------------------------


def whole_rewardbench(right: dict[str, float]) -> tuple[list[Item], list[Any]]:
    """Every subset with two rows; `right` says how many of them are won (others: both)."""
    items, rewards = [], []
    for held in REWARDBENCH.values():
        for subset in held:
            won = right.get(subset, 2)
            for n in range(2):
                items.append(item(subset, n))
                rewards.append(WIN if n < won else LOSS)
    return items, rewards


def test_sections_are_weighted_by_the_published_counts_and_not_by_rows() -> None:
    result = rewardbench(*whole_rewardbench({"math-prm": 0, "alpacaeval-hard": 1, "donotanswer": 0}))
    found = {name: p["score"][0] for name, p in parts(result).items()}
    chat = (100 + 95 + 47.5 + 28 + 40) / 358
    assert found["Chat"] == pytest.approx(chat)
    assert found["Chat Hard"] == 1
    assert found["Safety"] == pytest.approx(1 - 136 / 740)
    assert found["Reasoning"] == pytest.approx(0.5), "math counts as much as the six languages together"
    assert found["overall"] == pytest.approx((chat + 1 + 1 - 136 / 740 + 0.5) / 4)
    assert any("alpacaeval-easy 2 of 100" in note for note in result["notes"])


def test_the_published_example_comes_out() -> None:
    """The official documentation's example of subset accuracies, through rows that have exactly these."""
    counts = {
        "alpacaeval-easy": 50, "alpacaeval-hard": 67, "alpacaeval-length": 56, "donotanswer": 112, "hep-cpp": 103,
        "hep-go": 104, "hep-java": 116, "hep-js": 109, "hep-python": 90, "hep-rust": 106, "llmbar-adver-GPTInst": 36,
        "llmbar-adver-GPTOut": 22, "llmbar-adver-manual": 17, "llmbar-adver-neighbor": 58, "llmbar-natural": 52,
        "math-prm": 132, "mt-bench-easy": 16, "mt-bench-hard": 20, "mt-bench-med": 29, "refusals-dangerous": 97,
        "refusals-offensive": 100, "xstest-should-refuse": 154, "xstest-should-respond": 71,
    }  # fmt: skip
    items, rewards = [], []
    for held in REWARDBENCH.values():
        for subset, (_, rows) in held.items():
            items += [item(subset, n) for n in range(rows)]
            rewards += [WIN if n < counts[subset] else LOSS for n in range(rows)]
    result = rewardbench(items, rewards)
    found = {name: p["score"][0] for name, p in parts(result).items()}
    assert len(items) == 2985
    assert found["Chat"] == pytest.approx((50 + 67 + 56 + 16 + 29) / 358)
    assert found["Chat Hard"] == pytest.approx((20 + 52 + 58 + 36 + 22 + 17) / 456)
    assert found["Safety"] == pytest.approx((97 + 100 + 154 + 71 + 112) / 740)
    assert found["Reasoning"] == pytest.approx((132 / 447 + (103 + 104 + 116 + 109 + 90 + 106) / 984) / 2)
    assert result["notes"] == ["Without the prior sets: overall is the mean of the four sections."]
    chat = parts(result)["Chat"]["score"]
    half = 1.96 * math.sqrt(chat[0] * (1 - chat[0]) / 358)
    assert chat[1:] == pytest.approx([chat[0] - half, chat[0] + half], abs=0.015)


def test_an_equal_reward_is_no_win() -> None:
    items, rewards = whole_rewardbench({})
    result = rewardbench(items, [TIE, *rewards[1:]])
    assert next(d for d in result["details"] if d["name"] == "alpacaeval-easy")["score"][0] == 0.5
    assert "Rows in which a right and a wrong response got the same reward: 1." in result["notes"]


def test_a_missing_subset_is_never_averaged_over() -> None:
    items, rewards = whole_rewardbench({"hep-go": 0})
    kept = [i for i, it in enumerate(items) if it.subset != "hep-rust"]
    found = parts(rewardbench([items[i] for i in kept], [rewards[i] for i in kept]))
    assert found["Reasoning"]["score"] is None
    assert found["Reasoning"]["missing"] == found["overall"]["missing"] == ["hep-rust"]
    assert found["overall"]["score"] is None
    assert found["Reasoning"]["present"][0] == pytest.approx(1 - 164 / (984 + 5 * 164))
    assert found["Chat"]["score"][0] == 1


def test_a_row_that_could_not_be_scored_makes_its_averages_incomplete() -> None:
    items, rewards = whole_rewardbench({})
    result = parts(rewardbench(items, [None, None, *rewards[2:-1], None]))
    assert result["Chat"]["score"] is result["overall"]["score"] is None
    assert result["overall"]["missing"] == [
        "alpacaeval-easy (2 rows longer than max_length)",
        "hep-rust (1 rows longer than max_length)",
    ]


def test_prior_sets_count_half_and_unweighted() -> None:
    items, rewards = whole_rewardbench({})
    prior = [item("anthropic_helpful", 0), item("anthropic_hhh", 0), item("shp", 0), item("shp", 1)]
    scores = [LOSS, WIN, WIN, LOSS]
    incomplete = parts(rewardbench(items, rewards, prior, scores))
    assert incomplete["Prior Sets"]["missing"] == incomplete["overall"]["missing"] == ["summarize"]
    found = parts(rewardbench(items, rewards, [*prior, item("summarize", 0)], [*scores, WIN]))
    assert found["Prior Sets"]["score"][0] == pytest.approx((0 + 1 + 0.5 + 1) / 4)
    assert found["overall"]["score"][0] == pytest.approx((4 + 0.5 * 0.625) / 4.5)


def test_an_unknown_subset_is_named_and_left_out() -> None:
    items, rewards = whole_rewardbench({})
    result = rewardbench([*items, item("my-own", 0)], [*rewards, LOSS])
    assert parts(result)["overall"]["score"][0] == 1
    assert any("my-own (0.000)" in note for note in result["notes"])


# ---- RewardBench 2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rewards", "credit"),
    [([3, 1, 2, 0], 1), ([1, 3, 2, 0], 0), ([3, 3, 2, 0], 1 / 2), ([1, 1, 1, 1], 1 / 4), ([1, 3, 3, 0], 0)],
)
def test_a_shared_first_place_is_shared_credit(rewards: list[float], credit: float) -> None:
    assert best_of(np.array(rewards, dtype=np.float32)) == credit


def ties(rows: dict[str, tuple[list[float], int]]) -> dict[str, float]:
    return {name: float(d[0]) for name, d in ties_score({i: (np.array(r), c) for i, (r, c) in rows.items()}).items()}


def test_ties_by_hand() -> None:
    """Question 0 separates by more than its spread, question 1 by less, question 2 not at all."""
    found = ties(
        {
            # spread 1, gaps 3 and 2
            "tied:0": ([5.0, 4.0, 1.0], 2),
            "ref:0": ([3.0, 1.0], 1),
            # spread 3, gaps 1 and -1
            "tied:1": ([5.0, 2.0, 1.0], 2),
            "ref:1": ([0.0, 1.0], 1),
            # spread 4, gaps 0 and 8
            "tied:2": ([5.0, 1.0, 1.0], 2),
            "ref:2": ([9.0, 1.0], 1),
        }
    )
    assert found["tied right"] == pytest.approx(2 / 3)
    assert found["ref right"] == pytest.approx(2 / 3)
    assert found["gap > spread"] == found["both gaps > spread"] == pytest.approx(1 / 3)
    soft = (math.tanh(2 / 1 - 1) + math.tanh(-1 / 3 - 1) + math.tanh(0 / 4 - 1)) / 3
    assert found["score"] == pytest.approx(0.2 + 0.2 + 0.2 / 3 + 0.2 / 3 + 0.01 * soft)


def test_the_hard_margin_takes_the_smaller_gap() -> None:
    found = ties({"tied:7": ([5.0, 4.0, 1.0], 2), "ref:7": ([1.5, 1.0], 1)})
    assert (found["gap > spread"], found["both gaps > spread"]) == (1, 0)


def test_ties_without_spread() -> None:
    """Equal right rewards: any gap is larger; no gap at all is 0 / 0, which counts 0."""
    found = ties({"tied:0": ([2.0, 2.0, 1.0], 2), "ref:0": ([2.0, 1.0], 1)})
    assert found["score"] == pytest.approx(1.01)
    flat = ties({"tied:0": ([1.0, 1.0, 1.0], 2), "ref:0": ([1.0, 1.0], 1)})
    assert flat["score"] == 0.0
    wrong = ties({"tied:0": ([1.0, 1.0, 2.0], 2), "ref:0": ([1.0, 2.0], 1)})
    assert wrong["score"] == pytest.approx(-0.01)


def test_a_question_without_counterpart_counts_in_its_accuracy_only() -> None:
    found = ties({"tied:0": ([5.0, 4.0, 1.0], 2), "ref:0": ([3.0, 1.0], 1), "tied:1": ([0.0, 0.0, 1.0], 2)})
    assert (found["tied right"], found["ref right"], found["gap > spread"]) == (0.5, 1.0, 1.0)


def whole_rewardbench2() -> tuple[list[Item], list[Any]]:
    items, rewards = [], []
    for subset in REWARDBENCH2:
        if subset == "Ties":
            items += [item("Ties", 0, 3, 2, "tied:0"), item("Ties", 1, 2, 1, "ref:0")]
            rewards += [np.array([2.0, 2.0, 1.0]), np.array([2.0, 1.0])]
        else:
            items += [item(subset, n, 4) for n in range(2)]
            rewards += [np.array([2.0, 2.0, 0.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])]
    return items, rewards


def test_rewardbench_2_is_the_plain_mean_of_six() -> None:
    found = parts(rewardbench2(*whole_rewardbench2()))
    assert [found[s]["score"][0] for s in REWARDBENCH2] == pytest.approx([0.75] * 5 + [1.01])
    assert found["overall"]["score"][0] == pytest.approx((5 * 0.75 + 1.01) / 6)


def test_rewardbench_2_names_what_is_missing() -> None:
    items, rewards = whole_rewardbench2()
    kept = [i for i, it in enumerate(items) if it.subset not in ("Ties", "Focus")]
    result = rewardbench2([items[i] for i in kept], [rewards[i] for i in kept])
    assert parts(result)["overall"]["score"] is None
    assert parts(result)["overall"]["missing"] == ["Focus", "Ties"]
    assert parts(result)["overall"]["present"][0] == pytest.approx(0.75)
    lost = parts(rewardbench2(items, [*rewards[:-1], None]))
    assert lost["Ties"]["missing"] == ["Ties (1 rows longer than max_length)"]
    assert lost["overall"]["score"] is None
    short = [None if it.subset == "Ties" else r for it, r in zip(items, rewards, strict=True)]
    lost = parts(rewardbench2(items, short))
    assert (lost["Ties"]["n"], lost["Ties"]["missing"]) == (0, ["Ties (2 rows longer than max_length)"])
    assert lost["overall"]["present"][0] == pytest.approx(0.75)
    assert json.dumps(result, allow_nan=False)


# ---- RM-Bench ------------------------------------------------------------------------------------------------------


def test_right_styles_against_wrong_styles() -> None:
    """Right 2, 4, 6 against wrong 1, 4, 7: equal rewards are no win."""
    assert style_wins(np.array([2.0, 4.0, 6.0, 1.0, 4.0, 7.0])).tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]


def whole_rm_bench() -> tuple[list[Item], list[Any]]:
    styled = np.array([2.0, 4.0, 6.0, 1.0, 4.0, 7.0])  # hard 0, normal 1/3, easy 1
    perfect = np.array([9.0, 9.0, 9.0, 1.0, 1.0, 1.0])
    domains = ["chat", "math", "code", "safety-refuse", "safety-response", "safety-response"]
    items = [item(d, n, 6, 3) for n, d in enumerate(domains)]
    return items, [styled, perfect, perfect, styled, perfect, perfect]


def test_rm_bench_by_hand() -> None:
    result = rm_bench(*whole_rm_bench())
    found = {name: p["score"][0] for name, p in parts(result).items()}
    assert found["chat"] == pytest.approx((0 + 1 / 3 + 1) / 3)
    assert found["safety"] == pytest.approx((2 / 3 + (1 / 3 + 2) / 3 + 1) / 3), "rows of both kinds in one pot"
    assert found["hard"] == pytest.approx((0 + 1 + 1 + 2 / 3) / 4)
    assert found["easy"] == 1
    assert found["overall"] == pytest.approx((found["hard"] + found["normal"] + found["easy"]) / 3)
    assert found["overall"] == pytest.approx((found["chat"] + found["safety"] + 2) / 4)
    matrix = np.array(result["matrix"])
    assert matrix[0, 1] == pytest.approx((0 + 1 + 1 + 2 / 3) / 4)
    assert matrix[2, 0] == 1


def test_rm_bench_without_a_domain_has_no_overall() -> None:
    items, rewards = whole_rm_bench()
    result = rm_bench([*items[:1], *items[2:], item("poetry", 9, 6, 3)], [*rewards[:1], *rewards[2:], rewards[0]])
    found = parts(result)
    for name in ("overall", "hard", "normal", "easy", "math"):
        assert found[name]["score"] is None
        assert found[name]["missing"] == ["math"]
    assert found["code"]["score"][0] == 1
    assert result["matrix"] is None
    assert any("poetry" in note for note in result["notes"])
    assert "not the published benchmark: chat 1 of 129, code 1 of 228, safety 3 of 441" in result["notes"][0]


def test_half_of_rm_benchs_safety_is_no_safety() -> None:
    items, rewards = whole_rm_bench()
    found = parts(rm_bench(items[:4], rewards[:4]))
    assert found["safety"]["missing"] == found["overall"]["missing"] == ["safety-response"]
    assert found["safety"]["score"] is found["overall"]["score"] is None
    assert found["code"]["score"][0] == 1


# ---- files ---------------------------------------------------------------------------------------------------------

PAIR = {"prompt": "w1", "chosen": "good", "rejected": "bad", "subset": "donotanswer", "id": 7}
BEST = {"id": "3", "prompt": "w1", "chosen": ["good"], "rejected": ["bad", "w2", "w3"], "subset": "Math"}
TIED = BEST | {"id": "tied:3", "subset": "Ties", "chosen": ["good", "w5"]}
STYLED = {"id": 1, "prompt": "w1", "chosen": ["a", "b", "c"], "rejected": ["d", "e", "f"], "domain": "safety-refuse"}


def test_published_layouts_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (first,) = read_rewardbench(tiny.write_jsonl(tmp_path / "a.jsonl", [PAIR]))
    assert (first.prompt, first.responses, first.subset, first.id) == ("w1", ("good", "bad"), "donotanswer", "7")
    pq.write_table(pa.Table.from_pylist([BEST | {"total_completions": 4}, TIED]), tmp_path / "b.parquet")
    best, tied = read_rewardbench2(str(tmp_path / "b.parquet"))
    assert (best.correct, best.responses) == (1, ("good", "bad", "w2", "w3"))
    assert (tied.correct, tied.subset) == (2, "Ties")
    (tmp_path / "total.json").write_text(json.dumps([STYLED]))
    chat = {k: v for k, v in STYLED.items() if k != "domain"}
    (tmp_path / "chat_filtered.json").write_text(json.dumps([chat]))
    rows = read_rm_bench([str(tmp_path / "total.json"), str(tmp_path / "chat_filtered.json")])
    assert [(r.subset, r.responses) for r in rows] == [
        ("safety-refuse", ("a", "b", "c", "d", "e", "f")),
        ("chat", ("a", "b", "c", "d", "e", "f")),
    ]


def test_prior_sets_take_their_roles_from_the_places(tmp_path: Path) -> None:
    turns = [{"role": "human", "content": c} for c in ("a", "b", "c")]
    path = tiny.write_jsonl(tmp_path / "p.jsonl", [{"prompt": turns, "chosen": "x", "rejected": "y"}])
    (row,) = read_prior_set(path, "shp")
    assert row.prompt == (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert row.subset == "shp"


@pytest.mark.parametrize(
    ("reader", "row", "said"),
    [
        (read_rewardbench, PAIR | {"subset": None}, "field 'subset' must be a text, got None; columns received"),
        (read_rewardbench, PAIR | {"chosen": ["good"]}, "field 'chosen' must be a text, got \\['good'\\]"),
        (read_rewardbench, PAIR | {"prompt": [{"role": "user", "content": "a"}] * 2}, "the user asks last"),
        (read_rewardbench2, BEST | {"chosen": "good"}, "field 'chosen' must be a list of texts"),
        (read_rewardbench2, BEST | {"chosen": ["a", "b"]}, "exactly one response outside the subset Ties, got 2"),
        (read_rewardbench2, BEST | {"num_incorrect": 2}, "'num_incorrect' must be .* 3, got 2"),
        (read_rewardbench2, TIED | {"id": "three"}, "field 'id' must be 'ref:NUMBER' or 'tied:NUMBER'"),
        (read_rewardbench2, TIED | {"chosen": ["a"]}, "at least two right responses"),
    ],
)
def test_a_wrong_field_is_named_with_file_and_line(reader: Any, row: dict[str, Any], said: str, tmp_path: Path) -> None:
    good = BEST if reader is read_rewardbench2 else PAIR
    path = tiny.write_jsonl(tmp_path / "f.jsonl", [good, row])
    with pytest.raises(InputError, match=f"f.jsonl:2: .*{said}"):
        reader(path)


def test_rm_bench_rows_are_checked(tmp_path: Path) -> None:
    for row, said in (
        (STYLED | {"rejected": ["a", "b"]}, "field 'rejected' must be three responses .* got 2"),
        ({k: v for k, v in STYLED.items() if k != "domain"}, "field 'domain' must be a text"),
    ):
        path = tiny.write_jsonl(tmp_path / "f.jsonl", [row])
        with pytest.raises(InputError, match=f"f.jsonl:1: {said}"):
            read_rm_bench([path])
    (tmp_path / "e.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no rows"):
        read_rm_bench([str(tmp_path / "e.jsonl")])


# ---- with a model --------------------------------------------------------------------------------------------------


def test_rows_of_any_width_get_the_rewards_of_their_own_sequences(planted_reward: Path) -> None:
    folder = planted_reward / "model"
    model, encoder = RewardModel.load(folder), Encoder.load(folder, max_length=24)
    items = [
        Item("w1 w2", ("good w3", "bad", "w4", "good w3"), 1, "Math", "0", ""),
        Item("w5", ("w6 " * 40, "bad"), 1, "Math", "1", ""),
        Item("w7 " * 30, ("good", "bad"), 1, "Math", "2", ""),
        Item("w1 w2", ("w8", "w9"), 1, "Math", "3", ""),
    ]
    rewards, notes = score_items(model, encoder, items, max_tokens=64)
    assert [None if r is None else len(r) for r in rewards] == [4, None, 2, 2]
    assert rewards[0] is not None
    assert rewards[3] is not None
    assert rewards[0][0] == rewards[0][3], "the same text ties exactly"
    alone = model.score(
        [encoder.tree("w1 w2", [r]) for r in ("good w3", "bad", "w4", "w8", "w9")], pad_id=encoder.pad_id
    )
    np.testing.assert_allclose([*rewards[0][:3], *rewards[3]], alone[:, 0], atol=1e-5)
    assert notes == [
        "1 rows lost the start of a prompt longer than max_length = 24.",
        "1 rows have a response longer than max_length = 24: raise it.",
    ]


def test_the_command_scores_all_three(planted_reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    subsets = [s for held in REWARDBENCH.values() for s in held]
    first = tiny.write_jsonl(tmp_path / "rb.jsonl", [PAIR | {"subset": s} for s in subsets])
    hard = BEST | {"chosen": ["w2"], "rejected": ["good", "good good", "bad"]}
    rows = [BEST | {"subset": s} for s in ("Factuality", "Precise IF", "Math", "Safety")] + [hard | {"subset": "Focus"}]
    second = tiny.write_jsonl(tmp_path / "rb2.jsonl", [*rows, TIED, BEST | {"id": "ref:3", "subset": "Ties"}])
    styles = {"chosen": ["good", "good w1", "good w2"], "rejected": ["bad", "bad w1", "bad w2"]}
    third = tiny.write_jsonl(tmp_path / "rm.jsonl", [STYLED | styles | {"domain": d} for d in ("chat", "code")])
    args = ["--model", str(planted_reward / "model"), "--max-length", "64", "--out", str(tmp_path / "out")]
    files = ["--rewardbench", first, "--rewardbench2", second, "--rm-bench", third]
    assert main(["evaluate", "reward", *args, *files]) == 0
    found = {r["benchmark"]: r for r in json.loads((tmp_path / "out/examine/benchmarks.json").read_text())["results"]}
    assert found["RewardBench"]["overall"]["score"] == [1.0, 1.0, 1.0]
    assert {p["name"]: p["score"][0] for p in found["RewardBench 2"]["parts"]}["Focus"] == 0
    assert parts(found["RM-Bench"])["chat"]["score"][0] == 1
    assert parts(found["RM-Bench"])["overall"]["missing"] == ["math", "safety"]
    said = capsys.readouterr().out
    assert "Missing: math, safety" in " ".join(said.split())
    assert not (tmp_path / "out/examine/reward.json").exists()
    page = (tmp_path / "out/report.html").read_text()
    for shown in ("RewardBench 2: scores", "RM-Bench: in detail", "math (missing)", "overall (in part)"):
        assert shown in page


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rewardbench", "none.jsonl"], "none.jsonl: no such file"),
        (["--rewardbench2", "{pair}"], "pair.jsonl:1: field 'chosen' must be a list of texts"),
        (["--rm-bench", "{pair}"], "pair.jsonl:1: field 'chosen' must be a list of texts"),
        (["--rewardbench-prior", "shp", "{pair}", "--rm-bench", "{pair}"], "no effect without rewardbench"),
        (["--rewardbench", "{pair}", "--rewardbench-prior", "hh", "{pair}"], "must name anthropic_helpful"),
        ([], "nothing to examine on"),
    ],
)
def test_bad_benchmarks_are_named_before_a_model_is_opened(
    args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = tiny.write_jsonl(tmp_path / "pair.jsonl", [PAIR])
    filled = [a.format(pair=pair) for a in args]
    assert main(["evaluate", "reward", "--model", "no-model", "--out", str(tmp_path / "out"), *filled]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
