"""The section of `steelyard study policy`: gold and proxy reward against distance, and what explains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from steelyard.report import plots
from steelyard.report.blocks import (
    Block,
    Figure,
    Folded,
    Key,
    Panel,
    Section,
    Style,
    WinBars,
    arm_keys,
    arm_styles,
    count,
    decimals,
    interval,
    over,
    percent,
    seeds_of,
    series_style,
    table,
)
from steelyard.report.plots import Series
from steelyard.report.policy_study_records import CellDifference, CellName, CellWin, Point, PolicyStudyFile
from steelyard.report.policy_study_theory import theory_blocks
from steelyard.report.read import Run
from steelyard.report.study_records import Difference

_AXIS = "√KL to the SFT model, √nats"
_CELL = (("labels", None), ("repair", None), ("arm", None), ("KL weight", None))
HEAVIER, ASKED = "arm, heavier KL", "asked for"
_KINDS = {
    "recommended": "Recommended settings against plain PPO on the labels as they are",
    ASKED: "Further comparisons, named in the study file",
    "arm": "Arms against plain PPO with the same labels, repair and KL weight",
    "repair": "Repaired labels against labels as they are, or another repair, same arm and KL weight",
    "KL weight": "Another KL weight against the study's own, same labels, repair and arm",
    HEAVIER: "Arms against plain PPO with a heavier KL penalty, same labels and repair",
}
END, COMMON = "end of the run", "greatest KL that both reached"


def policy_study_section(run: Run) -> Section | None:
    """Over-optimisation, cell by cell."""
    study = run.policy_study
    if study is None:
        return None
    blocks: list[Block] = [*_main(study), *_by_noise(study), *_groups(study), _ends(study)]
    for kind, title in _KINDS.items():
        blocks += _differences(study, kind, title)
    blocks += [*_wins(study), *_strata(study), *theory_blocks(study), _rewards(study), *_failures(study)]
    intro = (
        f"Policies trained on the small world's noisy labels, {seeds_of(study.seeds)}: each has its own label noise, "
        "SFT model, reward models, baselines and order; prompts and texts are shared. Gold is the world's true "
        "reward, proxy the reward model's score; both on held-out prompts. Bars and brackets are 95 % intervals over "
        f"{over(len(study.seeds), 'prompts')}. Differences at equal distance compare arms where each first is that far "
        "from the SFT model (linear in √KL between looks); at equal steps an arm that merely moves faster looks "
        "better, or worse."
    )
    return Section("policy-study", "Over-optimisation", intro, blocks)


def _cell(c: CellName) -> tuple[str, str, str, str]:
    return c.world, c.repair, c.arm, c.weight


def _text(d: Difference | None, places: int = 3) -> str | None:
    return None if d is None else interval(d.value, d.low, d.high, places)


# ---- figures ---------------------------------------------------------------------------------------------------


def _series(points: Sequence[Point], key: str, style: Style) -> Series:
    drawn = sorted(points, key=lambda p: p.step)
    values = [getattr(p, key) for p in drawn]
    return Series([p.root_kl for p in drawn], [v.value for v in values], style, [v.low for v in values],
                  [v.high for v in values])  # fmt: skip


def _panels(
    name: str, title: str, lines: Mapping[str, Sequence[Point]], styles: Mapping[str, Style], small: bool = False
) -> list[Panel]:
    """Gold and proxy of some lines, side by side."""
    panels = []
    for key in ("gold", "proxy"):
        series = [_series(points, key, styles[line]) for line, points in lines.items() if points]
        if series:
            svg = plots.lines(f"{name}-{key}", series, _AXIS, f"{key} reward", marks=True, small=small)
            panels.append(Panel(f"{title}: {key}" if title else key.capitalize(), svg))
    return panels


def _worlds(study: PolicyStudyFile) -> list[str]:
    return list(dict.fromkeys(p.world for p in study.frontier))


def _pick(study: PolicyStudyFile, world: str, repair: str, arm: str, kl_coef: float | None) -> list[Point]:
    return [p for p in study.frontier if (p.world, p.repair, p.arm, p.kl_coef) == (world, repair, arm, kl_coef)]


def _main(study: PolicyStudyFile) -> list[Block]:
    best = study.recommended
    if best is None:
        return []
    usual = f"{study.control} PPO, labels as they are, KL weight {study.kl_coef:g}"
    chosen = CellName(world="", repair=best.repair, arm=best.arm, kl_coef=best.kl_coef).words
    styles = {usual: series_style(0), chosen: series_style(1)}
    panels = []
    for world in _worlds(study):
        lines = {
            usual: _pick(study, world, "none", study.control, study.kl_coef),
            chosen: _pick(study, world, best.repair, best.arm, best.kl_coef),
        }
        if all(lines.values()):
            panels += _panels(f"main-{world}", world.capitalize(), lines, styles)
    if not panels:
        return []
    reading = (
        "Mean over seeds, bands are intervals. Where proxy still rises and gold turns down, the policy exploits its "
        "reward model; the higher gold line makes better use of the same distance."
    )
    keys = [Key(line, style) for line, style in styles.items()]
    return [Figure("Gold against distance: plain PPO and the recommended settings", reading, panels, keys)]


def _by_noise(study: PolicyStudyFile) -> list[Block]:
    lines = {w: _pick(study, w, "none", study.control, study.kl_coef) for w in _worlds(study)}
    lines = {world: points for world, points in lines.items() if points}
    if len(lines) < 2:
        return []
    styles = {world: series_style(i) for i, world in enumerate(lines)}
    reading = (
        f"“{study.control}” on the labels as they are, KL weight {study.kl_coef:g}. The proxies are different models."
    )
    keys = [Key(world, style) for world, style in styles.items()]
    return [Figure("What label noise does", reading, _panels("noise", "", lines, styles), keys)]


def _groups(study: PolicyStudyFile) -> list[Block]:
    """All arms, one figure for each repair and KL weight, two panels a noise level."""
    styles = arm_styles(p.arm for p in study.frontier)
    blocks: list[Block] = []
    weights = list(dict.fromkeys((p.repair, p.kl_coef) for p in study.frontier if p.kl_coef is not None))
    for repair, weight in weights:
        panels, shown = [], set()
        for world in _worlds(study):
            lines = {arm: _pick(study, world, repair, arm, weight) for arm in styles}
            if any(lines.values()):
                lines |= {arm: _pick(study, world, repair, arm, None) for arm in styles if not lines[arm]}
                panels += _panels(f"group-{repair}-{weight}-{world}", world.capitalize(), lines, styles)
                shown |= {arm for arm, points in lines.items() if points}
        words = "labels as they are" if repair == "none" else f"repaired: {repair}"
        reading = "One line an arm, mean over seeds with its interval; a mark is a look. DPO has no KL weight."
        title = f"Gold and proxy against distance: {words}, KL weight {weight:g}"
        blocks.append(Figure(title, reading, panels, arm_keys(styles, shown)))
    return blocks


# ---- tables ----------------------------------------------------------------------------------------------------


def _ends(study: PolicyStudyFile) -> Block:
    columns: list[tuple[str, Callable[..., str] | None]] = [
        *_CELL, ("gold", str), ("proxy", str), ("KL, nats", decimals(2)), ("length", decimals(1)), ("ended", percent),
        ("best gold", str), ("at KL", decimals(2)), ("end less best", str), ("seeds", count),
    ]  # fmt: skip
    rows = [
        (*_cell(e), _text(e.gold), _text(e.proxy), e.kl, e.length, e.ended, _text(e.best), e.best_kl, _text(e.lost),
         e.n_seeds)
        for e in study.ends
    ]  # fmt: skip
    note = "Best: of each run's looks, by the same answers, which flatters a little. End less best: what went too far."
    return table("Where the runs end", columns, rows, note=note)


def _differences(study: PolicyStudyFile, kind: str, title: str) -> list[Block]:
    chosen = [d for d in study.differences if d.kind == kind]
    if not chosen:
        return []
    places = list(dict.fromkeys(d.at for d in study.differences))
    places = [p for p in places if p not in (END, COMMON)]
    places = [END, *places, COMMON]
    by_cell: dict[tuple[str, ...], dict[str, CellDifference]] = {}
    for d in chosen:
        by_cell.setdefault((*_cell(d), d.against.words), {})[d.at] = d
    rows = [(*key, *(_short(found.get(p), len(study.seeds)) for p in places)) for key, found in by_cell.items()]
    columns = [*_CELL, ("less", None), *((p, str) for p in places)]
    note = (
        "Gold reward, paired by seed, prompt and random numbers. In brackets after it: seeds, where not all reached it."
    )
    blocks: list[Block] = [table(title, columns, rows, note=note)]
    shared = [d for d in chosen if d.at == COMMON]
    if shared:
        series = [
            Series([d.value], [i], series_style(0), [d.low or 0.0], [d.high or 0.0]) for i, d in enumerate(shared)
        ]
        names = [_brief(d, study.kl_coef) for d in shared]
        svg = plots.dots(f"difference-{kind}", names, series, "difference in gold reward", level=0.0)
        reading = "At the greatest distance that both runs of a seed reached. A bar that holds 0 shows no difference."
        blocks.insert(0, Figure(title, reading, [Panel("At equal distance", svg)]))
    return blocks


def _brief(d: CellDifference, usual: float) -> str:
    """A cell in few words: there is little room beside a plot."""
    repaired = "" if d.repair == "none" else f" on {d.repair}"
    weight = "" if d.kl_coef in (None, usual) else f", KL {d.weight}"
    held = f" / plain, KL {d.against.weight}" if d.kind == HEAVIER else ""
    if d.kind == ASKED:
        held = f" / {d.against.words}"
    if d.kind == "repair" and d.against.repair != "none":
        held = f" / {d.against.repair}"
    return f"{d.world}: {d.arm}{repaired}{weight}{held}"


def _short(d: CellDifference | None, seeds: int) -> str | None:
    if d is None:
        return None
    return f"{_text(d)}" + ("" if d.n_seeds == seeds else f" ({d.n_seeds})")


def _wins(study: PolicyStudyFile) -> list[Block]:
    """Every arm against plain PPO as bars, all other pairs as folded text."""
    against: list[CellWin] = []
    others: list[CellWin] = []
    for w in study.wins:
        like = w.a.repair == w.b.repair and (w.a.kl_coef == w.b.kl_coef or None in (w.a.kl_coef, w.b.kl_coef))
        (against if like and w.b.arm == study.control != w.a.arm else others).append(w)
    blocks: list[Block] = []
    if against:
        reading = (
            "Per cent of held-out answers that win, tie or lose by gold at the end of the runs, all seeds together. "
            "The score counts a tie as one half. Equal steps, not equal distance."
        )
        blocks.append(WinBars("Head to head with plain PPO", reading, [_bar(w) for w in against]))
    if others:
        lines = [
            f"{w.a.world}: {w.a.words} against {w.b.words}: {w.win:.3f} / {w.tie:.3f} / {w.lose:.3f}, "
            f"score {w.score:.3f} [{w.low:.3f}, {w.high:.3f}]"
            for w in others
        ]
        blocks.append(Folded("All other pairs with the same labels: win / tie / lose by gold", "\n".join(lines)))
    return blocks


def _bar(w: CellWin) -> dict[str, object]:
    kinds = (("win", w.win), ("tie", w.tie), ("lose", w.lose))
    verdict = f"{w.a.arm} better" if w.low > 0.5 else f"{w.b.arm} better" if w.high < 0.5 else "no clear difference"
    return {
        "a": f"{w.a.world}: {w.a.words}",
        "b": w.b.words,
        "judge": "gold",
        "n": count(w.n),
        "parts": [
            {"kind": kind, "width": f"{100 * share:.2f}", "text": decimals(0)(100 * share) if share >= 0.05 else "",
             "title": f"{kind} {decimals(1)(100 * share)} %"}
            for kind, share in kinds
        ],
        "score": interval(w.score, w.low, w.high),
        "verdict": verdict,
    }  # fmt: skip


def _strata(study: PolicyStudyFile) -> list[Block]:
    names = list(dict.fromkeys(s.stratum for s in study.strata))
    by_cell: dict[tuple[str, ...], dict[str, str]] = {}
    for s in study.strata:
        if s.difference is not None:
            by_cell.setdefault(_cell(s), {})[s.stratum] = str(_text(s.difference))
    if not by_cell:
        return []
    rows = [(*key, *(found.get(name) for name in names)) for key, found in by_cell.items()]
    columns = [*_CELL, *((name, str) for name in names)]
    note = (
        "Difference in gold to plain PPO at the end, by difficulty of the prompt, hardest first: the reward models' "
        "mean score of an independent draw from the SFT models. The paper expects more of contrastive rewards on hard "
        "prompts."
    )
    return [table("By difficulty of the prompt", columns, rows, note=note)]


def _rewards(study: PolicyStudyFile) -> Block:
    columns = (
        ("labels", None), ("repair", None), ("wrong labels in training", percent), ("accuracy by gold", str),
        ("pairs", count),
    )  # fmt: skip
    rows = [(r.world, r.repair, r.wrong, interval(r.value, r.low, r.high), r.n) for r in study.rewards]
    return table("Reward models", columns, rows, note="On held-out pairs. A soft label counts as wrong by its share.")


def _failures(study: PolicyStudyFile) -> list[Block]:
    if not study.failed:
        return []
    rows = [(*_cell(f), f.seed, f.error) for f in study.failed]
    return [table("Runs that were stopped and left out", [*_CELL, ("seed", count), ("why", None)], rows)]
