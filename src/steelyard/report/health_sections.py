"""The sections about a reward model's health (calibration, length, scale) and its benchmarks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from steelyard.report import plots
from steelyard.report.blocks import (
    MISSING,
    Block,
    Figure,
    Panel,
    Section,
    Style,
    arm_keys,
    count,
    decimals,
    interval,
    percent,
    table,
)
from steelyard.report.model_sections import accuracy_line
from steelyard.report.plots import Series
from steelyard.report.read import Run
from steelyard.report.reward_records import (
    BenchmarkResult,
    BenchmarkScore,
    Estimate,
    ReliabilityBin,
    RewardFile,
)

Styles = Mapping[str, Style]
_FEW_PROMPTS = 30
_FEW_PAIRS = 5
_MEASURES: tuple[tuple[str, str], ...] = (
    ("spearman", "all responses, Spearman"),
    ("pearson", "all responses, Pearson"),
    ("pair_spearman", "within pairs, Spearman"),
    ("pair_pearson", "within pairs, Pearson"),
)
_RM_STYLES = ("concise", "detailed", "Markdown")


def health_section(run: Run, styles: Styles) -> Section | None:
    """Temperature, length, scale. Only where the examination measured them."""
    reward = run.reward
    if reward is None or not (reward.temperature or reward.by_length or reward.length or reward.scale):
        return None
    blocks = [*_temperature(reward, styles), *_by_length(reward, styles), *_length(reward, styles)]
    blocks += _scale(reward, styles)
    return Section("health", "Health of the reward models", _intro(reward), blocks)


def _intro(reward: RewardFile) -> str:
    text = "What accuracy does not tell: whether claimed chances hold, what length does to the reward, and its scale."
    few = [(r.prompts, r.unit) for r in reward.rows if r.prompts is not None and r.prompts < _FEW_PROMPTS]
    if few:
        fewest, unit = min(few)
        text += f" With only {fewest} different prompts"
        if unit == "prompts":
            text += " to resample, the intervals are themselves very uncertain."
        else:
            text += f", the bootstrap draws {unit}: the intervals say nothing of other prompts."
    left_out = dict.fromkeys(f"{r.set}: {r.left_out}" for r in reward.rows if r.left_out)
    return text + (f" Not examined in full: {'; '.join(left_out)}." if left_out else "")


def _sets(records: Sequence[Any]) -> list[str]:
    return list(dict.fromkeys(r.set for r in records))


def _ordered(records: Sequence[Any], styles: Styles) -> list[Any]:
    sets, arms = _sets(records), list(styles)
    return sorted(records, key=lambda r: (sets.index(r.set), arms.index(r.arm)))


def _written(value: Estimate, places: int = 3) -> str | None:
    return None if value[0] is None else interval(*value, places=places)


# ---- calibration ---------------------------------------------------------------------------------------------------


def _temperature(reward: RewardFile, styles: Styles) -> list[Block]:
    if not reward.temperature:
        return []
    reading = (
        "How often the model is right when it claims a probability. Below the dashed line it is over-confident, above "
        "it too timid. Right: rewards divided by a temperature T that was fitted on the other half of the prompts, so "
        "no pair is judged by a T that saw it. What one number cannot mend stays visible there. "
        f"Points of fewer than {_FEW_PAIRS} pairs are left out."
    )
    keys = arm_keys(styles, [r.arm for r in reward.temperature])
    blocks: list[Block] = []
    for name in _sets(reward.temperature):
        panels = _calibration(reward, styles, name)
        if panels:
            title = f"Calibration before and after a fitted temperature, set {name}"
            blocks.append(Figure(title, reading if not blocks else "Read as above.", panels, keys))
    columns = (
        ("set", None),
        ("arm", None),
        ("T", decimals(2)),
        ("NLL before", decimals(3)),
        ("NLL after", decimals(3)),
        ("gain", str),
        ("ECE before (by chance)", str),
        ("ECE after (by chance)", str),
    )
    ordered = _ordered(reward.temperature, styles)
    rows = [
        (
            *(r.set, r.arm, r.temperature, r.nll[0], r.nll_scaled[0], _written(r.nll_gain)),
            *(_chances(r.ece, r.ece_floor), _chances(r.ece_scaled, r.ece_scaled_floor)),
        )
        for r in ordered
    ]
    reasons = dict.fromkeys(f"{r.arm} on {r.set}: {r.reason}" for r in ordered if r.reason)
    note = (
        "T above 1: the model claims too much; below 1: too little. It is fitted on all pairs, to be used elsewhere; "
        "before and after are judged on the half that did not fit it. Gain: NLL saved; an interval above zero says "
        "that T helps. By chance: the ECE of a perfectly calibrated model with these claims on as many pairs."
    ) + (f" No temperature: {'; '.join(reasons)}." if reasons else "")
    return [*blocks, table("Fitted temperature", columns, rows, note=note)]


def _calibration(reward: RewardFile, styles: Styles, name: str) -> list[Panel]:
    """Reliability on one set as it is and with the temperature."""
    before = {r.arm: r.bins for r in reward.reliability if r.set == name}
    after = {r.arm: r.bins_scaled for r in reward.temperature if r.set == name}
    panels = []
    for label, bins in (("as it is", before), ("with temperature", after)):
        drawn = [
            Series([b.confidence for b in held], [b.accuracy for b in held], styles[arm])
            for arm in styles
            if (held := _held(bins.get(arm, [])))
        ]
        if drawn:
            lowest = min(y for one in drawn for y in one.y if y is not None)
            limits = (min(0.28, lowest - 0.02), 1.02)
            svg = plots.lines(
                f"calibration-{label}-{name}", drawn, "confidence", "accuracy", marks=True, diagonal=True,
                xlim=(0.48, 1.01), ylim=limits,
            )  # fmt: skip
            panels.append(Panel(label.capitalize(), svg))
    return panels


def _held(bins: Sequence[ReliabilityBin]) -> list[ReliabilityBin]:
    return [b for b in bins if b.n >= _FEW_PAIRS and b.confidence is not None and b.accuracy is not None]


def _chances(ece: float | None, floor: float | None) -> str | None:
    return None if ece is None else f"{decimals(3)(ece)} ({decimals(3)(floor)})"


# ---- length --------------------------------------------------------------------------------------------------------


def _by_length(reward: RewardFile, styles: Styles) -> list[Block]:
    if not reward.by_length:
        return []
    sets = _sets(reward.by_length)
    panels = []
    for name in sets:
        drawn = [
            accuracy_line(r.groups, styles[arm])
            for arm in styles
            for r in reward.by_length
            if r.arm == arm and r.set == name and any(g.accuracy is not None for g in r.groups)
        ]
        if drawn:
            svg = plots.lines(
                f"by-length-{name}", drawn, "chosen minus rejected, tokens", "accuracy", marks=True, level=0.5,
                ylim=(-0.02, 1.02), small=len(sets) > 2,
            )  # fmt: skip
            panels.append(Panel(f"Set: {name}", svg))
    reading = (
        "Accuracy on groups of pairs by how much longer the chosen response is. Level: length plays no part. A line "
        "that climbs from left to right is a model that goes by length: right where the longer response was chosen, "
        "wrong where the shorter one was."
    )
    sides = list(dict.fromkeys(s.side for r in reward.by_length for s in r.sides))
    found = {(r.arm, r.set): r for r in reward.length}
    columns: list[tuple[str, Callable[[Any], str] | None]] = [("set", None), ("arm", None)]
    columns += [(side, str) for side in sides]
    columns += [("longer wins", str), ("prefers longer", str)]
    rows = []
    for r in _ordered(reward.by_length, styles):
        held = {s.side: s for s in r.sides}
        cells = [interval(s.accuracy, s.low, s.high, 2) if (s := held.get(side)) and s.n else None for side in sides]
        bias = found.get((r.arm, r.set))
        prefers = None if bias is None else _written(bias.prefers_longer, 2)
        rows.append((r.set, r.arm, *cells, _written(r.longer_is_right, 2), prefers))
    note = (
        "Accuracy where the chosen response is longer, shorter, or within a tenth as long. Longer wins: accuracy of a "
        "rule that always prefers the longer response; a model below it has learned less than that. Prefers longer: "
        "share of pairs in which the model gives the longer response more, whatever the label."
    )
    counts = {r.set: ", ".join(f"{count(s.n)} {s.side}" for s in r.sides) for r in reward.by_length if r.sides}
    note += "".join(f" Pairs of {name}: {said}." for name, said in counts.items())
    keys = arm_keys(styles, [r.arm for r in reward.by_length])
    figure: list[Block] = [Figure("Accuracy by length difference", reading, panels, keys)] if panels else []
    return [*figure, table("Accuracy by which response is longer", columns, rows, note=note)]


def _length(reward: RewardFile, styles: Styles) -> list[Block]:
    panels = []
    sets = _sets(reward.length)
    for name in sets:
        drawn = []
        for arm in styles:
            for r in reward.length:
                held = [(i, getattr(r, key)) for i, (key, _) in enumerate(_MEASURES)]
                held = [(i, e) for i, e in held if e[0] is not None]
                if r.arm == arm and r.set == name and held:
                    low = [e[0] if e[1] is None else e[1] for _, e in held]
                    high = [e[0] if e[2] is None else e[2] for _, e in held]
                    drawn.append(Series([e[0] for _, e in held], [i for i, _ in held], styles[arm], low, high))
        if drawn:
            rows = [label for _, label in _MEASURES]
            svg = plots.dots(
                f"length-{name}", rows, drawn, "correlation of reward and length", level=0.0, spread=len(drawn) > 1,
            )  # fmt: skip
            panels.append(Panel(f"Set: {name}", svg))
    if not panels:
        return []
    reading = (
        "Zero: the reward does not know the length. Over all responses, easy prompts with long answers count too; "
        "within pairs only what the model makes of the longer of two responses to one prompt. The labels play no part: "
        "where people do prefer longer responses, a good model correlates as well. Spearman: ranks; Pearson: values."
    )
    return [Figure("Reward and length", reading, panels, arm_keys(styles, [r.arm for r in reward.length]))]


# ---- scale ---------------------------------------------------------------------------------------------------------


def _scale(reward: RewardFile, styles: Styles) -> list[Block]:
    if not reward.scale:
        return []
    ordered = _ordered(reward.scale, styles)
    shares = sorted({q for r in ordered for q in r.percentiles}, key=float)
    columns: list[tuple[str, Callable[[Any], str] | None]] = [
        ("set", None), ("arm", None), ("mean", str), ("std", decimals(2)), ("above 0", percent),
        ("std per prompt", decimals(2)),
        ("between prompts", percent), ("skew", decimals(2)), ("recorded", str), ("drift", decimals(2)),
        ("stretch", decimals(2)),
    ]  # fmt: skip
    rows = [
        (
            *(r.set, r.arm, _written(r.mean, 2), r.std[0], r.positive[0], r.prompt_std),
            *(r.between, r.skew, _pair(r.normal), r.drift, r.stretch),
        )
        for r in ordered
    ]
    note = (
        "Over all responses, in reward units. Above 0: share of positive rewards. Between prompts: share of the "
        "variance that says which prompt it was, not which response is better. Recorded: mean and std that the "
        "checkpoint stored of its training pairs, by which PPO normalises. Drift: how far this file's mean lies from "
        "it, in recorded stds; stretch: this file's std over the recorded one. 0 and 1 mean that the recorded scale "
        "holds here."
    )
    found: list[Block] = [table("Scale and centring of the rewards", columns, rows, note=note)]
    if shares:
        heads: list[tuple[str, Callable[[Any], str] | None]] = [("set", None), ("arm", None)]
        heads += [(f"{q} %", decimals(2)) for q in shares]
        cells = [(r.set, r.arm, *(r.percentiles.get(q) for q in shares)) for r in ordered]
        text = "Rewards at these percentiles: a long tail on one side is where a policy will go."
        found.append(table("Percentiles of the rewards", heads, cells, note=text))
    return found


def _pair(normal: tuple[float, float] | None) -> str | None:
    return None if normal is None else f"{decimals(2)(normal[0])} ± {decimals(2)(normal[1])}"


# ---- benchmarks ----------------------------------------------------------------------------------------------------


def benchmark_section(run: Run, styles: Styles) -> Section | None:
    """RewardBench 1 and 2, RM-Bench."""
    if run.benchmarks is None or not run.benchmarks.results:
        return None
    blocks: list[Block] = []
    for name in dict.fromkeys(r.benchmark for r in run.benchmarks.results):
        held = [r for arm in styles for r in run.benchmarks.results if r.benchmark == name and r.arm == arm]
        blocks.extend(_benchmark(name, held, styles))
    intro = (
        "Public benchmarks, scored by their published rules from local files. An average that lacks a subset is not "
        "given; what there is stands in brackets. Intervals by prompt."
    )
    return Section("benchmarks", "Benchmarks", intro, blocks)


def _benchmark(name: str, results: Sequence[BenchmarkResult], styles: Styles) -> list[Block]:
    scores = {r.arm: {s.name: s for s in [r.overall, *r.parts]} for r in results}
    names = list(dict.fromkeys(n for held in scores.values() for n in held))
    shown = {
        arm: [(i, s.present) for i, n in enumerate(names) if (s := held.get(n)) and s.present[0] is not None]
        for arm, held in scores.items()
    }
    drawn = [
        Series(
            [e[0] for _, e in held],
            [i for i, _ in held],
            styles[arm],
            [e[0] if e[1] is None else e[1] for _, e in held],
            [e[0] if e[2] is None else e[2] for _, e in held],
        )
        for arm, held in shown.items()
        if held
    ]
    blocks: list[Block] = []
    lacking = {n for held in scores.values() for n, s in held.items() if s.missing}
    if drawn:
        empty = {n for n in names if not any(n == names[i] for held in shown.values() for i, _ in held)}
        rows = [f"{n} (missing)" if n in empty else f"{n} (in part)" if n in lacking else n for n in names]
        svg = plots.dots(f"benchmark-{name}", rows, drawn, "score", level=_chance(name), spread=len(drawn) > 1)
        reading = f"Score by part; dashed: {_CHANCE[name]}." if name in _CHANCE else "Score by part."
        panel = Panel(f"{name}, {'complete' if not lacking else 'in part'}", svg)
        blocks.append(Figure(name, reading, [panel], arm_keys(styles, shown)))
    missing = list(dict.fromkeys(m for r in results for m in r.overall.missing))
    notes = list(dict.fromkeys(note for r in results for note in r.notes))
    note = " ".join([f"Missing: {', '.join(missing)}." if missing else "", *notes]).strip()
    columns: list[tuple[str, Callable[[Any], str] | None]] = [("part", None), *((arm, str) for arm in scores)]
    cells = [(n, *(_score(held.get(n)) for held in scores.values())) for n in names]
    blocks.append(table(f"{name}: scores", columns, cells, note=note))
    details: dict[tuple[str, str, int | None], dict[str, str | None]] = {
        (d.part, d.name, d.n): {} for r in results for d in r.details
    }
    for r in results:
        for d in r.details:
            details[d.part, d.name, d.n][r.arm] = _score(d)
    if details:
        heads: list[tuple[str, Callable[[Any], str] | None]] = [("part", None), ("subset", None), ("rows", count)]
        heads += [(arm, str) for arm in scores]
        rows_shown = [(*key, *(held.get(arm) for arm in scores)) for key, held in details.items()]
        blocks.append(table(f"{name}: in detail", heads, rows_shown))
    return blocks + [_matrix(r) for r in results if r.matrix is not None]


_CHANCE = {
    "RewardBench": "chance, one half",
    "RewardBench 2": "chance, one quarter, outside Ties",
    "RM-Bench": "chance, one half",
}


def _chance(name: str) -> float | None:
    return {"RewardBench": 0.5, "RewardBench 2": 0.25, "RM-Bench": 0.5}.get(name)


def _score(score: BenchmarkScore | None) -> str | None:
    if score is None:
        return None
    if score.score is not None:
        return _written(score.score)
    return MISSING if score.present[0] is None else f"({_written(score.present)})"


def _matrix(result: BenchmarkResult) -> Block:
    columns: list[tuple[str, Callable[[Any], str] | None]] = [("right response", None)]
    columns += [(f"wrong one {style}", decimals(3)) for style in _RM_STYLES]
    rows = [(style, *row) for style, row in zip(_RM_STYLES, result.matrix or [], strict=False)]
    note = (
        "Share of rows in which the right response of a style gets more than the wrong one of another, mean over the "
        "domains. Above the diagonal (hard) the wrong response is the fancier one: low there and high below means "
        "that style decides."
    )
    return table(f"RM-Bench: right against wrong by style, {result.arm}", columns, rows, note=note)
