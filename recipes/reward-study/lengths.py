"""Accuracy of a study's arms where the longer response is the better one, and where the shorter one is.

python recipes/reward-study/lengths.py runs/ukp-controls plain flip margin flip+margin

Reads the rewards that `steelyard study data` left of its validation pairs, labels as in `validation/relabelled.jsonl`.
The first arm is the control. Length is the number of characters; 95 % intervals are over seeds and units.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from steelyard.data.load import load_preferences
from steelyard.evaluate.reward import wins
from steelyard.evaluate.seeds import compare_arms
from steelyard.evaluate.units import units_of
from steelyard.study.data_models import load_scores


def margins(study: Path, arm: str, ids: list[str], signs: dict[str, int]) -> np.ndarray:
    """r(better) - r(worse) of these pairs, one row a seed; `signs`: -1 where the label was turned."""
    name = "all" if arm == "plain" else "arm-" + arm.replace(" ", "-")
    folders = sorted((study / "models" / name).glob("*-steps/seed-*"))
    if not folders:
        raise SystemExit(f"{study}: has no models of an arm named {arm!r}")
    rows = []
    for folder in folders:
        names, scores = load_scores(folder / "scores.npz")
        of = dict(zip(names, scores[:, 0] - scores[:, 1], strict=True))
        rows.append([of[i] * signs[i] for i in ids])
    return np.array(rows, dtype=np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("arms", nargs="+")
    args = parser.parse_args()
    held = args.study / "validation"
    pairs = load_preferences(held / "relabelled.jsonl").preferences
    first = {p.id: str(p.chosen) for p in load_preferences(held / "original.jsonl").preferences}
    signs = {p.id: 1 if first[p.id] == str(p.chosen) else -1 for p in pairs}
    ids = [p.id for p in pairs]
    correct = {arm: wins(margins(args.study, arm, ids, signs)) for arm in args.arms}
    longer = np.array([len(str(p.chosen)) - len(str(p.rejected)) for p in pairs])
    for name, rows in (("longer", longer > 0), ("shorter", longer < 0)):
        units = units_of([p for p, taken in zip(pairs, rows, strict=True) if taken])
        found = {arm: values[:, rows] for arm, values in correct.items()}
        for row in compare_arms(found, clusters=units, control=args.arms[0]):
            print(json.dumps({"better is": name, "pairs": int(rows.sum())} | row))


if __name__ == "__main__":
    main()
