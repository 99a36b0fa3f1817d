"""Parallel jobs: order, errors, deaths, and results that do not depend on the number of workers.

The jobs live here and this module does not import torch at its top, so that workers start fast (`preload=()`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from steelyard.errors import InputError
from steelyard.parallel import JobError, default_workers, run_jobs


def square(number: int, delay: float = 0.0) -> int:
    time.sleep(delay)
    return number * number


def misbehave(how: str) -> Any:
    if how == "input":
        raise InputError("data.jsonl:3: prompt must be text")
    if how == "error":
        raise ZeroDivisionError("the cause")
    if how == "exit":
        os._exit(3)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "unpicklable":
        return lambda: None
    if how == "sleep":
        time.sleep(60)
    return how


def grow(numbers: list[int]) -> int:
    numbers.append(1)
    return len(numbers)


def surroundings() -> tuple[int, str | None, str | None]:
    return os.getpid(), os.environ.get("OMP_NUM_THREADS"), os.environ.get("STEELYARD_QUIET")


def fit(seed: int) -> tuple[int, bytes]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 300, generator=generator)
    for _ in range(3):
        x = torch.tanh(x @ x.T / 10)
    return torch.get_num_threads(), x.sum(0).numpy().tobytes()


def jobs(*values: Any) -> list[tuple[Any, ...]]:
    return [(value,) for value in values]


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_are_announced_as_they_end(workers: int) -> None:
    done: list[tuple[int, int]] = []
    results = run_jobs(
        square,
        [(3, 0.5), (4, 0.0), (5, 0.0)],
        workers=workers,
        on_done=lambda index, result: done.append((index, result)),
        preload=(),
    )
    assert results == [9, 16, 25]
    assert sorted(done) == [(0, 9), (1, 16), (2, 25)]
    assert done[0][0] == (0 if workers == 1 else 1)
    assert run_jobs(square, [], workers=workers, preload=()) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_name_the_job_and_end_the_rest(workers: int) -> None:
    start = time.monotonic()

    def run(*hows: str) -> None:
        run_jobs(misbehave, jobs(*hows), labels=[f"arm {how}" for how in hows], workers=workers, preload=())

    with pytest.raises(InputError, match=r"^arm input: data\.jsonl:3: prompt must be text$"):
        run("fine", "input", "sleep", "sleep")
    with pytest.raises(JobError, match=r"(?s)^arm error: the job failed:.*in misbehave.*ZeroDivisionError: the cause"):
        run("error", "sleep")
    with pytest.raises(JobError, match=r"(?s)^arm unpicklable: .*lambda"):
        run("unpicklable", "sleep")
    assert time.monotonic() - start < 20


def test_a_worker_that_dies_is_explained() -> None:
    with pytest.raises(JobError, match=r"^job 1: its process was killed by signal 9 \(SIGKILL\); most likely memory"):
        run_jobs(misbehave, jobs("fine", "kill", "sleep"), workers=2, preload=())
    with pytest.raises(JobError, match=r"^job 0: its process ended with status 3 and without a result"):
        run_jobs(misbehave, jobs("exit", "sleep"), workers=2, preload=())


def test_workers_have_their_own_environment_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    seen = run_jobs(surroundings, [(), (), ()], workers=2, threads=2, preload=())
    assert len({pid for pid, _, _ in seen} | {os.getpid()}) == 4
    assert {(threads, quiet) for _, threads, quiet in seen} == {("2", "1")}
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "STEELYARD_QUIET" not in os.environ


@pytest.mark.parametrize("workers", [1, 2])
def test_arguments_are_copies_wherever_a_job_runs(workers: int) -> None:
    numbers = [1, 2]
    assert run_jobs(grow, [(numbers,), (numbers,)], workers=workers, preload=()) == [3, 3]
    assert numbers == [1, 2]
    with pytest.raises(TypeError, match="job 0: the function must be defined at the top of a module"):
        run_jobs(lambda: 1, [()], workers=workers, preload=())


def test_results_and_threads_do_not_depend_on_the_number_of_workers() -> None:
    import torch

    before = torch.get_num_threads()
    here = run_jobs(fit, jobs(1, 2), workers=1, threads=2)
    assert torch.get_num_threads() == before
    assert [threads for threads, _ in here] == [2, 2]
    assert run_jobs(fit, jobs(1, 2), workers=2, threads=2, preload=("torch",)) == here


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="workers and threads must be at least 1, got workers=0"):
        run_jobs(square, jobs(1), workers=0)
    with pytest.raises(InputError, match="threads=0"):
        run_jobs(square, jobs(1), workers=1, threads=0)
    with pytest.raises(ValueError, match="one label for each of the 1 jobs, got 2"):
        run_jobs(square, jobs(1), workers=1, labels=["a", "b"])
    assert 1 <= default_workers() <= (os.cpu_count() or 1)


SLEEPERS = """
import signal
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from steelyard.parallel import run_jobs
import test_parallel

if __name__ == "__main__":
    # A shell's background jobs are started with SIGINT ignored, and so would this one be, when the tests run there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_jobs(test_parallel.mark_and_sleep, [(sys.argv[2], i) for i in range(2)], workers=2, preload=())
"""


def mark_and_sleep(folder: str, index: int) -> None:
    Path(folder, f"partial-{index}").write_text(str(os.getpid()))
    Path(folder, f"partial-{index}").rename(Path(folder, str(index)))
    time.sleep(60)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A dead process that nobody has waited for yet is gone as well.
    return Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[-1][0] == "Z"


def wait_until(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_an_interrupt_while_a_worker_starts_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, pids = BaseProcess.start, []

    def interrupted(process: BaseProcess) -> None:
        start(process)
        pids.append(process.pid)
        if len(pids) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(BaseProcess, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs(mark_and_sleep, [(str(tmp_path), i) for i in range(3)], workers=3, preload=())
    assert len(pids) == 2
    assert wait_until(lambda: all(gone(pid) for pid in pids), 5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_workers_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "main.py"
    script.write_text(SLEEPERS)
    command = [sys.executable, str(script), str(Path(__file__).parent), str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as parent:
        try:
            assert wait_until(lambda: all((tmp_path / name).exists() for name in "01"), 60)
            workers = [int((tmp_path / name).read_text()) for name in "01"]
            # Ctrl-C goes to the whole group; an outright kill hits the parent alone.
            if number == signal.SIGINT:
                os.killpg(parent.pid, number)
            else:
                parent.send_signal(number)
            assert wait_until(lambda: all(gone(pid) for pid in workers), 5)
            assert wait_until(lambda: parent.poll() is not None, 5)
        finally:
            parent.kill()
        assert parent.stderr is not None
        if number == signal.SIGINT:
            text = parent.stderr.read()
            assert text.count("Traceback") == 1, text
            assert "KeyboardInterrupt" in text
