"""Measure how strong each preference is: train M reward models, let them vote, write it all down.

In-sample members saw the pairs they judge (the paper's way); out-of-fold members did not (the better practice
for finding label errors). What kinds of member there are stands in steelyard.members.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from steelyard.data.dialogues import prompt_text
from steelyard.data.encode import Encoder
from steelyard.data.load import load_preferences
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.members.config import MemberConfig as MemberConfig
from steelyard.members.config import Scoring as Scoring
from steelyard.members.config import StrengthConfig as StrengthConfig
from steelyard.members.config import check as check
from steelyard.members.config import held_out_plan as held_out_plan
from steelyard.members.run import run_members
from steelyard.run_dir import RunDir, write_json_atomic
from steelyard.strength import detection, fit_temperature, groups, summarise
from steelyard.types import Preference, Strength


def measure(
    config: StrengthConfig,
    preferences: Sequence[Preference],
    out: Path,
    *,
    truth: dict[str, int] | None = None,
    noise: dict[str, str] | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> list[Strength | None]:
    """The strength of each preference (None where it could not be tokenised), in order.

    Leaves in `out`: strength.parquet, margins.npz (members' scores), cost.json (members.cost.Cost), left_out.json
    (id -> reason), result.json.
    `truth` (1 right, -1 wrong, 0 tie, by id) and `noise` (what made it wrong) are compared with the outcome and never
    used before.

    Raises:
        InputError: the settings contradict each other; no pair can be used; `preferences` are not those of
            `config.data`, though members read that (all kinds but head); `out` holds a run that this cannot go on with,
            or the strengths of other pairs.
        FloatingPointError, parallel.JobError: the training of a member failed.
    """
    check(config)
    began = time.perf_counter()
    with RunDir.open(out, config, resume=resume) as run:
        encoder = Encoder.load(config.model, max_length=config.max_length, on_overlong=config.on_overlong)
        encoded = encoder.encode(preferences)
        if not encoded.trees:
            raise InputError(f"{config.data}: no usable pair to weigh ({encoded.text() or 'the file is empty'})")
        keys = [prompt_key(preferences[i].prompt) for i in encoded.index]
        plan = held_out_plan(config, keys)
        if run.finished:
            scores, index = read_scores(out)
            _require_measured(out, preferences, index, encoded.index)
        else:
            run.restore()
            if config.backend != "head":
                _check_same(config, preferences)
            pairs = [preferences[i] for i in encoded.index]
            scores, shared, members = run_members(
                config, encoder, encoded.trees, encoded.index, keys, plan, out, pairs=pairs, quiet=quiet
            )
            write_json_atomic(out / "cost.json", {"shared": asdict(shared), "members": [asdict(c) for c in members]})
            _save_scores(out / "margins.npz", scores, encoded.index)
        margins = scores[..., 0] - scores[..., 1]
        temperature = config.temperature or _temperature(config, margins)
        measured = summarise(margins, temperature=temperature, thresholds=config.rule)
        strengths: list[Strength | None] = [None] * len(preferences)
        for i, s in zip(encoded.index, measured, strict=True):
            strengths[i] = s
        if not run.finished:
            write_strength(out / "strength.parquet", preferences, strengths, truth, noise)
            left_out = {preferences[i].id: reason for i, reason in encoded.left_out.items()}
            write_json_atomic(out / "left_out.json", left_out)
            result = {
                "members": config.members,
                "backend": config.backend,
                "scoring": config.scoring,
                "folds": config.folds if config.scoring == "out-of-fold" else None,
                "temperature": temperature,
                "pairs": len(encoded.trees),
                "left_out": encoded.text(),
                "seconds": time.perf_counter() - began,
                "tokens": sum(map(len, encoded.trees)),
            }
            run.finish(result | describe(preferences, strengths, margins, encoded.index, truth, noise))
    return strengths


def _require_measured(
    out: Path, preferences: Sequence[Preference], measured: Sequence[int], usable: Sequence[int]
) -> None:
    """Raise InputError unless the finished run in `out` weighed these very pairs."""
    table = pq.read_table(out / "strength.parquet", columns=["id", "chosen", "rejected"]).to_pydict()
    given = [(preferences[i].id, preferences[i].chosen, preferences[i].rejected) for i in usable]
    if list(measured) != list(usable) or list(zip(*table.values(), strict=True)) != given:
        raise InputError(
            f"{out}: holds the strengths of other pairs than these {len(given)}; give the pairs that it measured, or "
            "use another folder"
        )


def _check_same(config: StrengthConfig, preferences: Sequence[Preference]) -> None:
    """Members that are trained read the file themselves: with other pairs, they would judge what they trained on."""
    if load_preferences(config.data, on_invalid=config.on_invalid).preferences != list(preferences):
        raise InputError(
            f"preferences must be those of {config.data} with backend = {config.backend}; write yours with "
            "write_preferences and name that file as data"
        )


def describe(
    preferences: Sequence[Preference],
    strengths: Sequence[Strength | None],
    margins_MN: Float[np.ndarray, "M N"],
    index: Sequence[int],
    truth: dict[str, int] | None,
    noise: dict[str, str] | None,
) -> dict[str, Any]:
    """Groups by strength and, where the truth is known, how well wrong labels are found and by what baselines."""
    kept = [s for s in strengths if s is not None]
    mean, std = np.array([s.mean for s in kept]), np.array([s.std for s in kept])
    ids = [preferences[i].id for i in index]
    agreement = None if truth is None else np.array([truth.get(i, 0) for i in ids])
    longer = np.array([len(preferences[i].chosen) - len(preferences[i].rejected) for i in index], dtype=float)
    found = None
    if agreement is not None:
        kinds = np.array([(noise or {}).get(i, "") for i in ids])
        found = _detections(agreement, kinds, mean, margins_MN, longer)
    return {
        "share_negative": float((mean < 0).mean()),
        "actions": {a: sum(s.action == a for s in kept) for a in ("keep", "soften", "flip")},
        "groups": [asdict(g) for g in groups(mean, std, n=min(20, len(mean)), agreement=agreement)],
        "detection": found,
        "length_correlation": _correlation(mean, longer),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Pearson's; None where it does not exist."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and a.std() > 0 and b.std() > 0 else None


def _detections(
    agreement_N: np.ndarray,
    kinds_N: np.ndarray,
    mean_N: np.ndarray,
    margins_MN: Float[np.ndarray, "M N"],
    longer_N: np.ndarray,
) -> list[dict[str, Any]]:
    """AUROC and average precision of strength, of a single member (averaged over members), and of length.

    A kind of noise is told from the right labels alone: the other kinds' wrong labels are left aside.
    """
    rows = []
    known = agreement_N != 0
    for kind in ["all", *sorted(set(kinds_N[agreement_N < 0]) - {""})]:
        use = known & ((agreement_N > 0) | (kinds_N == kind)) if kind != "all" else known
        wrong = agreement_N < 0
        scorers: dict[str, list[np.ndarray]] = {
            "strength": [-mean_N],
            "single member": [-m for m in margins_MN],
            "longer text": [-longer_N],
        }
        for name, scores in scorers.items():
            results = []
            for s in scores:
                voted = use & ~np.isnan(s)
                results.append(detection(s[voted], wrong[voted]))
            kept = [r for r in results if r is not None]
            if kept:
                rows.append(
                    {
                        "scorer": name,
                        "noise": kind,
                        "auroc": float(np.mean([r.auroc for r in kept])),
                        "average_precision": float(np.mean([r.average_precision for r in kept])),
                        "n": int(use.sum()),
                        "positives": int((wrong & use).sum()),
                    }
                )
    return rows


def write_strength(
    path: Path,
    preferences: Sequence[Preference],
    strengths: Sequence[Strength | None],
    truth: dict[str, int] | None,
    noise: dict[str, str] | None,
) -> None:
    """The table that the report reads: one row per measured preference."""
    rows = [(p, s) for p, s in zip(preferences, strengths, strict=True) if s is not None]
    columns: dict[str, list[Any]] = {
        "id": [p.id for p, _ in rows],
        "prompt": [prompt_text(p.prompt) for p, _ in rows],
        "chosen": [p.chosen for p, _ in rows],
        "rejected": [p.rejected for p, _ in rows],
        "strength_mean": [s.mean for _, s in rows],
        "strength_std": [s.std for _, s in rows],
        "votes": [s.votes for _, s in rows],
        "voters": [s.voters for _, s in rows],
        "p_flip": [s.p_flip for _, s in rows],
        "suggested_action": [s.action for _, s in rows],
        "reason": [s.reason for _, s in rows],
        "length_chosen": [len(p.chosen) for p, _ in rows],
        "length_rejected": [len(p.rejected) for p, _ in rows],
    }
    if truth is not None:
        columns["truth"] = [truth.get(p.id, 0) for p, _ in rows]
        columns["noise"] = [(noise or {}).get(p.id, "") for p, _ in rows]
    temporary = path.with_suffix(".tmp")
    pq.write_table(pa.table(columns), temporary)
    temporary.replace(path)


def _temperature(config: StrengthConfig, margins_MN: Float[np.ndarray, "M N"]) -> float:
    if config.scoring == "in-sample":
        return 1.0
    try:
        return fit_temperature(margins_MN)
    except InputError:
        # Held-out margins that carry no signal, or no error: the scale of a Bradley-Terry model is the honest one.
        return 1.0


def _save_scores(path: Path, scores: Float[np.ndarray, "M N 2"], index: Sequence[int]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, scores=scores, index=np.array(index))
    temporary.replace(path)


def read_scores(folder: Path) -> tuple[Float[np.ndarray, "M N 2"], list[int]]:
    """The members' scores of chosen and rejected (NaN: did not judge), and which preferences they belong to.

    Raises FileNotFoundError if `folder` holds no finished measurement.
    """
    stored = np.load(folder / "margins.npz")
    return stored["scores"], stored["index"].tolist()
