"""What a policy study says, computed from its folder alone: curves, differences, wins, strata.

Values are kept response by response, (S, N K) for S seeds, N prompts and K responses, so that differences are paired
and intervals draw seeds and prompts anew (`evaluate.seeds.mean_over_seeds`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from steelyard.report.blocks import over
from steelyard.report.policy_study_records import CellName
from steelyard.study.policy_config import AS_LABELLED, PLAIN, Cell, PolicyStudy, control_of, evaluation_config
from steelyard.study.policy_curves import at_kl, flip_table, reached
from steelyard.study.policy_jobs import wrong_share
from steelyard.study.policy_places import labels_of
from steelyard.study.policy_runs import Array, Row, Run, Runs, examined, named, read_runs, value_row
from steelyard.study.policy_variance import correlations, curves, speeds, variance_rows

END, COMMON = "end of the run", "greatest KL that both reached"
ASKED = "asked for"  # what the file's `compare` names
HEAVIER = "arm, heavier KL"  # an arm against plain PPO with a heavier KL weight


def examine_study(study: PolicyStudy, out: Path) -> dict[str, Any]:
    """Everything that study.json holds."""
    runs, grid = read_runs(study, out), study.grid()
    tie = evaluation_config(study).tie
    return {
        "kind": "policy",
        "seeds": list(study.seeds),
        "control": PLAIN,
        "at_kl": list(study.at_kl),
        "recommended": None if study.main is None else dict(zip(("repair", "arm", "kl_coef"), study.main, strict=True)),
        "kl_coef": study.kl_coef,
        "failed": runs.failed,
        "rewards": rewards(study, grid, out),
        "frontier": [row for cell in grid for row in frontier(cell, runs)],
        "ends": [row for cell in grid for row in ends(cell, runs)],
        "differences": differences(study, grid, runs),
        "wins": wins(grid, runs, tie),
        "strata": strata(study, grid, runs, out),
        "correlations": correlations(study, grid, runs, out),
        "variances": variance_rows(study, grid, runs, out),
        "speeds": speeds(grid, runs),
        "curves": curves(grid, runs),
        "flips": flip_table(),
    }


def rewards(study: PolicyStudy, grid: Sequence[Cell], out: Path) -> list[Row]:
    """What each reward model was trained on, and how often it is right by gold on held-out pairs."""
    rows = []
    for data in dict.fromkeys(c.data for c in grid):
        right = [examined(out, seed, data)["accuracy_V"] for seed in study.seeds]
        wrong = [wrong_share(labels_of(out, seed, data)) for seed in study.seeds]
        accuracy = value_row(right, list(range(len(right[0]))))
        rows.append(
            {"world": data[0], "repair": data[1], "wrong": float(np.mean(wrong)), "n": len(right[0]), **accuracy}
        )
    return rows


def frontier(cell: Cell, runs: Runs) -> list[Row]:
    """Gold and proxy of a cell's looks: mean and interval over the seeds, at their mean sqrt(KL)."""
    of_seeds = list(runs.of[cell].values())
    rows = []
    for j, step in enumerate(of_seeds[0].steps if of_seeds else []):
        gold, proxy = (value_row([run.values(c)[j] for run in of_seeds], runs.clusters) for c in ("gold", "proxy"))
        roots = [float(np.sqrt(max(run.kl_J[j], 0.0))) if j else 0.0 for run in of_seeds]
        rows.append(named(cell) | {"step": step, "root_kl": float(np.mean(roots)), "gold": gold, "proxy": proxy})
    return rows


def ends(cell: Cell, runs: Runs) -> list[Row]:
    """Where a cell ends, and the best gold reward of its looks with its distance: what went too far is their
    difference. The best of several looks is picked by the same answers, so it flatters a little."""
    of_seeds = list(runs.of[cell].values())
    if not of_seeds:
        return []
    best = [int(run.values("gold").mean(1).argmax()) for run in of_seeds]
    last = {c: value_row([run.values(c)[-1] for run in of_seeds], runs.clusters) for c in ("gold", "proxy")}
    means = {c: float(np.mean([run.columns[c][-1].mean() for run in of_seeds])) for c in ("kl", "length", "ended")}
    peak = value_row([run.values("gold")[j] for run, j in zip(of_seeds, best, strict=True)], runs.clusters)
    lost = [run.values("gold")[-1] - run.values("gold")[j] for run, j in zip(of_seeds, best, strict=True)]
    at = float(np.mean([run.kl_J[j] if j else 0.0 for run, j in zip(of_seeds, best, strict=True)]))
    return [
        named(cell) | last | means
        | {"best": peak, "best_kl": at, "lost": value_row(lost, runs.clusters), "n_seeds": len(of_seeds)}
    ]  # fmt: skip


