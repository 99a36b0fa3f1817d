"""The finished runs of a policy study, read back: one array a cell and seed, and rows of values with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from steelyard.evaluate.seeds import mean_over_seeds
from steelyard.study.policy_config import Cell, PolicyStudy
from steelyard.study.policy_jobs import EXAMINED, FAILED, load_arrays, read_looks
from steelyard.study.policy_places import reward_of, run_of

Array = np.ndarray
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One policy's looks: J points, N prompts, K responses."""

    folder: Path
    steps: list[int]
    columns: dict[str, Float[Array, "J N K"]]

    @property
    def kl_J(self) -> Float[Array, "J"]:
        """The distance at each look, nats a response."""
        return self.columns["kl"].mean((1, 2))

    def values(self, column: str) -> Float[Array, "J X"]:
        """One column, response by response."""
        stacked = self.columns[column]
        return stacked.reshape(len(stacked), -1)


@dataclass(frozen=True)
class Runs:
    """All finished runs; `failed` names those that their guards ended."""

    of: Mapping[Cell, Mapping[int, Run]]
    failed: list[Row]
    clusters: list[int]  # the prompt of each response

    def both(self, a: Cell, b: Cell) -> list[int]:
        """The seeds that have both cells."""
        return [seed for seed in self.of[a] if seed in self.of[b]]


def read_runs(study: PolicyStudy, out: Path) -> Runs:
    """Every finished run of the study's grid."""
    found: dict[Cell, dict[int, Run]] = {}
    failed: list[Row] = []
    shape = (0, 1)
    for cell in study.grid():
        found[cell] = {}
        for seed in study.seeds:
            folder = run_of(out, seed, cell)
            if (folder / FAILED).exists():
                failed.append(named(cell) | {"seed": seed, **json.loads((folder / FAILED).read_text())})
                continue
            steps, columns = read_looks(folder)
            found[cell][seed] = Run(folder, steps, columns)
            shape = columns["gold"].shape[1:]
    return Runs(found, failed, [n for n in range(shape[0]) for _ in range(shape[1])])


def examined(out: Path, seed: int, data: tuple[str, str], member: int = 0) -> dict[str, Array]:
    """What a reward model's examination left."""
    return load_arrays(reward_of(out, seed, data, member) / EXAMINED)


def named(cell: Cell) -> Row:
    """The columns that name a cell."""
    return {"world": cell.world, "noise": cell.noise, "rate": cell.rate, "repair": cell.repair, "arm": cell.arm,
            "kl_coef": cell.kl_coef}  # fmt: skip


def value_row(values_SX: Sequence[Array] | Sequence[float], clusters: Sequence[int] | None = None) -> Row:
    """Mean over seeds with its interval over seeds and prompts; without clusters (one number a seed) over seeds.

    One number of one seed has no interval: its ends are None.
    """
    stacked = np.array(values_SX, dtype=np.float64).reshape(len(values_SX), -1)
    groups = list(range(stacked.shape[1])) if clusters is None else clusters
    value, low, high = mean_over_seeds(stacked, clusters=groups)
    if stacked.size == 1:
        return {"value": value, "low": None, "high": None, "seeds": [value]}
    return {"value": value, "low": low, "high": high, "seeds": stacked.mean(1).tolist()}
