"""The section of `steelyard study strength`: quality of strength against its cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from steelyard.report import plots
from steelyard.report.blocks import (
    MISSING,
    Block,
    Figure,
    Key,
    Panel,
    Section,
    count,
    decimals,
    duration,
    interval,
    over,
    percent,
    seeds_of,
    series_style,
    table,
)
from steelyard.report.plots import Series
from steelyard.report.read import Run
from steelyard.report.strength_study_records import Spread, StrengthRow, StrengthStudyFile


def strength_study_section(run: Run) -> Section | None:
    """Kinds of member by what they find and what they cost."""
    study = run.strength_study
    if study is None:
        return None
    blocks: list[Block] = [*_scatter(study), _quality(study), _costs(study), _readings(study)]
    if study.confident:
        blocks.append(_confident(study))
    if study.between_seeds:
        blocks.append(_between(study))
    intro = (
        f"Ensembles of several kinds weigh {count(study.pairs)} pairs, of which {count(study.wrong)} are known to be "
        f"wrong, with {seeds_of(study.seeds)}. An ensemble is trained once with its largest number of members; "
        f"smaller ones are its first members. {study.confident_note}"
    )
    return Section("strength-study", "Quality and cost of strength", intro.strip(), blocks)


def _kinds(study: StrengthStudyFile) -> list[str]:
    return list(dict.fromkeys(r.backend for r in study.rows))


def _scatter(study: StrengthStudyFile) -> list[Block]:
    """AUROC over cost, one panel a scoring; a line joins the sizes of one kind."""
    styles = {backend: series_style(i) for i, backend in enumerate(_kinds(study))}
    panels = []
    for scoring in dict.fromkeys(r.scoring for r in study.rows):
        series = []
        for backend, style in styles.items():
            rows = [r for r in study.rows if (r.backend, r.scoring) == (backend, scoring)]
            points = [(c, r.auroc) for r in rows if (c := r.cpu_of_one.mean) and r.auroc.mean is not None]
            if points:
                low, high = (
                    [q.mean + sign * (q.std or 0.0) for _, q in points if q.mean is not None] for sign in (-1, 1)
                )
                x, y = [math.log10(c) for c, _ in points], [q.mean for _, q in points]
                series.append(Series(x, y, style, low, high))
        if series:
            label = f"CPU of one {study.reference} model, log₁₀"
            svg = plots.lines(
                f"cost-{scoring}", series, label, "AUROC", marks=True, level=study.longer.auroc.mean,
                xlim=_limits([x for s in series for x in s.x if x is not None]),
            )  # fmt: skip
            panels.append(Panel(scoring.capitalize(), svg))
    if not panels:
        return []
    bands = "Bands: one standard deviation over seeds. " if len(study.seeds) > 1 else ""
    reading = (
        "Each point is an ensemble of a certain size; further left is cheaper, higher finds more wrong labels. 0 is "
        f"the price of one {study.reference} model, 1 that of ten. {bands}Dashed: "
        "taking the longer text for the better one."
    )
    return [Figure("What strength costs", reading, panels, [Key(b, s) for b, s in styles.items()])]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    pad = 0.05 * max(max(values) - min(values), 0.2)
    return min(values) - pad, max(values) + pad


def _sorted(study: StrengthStudyFile) -> list[StrengthRow]:
    order = list(dict.fromkeys(r.scoring for r in study.rows))
    return sorted(study.rows, key=lambda r: order.index(r.scoring))


def _quality(study: StrengthStudyFile) -> Block:
    rows: list[tuple[Any, ...]] = [
        (r.scoring, r.backend, r.members, r.votes.mean, r.voted.mean, _text(r.auroc),
         _ends(r.auroc_interval), _difference(r.auroc_difference), _text(r.average_precision),
         _text(r.monotonicity), _text(r.rank_correlation))
        for r in _sorted(study)
    ]  # fmt: skip
    longer = study.longer
    rows.append(
        ("", "longer text", None, None, None, _text(longer.auroc), None, None, _text(longer.average_precision), "", "")
    )
    columns = [
        ("scoring", None), ("members", None), ("M", count), ("votes a pair", decimals(1)), ("pairs judged", percent),
        ("AUROC", None), ("95 % interval", str), (f"less all {study.reference}", str), ("average precision", None),
        ("monotonicity", None), (f"rank correlation with {study.reference}", None),
    ]  # fmt: skip
    spread = "Mean ± standard deviation over seeds." if len(study.seeds) > 1 else "One seed: no standard deviation."
    note = (
        f"{spread} Monotonicity: Spearman correlation of strength and agreement with the "
        f"truth over 20 groups. Rank correlation: Spearman, with all {study.reference} members of the same seed and "
        "scoring. Out-of-fold, the first members judge only a part of the pairs (column pairs judged), and AUROCs of "
        f"different parts do not compare. Intervals: bootstrap over {over(len(study.seeds), study.unit or 'pairs')}. "
        f"Less all {study.reference}: on the pairs that both judge, with the same draws; an interval that holds 0 "
        "shows no difference."
    )
    return table("Quality", columns, rows, note=note)


def _ends(value: tuple[float, float, float] | None) -> str | None:
    return None if value is None else f"[{decimals(3)(value[1])}, {decimals(3)(value[2])}]"


def _difference(value: tuple[float, float, float] | None) -> str | None:
    return None if value is None else interval(*value)


def _costs(study: StrengthStudyFile) -> Block:
    rows = [
        (r.scoring, r.backend, r.members, r.tokens.mean, r.tokens_of_one.mean, r.cpu.mean, r.cpu_of_one.mean,
         r.wall.mean, None if r.memory.mean is None else r.memory.mean / 1e6)
        for r in _sorted(study)
    ]  # fmt: skip
    one = f"in {study.reference} models"
    columns = [
        ("scoring", None), ("members", None), ("M", count), ("tokens", count), (one, decimals(2)), ("CPU", duration),
        (one, decimals(2)), ("wall", duration), ("peak memory, MB", count),
    ]  # fmt: skip
    note = (
        "Tokens: one token forward through the whole model counts 1, a trained one 3 (backward costs 2), under "
        "adapters 2; layers that are computed once count once. What members of a kind share is in each of its rows. "
        "Members one after the other, one process; the wall time depends on what else the machine did."
    )
    return table("Cost", columns, rows, note=note)


def _readings(study: StrengthStudyFile) -> Block:
    rows = [(r.scoring, r.backend, r.scorer, _text(r.auroc), _text(r.average_precision)) for r in study.scorers]
    columns = [
        ("scoring", None), ("members", None), ("pairs sorted by", None), ("AUROC", None), ("average precision", None)
    ]  # fmt: skip
    note = "All members. Mean / std leaves out pairs with fewer than two votes."
    return table("Which reading of the votes finds wrong labels", columns, rows, note=note)


def _confident(study: StrengthStudyFile) -> Block:
    rows = []
    for r in study.confident:
        for name, precision, recall in (
            ("cleanlab's filter", r.filter_precision, r.filter_recall),
            ("as many by mean strength", r.weakest_precision, r.weakest_recall),
            ("all below zero", r.negative_precision, r.negative_recall),
        ):
            first = name.startswith("cleanlab")
            share = r.flagged.mean if not name.startswith("all") else None
            rows.append((r.backend, name, share, _text(precision), _text(recall), _text(r.auroc) if first else ""))
    columns = [
        ("members", None), ("chosen by", None), ("pairs chosen", percent), ("precision", None), ("recall", None),
        ("AUROC of its score", None),
    ]  # fmt: skip
    note = "Out-of-fold. Confident learning: Northcutt et al. 2021, arXiv 1911.00068, on p = mean sigmoid(margin)."
    return table("Confident learning", columns, rows, note=note)


def _between(study: StrengthStudyFile) -> Block:
    rows = [(r.scoring, r.backend, r.rank_correlation) for r in study.between_seeds]
    columns = [("scoring", None), ("members", None), ("rank correlation", decimals(3))]
    note = (
        "What an ensemble's strength shares with that of another seed of the same kind: no cheaper one can share more."
    )
    return table("Two seeds of the same kind", columns, rows, note=note)


def _text(value: Spread) -> str:
    if value.mean is None:
        return MISSING
    return decimals(3)(value.mean) + (f" ± {decimals(3)(value.std)}" if value.std is not None else "")
