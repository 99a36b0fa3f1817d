"""Measure how strong each preference is: train M reward models, let them vote, write it all down.

In-sample members saw the pairs they judge (the paper's way); out-of-fold members did not (the better practice
for finding label errors). Two kinds of member: `full` fine-tunes the whole model, `head` fits linear heads on one
pass of the frozen trunk (steelyard.probe).
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Bool, Float
from pydantic import Field

from steelyard.baselines import fingerprint
from steelyard.config import Config
from steelyard.data.encode import Encoder, OnOverlong, Tree
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.models.reward import RewardModel
from steelyard.models.trunk import Precision
from steelyard.parallel import default_workers, run_jobs
from steelyard.probe import Probes, bootstrap_rows, features, layer_choice
from steelyard.run_dir import RunDir, write_json_atomic
from steelyard.strength import (
    ActionRule,
    detection,
    fit_temperature,
    groups,
    out_of_fold_plan,
    summarise,
)
from steelyard.train.optim import OptimConfig
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.types import Preference, Strength

Scoring = Literal["in-sample", "out-of-fold"]


class MemberConfig(Config):
    """How a full member is trained."""

    epochs: float = Field(1.0, gt=0, description="passes over the data")
    batch_size: int = Field(32, ge=1, description="pairs a step")
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=5e-6), description="optimiser")
    trainable_layers: int | None = Field(None, ge=0, description="train only this many top layers; none given: all")


class StrengthConfig(Config):
    """Preference strength by the vote of M reward models."""

    data: str = Field(description="preferences to weigh")
    model: str = Field(description="model folder that the members start from: the SFT model")
    backend: Literal["full", "head"] = Field("head", description="kind of member: full fine-tuning, or linear heads")
    scoring: Scoring = Field("out-of-fold", description="whether members judge pairs that they trained on")
    members: int = Field(10, ge=1, description="M, the number of reward models; the paper uses 10")
    folds: int = Field(
        2, ge=2, description="out-of-fold: parts by prompt, dividing the members: each pair gets members / folds votes"
    )
    member: MemberConfig = Field(default_factory=MemberConfig, description="training of full members")
    layers: int = Field(3, ge=1, description="head: this many layers of the upper half give features")
    penalty: float | None = Field(
        None, gt=0, description="head: inverse L2 penalty; none given: chosen by held-out loss"
    )
    temperature: float | None = Field(
        None, gt=0, description="of p_flip; none given: fitted to held-out margins (out-of-fold) or 1 (in-sample)"
    )
    rule: ActionRule = Field(default_factory=ActionRule, description="when to suggest what")
    keep_members: bool = Field(False, description="keep the full members' models on disk")
    max_length: int = Field(512, ge=8, description="tokens of prompt and one response together")
    on_overlong: OnOverlong = Field("truncate-prompt", description="what to do with longer pairs")
    on_invalid: OnInvalid = Field("error", description="malformed rows: stop with a list, or skip and count them")
    max_tokens: int = Field(4096, ge=16, description="padded tokens computed at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunk")
    workers: int | None = Field(None, ge=1, description="full members trained side by side; none given: one per CPU")
    seed: int = Field(0, ge=0, description="member m uses seed + m")


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

    Leaves in `out`: strength.parquet, margins.npz (members' scores), result.json. `truth` (1 right, -1 wrong,
    0 tie, by id) and `noise` (what made it wrong) are compared with the outcome and never used before.
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
            scores = np.load(out / "margins.npz")["scores"]
        else:
            run.restore()
            if config.backend == "full":
                _check_same(config, preferences)
            if config.backend == "head":
                scores = _head_scores(config, encoder, encoded.trees, keys, plan, out, quiet)
            else:
                scores = _full_scores(config, encoder, encoded.trees, encoded.index, plan, out, quiet)
            _save_scores(out / "margins.npz", scores, encoded.index)
        margins = scores[..., 0] - scores[..., 1]
        temperature = config.temperature or _temperature(config, margins)
        measured = summarise(margins, temperature=temperature, thresholds=config.rule)
        strengths: list[Strength | None] = [None] * len(preferences)
        for i, s in zip(encoded.index, measured, strict=True):
            strengths[i] = s
        if not run.finished:
            write_strength(out / "strength.parquet", preferences, strengths, truth, noise)
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


def check(config: StrengthConfig) -> None:
    """Raise InputError for settings that would have no effect."""
    idle = {"layers", "penalty"} if config.backend == "full" else {"member", "keep_members", "workers"}
    if config.scoring == "in-sample":
        idle |= {"folds"}
    if given := idle & config.given():
        raise InputError(
            f"{', '.join(sorted(given))}: no effect with backend = {config.backend}, scoring = {config.scoring}; "
            "leave it out"
        )


def _check_same(config: StrengthConfig, preferences: Sequence[Preference]) -> None:
    """Full members read the file themselves: with other pairs in hand, they would judge what they trained on."""
    if load_preferences(config.data, on_invalid=config.on_invalid).preferences != list(preferences):
        raise InputError(
            f"preferences must be those of {config.data} with backend = full; write yours with write_preferences and "
            "name that file as data"
        )


def held_out_plan(config: StrengthConfig, keys: Sequence[str]) -> Bool[np.ndarray, "M N"] | None:
    """Which member scores which pair; None in-sample, where every member scores every pair."""
    if config.scoring == "in-sample":
        return None
    return out_of_fold_plan(keys, members=config.members, folds=config.folds, seed=config.seed)


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
        "length_correlation": float(np.corrcoef(mean, longer)[0, 1]) if len(mean) > 2 and longer.std() > 0 else None,
    }


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
        "prompt": [
            p.prompt if isinstance(p.prompt, str) else "\n\n".join(f"{t.role}: {t.content}" for t in p.prompt)
            for p, _ in rows
        ],
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


def _head_scores(
    config: StrengthConfig,
    encoder: Encoder,
    trees: list[Tree],
    keys: list[str],
    plan: Bool[np.ndarray, "M N"] | None,
    out: Path,
    quiet: bool,
) -> Float[np.ndarray, "M N 2"]:
    model = RewardModel.from_language_model(
        config.model, pad_id=encoder.pad_id, seed=config.seed, precision=config.precision
    )
    chosen = layer_choice(model.hf.config.get_text_config().num_hidden_layers, config.layers)
    # Beside the run's folder, so that both scorings of one data set share the pass.
    key = hashlib.sha256(repr((fingerprint(config.model), chosen, config.precision, trees)).encode()).hexdigest()[:16]
    cache = out.parent / f"features-{key}.npy"
    table = features(model, trees, chosen, cache, pad_id=encoder.pad_id, max_tokens=config.max_tokens, quiet=quiet)
    probes = Probes(table)
    N = len(trees)
    penalty = config.penalty
    if penalty is None:
        held_out = out_of_fold_plan(keys, members=2, folds=2, seed=config.seed)[0] if plan is None else plan[0]
        penalty = probes.choose_penalty(held_out, config.seed)
    scores = np.full((config.members, N, 2), np.nan, dtype=np.float32)
    for m in range(config.members):
        train = bootstrap_rows(keys, config.seed + m) if plan is None else np.flatnonzero(~plan[m])
        judged = np.arange(N) if plan is None else np.flatnonzero(plan[m])
        scores[m, judged] = probes.scores(probes.fit(train, penalty, config.seed + m), judged)
    write_json_atomic(out / "probe.json", {"layers": chosen, "penalty": penalty, "features": table.shape[-1]})
    return scores


def _full_scores(
    config: StrengthConfig,
    encoder: Encoder,
    trees: list[Tree],
    index: list[int],
    plan: Bool[np.ndarray, "M N"] | None,
    out: Path,
    quiet: bool,
) -> Float[np.ndarray, "M N 2"]:
    jobs = []
    for m in range(config.members):
        held_out = None if plan is None else np.flatnonzero(plan[m])
        train = None if plan is None else [index[i] for i in np.flatnonzero(~plan[m])]
        judged = trees if held_out is None else [trees[i] for i in held_out]
        jobs.append((config, m, train, judged, encoder.pad_id, out / "members" / f"{m:02d}"))
    results = run_jobs(
        full_member,
        jobs,
        workers=min(config.workers or default_workers(), config.members),
        labels=[f"member {m}" for m in range(config.members)],
        on_done=None if quiet else lambda m, _: print(f"  member {m + 1} of {config.members} done", flush=True),
    )
    scores = np.full((config.members, len(trees), 2), np.nan, dtype=np.float32)
    for m, judged_scores in enumerate(results):
        scores[m, slice(None) if plan is None else np.flatnonzero(plan[m])] = judged_scores
    return scores


def full_member(
    config: StrengthConfig, m: int, train: list[int] | None, judged: list[Tree], pad_id: int, out: Path
) -> Float[np.ndarray, "n 2"]:
    """Train member m (its own head and order of data) and score; picks up where an interrupted one stopped."""
    done = out.with_suffix(".npy")
    if done.exists():
        scores: np.ndarray = np.load(done)
        return scores
    settings = RewardConfig(
        data=config.data,
        model=config.model,
        epochs=config.member.epochs,
        batch_size=config.member.batch_size,
        optim=config.member.optim,
        trainable_layers=config.member.trainable_layers,
        max_length=config.max_length,
        on_overlong=config.on_overlong,
        on_invalid=config.on_invalid,
        max_tokens=config.max_tokens,
        precision=config.precision,
        seed=config.seed + m,
    )
    train_reward(settings, out, resume=out.exists(), quiet=True, rows=train)
    model = RewardModel.load(out / "model", precision=config.precision)
    scores = model.score(judged, pad_id=pad_id, max_tokens=config.max_tokens)
    temporary = done.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, scores)
    temporary.replace(done)
    if not config.keep_members:
        shutil.rmtree(out)
    return scores


def _save_scores(path: Path, scores: Float[np.ndarray, "M N 2"], index: Sequence[int]) -> None:
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, scores=scores, index=np.array(index))
    temporary.replace(path)


def read_scores(folder: Path) -> tuple[Float[np.ndarray, "M N 2"], list[int]]:
    """The members' scores of chosen and rejected (NaN: did not judge), and which preferences they belong to."""
    stored = np.load(folder / "margins.npz")
    return stored["scores"], stored["index"].tolist()
