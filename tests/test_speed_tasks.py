"""What the sampling and PPO benchmarks plan, measure and sum up; TRL is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tiny
from conftest import Folders

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from rounds import Round, Worker  # noqa: E402
from task import Task  # noqa: E402
from task_options import compared, shown_table  # noqa: E402

WORKER = """
import sys, time
sys.path.insert(0, {benchmarks!r})
from rounds import Finished
from ppo_workers import PhaseGate
gate = PhaseGate()
gate.open(name="x")
try:
    while True:
        outside = bytearray(400_000_000)
        time.sleep(0.3)
        del outside
        gate.begin()
        inside = bytearray(50_000_000)
        time.sleep(0.1)
        del inside
        gate.end(1.5, 7)
except Finished:
    pass
"""


def test_only_the_phase_is_measured_time_and_memory(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(benchmarks=str(BENCHMARKS)))
    with Worker("x", [sys.executable, str(script)], tmp_path / "log") as worker:
        began = time.perf_counter()
        first = worker.run(2)
        wall, second = time.perf_counter() - began, worker.run(1)
    assert first.losses == [1.5, 1.5]
    assert (first.tokens, second.tokens) == (14, 7)
    assert 0.2 <= first.seconds <= wall - 0.6
    assert 0.1 <= second.seconds < first.seconds + 1
    if sys.platform == "linux" and (Path("/proc/self/clear_refs")).exists():
        assert 50e6 < second.peak_bytes < 400e6


def test_a_task_survives_its_file(tmp_path: Path) -> None:
    task = Task("s", "float32", 1, 2, 8, True, 32, 0, 3, 0, [[4, 5]], [[[6], [7, 3]]], {"micro": 2})
    task.write(tmp_path / "task.json")
    assert Task.read(tmp_path / "task.json") == task
    assert "prompts" not in task.about()


def test_ratios_are_taken_within_rounds() -> None:
    def rounds(*seconds: float, peak: int) -> list[Round]:
        return [Round(s, s / 2, [], 0, peak) for s in seconds]

    rows = compared({"theirs": rounds(8, 80, peak=4), "ours": rounds(2, 10, peak=1)}, "theirs", unit=16)
    assert rows["ours"]["times_faster"] == {"median": 6, "low": 4, "high": 8}
    assert rows["ours"]["per_second"] == {"median": 4.8, "low": 1.6, "high": 8}
    assert rows["ours"]["per_cpu_second"]["high"] == 16
    assert rows["ours"]["peak_share"] == 0.25
    assert "times_faster" not in rows["theirs"]
    assert "6.00 (4.00 - 8.00)" in shown_table(rows, "theirs", "tokens", 1)


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    return tiny.write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": f"w1 w{i} w3" + " w4" * (i % 3)} for i in range(12)]
    )


def _run(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / name), "--rounds", "1", "--warmup", "0", "--new-tokens", "5", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_sampling_runs_from_end_to_end(language_model: Folders, prompts: str, tmp_path: Path) -> None:
    common = ["--model", language_model("llama"), "--data", prompts, "--prompts", "4", "--out", str(tmp_path / "out")]
    done = _run("sampling.py", *common, "--variants", "generate", "generate-sorted", "steelyard")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert {name: made[0]["tokens"] for name, made in found["rounds"].items()} == dict.fromkeys(
        ("generate", "generate-sorted", "steelyard"), 4 * 4 * 5
    )
    assert found["compared"]["steelyard"]["times_faster"]["median"] > 0
    short = _run("sampling.py", *common, "--natural")
    assert short.returncode == 0, short.stderr
    assert "responses/s" in short.stdout


@pytest.mark.slow
def test_ppo_runs_from_end_to_end(language_model: Folders, prompts: str, tmp_path: Path) -> None:
    common = ["--model", language_model("llama"), "--data", prompts, "--out", str(tmp_path / "out")]
    done = _run("ppo.py", *common, "--prompts", "2", "--variants", "steelyard", "steelyard-shared", "--steps", "2")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "ppo.json").read_text())
    one, other = (found["rounds"][name][0] for name in ("steelyard", "steelyard-shared"))
    assert one["tokens"] == other["tokens"] == 2 * 2 * (sum(found["prompt_tokens"]) + 8 * 5)
    assert len(one["losses"]) == 2


@pytest.mark.slow
def test_ensembles_run_from_end_to_end(language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
    """Ours alone: TRL lives in another environment."""
    options = ["--model", language_model("llama"), "--data", planted["clean"], "--pairs", "12", "--members", "2"]
    command = [sys.executable, str(BENCHMARKS / "ensemble.py"), *options, "--rounds", "1", "--variants", "steelyard"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr + (tmp_path / "ensemble.log").read_text()
    found = json.loads((tmp_path / "ensemble.json").read_text())
    ((wall, cpu),) = found["steelyard"]["rounds"]
    assert wall > 0
    assert cpu > 0
    assert found["steelyard"]["faster"][0]["median"] == 1


def test_too_few_prompts_are_said(language_model: Folders, prompts: str, tmp_path: Path) -> None:
    options = ["--model", language_model("llama"), "--data", prompts, "--prompts", "50", "--out", str(tmp_path / "out")]
    done = _run("sampling.py", *options)
    assert done.returncode != 0
    assert "has 12 prompts of at most 256 tokens, 50 are needed" in done.stderr
