"""Of a policy study: variances, critics, correlations and the flip-rate identity, measured beside what is predicted."""

from __future__ import annotations

from steelyard.report import plots
from steelyard.report.blocks import Block, Figure, Panel, arm_keys, arm_styles, count, decimals, interval, table
from steelyard.report.plots import Series
from steelyard.report.policy_study_records import PolicyStudyFile
from steelyard.report.study_records import Difference

_CELL = (("labels", None), ("repair", None), ("arm", None), ("KL weight", None))
_WATCHED = (
    ("ppo/explained_variance", "Explained variance of the critic", "share"),
    ("ppo/value_loss", "Value loss", "squared reward"),
    ("ppo/advantage_std", "Advantage, standard deviation", "reward as paid"),
)


def theory_blocks(study: PolicyStudyFile) -> list[Block]:
    """What contrastive rewards should do, and what they did."""
    return [*_variances(study), *_speeds(study), *_curves(study), *_correlations(study), *_flips(study)]


def _text(d: Difference | None) -> str | None:
    return None if d is None else interval(d.value, d.low, d.high)


def _intervals(study: PolicyStudyFile) -> str:
    """Of one number a seed."""
    return "intervals over seeds" if len(study.seeds) > 1 else "one seed, so without intervals"


def _variances(study: PolicyStudyFile) -> list[Block]:
    rows = [
        (v.world, v.repair, v.policy, "plain" if v.k == 0 else f"{'shrunk' if v.shrunk else 'contrastive'}, k = {v.k}",
         _text(v.measured), _text(v.predicted))
        for v in study.variances
    ]  # fmt: skip
    columns = (
        ("labels", None), ("repair", None), ("answers of", None), ("reward", None), ("variance", str),
        ("predicted", str),
    )  # fmt: skip
    note = (
        "Of rewards on held-out prompts, in units of the reward model's normalised score, unscaled; "
        f"{_intervals(study)}. Predicted for the SFT model from an independent draw: tau² + s² plain, s² (1 + 1/k) "
        "contrastive, with tau² between prompts and s² within. Where s² / k exceeds tau², contrastive rewards vary "
        "more. Shrunk: less their mean, drawn to that of all prompts by its reliability w = tau² / (tau² + s² / k): "
        "s² (1 + w / k)"
    )
    return [table("Variance of the reward, and what is predicted", columns, rows, note=note)] if rows else []


def _speeds(study: PolicyStudyFile) -> list[Block]:
    columns = (
        *_CELL, ("advantage std, first quarter", str), ("advantage std, last", str),
        ("explained variance, first quarter", str), ("explained variance, last", str),
    )  # fmt: skip
    rows = [
        (s.world, s.repair, s.arm, s.weight, _text(s.advantage_first), _text(s.advantage_last),
         _text(s.explained_first), _text(s.explained_last))
        for s in study.speeds
    ]  # fmt: skip
    note = (
        f"Means over a quarter of the steps; {_intervals(study)}. The advantage before whitening, over tokens, in "
        "units of the reward before it was scaled (PAR and LSC: of the transformed reward). The critic starts as the "
        "reward model, which knows the level of a prompt but not its contrast."
    )
    return [table("Advantage and critic", columns, rows, note=note)] if rows else []


def _curves(study: PolicyStudyFile) -> list[Block]:
    """One figure for each noise level: plain labels, the study's own KL weight."""
    blocks: list[Block] = []
    styles = arm_styles(p.arm for p in study.frontier)
    shown = [c for c in study.curves if c.repair == "none" and c.kl_coef == study.kl_coef]
    for world in dict.fromkeys(c.world for c in shown):
        panels = []
        for metric, title, unit in _WATCHED:
            series = [
                Series(c.steps, c.mean, styles[c.arm], c.low, c.high)
                for c in shown
                if (c.world, c.metric) == (world, metric)
            ]
            if series:
                name = f"critic-{world}-{metric}"
                panels.append(Panel(title, plots.lines(name, series, "step", unit, small=True)))
        reading = (
            "Mean of the seeds; the band reaches from the least to the greatest. Arms without a critic lack two panels."
        )
        keys = arm_keys(styles, {c.arm for c in shown if c.world == world})
        blocks.append(Figure(f"Critic and advantage while training: {world}", reading, panels, keys))
    return blocks


def _correlations(study: PolicyStudyFile) -> list[Block]:
    rows = [(c.world, c.repair, c.arm, c.weight if c.arm != "SFT" else "", _text(c.scores), _text(c.errors))
            for c in study.correlations]  # fmt: skip
    columns = (*_CELL, ("scores", str), ("errors", str))
    note = (
        "Correlation between the reward model's scores of a policy's answer and of a baseline answer to the same "
        "prompt; of errors: what a straight line on gold leaves of both. The analysis of contrastive rewards assumes "
        "independence given the truth, which would be 0 for the errors. An error that both share is removed by the "
        "subtraction."
    )
    return [table("Scores of current and baseline answers", columns, rows, note=note)] if rows else []


def _flips(study: PolicyStudyFile) -> list[Block]:
    if not study.flips:
        return []
    columns = (
        ("c0", decimals(2)), ("c1", decimals(2)), ("E r", decimals(3)), ("E (r - r base), predicted", decimals(4)),
        ("simulated", decimals(4)), ("standard error", decimals(4)),
    )  # fmt: skip
    rows = [(f.c0, f.c1, f.plain, f.predicted, f.simulated, f.error) for f in study.flips]
    first = study.flips[0]
    note = (
        f"Binary rewards with flips, {count(first.draws)} draws, k = {first.k}; the policy is right in "
        f"{first.policy:g}, baselines in {first.baseline:g} of the cases. Identity: (1 - c0 - c1) times their "
        "difference; the bias c0 is gone."
    )
    return [table("The flip-rate identity, simulated", columns, rows, note=note)]
