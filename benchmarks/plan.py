"""Which pairs are computed in which step: written once, read by every worker. Imports neither torch nor Steelyard."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Pair:
    """One comparison in tokens; chosen and rejected follow the prompt and hold their end token."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def sequences(self) -> tuple[list[int], list[int]]:
        """What a trainer without a shared prompt computes."""
        return self.prompt + self.chosen, self.prompt + self.rejected

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that all trainers must agree on, and the two things that each has of its own.

    A step is `batch` pairs. `micro` pairs go through TRL's model at once, `bucket` pairs of similar length through the
    bucketed loop's, `max_tokens` tokens through Steelyard's. The learning rate is constant.
    """

    start: str
    precision: str
    threads: int
    device: str = "cpu"
    batch: int = 16
    micro: int = 8
    bucket: int = 4
    max_tokens: int = 2048
    max_length: int = 1024
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """`pairs` in the order of the steps; `windows` are numbers of steps within which the bucketed loop may sort."""

    settings: Settings
    pairs: list[Pair]
    windows: list[int]

    def steps(self) -> list[list[Pair]]:
        """The pairs of each step, as all but the bucketed loop take them."""
        batch = self.settings.batch
        return [self.pairs[at : at + batch] for at in range(0, len(self.pairs), batch)]

    def bucketed_steps(self) -> list[list[Pair]]:
        """The same pairs in each window, in steps of similar length; shortest pairs of a step first."""
        lengths = [pair.longest for pair in self.pairs]
        order = bucketed(lengths, self.settings.batch, self.windows, self.settings.seed)
        return [[self.pairs[i] for i in step] for step in order]

    def write(self, path: Path) -> None:
        """As JSON, for the workers."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Plan:
        """What `write` wrote."""
        told: dict[str, Any] = json.loads(path.read_text())
        told["settings"]["betas"] = tuple(told["settings"]["betas"])
        return cls(Settings(**told["settings"]), [Pair(**pair) for pair in told["pairs"]], told["windows"])


def bucketed(lengths: Sequence[int], batch: int, windows: Sequence[int], seed: int) -> list[list[int]]:
    """Steps of `batch` pairs of similar length; each window of steps holds the pairs it would hold unsorted.

    The steps of a window come in random order, so that training does not go from short to long; within a step the
    shortest pair comes first. Raises ValueError if the windows do not cover the pairs exactly.
    """
    if sum(windows) * batch != len(lengths):
        raise ValueError(f"windows of {sum(windows)} steps of {batch} pairs do not cover {len(lengths)} pairs")
    draw = random.Random(seed)
    steps: list[list[int]] = []
    at = 0
    for window in windows:
        inside = sorted(range(at, at + window * batch), key=lambda i: (lengths[i], i))
        cut = [inside[i : i + batch] for i in range(0, len(inside), batch)]
        draw.shuffle(cut)
        steps += cut
        at += window * batch
    return steps


def micro_batches(pairs: Sequence[Pair], size: int) -> list[list[Pair]]:
    """Consecutive pairs, `size` at once."""
    return [list(pairs[i : i + size]) for i in range(0, len(pairs), size)]