# ---- differences -----------------------------------------------------------------------------------------------


def comparisons(study: PolicyStudy, grid: Sequence[Cell]) -> list[tuple[str, Cell, Cell]]:
    """(what differs, a cell, the cell that it is set against)."""
    found: list[tuple[str, Cell, Cell]] = []
    for cell in grid:
        control = control_of(study, cell, list(grid))
        if control is not None and control != cell:
            found.append(("arm", cell, control))
        for other in grid:
            alike = (other.world, other.arm) == (cell.world, cell.arm)
            controls = (AS_LABELLED, study.against.get(cell.repair))
            if cell.repair != AS_LABELLED and other.repair in controls and alike and other.kl_coef == cell.kl_coef:
                found.append(("repair", cell, other))
            if cell.kl_coef is None or other.kl_coef is None or other.data != cell.data:
                continue
            if other.arm == cell.arm and cell.kl_coef != other.kl_coef == study.kl_coef:
                found.append(("KL weight", cell, other))
            # An arm that moves less may gain by that alone: plain PPO that is held back is its control.
            if other.arm == PLAIN != cell.arm and cell.kl_coef == study.kl_coef < other.kl_coef:
                found.append((HEAVIER, cell, other))
        base = next((c for c in grid if _usual(c, study) and c.world == cell.world), None)
        if study.main == cell.way and base is not None and base != cell:
            found.append(("recommended", cell, base))
        for asked in study.compare:
            if cell.way == study.way(asked.of):
                less = study.way(asked.less)
                found += [(ASKED, cell, c) for c in grid if c.world == cell.world and c.way == less]
    return found


def _usual(cell: Cell, study: PolicyStudy) -> bool:
    return cell.way == (AS_LABELLED, PLAIN, study.kl_coef)


def differences(study: PolicyStudy, grid: Sequence[Cell], runs: Runs) -> list[Row]:
    """Gold reward of a cell less that of another, paired: at equal steps and at equal distances.

    At a distance that not all seeds reach, only those that reached it with both cells count; `n_seeds` says how many.
    """
    rows = []
    for kind, cell, against in comparisons(study, grid):
        seeds = runs.both(cell, against)
        pairs = [(runs.of[cell][s], runs.of[against][s]) for s in seeds]
        at: list[tuple[str, list[Array]]] = [(END, [a.values("gold")[-1] - b.values("gold")[-1] for a, b in pairs])]
        at += [(f"KL {x:g}", [d for a, b in pairs if (d := at_distance(a, b, x)) is not None]) for x in study.at_kl]
        common = [at_distance(a, b, min(reached(a.kl_J), reached(b.kl_J))) for a, b in pairs]
        at.append((COMMON, [d for d in common if d is not None]))
        shared = [min(reached(a.kl_J), reached(b.kl_J)) for a, b in pairs]
        for where, found in at:
            if found:
                row = named(cell) | {"kind": kind, "against": named(against), "at": where, "n_seeds": len(found)}
                kl = float(np.mean(shared)) if where == COMMON else None
                rows.append(row | value_row(found, runs.clusters) | {"kl": kl})
    return rows


def at_distance(a: Run, b: Run, kl: float) -> Array | None:
    """The difference of two runs' gold rewards, response by response, where each is `kl` nats away."""
    first, second = (at_kl(run.values("gold"), run.kl_J, kl) for run in (a, b))
    return None if first is None or second is None else first - second


