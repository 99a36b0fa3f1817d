"""What a piece of work costs: tokens through the model, time, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class Cost:
    """`tokens` counts one token going forward through all layers as 1.

    A token's backward pass costs 2: one for the gradient of the states, one for that of the weights. So a token of
    training counts 3 where all layers are trained, 2 under adapters on frozen weights (the adapters' own share is
    left out), and 3 n / L where the top n of L layers are trained on stored states, which cost (L - n) / L once.
    `wall` and `cpu` are seconds (of this process, all its threads), `memory` the peak of the resident set in bytes,
    pages of mapped files included.
    """

    tokens: float = 0.0
    wall: float = 0.0
    cpu: float = 0.0
    memory: float = 0.0

    def plus(self, other: Cost) -> Cost:
        """The cost of both, one after the other."""
        memory = max(self.memory, other.memory)
        return Cost(self.tokens + other.tokens, self.wall + other.wall, self.cpu + other.cpu, memory)


@contextmanager
def metered(tokens: float = 0.0) -> Iterator[Cost]:
    """A cost that is filled in at the end of the block."""
    _forget_peak()
    cost = Cost(tokens)
    wall, cpu = time.perf_counter(), time.process_time()
    yield cost
    cost.wall, cost.cpu = time.perf_counter() - wall, time.process_time() - cpu
    cost.memory = _peak()


def _forget_peak() -> None:
    """Let the peak be that of what follows; only Linux can, elsewhere it is that of the process so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> float:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak if sys.platform == "darwin" else 1024 * peak)
