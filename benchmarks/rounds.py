"""Programs measured in turn: each in a process of its own, all but one asleep, the same work each round.

A shared machine is faster one minute and slower the next. So nothing is measured after the other: every round gives
each program the same steps, and only ratios within a round are compared. Nothing here imports torch: a worker's peak
memory must not begin with its parent's (a child that is forked from a large process inherits that process's peak).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NoReturn, Self

GIVE_BACK = {"BENCHMARK_GIVES_BACK": "1"}  # environment of a worker that gives freed memory back before it sleeps


class Finished(Exception):
    """The parent wants no more steps."""


class Gate:
    """The worker's side: a training loop calls `open` once and `step` after each optimiser step.

    Both return when the parent wants another step. What lies between two returns is the time of a step: fetching the
    batch, collation, forward, backward, optimiser, logging, whatever the loop does.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda: Any = None
        if device == "cuda":  # waited for before the clock is read; its memory is what counts there
            import torch

            self._cuda = torch.cuda
        # Libraries print to standard output: the parent reads from a copy of it that only the gate knows.
        die_first()
        self._replies = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._left = 0
        self._losses: list[float] = []
        self._tokens = 0

    def open(self, **about: Any) -> None:
        """Say that everything is loaded, with facts for the record, and wait for the first round."""
        self._reply({**about, "peak_bytes": self._peak_bytes()})
        self._wait()

    def step(self, loss: float, tokens: int) -> None:
        """`loss` of the step's batch before the update; `tokens` that were computed, padding included."""
        self._losses.append(loss)
        self._tokens += tokens
        self._left -= 1
        if self._left == 0:
            if self._cuda:
                self._cuda.synchronize()
            self._reply(
                {
                    "seconds": time.perf_counter() - self._wall,
                    "cpu_seconds": time.process_time() - self._cpu,
                    "losses": self._losses,
                    "tokens": self._tokens,
                    "peak_bytes": self._peak_bytes(),
                }
            )
            self._wait()

    def _peak_bytes(self) -> int:
        return int(self._cuda.max_memory_allocated()) if self._cuda else peak_bytes()

    def _reply(self, message: Mapping[str, Any]) -> None:
        self._replies.write(json.dumps(message) + "\n")

    def _wait(self) -> None:
        if GIVE_BACK.keys() & os.environ.keys():
            give_back()
        if self._cuda:
            self._cuda.empty_cache()
        wanted = sys.stdin.readline()
        if not wanted:
            raise Finished
        self._left, self._losses, self._tokens = int(wanted), [], 0
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def peak_bytes() -> int:
    """The largest resident set of this process so far, libraries and loading included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return freed memory to the system: what a sleeping worker's allocator keeps is missing for the one at work."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim
            ctypes.CDLL(None).malloc_trim(0)


def die_first() -> None:
    """Where memory runs out, let the kernel end this process and no other user's."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text("1000")


@dataclass(frozen=True, slots=True)
class Round:
    """What one worker did in one round. `losses` per step; `tokens` computed, padding included."""

    seconds: float
    cpu_seconds: float
    losses: list[float]
    tokens: int
    peak_bytes: int


@dataclass(slots=True)
class Worker:
    """The parent's side of one program; `about` is what it said when it had loaded."""

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    _process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        with self.log.open("w") as errors:
            self._process = subprocess.Popen(
                list(self.command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=os.environ | dict(self.env),
                text=True,
            )
        try:
            self.about = self._read()
        except BaseException:
            self._end(patience=0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(patience=60 if kind is None else 5)

    def run(self, steps: int) -> Round:
        """Let it make `steps` steps. Raises RuntimeError with the end of its log if it died."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        except BrokenPipeError:
            self._died()
        return Round(**self._read())

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise RuntimeError(f"{self.name}: not started; use it in a with statement")
        return self._process

    def _read(self) -> dict[str, Any]:
        process = self._running()
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            self._died()
        message: dict[str, Any] = json.loads(line)
        return message

    def _end(self, patience: float) -> None:
        """A worker that waits at its gate sees its input close, and returns."""
        process = self._running()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _died(self) -> NoReturn:
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
        status = self._running().wait()
        hint = "; probably out of memory: compare fewer programs at once, or shorter pairs" if status == -9 else ""
        raise RuntimeError(f"{self.name} ended early (status {status}{hint}); its log ends:\n{tail}")


def alternate(
    workers: Sequence[Worker], *, warmup: int, steps: int, rounds: int, say: Callable[[str], object] = print
) -> dict[str, list[Round]]:
    """`warmup` steps of each worker, unmeasured; then `rounds` times `steps` steps of each, who begins going round."""
    if warmup:
        for worker in workers:
            made = worker.run(warmup)
            say(f"warm-up   {worker.name:<14} {made.seconds:8.1f} s")
    found: dict[str, list[Round]] = {worker.name: [] for worker in workers}
    for r in range(rounds):
        first = r % len(workers)
        for worker in [*workers[first:], *workers[:first]]:
            made = worker.run(steps)
            found[worker.name].append(made)
            say(f"round {r + 1:<3} {worker.name:<14} {made.seconds:8.1f} s, {made.cpu_seconds:8.1f} s CPU")
    return found


# ---- numbers ---------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """`spread` of how many times longer the one took than the other, round by round."""
    return spread([s / f for s, f in zip(slow, fast, strict=True)])


def shown(found: Mapping[str, float], digits: int = 2) -> str:
    """`median (low - high)`."""
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} - {found['high']:.{digits}f})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def threads_env(threads: int) -> dict[str, str]:
    """Environment of a worker: that many threads for torch's pools, nothing fetched from anywhere."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
