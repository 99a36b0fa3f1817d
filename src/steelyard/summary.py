"""What a run says of itself: versions and origin, and the tables of its summary."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from steelyard import __version__
from steelyard.errors import InputError
from steelyard.evaluate.examination import benchmark_tables
from steelyard.evaluate.units import FEW_PROMPTS
from steelyard.parallel import default_workers
from steelyard.run_dir import write_json_atomic

T = TypeVar("T")
_KILLED = "killed while it ran: without the time up to then"


class Stages:
    """The stages of a run that holds several: `rows` of their names, seconds and notes, in stages.json.

    `settings` is the file of the run's settings, in the same folder.
    """

    def __init__(self, settings: Path) -> None:
        self._settings, self._path = settings, settings.with_name("stages.json")
        self.rows: list[dict[str, Any]] = json.loads(self._path.read_text()) if self._path.exists() else []

    def stage(self, name: str, work: Callable[[], T]) -> T:
        """`work()`, its seconds added to those of earlier sittings, however it ends.

        What is killed outright cannot say how long it ran: the note that stands meanwhile is then left to say so. A
        run whose first stage raises InputError never began: mended settings may use the same folder.
        """
        begun = bool(self.rows)
        row = next((r for r in self.rows if r["name"] == name), None)
        if row is None:
            self.rows.append(row := {"name": name, "seconds": 0.0, "note": ""})
        note, row["note"] = row["note"], _KILLED
        write_json_atomic(self._path, self.rows)
        began = time.perf_counter()
        try:
            result = work()
        except InputError:
            if not begun:
                self.rows.clear()
                self._settings.unlink()
            raise
        finally:
            seconds = time.perf_counter() - began
            row["seconds"] += seconds
            row["note"] = note
            write_json_atomic(self._path, self.rows)
        print(f"{name}: {seconds:.0f} s", flush=True)
        return result


def describe_run(name: str, seed: int, began: float, command: str) -> dict[str, Any]:
    """Versions and origin, for the report."""
    import torch
    import transformers

    commit = ""
    git = shutil.which("git")
    if git is not None:
        here = Path(__file__).resolve().parent
        asked = subprocess.run([git, "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
        commit = asked.stdout.strip() if asked.returncode == 0 else ""
    return {
        "name": name,
        "version": __version__,
        "commit": commit,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "platform": f"{sys.platform} {platform.machine()}, {default_workers()} CPUs",
        },
        "seed": seed,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
        "command": command,
    }


def tables(out: Path) -> list[dict[str, Any]]:
    """The summary's tables, from the files that the stages left."""
    found = []
    for scoring in ("in-sample", "out-of-fold"):
        path = out / "strength" / scoring / "result.json"
        if path.exists() and (rows := json.loads(path.read_text()).get("detection")):
            found.append(
                {
                    "title": f"Finding wrong labels, {scoring}",
                    "columns": ["noise", "scorer", "AUROC", "average precision", "wrong", "pairs"],
                    "rows": [
                        [r["noise"], r["scorer"], r["auroc"], r["average_precision"], r["positives"], r["n"]]
                        for r in rows
                    ],
                    "note": "A kind of noise is told from the right labels; a single member is the mean over members.",
                }
            )
    if (path := out / "examine" / "reward.json").exists():
        rows = json.loads(path.read_text())["rows"]
        sets = list(dict.fromkeys(r["set"] for r in rows))
        by_arm: dict[str, dict[str, Any]] = {r["arm"]: {} for r in rows}
        for r in rows:
            by_arm[r["arm"]][r["set"]] = r
        found.append(
            {
                "title": "Reward models: accuracy on held-out pairs",
                "columns": ["arm", *(f"{s} (n = {next(r['n'] for r in rows if r['set'] == s)})" for s in sets)],
                "rows": [
                    [arm, *(f"{c[s]['accuracy']:.3f} [{c[s]['low']:.3f}, {c[s]['high']:.3f}]" for s in sets)]
                    for arm, c in by_arm.items()
                ],
                "note": f"95 % bootstrap intervals by {_units(rows)}. One seed each: differences inside them are no "
                "finding." + _few_prompts(rows),
            }
        )
    if (path := out / "examine" / "benchmarks.json").exists():
        found += benchmark_tables(json.loads(path.read_text())["results"])
    if (path := out / "evaluate" / "policy.json").exists():
        result = json.loads(path.read_text())
        found.append(
            {
                "title": "Policies on held-out prompts",
                "columns": ["policy", "gold", "proxy", "KL to SFT", "length", "ended"],
                "rows": [
                    [a["arm"], _interval(a, "gold"), _interval(a, "proxy"), a["kl"], a["length"], a["ended"]]
                    for a in result["arms"]
                ],
                "note": "Proxy: the policy's own reward model, normalised (for SFT, where policies have several, the "
                "first policy's). One seed each.",
            }
        )
        found += _win_tables(result["wins"])
    return found + judge_tables(out)


def judge_tables(out: Path) -> list[dict[str, Any]]:
    """The summary's tables of evaluate/judge.json: wins by each judge, and how far a judge model can be trusted."""
    path = out / "evaluate" / "judge.json"
    if not path.exists():
        return []
    wins = json.loads(path.read_text())["wins"]
    found = _win_tables(wins)
    if asked := [w for w in wins if "replies" in w]:
        columns = ["judge", "policy", "against", "same verdict in both orders", "first answer wins"]
        columns += ["replies", "unreadable", "refused", "comparisons without verdict"]
        keys = ("consistency", "first_share", "replies", "unreadable", "refused", "without_verdict")
        rows = [[w["judge"], w["a"], w["b"], *("unknown" if w[k] is None else w[k] for k in keys)] for w in asked]
        note = "Verdicts that disagree are ties. Comparisons without a readable verdict in both orders are left out."
        found.append({"title": "Judge models", "columns": columns, "rows": rows, "note": note})
    return found


def _win_tables(wins: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A table for each judge."""
    return [
        {
            "title": f"Win / tie / lose by {judge}",
            "columns": ["policy", "against", "win", "tie", "lose", "score"],
            "rows": [
                [w["a"], w["b"], w["win"], w["tie"], w["lose"], _interval(w, "score", "")]
                for w in wins
                if w["judge"] == judge
            ],
            "note": "Score: wins and half the ties, with a 95 % bootstrap interval by prompt.",
        }
        for judge in dict.fromkeys(w["judge"] for w in wins)
    ]


def _interval(row: Mapping[str, Any], name: str, prefix: str | None = None) -> str:
    start = f"{name}_" if prefix is None else prefix
    if row[name] is None:
        return "unknown"
    return f"{row[name]:.3f} [{row[f'{start}low']:.3f}, {row[f'{start}high']:.3f}]"


def _units(rows: list[dict[str, Any]]) -> str:
    """What the intervals' bootstraps draw; files of earlier versions do not say it: prompts."""
    return " or ".join(dict.fromkeys(r.get("unit", "prompts").removesuffix("s") for r in rows))


def _few_prompts(rows: list[dict[str, Any]]) -> str:
    """A warning where the intervals rest on too few prompts to mean what they say."""
    fewest = min(rows, key=lambda r: r["prompts"])
    if fewest["prompts"] >= FEW_PROMPTS:
        return ""
    start = f" With only {fewest['prompts']} different prompts"
    if fewest.get("unit", "prompts") == "prompts":
        return f"{start} to resample, the intervals are themselves very uncertain."
    return f"{start}, {fewest['unit']} are resampled: the intervals say nothing of other prompts."
