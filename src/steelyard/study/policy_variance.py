"""Variance, the critic's speed and the scores' correlation in a policy study, beside what theory says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steelyard.study.folder import mean_curves
from steelyard.study.policy_config import Cell, PolicyStudy, members
from steelyard.study.policy_curves import contrasted, correlation_interval, errors, line
from steelyard.study.policy_jobs import read_metrics
from steelyard.study.policy_runs import Row, Runs, examined, named, value_row
from steelyard.variance import shrunk_means, variances

WATCHED = ("ppo/explained_variance", "ppo/value_loss", "ppo/advantage_std", "ppo/scale", "ppo/kl_plain", "ppo/length")


def variance_rows(study: PolicyStudy, grid: Sequence[Cell], runs: Runs, out: Path) -> list[Row]:
    """Variance of plain and contrastive rewards of the SFT model's and of each trained policy's answers.

    Predicted for the SFT model from tau^2 and s^2 of the second draw; measured on the first draw, and on the last look
    of each run, less the means of the second draw's first k. Units: the reward model's normalised score.
    """
    rows: list[Row] = []
    for data in dict.fromkeys(c.data for c in grid):
        seen = [examined(out, seed, data) for seed in study.seeds]
        most = seen[0]["base_proxy"].shape[1]
        split = [variances(one["base_proxy"]) for one in seen] if most > 1 else []
        for k, shrunk in [(0, False), *((k, s) for k in (1, 3, 5) if k <= most for s in (False, True) if k > s)]:
            measured = [_variance(one["proxy"], one["base_proxy"], k, shrunk) for one in seen]
            predicted = [v.shrunk(k) if shrunk else v.contrastive(k) if k else v.plain for v in split]
            row = {"world": data[0], "repair": data[1], "policy": "SFT", "k": k, "shrunk": shrunk}
            row |= {"measured": value_row(measured), "predicted": value_row(predicted) if predicted else None}
            rows.append(row)
        for cell in (c for c in grid if c.data == data and runs.of[c]):
            for k in (0, most) if members(study, cell.arm) == 1 else ():
                at_end = [
                    _variance(run.columns["proxy"][-1], examined(out, seed, data)["base_proxy"], k)
                    for seed, run in runs.of[cell].items()
                ]
                label = cell.arm if cell.kl_coef is None else f"{cell.arm}, KL weight {cell.kl_coef:g}"
                row = {"world": data[0], "repair": data[1], "policy": label, "k": k, "measured": value_row(at_end)}
                rows.append(row | {"predicted": None})
    return rows


def _variance(current_NK: np.ndarray, baselines_Nk: np.ndarray, k: int, shrunk: bool = False) -> float:
    if shrunk:
        rewards = current_NK - shrunk_means(baselines_Nk[:, :k])[:, None]
    else:
        rewards = contrasted(current_NK, baselines_Nk, k) if k else current_NK
    return float(rewards.var(ddof=1))


def speeds(grid: Sequence[Cell], runs: Runs) -> list[Row]:
    """Of PPO runs: the advantages' std before whitening, in units of the reward before it was scaled, and how much of
    the returns' variance the critic explains; in the first and the last quarter of the steps."""
    rows = []
    for cell in grid:
        if cell.kl_coef is None or not runs.of[cell]:
            continue
        logs = [read_metrics(run.folder, "ppo/") for run in runs.of[cell].values()]
        row = named(cell)
        for name, key in (("advantage", "ppo/advantage_std"), ("explained", "ppo/explained_variance")):
            row |= {f"{name}_first": None, f"{name}_last": None}
            if key in logs[0][0]:
                parts = [_quarters([_unscaled(one, key) for one in log]) for log in logs]
                row |= {
                    f"{name}_first": value_row([a for a, _ in parts]),
                    f"{name}_last": value_row([b for _, b in parts]),
                }
        rows.append(row)
    return rows


def _unscaled(metrics: dict[str, float], key: str) -> float:
    scale = abs(metrics.get("ppo/scale", 1.0)) if key == "ppo/advantage_std" else 1.0
    return metrics[key] / (scale or 1.0)


def _quarters(values: Sequence[float]) -> tuple[float, float]:
    n = max(1, len(values) // 4)
    return float(np.mean(values[:n])), float(np.mean(values[-n:]))


def curves(grid: Sequence[Cell], runs: Runs) -> list[Row]:
    """Metrics over PPO's steps: of each cell the seeds' mean, least and greatest."""
    found: list[Row] = []
    for cell in grid:
        folders = [run.folder for run in runs.of[cell].values()]
        if cell.kl_coef is not None and folders:
            found += [named(cell) | c for c in mean_curves({cell.arm: folders}, lambda m: m in WATCHED)]
    return found


def correlations(study: PolicyStudy, grid: Sequence[Cell], runs: Runs, out: Path) -> list[Row]:
    """Do the reward model's scores of current and baseline samples go together, beyond what the truth explains?

    Scores: the raw correlation over responses to the same prompt. Errors: the same of what is left after a straight
    line on gold, fitted to the SFT model's answers. Contrastive rewards' analysis assumes 0 for the errors. A shared
    error of a prompt is what subtracting baselines removes, so the assumption fails just where the method helps.
    Ensembles are left out: the stored scores of the baselines are those of their first member.
    """
    rows: list[Row] = []
    for data in dict.fromkeys(c.data for c in grid):
        seen = {seed: examined(out, seed, data) for seed in study.seeds}
        fits = {s: line(one["base_proxy"], one["base_gold"]) for s, one in seen.items()}
        base_errors = {s: errors(one["base_proxy"], one["base_gold"], fits[s]) for s, one in seen.items()}
        policies: list[tuple[Row, dict[int, tuple[np.ndarray, np.ndarray]]]] = [
            ({"arm": "SFT", "kl_coef": None}, {s: (one["proxy"], one["gold"]) for s, one in seen.items()})
        ]
        for cell in (c for c in grid if c.data == data and runs.of[c] and members(study, c.arm) == 1):
            last = {s: (run.columns["proxy"][-1], run.columns["gold"][-1]) for s, run in runs.of[cell].items()}
            policies.append(({"arm": cell.arm, "kl_coef": cell.kl_coef}, last))
        for name, of_seeds in policies:
            scores = correlation_interval(
                [proxy for proxy, _ in of_seeds.values()], [seen[s]["base_proxy"] for s in of_seeds]
            )
            left = correlation_interval(
                [errors(p, g, fits[s]) for s, (p, g) in of_seeds.items()], [base_errors[s] for s in of_seeds]
            )
            rows.append({"world": data[0], "repair": data[1], **name, "scores": scores, "errors": left})
    return rows
