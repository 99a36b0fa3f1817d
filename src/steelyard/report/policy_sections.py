"""The section about policies: reward against distance, comparisons, training curves and samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from steelyard.report import plots
from steelyard.report.blocks import (
    Block,
    Figure,
    Panel,
    Samples,
    Section,
    WinBars,
    arm_keys,
    count,
    decimals,
    interval,
    percent,
    table,
)
from steelyard.report.model_sections import Styles, curves, stage_samples
from steelyard.report.plots import Series
from steelyard.report.read import Run
from steelyard.report.records import DifficultyPoint, PolicyFile, Win

_SAMPLES = 12

_PPO_PANELS = (
    ("ppo/reward_raw", "Reward, raw", "reward units"),
    ("ppo/reward_shaped", "Reward, shaped", "reward units"),
    ("ppo/gold", "Gold reward", "gold units"),
    ("ppo/return", "Return", "reward units"),
    ("ppo/kl", "KL to the starting policy", "nats per response"),
    ("ppo/ppl_sft", "Perplexity under the SFT model", "perplexity"),
    ("ppo/length", "Response length", "tokens"),
    ("ppo/ended", "Responses that ended", "share"),
    ("ppo/entropy", "Entropy", "nats per token"),
    ("ppo/clip_fraction", "Clip fraction", "share of tokens"),
    ("ppo/value_loss", "Value loss", "squared reward"),
    ("ppo/policy_loss", "Policy loss", "loss"),
    ("ppo/explained_variance", "Explained variance", "share"),
    ("ppo/reward_std", "Reward, standard deviation", "reward units"),
    ("ppo/advantage_std", "Advantage, standard deviation", "reward units"),
    ("ppo/scale", "Scale of the contrastive reward", "factor"),
    ("ppo/kl_coef", "KL coefficient", "coefficient"),
)

_DPO_PANELS = (
    ("dpo/loss", "Training loss", "nats per pair"),
    ("dpo/accuracy", "Accuracy on training pairs", "share"),
    ("dpo/margin", "Implied margin", "reward units"),
    ("dpo/reward_chosen", "Implied reward, chosen", "reward units"),
    ("dpo/reward_rejected", "Implied reward, rejected", "reward units"),
    ("dpo/logprob_chosen", "Log-likelihood, chosen", "nats per response"),
    ("dpo/logprob_rejected", "Log-likelihood, rejected", "nats per response"),
    ("dpo/kl", "KL to the reference", "nats per response"),
    ("dpo/reward_raw", "Reward of answers, raw", "reward units"),
    ("dpo/gold", "Gold reward of answers", "gold units"),
    ("dpo/length", "Length of answers", "tokens"),
    ("dpo/ended", "Answers that ended", "share"),
)


def policy_section(run: Run, styles: Styles) -> Section | None:
    """Policies: reward against distance, comparisons, training curves, samples."""
    if not run.ppo and not run.dpo and run.policy is None and run.judged is None:
        return None
    blocks: list[Block] = []
    policy = run.policy
    if policy is not None:
        blocks.extend(_arms(policy))
        blocks.extend(_frontier(policy, styles))
    wins = [*(policy.wins if policy else []), *(run.judged.wins if run.judged else [])]
    blocks.extend(_wins(wins))
    blocks.extend(_judges(wins))
    if policy is not None:
        blocks.extend(_difficulty(policy, styles))
    blocks.extend(_dpo(run, styles))
    panels = curves("ppo", run.ppo, styles, _PPO_PANELS)
    if panels:
        reading = (
            "One line an arm. A healthy run has KL that grows steadily, flat perplexity and length, and explained "
            "variance near one; raw reward that climbs while gold does not is over-optimisation."
        )
        keys = arm_keys(styles, run.ppo)
        blocks.append(Figure("PPO, step by step", reading, panels, keys, mirrors="Fig. 9"))
    if policy is not None and policy.samples:
        blocks.append(_samples(policy, styles))
    else:
        blocks.extend(stage_samples({**run.ppo, **run.dpo}))
    intro = (
        "Policies trained by PPO against the reward models, or by DPO straight on the pairs. Proxy is the reward that "
        "PPO optimised; gold, where it is known, is the reward that was meant."
    )
    return Section("policy", "Policy", intro, blocks)


def _arms(policy: PolicyFile) -> list[Block]:
    if not policy.arms:
        return []
    columns = (
        ("arm", None),
        ("gold", str),
        ("proxy", str),
        ("KL, nats", decimals(2)),
        ("length, tokens", decimals(1)),
        ("ended", percent),
    )
    rows = [
        (
            a.arm,
            None if a.gold is None else interval(a.gold, a.gold_low, a.gold_high),
            None if a.proxy is None else interval(a.proxy, a.proxy_low, a.proxy_high),
            a.kl,
            a.length,
            a.ended,
        )
        for a in policy.arms
    ]
    note = "Rewards with their intervals. Proxies of different reward models have different scales: compare gold."
    return [table("Policies", columns, rows, note=note)]


def _frontier(policy: PolicyFile, styles: Styles) -> list[Block]:
    panels = []
    for key, title in (("gold", "Gold reward"), ("proxy", "Proxy reward")):
        series = []
        for arm, style in styles.items():
            points = [p for p in policy.frontier if p.arm == arm and getattr(p, key) is not None]
            points.sort(key=lambda p: (p.step is None, p.step or 0))
            if points:
                x = np.sqrt(np.maximum([p.kl for p in points], 0.0))
                series.append(Series(x, [getattr(p, key) for p in points], style))
        if series:
            svg = plots.lines(f"frontier-{key}", series, "√KL to the starting policy, √nats", "reward", marks=True)
            panels.append(Panel(title, svg))
    if not panels:
        return []
    reading = (
        "Reward against the distance that the policy has moved. Where proxy still rises and gold turns down, "
        "the policy exploits the reward model; the higher gold line is the better use of the same distance."
    )
    keys = arm_keys(styles, [p.arm for p in policy.frontier])
    return [Figure("Gold against proxy", reading, panels, keys)]


def _wins(wins: Sequence[Win]) -> list[Block]:
    rows = []
    for w in wins:
        total = w.win + w.tie + w.lose
        shares = [100 * part / total if total else 0.0 for part in (w.win, w.tie, w.lose)]
        verdict = ""
        if w.low is not None and w.high is not None:
            verdict = f"{w.a} better" if w.low > 0.5 else f"{w.b} better" if w.high < 0.5 else "no clear difference"
        rows.append(
            {
                "a": w.a,
                "b": w.b,
                "judge": w.judge,
                "n": count(w.n),
                "parts": [
                    {"kind": kind, "width": f"{share:.2f}", "text": decimals(0)(share) if share >= 5 else "",
                     "title": f"{kind} {decimals(1)(share)} %"}
                    for kind, share in zip(("win", "tie", "lose"), shares, strict=True)
                ],
                "score": interval(w.score, w.low, w.high) if w.score is not None else "",
                "verdict": verdict,
            }
        )  # fmt: skip
    if not rows:
        return []
    reading = (
        "Per cent of answers to the same prompts with which the first policy wins, ties or loses. The score counts a "
        "tie as one half, with its interval: only an interval clear of 0.5 tells the two apart."
    )
    return [WinBars("Head to head", reading, rows, mirrors="Fig. 10")]


def _judges(wins: Sequence[Win]) -> list[Block]:
    """How far the judge models can be trusted; reward models and gold scorers have no order to be swayed by."""
    asked = [w for w in wins if w.replies is not None]
    if not asked:
        return []
    columns = (
        ("judge", None),
        ("policy", None),
        ("against", None),
        ("same verdict in both orders", percent),
        ("first answer wins", percent),
        ("replies", count),
        ("unreadable", count),
        ("refused", count),
        ("left out", count),
    )
    rows = [
        (w.judge, w.a, w.b, w.consistency, w.first_share, w.replies, w.unreadable, w.refused, w.without_verdict)
        for w in asked
    ]
    note = (
        "Each comparison is asked in both orders; verdicts that disagree are ties. Without a bias the answer that "
        "stands first wins half of the replies that name a winner. Without two readable verdicts it is left out."
    )
    return [table("Judge models", columns, rows, note=note)]


def _dpo(run: Run, styles: Styles) -> list[Block]:
    panels = curves("dpo", run.dpo, styles, _DPO_PANELS)
    if not panels:
        return []
    reading = (
        "One line an arm. The margin should grow while the likelihood of chosen responses holds; where both "
        "likelihoods fall far, the policy moves to responses that nobody compared. KL, reward and length are of its "
        "own answers."
    )
    return [Figure("DPO, step by step", reading, panels, arm_keys(styles, run.dpo))]


def _difficulty(policy: PolicyFile, styles: Styles) -> list[Block]:
    points = sorted(policy.difficulty, key=lambda d: -math.inf if d.low is None else d.low)
    strata = list(dict.fromkeys(str(d.stratum) for d in points))
    panels = []
    for key, title in (("gold", "Gold reward"), ("proxy", "Proxy reward")):
        series = []
        for arm, style in styles.items():
            held = [d for d in policy.difficulty if d.arm == arm and getattr(d, key) is not None]
            if held:
                y = [strata.index(str(d.stratum)) for d in held]
                series.append(Series([getattr(d, key) for d in held], y, style, *_ends(held, key)))
        if series:
            labels = [_stratum(policy, s) for s in strata]
            panels.append(Panel(title, plots.dots(f"difficulty-{key}", labels, series, "reward", spread=True)))
    if not panels:
        return []
    reading = (
        "Mean reward on prompts grouped by the reward of other answers of the SFT model, hardest first (in brackets: "
        "from … to); 95 % intervals over prompts. Contrastive rewards are meant to help most where it is poor."
    )
    keys = arm_keys(styles, [d.arm for d in policy.difficulty])
    return [Figure("By difficulty of the prompt", reading, panels, keys)]


def _ends(held: list[DifficultyPoint], key: str) -> tuple[list[float], list[float]] | tuple[None, None]:
    """The ends of the intervals; none where one is missing."""
    ends = [(getattr(d, f"{key}_low"), getattr(d, f"{key}_high")) for d in held]
    if any(None in pair for pair in ends):
        return None, None
    return [low for low, _ in ends], [high for _, high in ends]


def _stratum(policy: PolicyFile, name: str) -> str:
    first = next(d for d in policy.difficulty if str(d.stratum) == name)
    write = decimals(1)
    bounds = f" ({write(first.low)} … {write(first.high)})" if first.low is not None and first.high is not None else ""
    return f"{name}{bounds}"


def _samples(policy: PolicyFile, styles: Styles) -> Samples:
    samples = []
    for sample in policy.samples[:_SAMPLES]:
        arms = [arm for arm in styles if arm in sample.responses]
        responses = [
            {
                "arm": arm,
                "style": styles[arm],
                "text": sample.responses[arm].text,
                "facts": [
                    (label, decimals(2)(value))
                    for label, value in (("gold", sample.responses[arm].gold), ("proxy", sample.responses[arm].proxy))
                    if value is not None
                ],
            }
            for arm in arms
        ]
        samples.append({"prompt": sample.prompt, "responses": responses})
    reading = (
        "The same prompts answered by each policy. Look for what the reward paid for: length, phrases, repetition."
    )
    return Samples("Samples side by side", reading, samples)
