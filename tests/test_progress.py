"""Progress: plain lines off a terminal, one live line on it, nothing where it is to be quiet."""

from __future__ import annotations

import io

import pytest

from steelyard.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def drive(stream: io.StringIO, *, steps: int = 25, start: int = 0, quiet: bool | None = False) -> None:
    clock = Clock()
    with Progress(steps, "reward [plain]", start=start, stream=stream, quiet=quiet, clock=clock) as progress:
        for step in range(start + 1, steps + 1):
            clock.now += 1.0
            progress.update(step, tokens=1500, loss=1 / step)


def test_plain_lines_come_seldom_and_at_the_end() -> None:
    stream = io.StringIO()
    drive(stream)
    assert stream.getvalue().splitlines() == [
        "reward [plain]  10/25  eta 0:15  1.5k tokens/s  loss 0.1",
        "reward [plain]  20/25  eta 0:05  1.5k tokens/s  loss 0.05",
        "reward [plain]  25/25  took 0:25  1.5k tokens/s  loss 0.04",
    ]


def test_a_resumed_run_counts_its_own_steps_only() -> None:
    stream = io.StringIO()
    drive(stream, start=1000, steps=1015)
    assert "1010/1015  eta 0:05" in stream.getvalue()


def test_a_value_stays_in_view_and_long_times_read_well() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(3, "x", stream=stream, clock=clock, quiet=False) as progress:
        progress.update(1, accuracy=0.5, name="set")
        clock.now += 3661
        progress.update(2, tokens=7_322_000_000)
    assert stream.getvalue().splitlines()[0] == "x  2/3  eta 30:30  2.0M tokens/s  accuracy 0.5  name set"
    assert "took 1:01:01" in stream.getvalue()


def test_a_failing_loop_leaves_its_last_line() -> None:
    def fail(stream: io.StringIO) -> None:
        with Progress(9, "x", stream=stream, quiet=False) as progress:
            progress.update(4, loss=2.0)
            raise ZeroDivisionError

    stream = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        fail(stream)
    assert stream.getvalue().startswith("x  4/9  took 0:00")
    assert stream.getvalue().endswith("loss 2\n")


def test_a_loop_without_steps_writes_nothing() -> None:
    stream = io.StringIO()
    with Progress(0, "x", stream=stream, quiet=False):
        pass
    assert stream.getvalue() == ""


def test_a_terminal_gets_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    drive(stream)
    assert "\x1b[" in stream.getvalue()
    assert "reward [plain]" in stream.getvalue()
    assert "25/25  took 0:25  1.5k tokens/s  loss 0.04" in stream.getvalue()


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    drive(stream)
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 3


def test_quiet_by_argument_or_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    drive(stream, quiet=True)
    monkeypatch.setenv("STEELYARD_QUIET", "1")
    drive(stream, quiet=None)
    assert stream.getvalue() == ""
    drive(stream, quiet=False)
    assert stream.getvalue() != ""
