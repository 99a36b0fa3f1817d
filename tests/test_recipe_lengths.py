"""`recipes/reward-study/lengths.py` on a study folder made by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PROGRAM = Path(__file__).parent.parent / "recipes" / "reward-study" / "lengths.py"
PAIRS = [  # id, chosen, rejected, whether the better one is the other
    ("a", "long answer", "short", False),
    ("b", "tiny", "a long answer", True),
    ("c", "no", "a long answer", False),
    ("d", "same", "also", False),
]
MARGINS = {"all": (1.0, 2.0, 3.0, 4.0), "arm-soft-targets": (1.0, -2.0, -3.0, -4.0)}  # r(chosen) - r(rejected)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    (tmp_path / "validation").mkdir()
    for name in ("original", "relabelled"):
        rows = []
        for key, chosen, rejected, other in PAIRS:
            if other and name == "relabelled":
                chosen, rejected = rejected, chosen
            rows.append({"id": key, "prompt": f"Say {key}.", "chosen": chosen, "rejected": rejected})
        (tmp_path / "validation" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for arm, found in MARGINS.items():
        folder = tmp_path / "models" / arm / "9-steps" / "seed-0"
        folder.mkdir(parents=True)
        scores = np.array([[m, 0] for m in found], dtype=np.float32)
        np.savez(folder / "scores.npz", ids=np.array([key for key, *_ in PAIRS]), scores=scores)
    return tmp_path


def ran(study: Path, *arms: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), str(study), *arms], capture_output=True, text=True)


def test_right_where_the_better_one_is_longer_and_where_it_is_shorter(study: Path) -> None:
    made = ran(study, "plain", "soft targets")
    assert made.returncode == 0, made.stderr
    rows = [json.loads(line) for line in made.stdout.splitlines()]
    # Longer is better in a and, its label turned, in b; shorter in c; d counts in neither.
    assert [(r["better is"], r["pairs"], r["arm"], r["value"]) for r in rows] == [
        ("longer", 2, "plain", 0.5),
        ("longer", 2, "soft targets", 1.0),
        ("shorter", 1, "plain", 1.0),
        ("shorter", 1, "soft targets", 0.0),
    ]
    assert [r["difference"]["value"] for r in rows if r["arm"] != "plain"] == [0.5, -1.0]


def test_an_arm_that_is_not_there_is_named(study: Path) -> None:
    made = ran(study, "plain", "flip")
    assert made.returncode == 1
    assert "no models of an arm named 'flip'" in made.stderr
