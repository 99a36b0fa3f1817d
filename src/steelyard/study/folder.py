"""The folder of a study: its settings, its stages' times, its curves; begun once, resumed as often as needed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import yaml

from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.report.blocks import over
from steelyard.run_dir import acquire, completed, write_json_atomic, write_text_atomic
from steelyard.summary import Stages, describe_run

T = TypeVar("T")
POINTS = 150  # of a curve in study.json
FEW_UNITS = 10  # of fewer a bootstrap does not know how they vary
FREE = ("name", "seeds", "workers", "threads")  # fields that may change between the sittings of a study

Curve = dict[str, Any]


def refuse_seeds(sections: Mapping[str, Any]) -> None:
    """Raise InputError where a section names a seed: all of the study's seeds would do the same with it."""
    if named := [name for name, settings in sections.items() if settings and "seed" in settings]:
        raise InputError(f"{', '.join(named)}: `seed` follows from the study's `seeds`; leave it out")


class StudyFolder:
    """One study's folder, this process's own until the end of a `with` block.

    Every stage must do nothing where its files are there already.
    """

    def __init__(
        self,
        path: Path,
        study: Config,
        *,
        resume: bool,
        command: str,
        free: Sequence[str] = FREE,
        growing: Sequence[str] = (),
    ) -> None:
        """A resumed study may change its `free` fields and add entries to its `growing` ones.

        Raises InputError if the folder holds another study, or this one and `resume` was not asked for, or another
        process works in it.
        """
        self.path, self.command, self.began = path, command, time.time()
        self._lock = acquire(path)
        try:
            _begin(path / "study.yaml", study, resume, free, growing)
            self._stages = Stages(path / "study.yaml")
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def stage(self, name: str, work: Callable[[], T]) -> T:
        """`work()`, timed as in `Stages`."""
        return self._stages.stage(name, work)

    def finish(self, name: str, seed: int, found: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]) -> None:
        """study.json with the findings, and what the report says of the run."""
        write_json_atomic(self.path / "study.json", dict(found))
        about = describe_run(name, seed, self.began, self.command)
        write_json_atomic(self.path / "run.json", about | {"seconds": sum(s["seconds"] for s in self._stages.rows)})
        write_json_atomic(self.path / "summary.json", {"tables": list(tables), "stages": self._stages.rows})


def _begin(stored: Path, study: Config, resume: bool, free: Sequence[str], growing: Sequence[str]) -> None:
    """Write the study's settings to `stored`, if those that it holds already allow it."""
    path, begun = stored.parent, stored.exists()
    if begun and not resume:
        raise InputError(f"{path}: holds a study already; go on with --resume, or give another folder (--out)")
    given = study.model_dump(mode="json")
    before = completed(yaml.safe_load(stored.read_text()), type(study)) if begun else given
    for name in growing:
        if changed := [k for k, v in before.get(name, {}).items() if given[name].get(k, v) != v]:
            said = ", ".join(changed)
            raise InputError(f"{name}: {said} has other settings than in {stored}; choose another name")
    if fixed := {n for n in {*given, *before} - {*free, *growing} if given.get(n) != before.get(n)}:
        said = ", ".join(sorted(fixed))
        raise InputError(f"{path}: holds a study with other settings of {said} ({stored}); give another folder")
    if given != before or not begun:
        write_text_atomic(stored, yaml.safe_dump(study.model_dump(mode="json", exclude_unset=True), sort_keys=False))


def mean_curves(folders: Mapping[str, Sequence[Path]], wanted: Callable[[str], bool]) -> list[Curve]:
    """The metrics of stage folders over steps: of each arm the mean over its seeds, with the least and greatest.

    `folders` holds each arm's stage folders, one a seed; only steps and metrics that all seeds of an arm logged count.
    """
    curves = []
    for arm, paths in folders.items():
        logged = [_metrics(path / "metrics.jsonl") for path in paths]
        for metric in sorted(set.intersection(*(set(one) for one in logged))):
            if not wanted(metric):
                continue
            steps = sorted(set.intersection(*(set(one[metric]) for one in logged)))
            steps = steps[:: -(-len(steps) // POINTS) or 1]
            values_SP = np.array([[one[metric][s] for s in steps] for one in logged])
            if steps:
                low, mean, high = values_SP.min(0), values_SP.mean(0), values_SP.max(0)
                curve = {"arm": arm, "metric": metric, "steps": steps}
                curves.append(curve | {"mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()})
    return curves


def _metrics(path: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            found.setdefault(name, {})[step] = value
    return found


def difference_table(title: str, rows: Sequence[Mapping[str, Any]], control: str) -> dict[str, Any]:
    """One table of the summary: value of each arm, difference to the control, both with intervals."""
    units = " or ".join(dict.fromkeys(r["unit"] for r in rows))
    least = min(r["clusters"] for r in rows)
    few = f" Over as few as {least} of them they are too narrow." if least < FEW_UNITS else ""
    return {
        "title": title,
        "columns": ["set", "measure", "arm", "value", f"difference to {control}", "seeds above it"],
        "rows": [
            [r["set"], r["measure"], r["arm"], _interval(r), _interval(r.get("difference")), _above(r)] for r in rows
        ],
        "note": f"95 % intervals over {over(len(rows[0]['seeds']), units)}; paired bootstrap.{few} An interval that "
        "holds 0 shows no difference.",
    }


def _interval(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _above(row: Mapping[str, Any]) -> str:
    seeds = row.get("difference", {}).get("seeds")
    return "" if seeds is None else f"{sum(s > 0 for s in seeds)} of {len(seeds)}"
