"""The numbers of a study of data: from its models' folders and validation scores to study.json, without training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from steelyard.data.load import load_preferences
from steelyard.data.split import prompt_key
from steelyard.evaluate.reward import reward_metrics, wins
from steelyard.evaluate.seeds import compare_arms
from steelyard.evaluate.units import Units, units_of
from steelyard.report.blocks import over
from steelyard.study import data_sets
from steelyard.study.data_config import PLAIN, SCORER_NAMES, DataStudy
from steelyard.study.data_models import SCORES, load_scores
from steelyard.study.data_sets import Input
from steelyard.study.folder import POINTS

ENSEMBLE_FILE = "ensemble.npz"
ENSEMBLE, WARM, WARM_MEAN = SCORER_NAMES
Row = dict[str, Any]


@dataclass
class Plan:
    """Which models belong to which analysis: analysis -> name -> seed -> folder; and the weight averages by seed."""

    models: dict[str, dict[str, dict[int, Path]]] = field(default_factory=dict)
    averages: dict[int, tuple[list[Path], Path]] = field(default_factory=dict)

    def need(self, analysis: str, name: str, seed: int, folder: Path) -> None:
        """Note that the analysis reads this model."""
        self.models.setdefault(analysis, {}).setdefault(name, {})[seed] = folder

    def folders(self, analysis: str, name: str) -> list[Path]:
        """The models of all seeds, in the seeds' order."""
        return list(self.models[analysis][name].values())


@dataclass(frozen=True)
class HeldOut:
    """The validation pairs that the models could read, in the order of their scores.

    `sets` maps a validation set to (rows, signs): sign -1 means that the set has the label turned. `units` are what the
    bootstrap draws in each set: prompts, or where these are too few the pairs' responses. `longer_N`: by how many
    characters the response that the original label prefers is the longer one.
    """

    ids: list[str]
    longer_N: Int[np.ndarray, "N"]
    sets: dict[str, tuple[np.ndarray, np.ndarray]]
    units: dict[str, Units]
    prompts: dict[str, int]


def held_out(validation: Mapping[str, str], ids: Sequence[str]) -> HeldOut:
    """Read the validation files: original labels, and, where the truth is known, relabelled and agreeing pairs."""
    pairs = {name: load_preferences(path).preferences for name, path in validation.items()}
    by_id = {p.id: p for p in pairs["original"]}
    sets: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, content in pairs.items():
        chosen = {p.id: p.chosen for p in content}
        known = [i for i, one in enumerate(ids) if one in chosen]
        signs = [1.0 if chosen[ids[i]] == by_id[ids[i]].chosen else -1.0 for i in known]
        sets[name] = (np.array(known), np.array(signs))
    units, prompts = {}, {}
    for name, (rows, _) in sets.items():
        held = [by_id[ids[i]] for i in rows]
        units[name] = units_of(held)
        prompts[name] = len({prompt_key(p.prompt) for p in held})
    longer = [len(by_id[one].chosen) - len(by_id[one].rejected) for one in ids]
    return HeldOut(list(ids), np.array(longer), sets, units, prompts)