def wins(grid: Sequence[Cell], runs: Runs, tie: float) -> list[Row]:
    """Win / tie / lose by gold at the end of the runs, any two cells with the same labels; a tie counts half.

    The answers of both to one prompt share their random numbers and are compared in order.
    """
    rows = []
    for b, a in combinations(grid, 2):
        if a.world != b.world or not (seeds := runs.both(a, b)):
            continue
        gaps = [runs.of[a][s].values("gold")[-1] - runs.of[b][s].values("gold")[-1] for s in seeds]
        points = [np.where(np.abs(gap) <= tie, 0.5, (gap > 0).astype(float)) for gap in gaps]
        score, together = value_row(points, runs.clusters), np.stack(points)
        rows.append(
            {"a": named(a), "b": named(b), "win": float((together == 1).mean()), "tie": float((together == 0.5).mean()),
             "lose": float((together == 0).mean()), "score": score.pop("value"), **score, "n_seeds": len(seeds),
             "n": int(together.size)}
        )  # fmt: skip
    return rows


# ---- difficulty ------------------------------------------------------------------------------------------------


def strata(study: PolicyStudy, grid: Sequence[Cell], runs: Runs, out: Path) -> list[Row]:
    """Gold reward at the end by the prompt's difficulty, hardest first, and its difference to the control arm.

    Difficulty: the reward models' mean score of an independent draw from the SFT models, averaged over the seeds, so
    that every seed has the same strata; answers that are compared do not decide it.
    """
    count = evaluation_config(study).strata
    rows = []
    for cell in grid:
        if not runs.of[cell]:
            continue
        scores = [examined(out, seed, cell.data)["base_proxy"].mean(1) for seed in study.seeds]
        difficulty_N = np.mean(scores, axis=0)
        control = control_of(study, cell, list(grid))
        for s, members in enumerate(np.array_split(np.argsort(difficulty_N, kind="stable"), count)):
            if not len(members):
                continue
            row = named(cell) | {"stratum": f"{s + 1} of {count}", "n": len(members)}
            row |= {"low": float(difficulty_N[members].min()), "high": float(difficulty_N[members].max())}
            row["gold"] = _part(list(runs.of[cell].values()), members)
            row["difference"] = None
            if control is not None and control != cell and (seeds := runs.both(cell, control)):
                mine, theirs = ([runs.of[c][s] for s in seeds] for c in (cell, control))
                row["difference"] = _part(mine, members, theirs)
            rows.append(row)
    return rows


def _part(runs: Sequence[Run], members: Array, against: Sequence[Run] | None = None) -> Row:
    """The last look's gold reward of some prompts, or its difference to other runs'."""
    values = [run.columns["gold"][-1][members] for run in runs]
    if against is not None:
        values = [mine - run.columns["gold"][-1][members] for mine, run in zip(values, against, strict=True)]
    return value_row(values, [n for n in range(len(members)) for _ in range(values[0].shape[1])])


# ---- the summary -----------------------------------------------------------------------------------------------


def summary_tables(found: dict[str, Any]) -> list[Row]:
    """The tables of the summary: where the arms end, and their differences to plain PPO."""
    columns = ["labels", "repair", "arm", "KL weight"]

    def cell(row: Row) -> list[Any]:
        return [row["world"], row["repair"], row["arm"], "" if row["kl_coef"] is None else f"{row['kl_coef']:g}"]

    def text(row: Row) -> str:
        return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"

    ending = [
        [*cell(r), text(r["gold"]), text(r["proxy"]), f"{r['kl']:.2f}", f"{r['length']:.1f}", text(r["lost"])]
        for r in found["ends"]
    ]
    compared = [
        [*cell(r), r["kind"], CellName.model_validate(r["against"]).words, r["at"], text(r),
         f"{sum(s > 0 for s in r['seeds'])} of {r['n_seeds']}"]
        for r in found["differences"]
        if r["at"] in (END, COMMON)
    ]  # fmt: skip
    note = f"95 % intervals over {over(len(found['seeds']), 'prompts')}; crossed bootstrap."
    return [
        {"title": "Policies at the end of their runs", "rows": ending, "note": f"{note} Lost: gold since the best.",
         "columns": [*columns, "gold", "proxy", "KL", "length", "lost"]},
        {"title": "Differences in gold reward", "rows": compared, "note": f"{note} One that holds 0 shows none.",
         "columns": [*columns, "what differs", "less", "at", "difference", "seeds above 0"]},
    ]  # fmt: skip
