"""One measured ensemble as `steelyard study strength` reads it: margins, truth, costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from steelyard.evaluate.units import Units, units_of
from steelyard.measure import read_scores
from steelyard.members.cost import Cost
from steelyard.types import Preference


@dataclass(frozen=True, slots=True)
class Run:
    """One ensemble: margins (NaN: no vote), the truth of each pair (1 right, -1 wrong, 0 unknown), and costs.

    `longer_N` is by how many characters the chosen text is longer, `index_N` which pair of the file a column is;
    `units` are those of all pairs of the file, none given: the pairs themselves.
    """

    backend: str
    scoring: str
    seed: int
    margins_MN: Float[np.ndarray, "M N"]
    truth_N: Int[np.ndarray, "N"]
    longer_N: Float[np.ndarray, "N"]
    index_N: Int[np.ndarray, "N"]
    shared: Cost
    members: list[Cost]
    units: Units | None = None

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        backend: str,
        scoring: str,
        seed: int,
        shared: Cost,
        members: list[Cost],
        preferences: Sequence[Preference],
        truth: dict[str, int],
    ) -> Run:
        """From a folder of `measure`."""
        scores, index = read_scores(folder)
        pairs = [preferences[i] for i in index]
        return cls(
            backend, scoring, seed,
            (scores[..., 0] - scores[..., 1]).astype(np.float64),
            np.array([truth.get(p.id, 0) for p in pairs]),
            np.array([len(p.chosen) - len(p.rejected) for p in pairs], dtype=float),
            np.array(index), shared, members, units_of(preferences),
        )  # fmt: skip

    def strength(self, M: int | None = None) -> Float[np.ndarray, "N"]:
        """Mean margin over the votes of the first M members; NaN where none of them voted."""
        votes = self.margins_MN[:M]
        voters = (~np.isnan(votes)).sum(0)
        return np.where(voters > 0, np.nansum(votes, 0) / np.maximum(voters, 1), np.nan)

    def drawn(self) -> Units:
        """What a bootstrap draws of the file's pairs."""
        return self.units or Units.of("pairs", range(int(self.index_N.max()) + 1))

    def cost(self, M: int) -> Cost:
        """Of the first M members, one after the other, with what they share."""
        total = self.shared
        for member in self.members[:M]:
            total = total.plus(member)
        return total
