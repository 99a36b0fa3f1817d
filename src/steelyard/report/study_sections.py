"""The sections of `steelyard study data`: arms against plain training, and what the kinds of data do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from steelyard.report import plots
from steelyard.report.blocks import (
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
from steelyard.report.data_study_records import (
    Accuracy,
    ArmRow,
    ControlRow,
    DataStudyFile,
    InflationRow,
    LengthRow,
    Segments,
    TreatmentRow,
)
from steelyard.report.plots import Series
from steelyard.report.read import Run
from steelyard.report.study_records import Difference

_SHOWN_SEGMENTS = 5
_PAIRED = (
    "The bar is the 95 % interval of a bootstrap over {drawn}; values come from the same pairs and "
    "seeds, so what the arms share cancels."
)


def arms_section(run: Run) -> Section | None:
    """Which arms beat plain training, in words and in numbers."""
    study = run.data_study
    if study is None or not study.arms:
        return None
    dots = _difference_panels("arms", study, [(r.arm, r) for r in study.arms])
    reading = (
        "Accuracy less that of plain training. " + _PAIRED.format(drawn=_drawn(study)) + " An arm whose bar holds 0 is "
        "not told apart from plain. The oracle knows the truth: an upper bound; random flip is the control of flip; "
        "the ensemble and weight averages took several trainings (table)."
    )
    blocks: list[Block] = [
        Figure("Arms less plain training", reading, dots, mirrors="Fig. 8"),
        _arms_table(study.arms, " ".join(study.findings)),
    ]
    if study.arms_by_length:
        blocks.append(_lengths_table(study.arms_by_length))
    if study.controls:
        blocks.append(_controls_table(study.controls))
    return Section("arms", "Repairs against plain training", _compute_words(study), blocks)


def kinds_section(run: Run) -> Section | None:
    """Bands, growing sets, repaired bands, validation segments and reward inflation."""
    study = run.data_study
    if study is None:
        return None
    blocks: list[Block] = []
    if study.bands:
        blocks += _bands(study)
    if study.growth:
        blocks += _growth(study)
    if study.bands_repair:
        blocks += _treatments(study)
    if study.segments is not None:
        blocks += _segments(study.segments, study)
    if study.inflation:
        blocks.append(_inflation(study.inflation, study))
    blocks.append(_compute(study))
    return Section("kinds", "What the kinds of data do", _compute_words(study), blocks)


def _compute_words(study: DataStudyFile) -> str:
    weak = [s for s in study.sets if s.unit != "prompts"]
    text = (
        f"{count(study.pairs)} training pairs, strength {study.scoring}, {seeds_of(study.seeds)}. Equal compute: "
        "within an analysis every model takes the same number of steps of the same number of pairs, so small sets are "
        "seen more often. Learning rate and batch are those of the study file; the study itself chooses none."
    )
    text += " Strength was measured once, so no interval holds another ensemble or its repair."
    if weak:
        fewest, units = min(s.prompts for s in weak), " or ".join(dict.fromkeys(s.unit for s in weak))
        text += (
            f" There are only {fewest} different prompts ({', '.join(s.set for s in weak)}), so the bootstrap draws "
            f"{units}: the intervals hold for these prompts and say nothing of others."
        )
    return text


def _drawn(study: DataStudyFile) -> str:
    """What the bootstrap draws, in words."""
    return over(len(study.seeds), "held-out " + " or ".join(dict.fromkeys(s.unit for s in study.sets)))


def _titles(study: DataStudyFile) -> dict[str, str]:
    return {s.set: f"Set: {s.set} ({count(s.n)} pairs)" for s in study.sets}


def _dot(d: Difference, place: int, style: int = 0) -> Series:
    low, high = (None, None) if d.low is None or d.high is None else ([d.low], [d.high])
    return Series([d.value], [place], series_style(style), low, high)


def _difference_panels(name: str, study: DataStudyFile, rows: Sequence[tuple[str, Accuracy]]) -> list[Panel]:
    """One panel for each validation set: differences to the control, one row of the plot each."""
    panels = []
    for one, title in _titles(study).items():
        shown = [(label, r.difference) for label, r in rows if r.set == one and r.difference is not None]
        if shown:
            series = [_dot(d, place) for place, (_, d) in enumerate(shown)]
            labels = [label for label, _ in shown]
            small = len(study.sets) > 2
            svg = plots.dots(f"{name}-{one}", labels, series, "difference in accuracy", level=0.0, small=small)
            panels.append(Panel(title, svg))
    return panels


def _difference_cells(d: Difference | None) -> tuple[str | None, str | None, str | None]:
    """The difference with its interval, each seed's, and what it says in a word."""
    if d is None:
        return None, None, None
    verdict = "open"
    if d.low is not None and d.low > 0:
        verdict = "above"
    elif d.high is not None and d.high < 0:
        verdict = "below"
    return interval(d.value, d.low, d.high), ", ".join(decimals(3)(s) for s in d.seeds), verdict


