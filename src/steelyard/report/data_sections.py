"""The sections about data: how strong the preferences are, how well wrong labels are found, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from steelyard.report import plots
from steelyard.report.blocks import (
    Block,
    Figure,
    Key,
    Pairs,
    Panel,
    Section,
    count,
    decimals,
    duration,
    percent,
    series_style,
    table,
)
from steelyard.report.plots import Floats, Series
from steelyard.report.read import Run, StrengthRun

_NOISE = {
    "all": "all wrong labels",
    "uniform": "uniform noise",
    "bradley_terry": "Bradley-Terry noise",
    "systematic": "systematic noise",
}
_REVIEWED = (0.02, 0.05, 0.1, 0.2, 0.3)
_WEAKEST, _EXAMPLES = 10, 3


def strength_section(run: Run) -> Section | None:
    """Distribution of strength, and how well it finds wrong labels where the truth is known."""
    if not run.strengths:
        return None
    blocks: list[Block] = [_scorings(run.strengths)]
    with_pairs = [s for s in run.strengths if s.pairs is not None and s.pairs.num_rows]
    if with_pairs:
        blocks.append(_histograms(with_pairs))
    grouped = [s for s in run.strengths if s.result and s.result.groups]
    if grouped:
        blocks.extend(_groups(grouped))
    blocks.extend(_in_sample_against_out_of_fold(with_pairs))
    blocks.extend(_detection(run.strengths))
    if with_pairs:
        blocks.extend(_found(with_pairs))
        blocks.extend(_length(with_pairs[0]))
    intro = (
        "Several reward models, differing in seed and data order, score every pair. A pair's strength is the mean of "
        "their margins, reward of chosen less reward of rejected; a mean below zero says that the models would "
        "have chosen the other response."
    )
    return Section("strength", "Data and strength", intro, blocks)


def pairs_section(run: Run) -> Section | None:
    """The weakest, the most ambiguous and the strongest pairs of the first scoring, side by side."""
    scored = next((s for s in run.strengths if s.pairs is not None and s.pairs.num_rows), None)
    if scored is None:
        return None
    mean = scored.column("strength_mean")
    finite = np.flatnonzero(np.isfinite(mean))
    order = finite[np.argsort(mean[finite], kind="stable")]
    weakest = order[:_WEAKEST]
    rest = order[_WEAKEST:]
    ambiguous = rest[np.argsort(np.abs(mean[rest]), kind="stable")][:_EXAMPLES]
    strongest = np.setdiff1d(rest, ambiguous, assume_unique=True)[::-1]
    strongest = strongest[np.argsort(-mean[strongest], kind="stable")][:_EXAMPLES]
    kinds = (
        ("weakest", weakest, "Weakest", "Lowest mean strength: the labels that the models most agree to doubt."),
        ("ambiguous", ambiguous, "Ambiguous", "Strength nearest to zero: the label carries next to no signal."),
        ("strongest", strongest, "Strongest", "Highest mean strength: clear cases, often with simple patterns."),
    )
    blocks = [
        Pairs(f"{title}: {len(rows)} pairs", reading, [_pair(scored, i) for i in rows.tolist()], "Table 1")
        for _, rows, title, reading in kinds
        if len(rows)
    ]
    intro = f"Scoring: {scored.scoring}. Read these before trusting any figure: they are what the numbers stand for."
    return Section("pairs", "The worst pairs, side by side", intro, blocks)


def _pair(scored: StrengthRun, i: int) -> dict[str, Any]:
    row: Mapping[str, Any] = scored.pairs.slice(i, 1).to_pylist()[0]
    votes, voters = row.get("votes"), row.get("voters")
    facts = [
        ("mean", decimals(2)(row["strength_mean"])),
        ("std", decimals(2)(row["strength_std"])),
        ("votes", f"{votes:g} of {voters}" if votes is not None and voters is not None else ""),
        ("p(flip)", decimals(2)(row.get("p_flip")) if row.get("p_flip") is not None else ""),
    ]
    truth = {1: "label right", -1: "label wrong", 0: "a tie"}.get(row.get("truth", 9), "")
    return {
        "id": str(row["id"]),
        "prompt": str(row["prompt"]),
        "chosen": str(row["chosen"]),
        "rejected": str(row["rejected"]),
        "facts": [fact for fact in facts if fact[1]],
        "action": row.get("suggested_action") or "",
        "reason": row.get("reason") or "",
        "truth": truth,
        "wrong": row.get("truth") == -1,
        "noise": _NOISE.get(row.get("noise") or "", row.get("noise") or ""),
    }


def _scorings(strengths: Sequence[StrengthRun]) -> Block:
    rows = []
    for s in strengths:
        r = s.result
        pairs = s.pairs.num_rows if s.pairs is not None else (sum(g.n for g in r.groups) if r else None)
        tokens = None if r is None or r.tokens is None else int(r.tokens)
        values = (r.members, r.folds, r.backend, r.share_negative, r.seconds) if r else (None,) * 5
        rows.append((s.scoring, pairs, *values, tokens))
    columns = (
        ("scoring", None),
        ("pairs", count),
        ("members", count),
        ("folds", count),
        ("backend", None),
        ("share below zero", percent),
        ("time", duration),
        ("tokens", count),
    )
    note = "Out-of-fold: a pair is scored only by members that did not train on it. In-sample is the paper's way."
    return table("Scorings", columns, rows, note=note)


def _histograms(scored: Sequence[StrengthRun]) -> Block:
    first, second = scored[0], (scored[1] if len(scored) > 1 else None)
    mean = first.column("strength_mean")
    below = float(np.mean(mean[np.isfinite(mean)] < 0)) if np.isfinite(mean).any() else float("nan")
    panels = []
    for key, title in (("strength_mean", "Mean of the margins"), ("strength_std", "Standard deviation")):
        outline = second.column(key) if second else None
        svg = plots.histogram(key, first.column(key), f"{title.lower()}, reward units", outline=outline)
        panels.append(Panel(title, svg))
    other = f" The outline is {second.scoring}." if second else ""
    reading = (
        f"{percent(below)} of the pairs lie below zero, {first.scoring} (the paper found about 25\u00a0% on HH-RLHF). "
        f"A long right tail of the deviation marks pairs on which the members disagree.{other}"
    )
    return Figure("How strong the preferences are", reading, panels, mirrors="Fig. 1")


def _groups(scored: Sequence[StrengthRun]) -> list[Block]:
    groups = scored[0].result.groups if scored[0].result else []
    title = "mean of the margins" + (f" ({scored[0].scoring})" if len(scored) > 1 else "")
    deviation = [
        Series(range(1, len(s.result.groups) + 1), [g.std for g in s.result.groups], series_style(i))
        for i, s in enumerate(scored)
        if s.result
    ]
    keys = _scoring_keys(scored)
    x = f"group, 1 (weakest) to {len(groups)} (strongest)"
    panels = [
        Panel("Mean", plots.bars("group-mean", [g.mean for g in groups], x, f"{title}")),
        Panel(
            "Standard deviation",
            plots.lines(
                "group-std",
                deviation,
                x,
                "mean std, reward units",
                marks=True,
                xlim=(0.2, len(groups) + 0.8),
                xticks=plots.group_ticks(len(groups)),
            ),
        ),
    ]
    reading = (
        "Pairs sorted by strength into groups of equal size. The deviation is U-shaped where models agree on ordinary "
        "pairs and differ on the clearly wrong and on the very strong ones."
    )
    blocks: list[Block] = [Figure("Groups of equal size", reading, panels, keys, mirrors="Fig. 2")]
    agreeing = [
        Series([g.mean for g in known], [g.agreement for g in known], series_style(i))
        for i, s in enumerate(scored)
        if s.result and (known := [g for g in s.result.groups if g.agreement is not None])
    ]
    if agreeing:
        svg = plots.lines(
            "group-agreement",
            agreeing,
            "group mean strength, reward units",
            "share of labels that are right",
            marks=True,
            level=0.5,
            ylim=(-0.02, 1.02),
        )
        reading = (
            "Share of labels that agree with the known truth, by strength. It should rise from left to right; below "
            "the dashed line more labels are wrong than right, and flipping would help."
        )
        panel = Panel("Agreement with the truth", svg)
        blocks.append(Figure("Strength and truth", reading, [panel], keys, mirrors="Fig. 3"))
    return blocks


def _scoring_keys(scored: Sequence[StrengthRun]) -> tuple[Key, ...]:
    return tuple(Key(s.scoring, series_style(i)) for i, s in enumerate(scored)) if len(scored) > 1 else ()


def _in_sample_against_out_of_fold(scored: Sequence[StrengthRun]) -> list[Block]:
    if len(scored) < 2:
        return []
    first, second = scored[:2]
    rows = {key: i for i, key in enumerate(second.pairs.column("id").to_pylist())}
    matches = [(i, rows[k]) for i, k in enumerate(first.pairs.column("id").to_pylist()) if k in rows]
    if len(matches) < 2:
        return []
    left, right = np.array(matches).T
    x, y = second.column("strength_mean")[right], first.column("strength_mean")[left]
    wrong = first.column("truth")[left] == -1 if first.has("truth") else np.zeros(len(left), dtype=bool)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y, wrong = x[finite], y[finite], wrong[finite]
    if len(x) < 2:
        return []
    svg = plots.scatter("scoring-scatter", x, y, f"{second.scoring}, reward units", first.scoring, wrong=wrong)
    changed = percent(float(np.mean((x < 0) != (y < 0))))
    coloured = " Orange points carry a wrong label." if wrong.any() else ""
    reading = (
        f"Mean strength of each pair in both scorings; {changed} change sign. Points to the right of the dashed line "
        f"look stronger to models that trained on them: memory, not evidence.{coloured}"
    )
    title = f"{second.scoring} against {first.scoring}"
    return [Figure(title[:1].upper() + title[1:], reading, [Panel("Strength by scoring", svg)])]


def _detection(strengths: Sequence[StrengthRun]) -> list[Block]:
    rows, panels, keys = [], [], []
    for s in strengths:
        found = (s.result.detection if s.result else None) or []
        for d in found:
            rate = d.positives / d.n if d.n else None
            noise = _NOISE.get(d.noise, d.noise)
            rows.append((s.scoring, d.scorer, noise, d.auroc, d.average_precision, rate, d.n, d.positives))
        if not found:
            continue
        noises = list(dict.fromkeys(d.noise for d in found))
        scorers = list(dict.fromkeys(d.scorer for d in found))
        series = []
        for i, scorer in enumerate(scorers):
            points = [(d.auroc, noises.index(d.noise)) for d in found if d.scorer == scorer and d.auroc is not None]
            if points:
                series.append(Series([p[0] for p in points], [p[1] for p in points], series_style(i)))
                keys.append(Key(scorer, series_style(i)))
        labels = [_NOISE.get(n, n) for n in noises]
        svg = plots.dots(f"auroc-{s.scoring}", labels, series, "AUROC", level=0.5, spread=True)
        panels.append(Panel(s.scoring, svg))
    if not rows:
        return []
    columns = (
        ("scoring", None),
        ("scorer", None),
        ("noise", None),
        ("AUROC", decimals(3)),
        ("average precision", decimals(3)),
        ("share wrong", percent),
        ("pairs", count),
        ("wrong", count),
    )
    note = (
        "AUROC: chance that a wrong pair ranks below a right one (0.5 is guessing). Average precision is to be "
        "compared with the share of wrong pairs, which guessing attains."
    )
    reading = (
        "How well each scorer tells wrong labels from right ones, by kind of noise; dashed is guessing. Systematic "
        "noise can be learned by the models like a rule, and is then the hardest to see."
    )
    unique = tuple(dict.fromkeys(keys))
    return [
        Figure("Finding wrong labels", reading, panels, unique),
        table("Detection of wrong labels", columns, rows, note=note),
    ]


def _found(scored: Sequence[StrengthRun]) -> list[Block]:
    """Share of the wrong labels met when pairs are reviewed from the weakest on."""
    known = [s for s in scored if s.has("truth") and bool((s.column("truth") == -1).any())]
    if not known:
        return []
    first = known[0]
    series = [Series(*_found_curve(s, s.column("truth") == -1), series_style(i)) for i, s in enumerate(known)]
    labels: dict[str, Any] = {
        "xlabel": "share of pairs reviewed, weakest first",
        "ylabel": "share of wrong labels found",
    }
    limits: dict[str, Any] = {"xlim": (0, 1), "ylim": (0, 1.02), "diagonal": True}
    panels = [Panel("By scoring" if len(known) > 1 else "All", plots.lines("found", series, **labels, **limits))]
    keys = list(_scoring_keys(known))
    noise = np.array(first.pairs.column("noise").to_pylist()) if first.has("noise") else np.array([])
    kinds = [k for k in sorted({str(n) for n in noise if n}) if ((noise == k) & (first.column("truth") == -1)).any()]
    if len(kinds) > 1:
        by_kind = [
            Series(*_found_curve(first, (first.column("truth") == -1) & (noise == k)), series_style(i + 3))
            for i, k in enumerate(kinds)
        ]
        panels.append(Panel(f"By noise, {first.scoring}", plots.lines("found-noise", by_kind, **labels, **limits)))
        keys.extend(Key(_NOISE.get(k, k), series_style(i + 3)) for i, k in enumerate(kinds))
    tenth = _review(first, 0.1)[3]
    reading = (
        f"Reviewing the weakest 10\u00a0% of the pairs finds {percent(tenth)} of the wrong labels ({first.scoring}). "
        "The dashed diagonal is review in random order."
    )
    return [Figure("What a review would find", reading, panels, tuple(keys)), _review_table(first)]


def _found_curve(scored: StrengthRun, wrong: Any) -> tuple[Floats, Floats]:
    hits = wrong[np.argsort(scored.column("strength_mean"), kind="stable")]
    x = np.concatenate([[0.0], np.arange(1, len(hits) + 1) / len(hits)])
    y = np.concatenate([[0.0], np.cumsum(hits) / max(int(hits.sum()), 1)])
    keep = np.unique(np.linspace(0, len(x) - 1, 150).astype(int))
    return x[keep], y[keep]


def _review(scored: StrengthRun, share: float) -> tuple[int, int, float, float]:
    """Of the weakest `share` of the pairs: their number, the wrong ones, precision and recall."""
    hits = (scored.column("truth") == -1)[np.argsort(scored.column("strength_mean"), kind="stable")]
    n = max(round(share * len(hits)), 1)
    wrong = int(hits[:n].sum())
    return n, wrong, wrong / n, wrong / int(hits.sum())


def _review_table(scored: StrengthRun) -> Block:
    rows = [(percent(share, 0), *_review(scored, share)) for share in _REVIEWED]
    columns = (
        ("weakest", None),
        ("pairs to review", count),
        ("wrong among them", count),
        ("precision", percent),
        ("of all wrong labels", percent),
    )
    return table(f"Cost and yield of a review ({scored.scoring})", columns, rows)


def _length(scored: StrengthRun) -> list[Block]:
    """Strength by difference in length: twenty groups of equal size, median and quartiles."""
    if not (scored.has("length_chosen") and scored.has("length_rejected")):
        return []
    difference = scored.column("length_chosen") - scored.column("length_rejected")
    mean = scored.column("strength_mean")
    finite = np.isfinite(difference) & np.isfinite(mean)
    difference, mean = difference[finite], mean[finite]
    if len(mean) < 20 or not np.ptp(difference) or not np.ptp(mean):
        return []
    parts = np.array_split(np.argsort(difference, kind="stable"), 20)
    quartiles = np.array([np.quantile(mean[part], (0.25, 0.5, 0.75)) for part in parts])
    centre = np.array([np.median(difference[part]) for part in parts])
    rank = float(spearmanr(difference, mean).statistic)
    one = Series(centre, quartiles[:, 1], series_style(0), quartiles[:, 0], quartiles[:, 2])
    x, y = "longer by, characters (chosen less rejected)", "strength, reward units"
    svg = plots.lines("length", [one], x, y, marks=True, level=0.0)
    reading = (
        f"Median strength and its middle half in twenty groups by difference in length; "
        f"rank correlation {decimals(2)(rank)}. "
        "A slope says that the models, or the annotators, favour longer (or shorter) answers whatever they say."
    )
    return [Figure("Length bias", reading, [Panel("Strength by difference in length", svg)])]
