"""The section about the features of chosen and rejected responses."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from steelyard.report import plots
from steelyard.report.blocks import Block, Figure, Key, Panel, Section, Style, count, interval, table
from steelyard.report.read import Run
from steelyard.report.study_records import FeatureModel

MEASURES = {
    "silhouette_cosine": "silhouette, cosine",
    "silhouette_euclidean": "silhouette, Euclidean",
    "probe_auroc": "probe's AUROC",
}
_CLOUDS = ("pairs", "differences")


def feature_section(run: Run) -> Section | None:
    """Figures of overlap, and the t-SNE pictures side by side."""
    if run.features is None or not run.features.models:
        return None
    models = run.features.models
    blocks: list[Block] = [_figures(models)]
    drawn = [m for m in models if m.tsne is not None]
    if drawn:
        blocks.append(_pictures(drawn))
    intro = "Where a reward model's last layer puts chosen and rejected responses, on held-out pairs"
    intro += f" (set: {run.features.set})." if run.features.set else "."
    return Section("features", "Features", intro, blocks)


def _figures(models: Sequence[FeatureModel]) -> Block:
    figures = ((f"{words}, {cloud}", str) for cloud in _CLOUDS for words in MEASURES.values())
    columns = (("model", None), ("pairs", count), *figures)
    rows = []
    for m in models:
        found = {(r.features, r.measure): interval(r.value, r.low, r.high) for r in m.rows}
        rows.append((m.name, m.pairs, *(found.get((c, measure)) for c in _CLOUDS for measure in MEASURES)))
    units = " or ".join(dict.fromkeys(m.unit for m in models))
    note = (
        "Pairs: chosen against rejected features. Differences: chosen less rejected against its negation. Silhouette: "
        "1 far apart, 0 in the same place. AUROC of a linear probe on prompts that it never saw: 0.5 is chance. "
        f"Intervals over {units}."
    )
    return table("How far chosen and rejected features lie apart", columns, rows, note=note)


def _pictures(models: Sequence[FeatureModel]) -> Block:
    panels = []
    for m in models:
        assert m.tsne is not None
        chosen, rejected = np.array(m.tsne.chosen), np.array(m.tsne.rejected)
        panels.append(Panel(m.name, plots.clouds(f"tsne-{m.name}", chosen, rejected, small=len(models) > 2)))
    reading = (
        "t-SNE of the features, every model by itself. Axes, distances between groups and their sizes mean nothing, "
        "and t-SNE draws groups where there are none. The figures above decide."
    )
    keys = (Key("chosen", Style(0, marker="o")), Key("rejected", Style(1, marker="s")))
    return Figure("Chosen and rejected features", reading, panels, keys, mirrors="the t-SNE plots of section 3.1")