def _arms_table(rows: Sequence[ArmRow], findings: str) -> Block:
    columns = (
        ("set", None), ("arm", None), ("trainings", count), ("accuracy", str), ("less plain", str), ("by seed", str),
        ("verdict", None), ("NLL", decimals(3)), ("ECE", decimals(3)), ("mean margin", decimals(2)),
        ("reward std", decimals(2)),
    )  # fmt: skip
    cells = [
        (r.set, r.arm, r.models, interval(r.value, r.low, r.high), *_difference_cells(r.difference), r.nll, r.ece,
         r.margin, r.reward_std)
        for r in rows
    ]  # fmt: skip
    note = (
        "Trainings: reward models that the arm needs for one seed. NLL, ECE, margin and std are means over seeds; an "
        "arm with margins may reach the same order of responses on a larger scale. Verdict: open where the "
        "interval of the difference holds 0."
    )
    return table("Arms by validation set", columns, cells, note=f"{findings} {note}".strip())


def _lengths_table(rows: Sequence[LengthRow]) -> Block:
    columns = (
        ("set", None), ("better response", None), ("pairs", count), ("arm", None), ("accuracy", str),
        ("less plain", str), ("by seed", str), ("verdict", None),
    )  # fmt: skip
    cells = [
        (r.set, r.better, r.n, r.arm, interval(r.value, r.low, r.high), *_difference_cells(r.difference)) for r in rows
    ]
    note = (
        "Better: by the set's label. Length in characters; pairs of equal length are left out. An arm that has only "
        "learned to prefer length gains where the longer response is the better one, and loses where the shorter is."
    )
    return table("Arms by length", columns, cells, note=note)


def _controls_table(rows: Sequence[ControlRow]) -> Block:
    columns = (
        ("set", None), ("arm", None), ("control", None), ("difference", str), ("by seed", str), ("verdict", None),
    )  # fmt: skip
    cells = [(r.set, r.arm, r.against, *_difference_cells(r)) for r in rows]
    note = (
        "Accuracy of each arm less that of its control, paired by seed and pair. A repair by shuffled strengths "
        "changes as many labels, by the same amounts, but not those that the ensemble doubts."
    )
    return table("Arms less their own controls", columns, cells, note=note)


def _bands(study: DataStudyFile) -> list[Block]:
    rows = study.bands
    panels = []
    for one, title in _titles(study).items():
        shown = sorted((r for r in rows if r.set == one), key=lambda r: r.band)
        if shown:
            panels.append(Panel(title, _by_x(f"bands-{one}", [r.band for r in shown], shown, "band (1 = weakest)")))
    reading = (
        "Accuracy of reward models trained on one band of strength each, equally many pairs in each band. "
        "The paper (ten bands) finds the two weakest below one half, the next two at it, and the strongest not the "
        f"best. The shade is the 95 % interval over {_drawn(study)}; the dashed line is guessing."
    )
    cells = [
        (r.band, r.pairs, r.strength_low, r.strength_high, r.right, r.set, interval(r.value, r.low, r.high))
        for r in sorted(rows, key=lambda r: r.band)
    ]
    columns = (
        ("band", count), ("pairs", count), ("strength from", decimals(2)), ("to", decimals(2)),
        ("labels right", percent), ("set", None), ("accuracy", str),
    )  # fmt: skip
    return [
        Figure("One band of strength alone", reading, panels, mirrors="Fig. 4"),
        table("Bands", columns, cells),
    ]


