"""Repairing noisy preferences (Secrets of RLHF II, arXiv 2401.06080, sections 2.4 and 2.5).

Each step takes preferences with their strengths and returns both, changed: they compose in any order.
`repair` runs a named recipe of steps and says, pair by pair, what it changed and on what evidence.

Four recipes are the paper's (flip, margin, flip+margin, soft+margin); the others are the baselines that an
honest comparison needs. Which one wins depends on the data: measure, do not believe.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field, model_validator

from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.types import Preference, Strength

Recipe = Literal[
    "keep",
    "flip",
    "margin",
    "flip+margin",
    "soft+margin",
    "drop",
    "soft targets",
    "random flip",
    "oracle flip",
]
Preferences = Sequence[Preference]
Strengths = Sequence[Strength | None]
Repaired = tuple[list[Preference], list[Strength | None]]
Step = Callable[[Preferences, Strengths], Repaired]

RECIPES: dict[Recipe, tuple[str, ...]] = {
    "keep": (),
    "flip": ("flip",),
    "margin": ("margin",),
    "flip+margin": ("flip", "margin"),
    "soft+margin": ("soften", "margin"),
    "drop": ("drop",),
    "soft targets": ("soft targets",),
    "random flip": ("random flip",),
    "oracle flip": ("oracle flip",),
}
"""The steps of each recipe, in order."""

_READS: dict[str, set[str]] = {
    "flip": {"q", "shuffle"},
    "margin": {"margin_scale", "margin_cap", "negative_margins", "shuffle"},
    "soften": {"alpha", "soft_below", "margin_in_flip", "shuffle"},
    "drop": {"q", "shuffle"},
    "soft targets": {"shuffle"},
    "random flip": {"q", "seed"},
    "oracle flip": set(),
}


class RepairOptions(Config):
    """A recipe and its options. What the papers leave open is an option here, with its default explained.

    An option that the recipe does not read is refused by name if it is set. (If *all* are set, as in a saved
    configuration read back, those at their defaults pass.)
    """

    recipe: Recipe = Field(default="keep", description="what to do with the pairs the ensemble doubts")
    q: float = Field(default=0.1, ge=0, le=1, description="flip or drop this share of the pairs, the weakest first")
    alpha: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="chance that a softened label is wrong; None: each pair's own p_flip (unknown in print)",
    )
    soft_below: float = Field(
        default=0.0, description="soften pairs whose mean margin is below this, in units of reward (print: 0)"
    )
    margin_scale: float = Field(default=1.0, gt=0, description="margin = scale * mean margin (print: 1)")
    margin_cap: float = Field(
        default=2.0,
        gt=0,
        description="bound on the size of a margin, in units of reward (print: none; its authors advise a small range)",
    )
    negative_margins: Literal["keep", "zero"] = Field(
        default="keep",
        description="the margin of a pair with a negative mean that keeps its order: negative as printed (the loss "
        "then meets flip+margin as alpha goes to 1), or 0",
    )
    margin_in_flip: bool = Field(
        default=True,
        description="whether the margin enters both terms of the smoothed loss; the trainer hands it to bradley_terry",
    )
    shuffle: bool = Field(
        default=False,
        description="control: every measured pair is repaired by the strength of another one, dealt out at random",
    )
    seed: int = Field(default=0, ge=0, description="which pairs the random flip draws, which strengths a shuffle deals")

    @model_validator(mode="after")
    def _refuse_idle_options(self) -> RepairOptions:
        fields = type(self).model_fields
        read = {"recipe"}.union(*(_READS[step] for step in RECIPES[self.recipe]))
        if self.shuffle:
            read.add("seed")
        idle = self.model_fields_set - read
        if self.model_fields_set == set(fields):
            idle = {name for name in idle if getattr(self, name) != fields[name].default}
        if idle:
            raise ValueError(
                f"recipe '{self.recipe}' does not read {', '.join(sorted(idle))}; "
                f"remove it or choose another recipe (this one reads: {', '.join(sorted(read - {'recipe'})) or 'none'})"
            )
        return self

    @property
    def drawn(self) -> bool:
        """Whether `seed` decides which pairs are repaired, and how."""
        return self.recipe == "random flip" or self.shuffle


@dataclass(frozen=True, slots=True)
class Change:
    """What one step did to one pair, and why. `after` is None for a dropped pair.

    "unmeasured" counts a pair that has no strength: it stays as it is (`after` equals `before`).
    """

    id: str
    action: Literal["flip", "soften", "margin", "drop", "unmeasured"]
    before: Preference
    after: Preference | None
    evidence: str


def repair(
    preferences: Preferences,
    strengths: Strengths,
    options: RepairOptions,
    *,
    wrong: Collection[str] | None = None,
) -> tuple[list[Preference], list[Change]]:
    """Run a recipe: the repaired preferences in input order, and every change step by step.

    Args:
        preferences, strengths: one strength per pair, None where it could not be measured.
        options: the recipe and its options.
        wrong: ids whose label is known to be wrong; only "oracle flip" reads it, and must have it.

    Raises:
        InputError: lengths differ, an id occurs twice, or "oracle flip" lacks `wrong` or finds an unknown id there.
    """
    _check(preferences, strengths)
    twice = [name for name, count in Counter(p.id for p in preferences).items() if count > 1]
    if twice:
        raise InputError(f"ids must be unique, got {len(twice)} twice or more, such as {twice[0]!r}")
    steps = RECIPES[options.recipe]
    changes = []
    if set(steps) - {"oracle flip"}:
        unmeasured = (p for p, s in zip(preferences, strengths, strict=True) if s is None)
        changes = [Change(p.id, "unmeasured", p, p, "no strength was measured") for p in unmeasured]
    current, measured = list(preferences), shuffled(strengths, options.seed) if options.shuffle else list(strengths)
    for name in steps:
        after, measured_after = _step(name, options, wrong)(current, measured)
        new = _changes(name, current, measured, after)
        control = " (of another pair: control)" if options.shuffle else ""
        changes += [replace(c, evidence=c.evidence + control) for c in new]
        current, measured = after, measured_after
    return current, changes


def shuffled(strengths: Strengths, seed: int) -> list[Strength | None]:
    """The control of every repair by strength: the measured strengths dealt out among the measured pairs.

    As many labels are flipped, softened or dropped, and by the same values; only which pair has which is chance. What a
    repair gains over this is the strengths' doing; what this gains over no repair is that of softer labels and margins
    as such.
    """
    places = [i for i, s in enumerate(strengths) if s is not None]
    dealt = list(strengths)
    for i, j in zip(places, random.Random(seed).sample(places, len(places)), strict=True):
        dealt[i] = strengths[j]
    return dealt


def undoubted(strengths: Strengths, options: RepairOptions) -> str:
    """What to tell people where a flip or drop by rank takes pairs that the models do not doubt; else nothing."""
    verb = {"flip": "flips", "drop": "drops"}.get(next(iter(RECIPES[options.recipe]), ""))
    if verb is None or options.shuffle:
        return ""
    means = sorted(s.mean for s in strengths if s is not None)
    taken = means[: _count(options.q, len(means))]
    if not (agreed := sum(mean > 0 for mean in taken)):
        return ""
    share = math.floor(1000 * (len(taken) - agreed) / len(means)) / 1000
    return (
        f"q = {options.q:g} {verb} {len(taken)} pairs, and with {agreed} of them the models rather agree with the "
        f"label (positive mean margin); with q = {share:g} it would stop before those"
    )


def flip(
    preferences: Preferences, strengths: Strengths, *, q: float | None = None, below: float | None = None
) -> Repaired:
    """Swap chosen and rejected in the weakest share q, or where the mean margin is below `below` (section 2.4.1).

    The new label inherits flip_prob, margin and weight. Its strength is |mu|, as in the paper; votes and p_flip
    are turned round. Of N measured pairs the weakest floor(q N) are taken, ties in input order.

    Raises:
        InputError: lengths differ, or not exactly one of q in [0, 1] and below is given.
    """
    return _flip(preferences, strengths, _weakest(preferences, strengths, q, below))


def drop(
    preferences: Preferences, strengths: Strengths, *, q: float | None = None, below: float | None = None
) -> Repaired:
    """Leave out the weakest share q, or what is below `below`; selection and errors as in `flip`."""
    gone = _weakest(preferences, strengths, q, below)
    kept = [i for i in range(len(preferences)) if i not in gone]
    return [preferences[i] for i in kept], [strengths[i] for i in kept]


def soften(
    preferences: Preferences,
    strengths: Strengths,
    *,
    q: float | None = None,
    below: float | None = None,
    alpha: float | None = None,
) -> Repaired:
    """Set flip_prob of the selected pairs to `alpha`, or to their own p_flip (label smoothing, Eq. 5).

    Selection and errors as in `flip`; `below=math.inf` softens every measured pair.
    """
    chosen = _weakest(preferences, strengths, q, below)
    result = [
        replace(p, flip_prob=s.p_flip if alpha is None else alpha) if i in chosen and s is not None else p
        for i, (p, s) in enumerate(zip(preferences, strengths, strict=True))
    ]
    return result, list(strengths)


def soft_targets(preferences: Preferences, strengths: Strengths) -> Repaired:
    """flip_prob = sigmoid(-mu) for every measured pair: the ensemble's mean, distilled.

    Raises:
        InputError: lengths differ.
    """
    _check(preferences, strengths)
    result = [
        p if s is None else replace(p, flip_prob=_sigmoid(-s.mean)) for p, s in zip(preferences, strengths, strict=True)
    ]
    return result, list(strengths)


def margin(
    preferences: Preferences,
    strengths: Strengths,
    *,
    scale: float = 1.0,
    cap: float = math.inf,
    negative: Literal["keep", "zero"] = "keep",
) -> Repaired:
    """Set the margin of every measured pair to scale * mu, bounded to [-cap, cap] (section 2.4.2, Eq. 6).

    `negative="zero"` asks nothing of pairs with mu < 0 instead of allowing them a negative difference. A margin
    that the pair had before is replaced.

    Raises:
        InputError: lengths differ.
    """
    _check(preferences, strengths)
    low = 0.0 if negative == "zero" else -cap
    result = [
        p if s is None else replace(p, margin=min(max(scale * s.mean, low), cap))
        for p, s in zip(preferences, strengths, strict=True)
    ]
    return result, list(strengths)


def random_flip(preferences: Preferences, strengths: Strengths, *, q: float, seed: int) -> Repaired:
    """The control of `flip`: as many labels swapped, drawn at random from the measured pairs.

    Raises:
        InputError: as in `flip`.
    """
    count = len(_weakest(preferences, strengths, q, None))
    measured = [i for i, s in enumerate(strengths) if s is not None]
    return _flip(preferences, strengths, set(random.Random(seed).sample(measured, count)))


def oracle_flip(preferences: Preferences, strengths: Strengths, *, wrong: Collection[str]) -> Repaired:
    """The ceiling of `flip`: swap exactly the labels known to be wrong, measured or not.

    Raises:
        InputError: lengths differ, or an id in `wrong` names no pair.
    """
    _check(preferences, strengths)
    wanted = set(wrong)
    unknown = wanted - {p.id for p in preferences}
    if unknown:
        raise InputError(
            f"ids of wrong labels must occur in the preferences, "
            f"got {len(unknown)} that do not, such as {min(unknown)!r}"
        )
    return _flip(preferences, strengths, {i for i, p in enumerate(preferences) if p.id in wanted})


def _flip(preferences: Preferences, strengths: Strengths, selected: set[int]) -> Repaired:
    flipped, turned = list(preferences), list(strengths)
    for i in selected:
        p, s = preferences[i], strengths[i]
        flipped[i] = replace(p, chosen=p.rejected, rejected=p.chosen)
        if s is not None:
            turned[i] = replace(
                s,
                mean=abs(s.mean),
                votes=s.voters - s.votes,
                p_flip=1 - s.p_flip,
                action="keep",
                reason=f"before the flip: {s.reason}",
            )
    return flipped, turned


def _weakest(preferences: Preferences, strengths: Strengths, q: float | None, below: float | None) -> set[int]:
    """Positions of the measured pairs that a step touches."""
    _check(preferences, strengths)
    if (q is None) == (below is None):
        raise InputError(f"select pairs either by share q or by a mean below a bound, got q={q}, below={below}")
    means = sorted((s.mean, i) for i, s in enumerate(strengths) if s is not None)
    if below is not None:
        return {i for mean, i in means if mean < below}
    if q is None or not 0 <= q <= 1:
        raise InputError(f"q must lie in [0, 1], got {q}")
    return {i for _, i in means[: _count(q, len(means))]}


def _count(q: float, pairs: int) -> int:
    # 0.29 * 100 is 28.999...: a share that is a whole number of pairs must not lose one to rounding.
    return math.floor(q * pairs + 1e-9)


def _check(preferences: Preferences, strengths: Strengths) -> None:
    if len(preferences) != len(strengths):
        raise InputError(
            f"there must be one strength (or None) per preference, got {len(strengths)} for {len(preferences)}; "
            "measure the strength of this very data set"
        )


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _step(name: str, options: RepairOptions, wrong: Collection[str] | None) -> Step:
    """A step of a recipe with its options filled in."""
    o = options
    if name == "oracle flip":
        if wrong is None:
            raise InputError("recipe 'oracle flip' needs the ids of the wrong labels, got none; give wrong=...")
        known = wrong
        return lambda p, s: oracle_flip(p, s, wrong=known)
    steps: dict[str, Step] = {
        "flip": lambda p, s: flip(p, s, q=o.q),
        "drop": lambda p, s: drop(p, s, q=o.q),
        "soften": lambda p, s: soften(p, s, below=o.soft_below, alpha=o.alpha),
        "soft targets": soft_targets,
        "margin": lambda p, s: margin(p, s, scale=o.margin_scale, cap=o.margin_cap, negative=o.negative_margins),
        "random flip": lambda p, s: random_flip(p, s, q=o.q, seed=o.seed),
    }
    return steps[name]


def _changes(
    step: str, before: list[Preference], strengths: list[Strength | None], after: list[Preference]
) -> list[Change]:
    """Compare the preferences before and after one step; the strengths are those it read."""
    left = {p.id: p for p in after}
    changes = []
    for old, s in zip(before, strengths, strict=True):
        new = left.get(old.id)
        if new == old:
            continue
        basis = "" if s is None else f"mean margin {s.mean:.3g}, std {s.std:.2g}: {s.reason}"
        if new is None:
            changes.append(Change(old.id, "drop", old, None, f"left out; {basis}"))
        elif new.margin != old.margin:
            changes.append(Change(old.id, "margin", old, new, f"margin {new.margin:.3g}; {basis}"))
        elif new.flip_prob != old.flip_prob:
            doubt = f"taken as wrong with probability {new.flip_prob:.2f}"
            changes.append(Change(old.id, "soften", old, new, f"{doubt}; {basis}"))
        else:
            why = {"random flip": " at random", "oracle flip": ", known to be wrong"}.get(step, "")
            evidence = f"chosen and rejected swapped{why}"
            changes.append(Change(old.id, "flip", old, new, f"{evidence}; {basis}" if basis else evidence))
    return changes
