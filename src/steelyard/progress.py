"""How far a loop has come: one live line on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar


class Progress:
    """Reports the steps of a loop on `stream` (standard error by default).

        with Progress(total, "reward model", start=step) as progress:
            ...
            progress.update(step, tokens=batch_tokens, loss=loss)

    `start` is the step from which this process goes on, so that the time to go is right for a resumed run. On a
    terminal a single line is kept up to date; elsewhere a plain line is written at most every `interval` seconds and
    one at the end. `quiet` writes nothing; by default that is so where STEELYARD_QUIET is set, as it is in worker
    processes. `clock` returns seconds.
    """

    def __init__(
        self,
        total: int,
        label: str,
        *,
        start: int = 0,
        stream: TextIO | None = None,
        quiet: bool | None = None,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label, self.start, self.interval = total, label, start, interval
        self.quiet = bool(os.environ.get("STEELYARD_QUIET")) if quiet is None else quiet
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._step = start
        self._tokens = 0
        self._shown: dict[str, Any] = {}
        self._began = self._printed = clock()
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        self._began = self._printed = self._clock()
        if not self.quiet and self._stream.isatty():
            console = Console(file=self._stream)
            if not console.is_dumb_terminal:
                self._bar = Bar(
                    TextColumn("{task.description}", markup=False),
                    BarColumn(bar_width=20),
                    TextColumn("{task.fields[text]}", markup=False),
                    console=console,
                )
                self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, text=self._text())
                self._bar.start()
        return self

    def update(self, step: int, *, tokens: int = 0, **shown: float | int | str) -> None:
        """Step `step` is done. `tokens` were processed since the last call; `shown` are values to show by name.

        A value stays in view until the next one of its name.
        """
        self._step = step
        self._tokens += tokens
        self._shown.update(shown)
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._text())
        elif self._clock() - self._printed >= self.interval:
            self._print()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._step, text=self._text(final=True))
            self._bar.stop()
        elif not self.quiet and self._step > self.start:
            self._print(final=True)

    def _print(self, *, final: bool = False) -> None:
        print(f"{self.label}  {self._text(final=final)}", file=self._stream, flush=True)
        self._printed = self._clock()

    def _text(self, *, final: bool = False) -> str:
        elapsed = self._clock() - self._began
        done = self._step - self.start
        parts = [f"{self._step}/{self.total}"]
        if final:
            parts.append(f"took {_duration(elapsed)}")
        elif done > 0:
            parts.append(f"eta {_duration(elapsed / done * max(self.total - self._step, 0))}")
        if self._tokens and elapsed > 0:
            parts.append(f"{_short(self._tokens / elapsed)} tokens/s")
        parts += [f"{name} {_value(value)}" for name, value in self._shown.items()]
        return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(number: float) -> str:
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def _value(value: float | int | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