def _by_x(name: str, x: Sequence[float], rows: Sequence[Accuracy], xlabel: str) -> Markup:
    return plots.lines(name, [_band_series(x, rows, 0)], xlabel, "accuracy", marks=True, level=0.5, small=True)


def _band_series(x: Sequence[float], rows: Sequence[Accuracy], style: int) -> Series:
    return Series(list(x), [r.value for r in rows], series_style(style), [r.low for r in rows], [r.high for r in rows])


def _growth(study: DataStudyFile) -> list[Block]:
    rows, ends = study.growth, list(dict.fromkeys(r.end for r in study.growth))
    panels = []
    for one, title in _titles(study).items():
        series = []
        for style, end in enumerate(ends):
            shown = [r for r in rows if (r.set, r.end) == (one, end)]
            series.append(_band_series([100 * r.fraction for r in shown], shown, style))
        svg = plots.lines(
            f"growth-{one}", series, "% of the training pairs", "accuracy", marks=True, level=0.5, small=True
        )
        panels.append(Panel(title, svg))
    keys = [Key(f"from the {end} end", series_style(style)) for style, end in enumerate(ends)]
    reading = (
        "Accuracy against the share of the training pairs, added from the weakest or from the strongest end, all with "
        "the same number of steps. Both curves meet at the whole set. If the curve from the strongest end falls at its "
        "right, the weakest pairs do harm; how far the other has to go shows how much good data outweighs them."
    )
    cells = [
        (r.end, r.fraction, r.pairs, r.strength_mean, r.right, r.set, interval(r.value, r.low, r.high)) for r in rows
    ]
    columns = (
        ("from the end", None), ("share", percent), ("pairs", count), ("mean strength", decimals(2)),
        ("labels right", percent), ("set", None), ("accuracy", str),
    )  # fmt: skip
    figure = Figure("Growing the training set", reading, panels, keys, mirrors="Figs. 21, 22")
    return [figure, table("Growing sets", columns, cells)]


def _treatments(study: DataStudyFile) -> list[Block]:
    blocks: list[Block] = []
    texts = {
        "flip": (
            "Flipping the weakest bands",
            "Models trained on one weak band alone, its labels flipped, and then with soft labels, a margin, or both; "
            "less the model of the same band untouched. Right of 0: the treatment helps.",
            "Fig. 5",
        ),
        "soft": (
            "Soft labels and margins within a band",
            "Models trained on one band alone with soft labels, margins, or both, less the untouched band.",
            "Fig. 6",
        ),
    }
    for kind, (title, reading, mirrors) in texts.items():
        rows = [r for r in study.bands_repair if r.kind == kind]
        if rows:
            labelled = [(f"band {r.band}, {r.treatment}", r) for r in rows]
            panels = _difference_panels(f"treatment-{kind}", study, labelled)
            reading = f"{reading} {_PAIRED.format(drawn=_drawn(study))}"
            blocks += [Figure(title, reading, panels, mirrors=mirrors), _treatment_table(title, rows)]
    return blocks


def _treatment_table(title: str, rows: Iterable[TreatmentRow]) -> Block:
    columns = (
        ("band", count), ("treatment", None), ("set", None), ("accuracy", str), ("less untouched", str),
        ("by seed", str), ("verdict", None),
    )  # fmt: skip
    cells = [
        (r.band, r.treatment, r.set, interval(r.value, r.low, r.high), *_difference_cells(r.difference)) for r in rows
    ]
    return table(title, columns, cells)


