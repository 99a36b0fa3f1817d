"""The sections about supervised fine-tuning and reward models, and what every trained stage shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from steelyard.report import plots
from steelyard.report.blocks import (
    Block,
    Figure,
    Panel,
    Samples,
    Section,
    Style,
    arm_keys,
    count,
    decimals,
    interval,
    table,
)
from steelyard.report.plots import Series
from steelyard.report.read import Run, Stage
from steelyard.report.reward_records import AccuracyGroup, RewardFile

Styles = Mapping[str, Style]
_STEP = "training step"
_SETS = ("original", "relabelled", "agreement")
_STAGE_SAMPLES = 6


def sft_section(run: Run, styles: Styles) -> Section | None:
    """Loss of supervised fine-tuning."""
    if not run.sft:
        return None
    metrics = (
        ("train/loss", "Training loss", "nats per token"),
        ("validation/loss", "Validation loss", "nats per token"),
    )
    panels = curves("sft", run.sft, styles, metrics)
    reading = "The validation loss should fall with the training loss and level off; a rise is memorising."
    blocks: list[Block] = [Figure("Loss", reading, panels, arm_keys(styles, run.sft))] if panels else []
    blocks.extend(stage_samples(run.sft))
    return Section("sft", "Supervised fine-tuning", "The policy from which reward models and PPO start.", blocks)


def reward_section(run: Run, styles: Styles) -> Section | None:
    """Accuracy, training dynamics and calibration of the reward models."""
    if not run.rm and run.reward is None:
        return None
    blocks: list[Block] = []
    if run.reward is not None and run.reward.rows:
        blocks.extend(_accuracy(run.reward, styles))
    if run.rm:
        blocks.extend(_reward_curves(run.rm, styles))
    if run.reward is not None:
        blocks.extend(_calibration(run.reward, styles))
    intro = "One reward model for each way of treating the data, all else equal. Compare arms by their intervals."
    if not run.rm:
        intro = "How well each reward model orders the pairs. Compare models by their intervals."
    return Section("reward", "Reward models", intro, blocks)


def curves(
    prefix: str, stages: Mapping[str, Stage], styles: Styles, metrics: Sequence[tuple[str, str, str]]
) -> list[Panel]:
    """One panel for each of `metrics` (key, title, unit) that a stage logged; one line a stage, over its steps."""
    drawn = []
    for key, title, unit in metrics:
        series = [
            Series(*stage.metrics[key], styles[arm])
            for arm, stage in _ordered(stages, styles)
            if key in stage.metrics and np.isfinite(stage.metrics[key][1]).any()
        ]
        if series:
            drawn.append((title, f"{prefix}-{key}", series, unit))
    small = len(drawn) > 2
    return [Panel(t, plots.lines(name, series, _STEP, unit, small=small)) for t, name, series, unit in drawn]


def _ordered(stages: Mapping[str, Stage], styles: Styles) -> list[tuple[str, Stage]]:
    return [(arm, stages[arm]) for arm in styles if arm in stages]


def _accuracy(reward: RewardFile, styles: Styles) -> list[Block]:
    sets = list(dict.fromkeys(r.set for r in reward.rows))
    panels = []
    for name in sets:
        rows = sorted((r for r in reward.rows if r.set == name), key=lambda r: list(styles).index(r.arm))
        series = [
            Series(
                [r.accuracy],
                [i],
                styles[r.arm],
                None if r.low is None else [r.low],
                None if r.high is None else [r.high],
            )
            for i, r in enumerate(rows)
        ]
        svg = plots.dots(f"accuracy-{name}", [r.arm for r in rows], series, "accuracy", small=len(sets) > 2)
        panels.append(Panel(f"Set: {name} ({count(rows[0].n)} pairs)", svg))
    reading = (
        "Share of pairs that each reward model orders as the labels of that set do; the bar is the interval. Where two "
        "bars overlap widely, the data do not tell the arms apart."
    )
    columns = (
        ("set", None),
        ("arm", None),
        ("pairs", count),
        ("accuracy", str),
        ("NLL", decimals(3)),
        ("ECE", decimals(3)),
        ("mean margin", decimals(2)),
        ("mean reward", decimals(2)),
        ("reward std", decimals(2)),
    )
    ordered = sorted(reward.rows, key=lambda r: (sets.index(r.set), list(styles).index(r.arm)))
    cells = [
        (
            r.set,
            r.arm,
            r.n,
            interval(r.accuracy, r.low, r.high),
            r.nll,
            r.ece,
            r.margin_mean,
            r.reward_mean,
            r.reward_std,
        )
        for r in ordered
    ]
    note = "NLL and ECE (expected calibration error): lower is better. Margins and rewards are in reward units."
    return [
        Figure("Accuracy by validation set", reading, panels, mirrors="Fig. 8"),
        table("Reward models by validation set", columns, cells, note=note),
    ]


def _reward_curves(stages: Mapping[str, Stage], styles: Styles) -> list[Block]:
    keys = arm_keys(styles, stages)
    blocks: list[Block] = []
    found = {m[1]: None for s in stages.values() for k in s.metrics if (m := re.match(r"validation/(.+)/accuracy$", k))}
    sets = sorted(found, key=lambda s: (_SETS.index(s) if s in _SETS else len(_SETS), s))
    accuracy = [(f"validation/{s}/accuracy", f"Set: {s}", "accuracy") for s in sets]
    panels = curves("rm", stages, styles, accuracy)
    if panels:
        reading = (
            "Accuracy over training steps. A peak followed by a decline on the original labels is a model that learns "
            "the noise; a denoised arm should stay level."
        )
        blocks.append(Figure("Accuracy while training", reading, panels, keys, mirrors="Fig. 8"))
    losses = [("train/loss", "Training loss", "nats"), ("train/accuracy", "Training accuracy", "accuracy")]
    losses += [("train/contrastive_loss", "Contrastive loss", "nats")]
    losses += [(f"validation/{s}/loss", f"Loss, set: {s}", "nats") for s in sets]
    panels = curves("rm", stages, styles, losses)
    if panels:
        reading = "Training loss that falls far below the validation loss says that labels are being memorised."
        blocks.append(Figure("Loss", reading, panels, keys, mirrors="Fig. 19"))
    inflation = (
        ("train/reward_mean", "Mean reward", "reward units"),
        ("train/margin", "Margin", "reward units"),
        ("train/reward_std", "Standard deviation of rewards", "reward units"),
    )
    panels = curves("rm", stages, styles, inflation)
    if panels:
        reading = (
            "Reward inflation: the mean reward drifts while the margin between chosen and rejected does not "
            "grow with it. Only the margin carries information; normalise rewards before PPO."
        )
        blocks.append(Figure("Reward inflation", reading, panels, keys, mirrors="Fig. 20"))
    return blocks


def _calibration(reward: RewardFile, styles: Styles) -> list[Block]:
    blocks: list[Block] = []
    sets = list(
        dict.fromkeys(
            [r.set for r in reward.rows] + [r.set for r in reward.reliability] + [r.set for r in reward.by_strength]
        )
    )
    reliability, strength = [], []
    small = len(sets) > 2
    for name in sets:
        series = [
            Series([b.confidence for b in bins], [b.accuracy for b in bins], styles[arm])
            for arm in styles
            for r in reward.reliability
            if r.arm == arm
            and r.set == name
            and not reward.temperature  # else the health section shows it, beside the curve after scaling
            and (bins := [b for b in r.bins if b.n and b.confidence is not None and b.accuracy is not None])
        ]
        if series:
            lowest = min(float(np.min(np.array(s.x, dtype=np.float64))) for s in series)
            xlim = (0.48, 1.01) if lowest >= 0.48 else (-0.02, 1.02)
            svg = plots.lines(
                f"reliability-{name}",
                series,
                "confidence",
                "accuracy",
                marks=True,
                diagonal=True,
                xlim=xlim,
                ylim=xlim,
                small=small,
            )
            reliability.append(Panel(f"Set: {name}", svg))
        series = [
            accuracy_line(r.groups, styles[arm])
            for arm in styles
            for r in reward.by_strength
            if r.arm == arm and r.set == name and any(g.accuracy is not None for g in r.groups)
        ]
        if series:
            x = "group mean strength, reward units"
            svg = plots.lines(
                f"strength-{name}", series, x, "accuracy", marks=True, level=0.5, ylim=(-0.02, 1.02), small=small
            )
            strength.append(Panel(f"Set: {name}", svg))
    if reliability:
        reading = (
            "How often the model is right when it claims a probability. Below the dashed line it is over-confident, "
            "above it too timid; a mere change of reward scale moves the line."
        )
        keys = arm_keys(styles, [r.arm for r in reward.reliability])
        blocks.append(Figure("Calibration", reading, reliability, keys))
    if strength:
        reading = (
            "Accuracy on groups of pairs by strength. A model that also agrees with the weakest labels has learned "
            "their mistakes; one that has not falls below one half there."
        )
        keys = arm_keys(styles, [r.arm for r in reward.by_strength])
        blocks.append(Figure("Accuracy by strength", reading, strength, keys))
    return blocks


def accuracy_line(groups: Sequence[AccuracyGroup], style: Style) -> Series:
    """Accuracy over the groups' means, with its intervals as a band where every group has one."""
    held = [g for g in groups if g.n and g.accuracy is not None]
    bounded = all(g.low is not None and g.high is not None for g in held)
    low, high = ([g.low for g in held], [g.high for g in held]) if bounded else (None, None)
    return Series([g.mean for g in held], [g.accuracy for g in held], style, low, high)


def stage_samples(stages: Mapping[str, Stage]) -> list[Block]:
    """The last samples that each stage wrote while it ran."""
    samples: list[dict[str, Any]] = []
    for arm, stage in stages.items():
        for row in stage.samples[-_STAGE_SAMPLES:]:
            numbers = [(k, v) for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)]
            facts = [(k, count(v) if isinstance(v, int) else decimals(2)(v)) for k, v in numbers]
            text, prompt = _plain(row.get("response", "")), _plain(row.get("prompt", ""))
            samples.append({"prompt": prompt, "responses": [{"arm": arm, "style": None, "text": text, "facts": facts}]})
    return [Samples("Samples while training", "The last samples that each stage wrote.", samples)] if samples else []


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
