"""The sections about rounds: one run of them, and the study of several arms and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from steelyard.report import plots
from steelyard.report.blocks import (
    Block,
    Figure,
    Key,
    Panel,
    Section,
    Style,
    arm_keys,
    count,
    decimals,
    interval,
    percent,
    seeds_of,
    series_style,
    table,
)
from steelyard.report.model_sections import curves
from steelyard.report.plots import Series
from steelyard.report.read import Run
from steelyard.report.rounds_records import RoundRow, RoundsFile, RoundsStudyFile
from steelyard.report.seed_sections import difference_figure, seed_curves, seed_rows_table

Styles = Mapping[str, Style]
_REWARDS = {
    "gold": "Gold reward",
    "judge": "Judge's reward (trained on other data)",
    "first": "Proxy: first reward model",
    "current": "Proxy: each round's reward model",
}
_BY_ROUND = _REWARDS | {
    "kl": "KL to the SFT model, nats",
    "ppl_sft": "Perplexity under the SFT model",
    "length": "Response length, tokens",
}
_KEPT = {"best": "The best round", "earliest": "The earliest round that is not told apart from the best (95 %)"}
_STEPS = {
    "ppo/reward_raw": ("Reward, raw", "reward units"),
    "ppo/gold": ("Gold reward", "gold units"),
    "ppo/return": ("Return", "reward units"),
    "ppo/kl_plain": ("KL to the SFT model", "nats per response"),
    "ppo/ppl_sft": ("Perplexity under the SFT model", "perplexity"),
    "ppo/length": ("Response length", "tokens"),
}


def rounds_section(run: Run) -> Section | None:
    """One run of rounds: the examination of each, PPO step by step in each, the reward models, what was kept."""
    found = run.rounds
    if found is None:
        return None
    blocks: list[Block] = [_table(found), *_examination(found), *_steps(run), *_accuracy(found)]
    how = {
        "metarm": "MetaRM on responses of the policy as it was",
        "plain": "trained on plainly, without a look at the policy's responses",
        "fixed": "the same in all rounds",
    }
    intro = (
        f"Round 0 is the SFT model. The reward model: {how.get(found.reward, found.reward)}. The KL is measured from "
        f"the SFT model in every round. {_KEPT[found.criterion.keep]} is chosen by: {found.criterion.why}."
    )
    if found.best is not None:
        gain = interval(found.best.gain.value, found.best.gain.low, found.best.gain.high)
        intro += (
            f" Kept: round {found.best.round}, chosen on half of the prompts; on the other half it is worth {gain} "
            "more than the SFT model."
        )
    return Section("rounds", "Rounds", f"{intro} {found.stopped}".strip(), blocks)


def _table(found: RoundsFile) -> Block:
    columns = [("round", None), *((words, str) for words in _REWARDS.values())]
    numbers = (("KL, nats", decimals(2)), ("PPL under SFT", decimals(2)), ("length, tokens", decimals(1)))
    rows = []
    for r in found.rounds:
        kept = ", kept" if found.best is not None and r.round == found.best.round else ""
        cells: list[Any] = [f"{'0, SFT' if r.round == 0 else r.round}{kept}"]
        for name in _REWARDS:
            value = getattr(r, name)
            bounds = (getattr(r, f"{name}_low"), getattr(r, f"{name}_high"))
            cells.append(None if value is None else interval(value, *bounds))
        rows.append([*cells, r.kl, r.ppl_sft, r.length, r.ended])
    note = "Held-out prompts; intervals over prompts. Each reward model's reward in units of its own std in training."
    return table("Rounds", (*columns, *numbers, ("ended", percent)), rows, note=note)


def _examination(found: RoundsFile) -> list[Block]:
    panels, plain, marked = [], series_style(0), series_style(1)
    best = None if found.best is None else found.best.round
    for name, words in _BY_ROUND.items():
        rows = [r for r in found.rounds if getattr(r, name) is not None]
        if not rows:
            continue
        series = [_line(rows, name, plain)]
        if kept := [r for r in rows if r.round == best]:
            series.append(_line(kept, name, marked))
        panels.append(Panel(words, plots.lines(f"rounds-{name}", series, "round", "value", marks=True, small=True)))
    reading = (
        "The band is the interval over prompts. A proxy that climbs while gold, or the judge, turns down is "
        "over-optimisation: the round before is the one to keep."
    )
    keys = [Key("examined after each round", plain)] + ([Key("kept", marked)] if best is not None else [])
    return [Figure("By round", reading, panels, keys)]


def _line(rows: Sequence[RoundRow], name: str, style: Style) -> Series:
    low, high = ([getattr(r, f"{name}_{end}", None) for r in rows] for end in ("low", "high"))
    banded = len(rows) > 1 and None not in low and None not in high
    values = [getattr(r, name) for r in rows]
    return Series([r.round for r in rows], values, style, low if banded else None, high if banded else None)


def _steps(run: Run) -> list[Block]:
    styles = {name: series_style(i) for i, name in enumerate(run.round_stages)}
    metrics = [(key, words, unit) for key, (words, unit) in _STEPS.items()]
    panels = curves("rounds", run.round_stages, styles, metrics)
    if not panels:
        return []
    reading = (
        "One line a round. Rewards are those of the round's own reward model: compare their course, not their height. "
        "KL and perplexity refer to the SFT model, so a round begins where the one before ended."
    )
    return [Figure("PPO in each round", reading, panels, arm_keys(styles, styles), mirrors="Fig. 17")]


def _accuracy(found: RoundsFile) -> list[Block]:
    styles = {"current": series_style(0), "first": series_style(1)}
    panels = []
    for name in dict.fromkeys(a.set for r in found.rounds for a in r.accuracy):
        series = []
        for model, style in styles.items():
            rows = [(r.round, a) for r in found.rounds for a in r.accuracy if (a.set, a.model) == (name, model)]
            if rows:
                x, y = [n for n, _ in rows], [a.accuracy for _, a in rows]
                low, high = [a.low for _, a in rows], [a.high for _, a in rows]
                banded = None not in low and None not in high
                series.append(Series(x, y, style, low if banded else None, high if banded else None))
        svg = plots.lines(f"rounds-set-{name}", series, "round", "accuracy", marks=True, level=0.5, small=True)
        panels.append(Panel(f"Set: {name}", svg))
    if not panels:
        return []
    reading = (
        "Share of pairs ordered rightly. On the policy's own responses the truth is gold, and the pairs are others in "
        "every round: there the first model shows what shift does to it, the current one what renewing it is worth."
    )
    keys = [Key("each round's reward model", styles["current"]), Key("first reward model", styles["first"])]
    return [Figure("Reward models", reading, panels, keys)]


def _choices(study: RoundsStudyFile) -> list[Block]:
    """What users without gold would keep, by a judge of theirs."""
    if not study.choices:
        return []
    note = (
        "The judge is a reward model trained on other pairs with the same kinds of label noise. Each rule chooses "
        "on half of the held-out prompts; gold is that on the other half. Earliest: the first round that is not told "
        "apart from the best (95 %)."
    )
    runs = list(dict.fromkeys((k.arm, k.seed) for k in study.kept))
    rules = list(dict.fromkeys(k.rule for k in study.kept))
    of = {(k.rule, k.arm, k.seed): k for k in study.kept}
    rows = [
        [rule, *(f"{of[rule, *run].round} ({of[rule, *run].gold:.2f})" for run in runs)]
        for rule in rules
        if not rule.startswith("round ")
    ]
    columns = (("rule", None), *((f"{arm}, seed {seed}", None) for arm, seed in runs))
    control = next(row.arm for row in study.choices if row.difference is None)
    title = "Gold of the round that each rule keeps, mean of the arms"
    return [
        seed_rows_table(title, study.choices, control, of="rule"),
        table("Rounds that each rule keeps (gold)", columns, rows, note=note),
    ]


def rounds_study_section(run: Run, styles: Styles) -> Section | None:
    """Rounds with several kinds of reward models, over seeds."""
    study = run.rounds_study
    if study is None:
        return None
    sets = [name for name in dict.fromkeys(c.metric for c in study.by_round) if name.startswith("accuracy/")]
    words = _BY_ROUND | {name: f"Accuracy: {name.removeprefix('accuracy/')}" for name in sets}
    steps = {key: title for key, (title, _) in _STEPS.items()}
    columns = (
        ("arm", None), ("seed", count), ("round kept", count), ("of", count), ("gain over SFT", decimals(3)),
    )  # fmt: skip
    against = f"Difference to “{study.control}”"
    blocks: list[Block] = [
        *seed_curves(study.by_round, styles, words, "By round", "round"),
        difference_figure(f"{against}: gold", "rounds", study.rows, styles, lambda row: row.set),
        seed_rows_table("Gold reward by round", study.rows, study.control),
        table(
            "What was kept", columns, [(t.arm, t.seed, t.best, t.rounds, t.gain) for t in study.turns],
            note="Chosen by gold on half of the held-out prompts; the gain is that on the other half.",
        ),
        *_choices(study),
        *seed_curves(study.by_step, styles, steps, "PPO over all rounds", "PPO step, all rounds"),
    ]  # fmt: skip
    if study.failed:
        rows = [(f.arm, f.seed, f.error) for f in study.failed]
        note = "Their seeds are left out of all arms above."
        blocks.append(table("Runs that failed", (("arm", None), ("seed", count), ("why", None)), rows, note=note))
    intro = (
        f"Every arm goes through the same rounds from the same SFT model and the same first reward models, "
        f"{seeds_of(study.seeds)}; arms differ in what becomes of the reward model between rounds. Round 0 is the SFT "
        f"model. Differences are to “{study.control}”, on the same prompts and seeds."
    )
    return Section("rounds-study", "Rounds, arm by arm", intro, blocks)
