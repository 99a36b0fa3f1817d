"""The sections of studies that repeat every arm with several seeds: contrastive learning, MetaRM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from steelyard.report import plots
from steelyard.report.blocks import (
    Block,
    Figure,
    Panel,
    Section,
    Style,
    arm_keys,
    count,
    decimals,
    interval,
    over,
    percent,
    seeds_of,
    table,
)
from steelyard.report.feature_sections import MEASURES
from steelyard.report.plots import Series
from steelyard.report.read import Run
from steelyard.report.study_records import MetaRMFile, SeedCurve, SeedRow, SpreadHistogram

Styles = Mapping[str, Style]
_UNITS = {
    "range": "of the range of rewards (0 to 1)",
    "std": "standard deviations of these rewards",
    "training std": "standard deviations in training",
}
_BARS = (
    "The bar is the 95 % interval over {drawn}; where it holds 0, no difference was found. Values come from "
    "the same pairs and seeds, so what the arms share cancels."
)


def contrastive_section(run: Run, styles: Styles) -> Section | None:
    """Contrastive learning against its control."""
    study = run.contrastive
    if study is None:
        return None
    against = f"Difference to “{study.control}”"
    blocks: list[Block] = [
        difference_figure(f"{against}: accuracy", "study-accuracy", study.accuracy, styles, _set_title),
        seed_rows_table("Accuracy on held-out pairs", study.accuracy, study.control),
        difference_figure(f"{against}: features apart", "study-overlap", study.overlap, styles, _overlap_title),
        seed_rows_table("Chosen and rejected features apart", study.overlap, study.control),
    ]
    blocks += seed_curves(
        study.curves, styles, {"train/contrastive_loss": "Contrastive loss", "train/loss": "Reward loss"}
    )
    sets = sorted({c.metric for c in study.curves if c.metric.startswith("validation/")})
    blocks += seed_curves(study.curves, styles, {m: f"Set: {m.split('/')[1]}" for m in sets}, "Accuracy while training")
    intro = (
        f"SimCSE and SwAV beside the reward loss, {seeds_of(study.seeds)}. “{study.control}” has the same dropout and "
        "the same doubled forward with beta = 0: what differs from it is the contrastive term's doing, what differs "
        "from plain training alone may be the dropout's."
    )
    return Section("contrastive", "Contrastive learning", intro, blocks)


def metarm_section(run: Run, styles: Styles) -> Section | None:
    """MetaRM against its controls."""
    study = run.metarm
    if study is None:
        return None
    against = f"Difference to “{study.control}”"
    blocks: list[Block] = [_shift(study)] if study.policies else []
    blocks += [
        difference_figure(f"{against}: accuracy", "meta-accuracy", study.accuracy, styles, _set_title),
        seed_rows_table("Accuracy", study.accuracy, study.control),
    ]
    blocks += _histograms(study.histograms, styles)
    blocks += [
        difference_figure(f"{against}: spread", "meta-spread", study.spread, styles, _spread_title),
        seed_rows_table("Mean reward difference of two responses to one prompt", study.spread, study.control),
    ]
    names = {"meta/spread": "Spread on the meta set", "meta/gradient_norm": "Norm of the meta gradient"}
    blocks += seed_curves(study.curves, styles, names | {"train/loss": "Training loss"})
    intro = (
        f"Reward models that look at the preferences from where a shifted policy's {study.k or 'k'} responses to a "
        f"prompt differ more, {seeds_of(study.seeds)}. “{study.control}” is the same code without the meta step; the "
        "other controls step in a random direction of the same norm, or on responses of the unmoved policy."
    )
    return Section("metarm", "MetaRM", intro, blocks)


def _set_title(row: SeedRow) -> str:
    return f"Set: {row.set} ({count(row.n)} pairs)"


def _overlap_title(row: SeedRow) -> str:
    return f"{MEASURES.get(row.measure, row.measure)}, {row.set}"


def _spread_title(row: SeedRow) -> str:
    return f"{row.set}, in units of the {row.measure}"


def difference_figure(
    title: str, name: str, rows: Sequence[SeedRow], styles: Styles, panel_title: Callable[[SeedRow], str]
) -> Block:
    """One panel for each set and measure, one row an arm."""
    places = list(dict.fromkeys((r.set, r.measure) for r in rows))
    panels = []
    for place in places:
        shown = [r for r in rows if (r.set, r.measure) == place and r.difference is not None]
        series = []
        for i, r in enumerate(shown):
            d = r.difference
            assert d is not None
            low, high = (None, None) if d.low is None or d.high is None else ([d.low], [d.high])
            series.append(Series([d.value], [i], styles[r.arm], low, high))
        if shown:
            svg = plots.dots(
                f"{name}-{'-'.join(place)}", [r.arm for r in shown], series, "difference", level=0.0,
                small=len(places) > 2,
            )  # fmt: skip
            panels.append(Panel(panel_title(shown[0]), svg))
    units = " or ".join(dict.fromkeys(r.unit for r in rows))
    seeds = max((len(r.seeds) for r in rows), default=0)
    return Figure(title, _BARS.format(drawn=over(seeds, units)), panels)


def seed_rows_table(title: str, rows: Sequence[SeedRow], control: str, of: str = "arm") -> Block:
    """Value of each arm (or what `of` says that rows are) on each set and its difference to the control, with
    intervals and by seed."""
    columns = (
        ("set", None), ("measure", None), (of, None), ("n", count), ("value", str),
        (f"difference to {control}", str), ("by seed", str),
    )  # fmt: skip
    cells = []
    for r in rows:
        d = r.difference
        by_seed = None if d is None else ", ".join(decimals(3)(s) for s in d.seeds)
        difference = None if d is None else interval(d.value, d.low, d.high)
        measure = MEASURES.get(r.measure, r.measure)
        cells.append((r.set, measure, r.arm, r.n, interval(r.value, r.low, r.high), difference, by_seed))
    return table(title, columns, cells, note="By seed: the difference of each seed. Intervals of 95 %.")


def seed_curves(
    curves: Sequence[SeedCurve],
    styles: Styles,
    metrics: Mapping[str, str],
    title: str = "While training",
    x: str = "training step",
) -> list[Block]:
    """One panel for each of `metrics` (name -> words): the mean of the seeds and the band of all."""
    panels = []
    for metric, words in metrics.items():
        series = [
            Series(c.steps, c.mean, styles[c.arm], c.low, c.high)
            for arm in styles
            for c in curves
            if c.arm == arm and c.metric == metric and c.steps
        ]
        if series:
            y = "accuracy" if "accuracy" in metric else "value"
            panels.append(Panel(words, plots.lines(f"study-{metric}", series, x, y, small=len(metrics) > 2)))
    if not panels:
        return []
    arms = {c.arm for c in curves if c.metric in metrics}
    reading = "The mean of the seeds; the band reaches from the least to the greatest."
    return [Figure(title, reading, panels, arm_keys(styles, arms))]


def _histograms(histograms: Sequence[SpreadHistogram], styles: Styles) -> list[Block]:
    blocks: list[Block] = []
    for name in dict.fromkeys(h.set for h in histograms):
        panels = []
        for unit in dict.fromkeys(h.unit for h in histograms if h.set == name):
            series = [
                Series([(a + b) / 2 for a, b in zip(h.edges, h.edges[1:], strict=False)], list(h.shares), styles[h.arm])
                for arm in styles
                for h in histograms
                if (h.set, h.unit, h.arm) == (name, unit, arm)
            ]
            svg = plots.lines(f"spread-{name}-{unit}", series, "reward difference", "share", small=True)
            panels.append(Panel(f"In units {_UNITS.get(unit, unit)}", svg))
        reading = (
            "Histograms of |r_i - r_j| over all pairs of responses to one prompt, drawn as lines, all seeds together, "
            "each model in units of its own: a scale of all rewards changes none. “eta = 0” is before, “MetaRM” is "
            "after. More spread is better only if the accuracy on the same responses rises with it. In units of a std "
            "the last bin holds all that lies beyond."
        )
        keys = arm_keys(styles, {h.arm for h in histograms})
        blocks.append(Figure(f"Reward differences, responses of the {name}", reading, panels, keys, mirrors="Fig. 16"))
    return blocks


def _shift(study: MetaRMFile) -> Block:
    columns = (
        ("policy", None), ("prompts", count), ("gold reward", decimals(3)), ("length, tokens", decimals(1)),
        ("ended", percent), ("KL to SFT, nats", decimals(2)),
    )  # fmt: skip
    rows = [(p.policy, p.prompts, p.gold, p.length, p.ended, p.kl) for p in study.policies]
    return table("How far the policy has moved", columns, rows, note="On held-out prompts; KL in the last PPO step.")