def examine_study(study: DataStudy, plan: Plan, start: Input) -> Row:
    """Every table of the study, from the files that its models left."""
    first = next(iter(next(iter(next(iter(plan.models.values())).values())).values()))
    held = held_out(start.validation, load_scores(first / SCORES)[0])
    means = [s.mean for s in start.strengths]
    found: Row = {
        "kind": "data",
        "seeds": list(study.seeds),
        "pairs": len(start.pairs),
        "scoring": start.scoring,
        "sets": [
            {"set": name, "n": len(rows), "prompts": held.prompts[name], "unit": held.units[name].name}
            for name, (rows, _) in held.sets.items()
        ],
        "share_negative": float(np.mean(np.array(means) < 0)),
        "compute": [_compute(name, models) for name, models in plan.models.items()],
    }
    if study.wants("bands"):
        found["bands"] = _bands(study, plan, start, held)
    if study.wants("growth"):
        found["growth"] = _growth(study, plan, start, held)
    if study.wants("bands_repair"):
        found["bands_repair"] = _bands_repair(study, plan, held)
    if study.wants("segments", "inflation"):
        runs = [_metrics(folder / "metrics.jsonl") for folder in plan.folders("dynamics", PLAIN)]
        per_pass = -(-len(start.pairs) // _config(plan.folders("dynamics", PLAIN)[0])["batch_size"])
        found["steps_per_pass"] = per_pass
        if study.wants("segments"):
            found["segments"] = _segments(study, runs, start, held)
        if study.wants("inflation"):
            found["inflation"] = _inflation(runs)
    if study.wants("arms"):
        rewards, trainings = _arm_rewards(study, plan, start, held)
        rows = compare(rewards, held, PLAIN)
        found["arms"] = [r | {"models": trainings[r["arm"]]} | _scale(rewards[r["arm"]], held, r["set"]) for r in rows]
        found["findings"] = findings(found["arms"])
        found["arms_by_length"] = by_length(rewards, held)
        found["controls"] = _controls(study, plan, held)
    return found


# ---- accuracy --------------------------------------------------------------------------------------------------


def read_rewards(folders: Sequence[Path], held: HeldOut) -> Float[np.ndarray, "S N 2"]:
    """Rewards of chosen and rejected by the models of all seeds, float64. Raises RuntimeError for other pairs."""
    rewards = []
    for folder in folders:
        ids, scores = load_scores(folder / SCORES)
        if ids != held.ids:
            raise RuntimeError(f"{folder / SCORES}: was scored on other validation pairs; remove it and resume")
        rewards.append(scores.astype(np.float64))
    return np.stack(rewards)


def correct(rewards_SN2: Float[np.ndarray, "S N 2"], held: HeldOut, name: str) -> Float[np.ndarray, "S n"]:
    """1 where a model orders a pair as the set's label does, 0 where not, 1/2 at a tie."""
    rows, signs = held.sets[name]
    margin = rewards_SN2[..., 0] - rewards_SN2[..., 1]
    return wins(margin[:, rows] * signs)


def compare(rewards: Mapping[str, Float[np.ndarray, "S N 2"]], held: HeldOut, control: str | None) -> list[Row]:
    """One row for each arm and set: accuracy with its interval and, beside `control`, the paired difference."""
    rows: list[Row] = []
    for name in held.sets:
        values = {arm: correct(r, held, name) for arm, r in rewards.items()}
        # Without a control every arm would be compared with nothing: compare each with itself alone.
        groups = [values] if control else [{arm: v} for arm, v in values.items()]
        for group in groups:
            compared = compare_arms(group, clusters=held.units[name], control=control or next(iter(group)))
            rows += [{"set": name, **row} for row in compared]
    return rows


def _bands(study: DataStudy, plan: Plan, start: Input, held: HeldOut) -> list[Row]:
    rows = data_sets.band_rows(start.strengths, study.bands.count)
    described = {str(band): _describe(start, held_rows) for band, held_rows in enumerate(rows, 1)}
    rewards = {band: read_rewards(plan.folders("bands", f"{band} plain"), held) for band in described}
    return [{"band": int(r["arm"]), **described[r["arm"]], **_renamed(r)} for r in compare(rewards, held, None)]


def _describe(start: Input, rows: Sequence[int]) -> Row:
    """A part of the training pairs: how many, how strong, and how many labels are right where that is known."""
    strengths = [start.strengths[i] for i in rows]
    known = [t for i in rows if (t := (start.truth or {}).get(start.pairs[i].id, 0))]
    return {
        "pairs": len(rows),
        "strength_low": min(s.mean for s in strengths),
        "strength_high": max(s.mean for s in strengths),
        "strength_mean": float(np.mean([s.mean for s in strengths])),
        "strength_std": float(np.mean([s.std for s in strengths])),
        "right": float(np.mean([t > 0 for t in known])) if known else None,
    }


def _renamed(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "arm"}


def _growth(study: DataStudy, plan: Plan, start: Input, held: HeldOut) -> list[Row]:
    names = [(end, f) for end in ("weakest", "strongest") for f in study.growth.fractions]
    rewards = {f"{end} {f:g}": read_rewards(plan.folders("growth", f"{end} {f:g}"), held) for end, f in names}
    rows = {(r["arm"], r["set"]): _renamed(r) for r in compare(rewards, held, None)}
    parts = {n: _describe(start, data_sets.growth_rows(start.strengths, n[1], n[0])) for n in names}
    return [
        {"end": end, "fraction": f, **parts[end, f], **rows[f"{end} {f:g}", name]}
        for end, f in names
        for name in held.sets
    ]


def _bands_repair(study: DataStudy, plan: Plan, held: HeldOut) -> list[Row]:
    """Each treatment of a band against the untouched band."""
    rows = []
    for kind, bands in (("flip", study.bands_repair.flip), ("soft", study.bands_repair.soft)):
        for band in bands:
            names = data_sets.treatments(kind == "flip")
            rewards = {t: read_rewards(plan.folders("bands_repair", f"{band} {t}"), held) for t in names}
            compared = compare(rewards, held, PLAIN)
            rows += [{"kind": kind, "band": band, "treatment": r["arm"], **_renamed(r)} for r in compared]
    return rows


def _arm_rewards(
    study: DataStudy, plan: Plan, start: Input, held: HeldOut
) -> tuple[dict[str, Float[np.ndarray, "S N 2"]], dict[str, int]]:
    """(the rewards of every arm, how many trainings it takes); an untrained scorer's are the same for every seed."""
    rewards = {arm: read_rewards(plan.folders("arms", arm), held) for arm in study.repair}
    cost = dict.fromkeys(rewards, 1)
    if "ensemble" in study.scorers:
        ids, scores = load_scores(start.out / ENSEMBLE_FILE)
        if ids != held.ids:
            raise RuntimeError(f"{start.out / ENSEMBLE_FILE}: was scored on other validation pairs; remove it")
        rewards[ENSEMBLE] = np.repeat(scores.astype(np.float64).mean(0)[None], len(study.seeds), 0)
        cost[ENSEMBLE] = len(scores)
    if plan.averages:
        rewards[WARM] = read_rewards([out for _, out in plan.averages.values()], held)
        members = [read_rewards(folders, held).mean(0) for folders, _ in plan.averages.values()]
        rewards[WARM_MEAN] = np.stack(members)
        cost[WARM] = cost[WARM_MEAN] = study.warm.members
    return rewards, cost


def by_length(rewards: Mapping[str, Float[np.ndarray, "S N 2"]], held: HeldOut) -> list[Row]:
    """Every arm against plain where the response that a set's label prefers is the longer one, and the shorter one."""
    rows = []
    for name, (places, signs) in held.sets.items():
        longer = held.longer_N[places] * signs
        for better, taken in (("longer", longer > 0), ("shorter", longer < 0)):
            units = held.units[name].take(taken) if taken.any() else None
            # One pair, or the pairs of one prompt, have no spread: their interval would be a point that excludes 0.
            if units is not None and len(units) > 1 and units.count > 1:
                values = {arm: correct(r, held, name)[:, taken] for arm, r in rewards.items()}
                compared = compare_arms(values, clusters=units, control=PLAIN)
                rows += [{"set": name, "better": better, **row} for row in compared]
    return rows


def _controls(study: DataStudy, plan: Plan, held: HeldOut) -> list[Row]:
    """Each arm of `against` less its control, on every set."""
    rows = []
    for arm, control in study.against.items():
        rewards = {a: read_rewards(plan.folders("arms", a), held) for a in (control, arm)}
        compared = [r for r in compare(rewards, held, control) if r["arm"] == arm]
        rows += [{"arm": arm, "against": control, "set": r["set"], **r["difference"]} for r in compared]
    return rows


def _scale(rewards_SN2: Float[np.ndarray, "S N 2"], held: HeldOut, name: str) -> Row:
    """Likelihood, calibration and scale, each the mean over seeds."""
    rows, signs = held.sets[name]
    turned = np.where(signs[:, None] > 0, rewards_SN2[:, rows], rewards_SN2[:, rows, ::-1])
    metrics = [reward_metrics(one[:, 0], one[:, 1]) for one in turned]
    read = {"nll": "loss", "ece": "ece", "margin": "margin", "reward_std": "reward_std"}
    return {ours: float(np.mean([m[theirs] for m in metrics])) for ours, theirs in read.items()}


def findings(arms: Sequence[Row]) -> list[str]:
    """Which arms beat plain training with an interval that excludes 0, in words, set by set."""
    said = []
    for name in dict.fromkeys(r["set"] for r in arms):
        compared = [r for r in arms if r["set"] == name and "difference" in r]
        if not compared:
            continue
        above = [r for r in compared if r["difference"]["low"] > 0]
        below = [r for r in compared if r["difference"]["high"] < 0]
        beats = ", ".join(map(_named, above)) or "no arm"
        text = f"On the set {name}, {beats} {'beat' if len(above) > 1 else 'beats'} plain training"
        text += " with an interval that excludes 0."
        if below:
            text += f" Below plain: {', '.join(map(_named, below))}."
        rest = len(compared) - len(above) - len(below)
        text += f" The other {rest} of {len(compared)} arms are not told apart from plain." if rest else ""
        said.append(text)
    if said:
        count = len({r["arm"] for r in arms}) - 1
        said.append(
            f"With {count} arms and intervals of 95 %, about {0.05 * count:.1f} of the arms would exclude 0 by chance "
            "on each set even if all were equal to plain."
        )
    return said


def _named(row: Row) -> str:
    return f"{row['arm']} ({_difference(row['difference'])})"


# ---- over steps ------------------------------------------------------------------------------------------------


def _segments(study: DataStudy, runs: Sequence[Mapping[str, Mapping[int, float]]], start: Input, held: HeldOut) -> Row:
    """Accuracy of the plain models on each validation segment at every examination."""
    _, scores = load_scores(start.out / ENSEMBLE_FILE)
    mean = (scores[..., 0].astype(np.float64) - scores[..., 1]).mean(0)
    parts = data_sets.segment_rows(mean, min(study.dynamics.segments, len(mean)))
    labels = {}
    if "relabelled" in held.sets:
        labels = dict(zip(held.sets["relabelled"][0].tolist(), held.sets["relabelled"][1].tolist(), strict=True))
    rows = []
    for number, part in enumerate(parts, 1):
        known = [labels[i] > 0 for i in part if i in labels]
        curve = mean_curve(runs, f"validation/segment-{number:02d}/accuracy")
        row = {"segment": number, "n": len(part), "strength_mean": float(mean[part].mean())}
        row |= {"strength_low": float(mean[part].min()), "strength_high": float(mean[part].max())}
        rows.append(row | {"right": float(np.mean(known)) if known else None, **curve})
    sets = [{"set": name, **mean_curve(runs, f"validation/{name}/accuracy")} for name in held.sets]
    return {"segments": rows, "sets": sets}


def _inflation(runs: Sequence[Mapping[str, Mapping[int, float]]]) -> list[Row]:
    """Mean r(chosen), r(rejected) and their gap d over steps: from the mean of all rewards and the mean margin."""
    rows = []
    for where in ("train", "validation/original"):
        split = [
            {
                "chosen": {s: m + run[f"{where}/margin"][s] / 2 for s, m in run[f"{where}/reward_mean"].items()},
                "rejected": {s: m - run[f"{where}/margin"][s] / 2 for s, m in run[f"{where}/reward_mean"].items()},
                "gap": run[f"{where}/margin"],
            }
            for run in runs
        ]
        rows += [{"on": where.split("/")[0], "what": what, **mean_curve(split, what)} for what in split[0]]
    return rows


def mean_curve(runs: Sequence[Mapping[str, Mapping[int, float]]], metric: str) -> Row:
    """Mean over seeds with the least and the greatest, at the steps that all seeds logged (evenly thinned)."""
    steps = sorted(set.intersection(*(set(run[metric]) for run in runs)))
    steps = steps[:: -(-len(steps) // POINTS) or 1]
    values_SP = np.array([[run[metric][s] for s in steps] for run in runs])
    low, high = values_SP.min(0), values_SP.max(0)
    return {"steps": steps, "mean": values_SP.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}


def _metrics(path: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        step = row.pop("step")
        for name, value in row.items():
            found.setdefault(name, {})[step] = value
    return found


# ---- compute ---------------------------------------------------------------------------------------------------


def _config(folder: Path) -> Row:
    content: Row = json.loads((folder / "config.json").read_text())
    return content


def _compute(analysis: str, models: Mapping[str, Mapping[int, Path]]) -> Row:
    """What the models of one analysis cost. Raises RuntimeError unless all took equal steps of equally many pairs."""
    folders = dict.fromkeys(folder for seeds in models.values() for folder in seeds.values())
    rows = []
    for folder in folders:
        config, result = _config(folder), json.loads((folder / "result.json").read_text())
        if result["pairs"] % config["batch_size"]:
            raise RuntimeError(
                f"{folder}: {result['pairs']} pairs a pass do not fill batches of {config['batch_size']}"
            )
        seconds = json.loads((folder / "cost.json").read_text())["seconds"]
        rows.append((result["steps"], config["batch_size"], result["pairs"], result["tokens"], seconds))
    steps, batch = {r[0] for r in rows}, {r[1] for r in rows}
    if len(steps) > 1 or len(batch) > 1:
        raise RuntimeError(f"{analysis}: compute must be equal, got steps {sorted(steps)}, batches {sorted(batch)}")
    passes = [s * b / pairs for s, b, pairs, _, _ in rows]
    return {
        "analysis": analysis,
        "models": len(rows),
        "steps": steps.pop(),
        "pairs_per_step": batch.pop(),
        "passes_least": min(passes),
        "passes_most": max(passes),
        "tokens": int(sum(p * r[3] for p, r in zip(passes, rows, strict=True))),
        "seconds": float(sum(r[4] for r in rows)),
    }


def summary_tables(found: Row) -> list[Row]:
    """The tables of summary.json."""
    made = []
    if arms := found.get("arms"):
        sets = list(dict.fromkeys(r["set"] for r in arms))
        by_arm: dict[str, dict[str, Row]] = {}
        for r in arms:
            by_arm.setdefault(r["arm"], {})[r["set"]] = r
        units = " or ".join(dict.fromkeys(s["unit"] for s in found["sets"]))
        cells = [[arm, *(text for s in sets for text in _cells(rows[s]))] for arm, rows in by_arm.items()]
        made.append(
            {
                "title": "Arms: accuracy on held-out pairs",
                "columns": ["arm", *(text for s in sets for text in (s, f"{s}, less {PLAIN}"))],
                "rows": cells,
                "note": f"95 % intervals over {over(len(found['seeds']), f'held-out {units}')}; paired bootstrap.",
            }
        )
    if by_length := found.get("arms_by_length"):
        # One table of the set whose labels are the best known.
        one = "relabelled" if any(r["set"] == "relabelled" for r in by_length) else "original"
        by_arm = {}
        for r in by_length:
            if r["set"] == one:
                by_arm.setdefault(r["arm"], {})[r["better"]] = r
        sides = list(dict.fromkeys(r["better"] for r in by_length if r["set"] == one))
        counts = {r["better"]: r["n"] for r in by_length if r["set"] == one}
        made.append(
            {
                "title": "Arms by length: accuracy where the better response is the longer one, and the shorter one",
                "columns": ["arm", *(text for s in sides for text in (f"{s} (n = {counts[s]})", f"less {PLAIN}"))],
                "rows": [[arm, *(text for s in sides for text in _cells(rows[s]))] for arm, rows in by_arm.items()],
                "note": f"The set {one}; length in characters; intervals as above.",
            }
        )
    if controls := found.get("controls"):
        sets = list(dict.fromkeys(r["set"] for r in controls))
        pairs: dict[tuple[str, str], list[str]] = {}
        for r in controls:
            pairs.setdefault((r["arm"], r["against"]), []).append(_difference(r))
        made.append(
            {
                "title": "Arms less their own controls",
                "columns": ["arm", "control", *sets],
                "rows": [[*names, *texts] for names, texts in pairs.items()],
                "note": "Difference in accuracy on held-out pairs; 95 % intervals as above.",
            }
        )
    columns = ["analysis", "models", "steps each", "pairs a step", "passes, least", "passes, most", "seconds"]
    keys = ("analysis", "models", "steps", "pairs_per_step", "passes_least", "passes_most", "seconds")
    note = "Equal compute: within an analysis every model takes the same steps of the same number of pairs."
    cost = [[c[k] for k in keys] for c in found["compute"]]
    made.append({"title": "Reward models trained", "columns": columns, "rows": cost, "note": note})
    return made


def _cells(row: Row) -> tuple[str, str]:
    d = row.get("difference")
    return f"{row['value']:.3f}", "" if d is None else _difference(d)


def _difference(d: Row) -> str:
    return f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