def _segments(found: Segments, study: DataStudyFile) -> list[Block]:
    rows = found.segments
    step = max(1, round((len(rows) - 1) / (_SHOWN_SEGMENTS - 1)))
    picked = sorted({0, len(rows) - 1, *range(0, len(rows) - 1, step)})
    over = [
        Series(rows[i].steps, rows[i].mean, series_style(n), rows[i].low, rows[i].high) for n, i in enumerate(picked)
    ]
    points = sorted({0, len(rows[0].steps) // 2, len(rows[0].steps) - 1}) if rows[0].steps else []
    by = [
        Series([r.segment for r in rows], [r.mean[p] for r in rows], series_style(n), None, None)
        for n, p in enumerate(points)
    ]
    title = f"{len(rows)} validation segments over steps"
    reading = (
        "Accuracy of plain training on the held-out pairs, sorted by the ensemble's mean margin and cut into equal "
        "segments (1 = weakest); mean of the seeds, shade from the least to the greatest. The ensemble has trained on "
        "the same training pairs and never on these. A rise on the weakest segments is the learning of wrong labels."
    )
    limits = (-0.02, 1.02)
    first = plots.lines("segments-steps", over, "training step", "accuracy", level=0.5, ylim=limits)
    second = plots.lines("segments-by", by, "segment (1 = weakest)", "accuracy", level=0.5, ylim=limits, marks=True)
    keys = [Key(f"segment {rows[i].segment}", series_style(n)) for n, i in enumerate(picked)]
    steps = [Key(f"step {rows[0].steps[p]:g}", series_style(n)) for n, p in enumerate(points)]
    columns = (
        ("segment", count), ("pairs", count), ("mean strength", decimals(2)), ("labels right", percent),
        *((f"step {rows[0].steps[p]:g}", decimals(3)) for p in points),
    )  # fmt: skip
    cells = [(r.segment, r.n, r.strength_mean, r.right, *(r.mean[p] for p in points)) for r in rows]
    blocks: list[Block] = [
        Figure(title, reading, [Panel("Over training steps", first)], keys, mirrors="App. A"),
        Figure("Accuracy by segment", "The same at three examinations.", [Panel("By segment", second)], steps),
        table("Validation segments", columns, cells),
    ]
    if found.sets:
        series = [Series(c.steps, c.mean, series_style(n), c.low, c.high) for n, c in enumerate(found.sets)]
        svg = plots.lines("segments-sets", series, "training step", "accuracy")
        text = "The same run on whole sets. A peak on the original labels that falls later is the learning of noise."
        marks = [Key(c.set, series_style(n)) for n, c in enumerate(found.sets)]
        blocks.append(
            Figure("Plain training over several passes", text, [Panel("By set", svg)], marks, mirrors="Fig. 8")
        )
    return blocks


def _inflation(rows: Sequence[InflationRow], study: DataStudyFile) -> Block:
    panels = []
    names = list(dict.fromkeys(r.what for r in rows))
    for on in dict.fromkeys(r.on for r in rows):
        series = [Series(r.steps, r.mean, series_style(names.index(r.what)), r.low, r.high) for r in rows if r.on == on]
        panels.append(Panel(f"On {on} pairs", plots.lines(f"inflation-{on}", series, "training step", "reward units")))
    words = {"chosen": "r(chosen)", "rejected": "r(rejected)", "gap": "gap d = r(chosen) - r(rejected)"}
    keys = [Key(words.get(name, name), series_style(n)) for n, name in enumerate(names)]
    reading = (
        "Mean rewards of chosen and rejected responses and their gap, plain training over several passes"
        + (f" of {study.steps_per_pass} steps" if study.steps_per_pass else "")
        + "; mean of the seeds, shade from the least to the greatest. Inflation: both rewards rise while the gap does "
        "not. A gap that grows on training pairs and not on held-out ones is memorising."
    )
    return Figure("Reward inflation", reading, panels, keys, mirrors="Fig. 20")


def _compute(study: DataStudyFile) -> Block:
    columns = (
        ("analysis", None), ("models", count), ("steps each", count), ("pairs a step", count),
        ("passes, least", decimals(1)), ("passes, most", decimals(1)), ("tokens", count), ("time, all cores", duration),
    )  # fmt: skip
    cells = [
        (c.analysis, c.models, c.steps, c.pairs_per_step, c.passes_least, c.passes_most, c.tokens, c.seconds)
        for c in study.compute
    ]
    note = (
        "Within a row every model took the same steps of the same number of pairs. A model that two analyses need is "
        "trained once and stands in both rows."
    )
    return table("Equal compute", columns, cells, note=note)
