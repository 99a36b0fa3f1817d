"""What the benchmarks plan, measure and sum up; TRL is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import draw  # noqa: E402
from plan import Pair, Plan, Settings, bucketed, micro_batches  # noqa: E402
from reward_model import loss_differences, summary  # noqa: E402
from rounds import Round, Worker, alternate, ratios, shown, spread, table  # noqa: E402

WORKER = """
import sys
sys.path.insert(0, {benchmarks!r})
from rounds import Finished, Gate
gate = Gate()
print("a library talks")
gate.open(name=sys.argv[1])
try:
    for step in range(4):
        print("a library talks")
        gate.step(loss=step / 2, tokens=10)
    raise SystemExit("the data have ended")
except Finished:
    pass
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(benchmarks=str(BENCHMARKS)))
    return path


def _worker(script: Path, name: str) -> Worker:
    return Worker(name, [sys.executable, str(script), name], script.parent / f"{name}.log")


def _round(seconds: float, *losses: float, cpu: float = 1.0, tokens: int = 0, peak: int = 1) -> Round:
    return Round(seconds, cpu, list(losses), tokens, peak)


def test_bucketed_sorts_within_windows_only() -> None:
    steps = bucketed([5, 1, 4, 2, 9, 8, 7, 6], 2, [2, 2], seed=0)
    assert sorted(steps[:2]) == [[1, 3], [2, 0]]
    assert sorted(steps[2:]) == [[5, 4], [7, 6]]


def test_bucketed_with_windows_of_one_step_keeps_each_steps_pairs() -> None:
    assert bucketed([3, 1, 2, 9, 7, 8], 3, [1, 1], seed=0) == [[1, 2, 0], [4, 5, 3]]


def test_bucketed_wants_windows_that_cover_the_pairs() -> None:
    with pytest.raises(ValueError, match="windows of 2 steps of 2 pairs do not cover 5 pairs"):
        bucketed([1] * 5, 2, [2], seed=0)


def test_every_order_holds_the_same_pairs() -> None:
    pairs = [Pair([i], [1] * (i * 7 % 5 + 1), [2]) for i in range(12)]
    plan = Plan(Settings(start="start", precision="float32", threads=1, batch=2), pairs, [2, 4])
    steps, by_length = plan.steps(), plan.bucketed_steps()
    assert [len(step) for step in steps] == [len(step) for step in by_length] == [2] * 6
    for window in (slice(0, 2), slice(2, 6)):
        assert sorted(p.prompt for s in steps[window] for p in s) == sorted(
            p.prompt for s in by_length[window] for p in s
        )
    assert micro_batches(pairs[:3], 2) == [pairs[:2], pairs[2:3]]


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    settings = Settings(start="start", precision="bfloat16", threads=2, batch=1, lr=3e-6)
    plan = Plan(settings, [Pair([1, 2], [3], [4, 5])], [1])
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert plan.pairs[0].sequences == ([1, 2, 3], [1, 2, 4, 5])
    assert plan.pairs[0].longest == 4


def test_ratios_are_taken_within_rounds() -> None:
    # The machine was three times slower in the second round, for both.
    assert ratios([4, 12, 6], [2, 6, 2]) == {"median": 2, "low": 2, "high": 3}
    assert shown(spread([1.0, 2.5, 2.0])) == "2.00 (1.00 - 2.50)"


def test_summary_by_hand() -> None:
    found = {
        "trl": [_round(8, cpu=4, tokens=900, peak=10), _round(10, cpu=6, tokens=1100, peak=30)],
        "steelyard": [_round(2, cpu=1, tokens=200, peak=15), _round(5, cpu=2, tokens=200, peak=15)],
    }
    rows = summary(found, pairs=10)
    assert rows["trl"]["pairs_per_second"] == {"median": 1.125, "low": 1.0, "high": 1.25}
    assert rows["trl"]["tokens_per_pair"] == 100
    assert rows["trl"]["time_over_ours"] == {"median": 3, "low": 2, "high": 4}
    assert rows["trl"]["cpu_time_over_ours"] == {"median": 3.5, "low": 3, "high": 4}
    assert rows["trl"]["peak_over_ours"] == 2
    assert "time_over_ours" not in rows["steelyard"]


def test_loss_differences_over_all_rounds() -> None:
    found = {
        "trl": [_round(1, 0.7, 0.6), _round(1, 0.5, 0.25)],
        "hf-bucketed": [_round(1, 9, 9), _round(1, 9, 9)],
        "steelyard": [_round(1, 0.7, 0.6), _round(1, 0.5, 0.5)],
    }
    assert loss_differences(found, ["trl", "steelyard"]) == {"trl": 0.25}


def test_table_aligns() -> None:
    assert table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc  d"


def test_workers_take_turns(script: Path) -> None:
    said: list[str] = []
    with _worker(script, "one") as one, _worker(script, "two") as two:
        found = alternate([one, two], warmup=1, steps=1, rounds=2, say=said.append)
        assert one.about["name"] == "one"
        assert one.about["peak_bytes"] > 1e6
    assert [line.split()[:3] for line in said[2:]] == [
        ["round", "1", "one"],
        ["round", "1", "two"],
        ["round", "2", "two"],
        ["round", "2", "one"],
    ]
    assert [r.losses for r in found["one"]] == [[0.5], [1.0]]
    assert [r.tokens for r in found["two"]] == [10, 10]


def test_a_worker_that_dies_shows_its_log(script: Path) -> None:
    with pytest.raises(RuntimeError, match=r"one ended early(.|\n)*the data have ended"), _worker(script, "one") as one:
        one.run(5)


def test_the_parent_imports_no_torch() -> None:
    # A child's ru_maxrss begins with the resident set of the process it was forked from.
    code = "import sys, reward_model, metarm; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, check=True)


@pytest.mark.slow
def test_the_plain_loop_and_ours_have_one_loss_curve(tmp_path: Path) -> None:
    folder = tiny.save_folder(tiny.build_model(tiny.build_config()), tiny.build_tokenizer(), tmp_path / "model")
    data = tiny.write_jsonl(tmp_path / "data.jsonl", tiny.planted_pairs(24)[0])
    command = [sys.executable, str(BENCHMARKS / "reward_model.py"), "--model", folder, "--data", data]
    options = ["--curve", "3", "--batch", "8", "--lr", "1e-2", "--variants", "hf-bucketed", "steelyard"]
    subprocess.run([*command, *options, "--out", str(tmp_path / "out")], check=True, capture_output=True, timeout=200)
    result = json.loads((tmp_path / "out" / "reward_model.json").read_text())
    losses = [r["losses"] for r in result["rounds"]["steelyard"]]
    assert losses[0][2] < losses[0][0]
    assert result["loss_difference"]["hf-bucketed"] < 1e-4
    assert result["summary"]["steelyard"]["tokens_per_pair"] == pytest.approx(result["tokens"]["shared"] / 24)


def test_the_draw_alone_is_measured_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--rows", "3", "--vocabulary", "300", "--steps", "2", "--rounds", "3", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["draw.py", *options])
    threads = torch.get_num_threads()
    try:
        draw.main()
    finally:
        torch.set_num_threads(threads)
    cells = json.loads((tmp_path / "draw.json").read_text())["seconds_of_rounds"]
    assert [(c["logits"], c["top_p"]) for c in cells] == [
        ("peaked", 1.0), ("peaked", 0.9), ("flat", 1.0), ("flat", 0.9)
    ]  # fmt: skip
    assert all(len(c[name]) == 3 and min(c[name]) > 0 for c in cells for name in ("multinomial", "steelyard"))
