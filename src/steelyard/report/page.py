"""Puts a run's report together: one self-contained HTML page without scripts and without remote resources."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from steelyard.errors import InputError
from steelyard.report.blocks import (
    MISSING,
    Block,
    Folded,
    Section,
    Style,
    arm_keys,
    arm_styles,
    count,
    duration,
    free_table,
    interval,
    percent,
    table,
)
from steelyard.report.data_sections import pairs_section, strength_section
from steelyard.report.feature_sections import feature_section
from steelyard.report.health_sections import benchmark_section, health_section
from steelyard.report.model_sections import reward_section, sft_section
from steelyard.report.policy_sections import policy_section
from steelyard.report.policy_study_sections import policy_study_section
from steelyard.report.read import Run, read_run
from steelyard.report.reward_records import RewardRow
from steelyard.report.rounds_sections import rounds_section, rounds_study_section
from steelyard.report.seed_sections import contrastive_section, metarm_section
from steelyard.report.strength_study_sections import strength_study_section
from steelyard.report.study_sections import arms_section, kinds_section

_FOLD = 420
_HERE = Path(__file__).parent


def build_report(run: Path, out: Path | None = None) -> Path:
    """Write the report of the folder `run` and return its path.

    `run` is a pipeline's folder, an audit's (with only `strength/`) or a single stage's (with `metrics.jsonl`).
    `out` is the file to write, or a folder to write `report.html` into; default: `report.html` in `run`. The
    same files give the same page, byte for byte.

    Raises InputError if `run` holds nothing to show, if a file of results is damaged, or if `out` cannot be
    written. Files that only say how the run was made are left out with a note on the page instead.
    """
    target = run / "report.html" if out is None else out / "report.html" if out.is_dir() else out
    content = render(read_run(run)).encode("utf-8", "replace")
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, target)
    except OSError as error:
        raise InputError(f"{target}: the report cannot be written there ({error}). Choose another place.") from None
    return target


def render(run: Run) -> str:
    """The page as text."""
    styles = arm_styles(_arms(run))
    candidates = (
        _summary_section(run, styles),
        strength_section(run),
        strength_study_section(run),
        pairs_section(run),
        sft_section(run, styles),
        reward_section(run, styles),
        health_section(run, styles),
        benchmark_section(run, styles),
        contrastive_section(run, styles),
        metarm_section(run, styles),
        arms_section(run),
        kinds_section(run),
        feature_section(run),
        rounds_section(run),
        rounds_study_section(run, styles),
        policy_study_section(run),
        policy_section(run, styles),
        _made_section(run),
    )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["excerpt"] = _excerpt
    template = environment.from_string((_HERE / "page.html").read_text(encoding="utf-8"))
    style = (_HERE / "style.css").read_text(encoding="utf-8")
    return template.render(
        name=(run.info.name if run.info else "") or run.name,
        facts=_facts(run),
        notes=run.notes,
        sections=[section for section in candidates if section is not None],
        style=Markup(style),
        fold=_FOLD,
    )


def _arms(run: Run) -> list[str]:
    names = [*run.sft, *run.rm, *run.ppo, *run.dpo]
    if run.reward:
        names += [r.arm for r in run.reward.rows]
        names += [r.arm for r in run.reward.reliability] + [r.arm for r in run.reward.by_strength]
    if run.benchmarks:
        names += [r.arm for r in run.benchmarks.results]
    if run.policy:
        names += [p.arm for p in run.policy.arms] + [p.arm for p in run.policy.frontier]
        names += [p.arm for p in run.policy.difficulty]
        names += [arm for sample in run.policy.samples for arm in sample.responses]
    for study in (run.contrastive, run.metarm):
        names += [] if study is None else [r.arm for r in study.accuracy] + [c.arm for c in study.curves]
    if run.rounds_study:
        names += [r.arm for r in run.rounds_study.rows] + [c.arm for c in run.rounds_study.by_round]
    return names


def _excerpt(text: str) -> str:
    """The beginning of a long text, cut between words where that is possible."""
    head = text[:_FOLD]
    return head[: head.rfind(" ")] if " " in head[_FOLD // 2 :] else head


def _facts(run: Run) -> list[str]:
    if run.info is None:
        return []
    info = run.info
    started = info.started
    if isinstance(started, float):
        started = datetime.fromtimestamp(started, UTC).isoformat(timespec="minutes")
    date = re.sub(r"^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d).*$", r"\1 \2", started or "")
    facts = [date, f"steelyard {info.version}" if info.version else ""]
    facts.append(f"commit {info.commit[:10]}" if info.commit else "")
    facts.append(f"seed {info.seed}" if info.seed is not None else "")
    facts.append(f"took {duration(info.seconds)}" if info.seconds is not None else "")
    return [fact for fact in facts if fact]


def _summary_section(run: Run, styles: Mapping[str, Style]) -> Section:
    tables: list[Block] = []
    for one in run.summary.tables if run.summary else ():
        tables.append(free_table(one.title, one.columns, one.rows, one.note or ""))
    sentences = [*_data_sentences(run), *_reward_sentences(run), *_policy_sentences(run)]
    sentences += run.data_study.findings if run.data_study else []
    intro = " ".join(sentences) or "What this folder holds is shown below."
    return Section("summary", "Summary", intro, tables, _tiles(run), arm_keys(styles, styles))


def _data_sentences(run: Run) -> list[str]:
    scored = next((s for s in run.strengths if s.result), None)
    if scored is None or scored.result is None:
        return []
    pairs = scored.pairs.num_rows if scored.pairs is not None else sum(g.n for g in scored.result.groups)
    members = f" with {scored.result.members} reward models" if scored.result.members else ""
    text = f"{count(pairs)} pairs were weighed{members}, {scored.scoring}"
    below = scored.result.share_negative
    text += f"; {percent(below)} of them lie below zero." if below is not None else "."
    found = next((d for d in scored.result.detection or () if d.scorer == "strength" and d.noise == "all"), None)
    if found is None or found.auroc is None:
        return [text]
    return [text, f"Strength finds the wrong labels with an AUROC of {found.auroc:.3f}."]


def _best_reward(run: Run) -> tuple[RewardRow, RewardRow | None] | None:
    """The most accurate arm that needs no truth, and the plain one, on the most trusted set of labels."""
    rows = run.reward.rows if run.reward else []
    sets = {r.set for r in rows}
    chosen = next((s for s in ("agreement", "relabelled") if s in sets), rows[0].set if rows else "")
    honest = [r for r in rows if r.set == chosen and r.arm not in _told_the_truth(run)]
    if not honest:
        return None
    best = max(honest, key=lambda r: r.accuracy)
    return best, next((r for r in honest if r.arm == "plain" and r is not best), None)


def _told_the_truth(run: Run) -> set[str]:
    """The arms whose labels were mended by the truth."""
    arms = run.settings.get("repair")
    named = arms.items() if isinstance(arms, dict) else ()
    return {str(arm) for arm, repair in named if isinstance(repair, dict) and repair.get("recipe") == "oracle flip"}


def _reward_sentences(run: Run) -> list[str]:
    found = _best_reward(run)
    if found is None:
        return []
    best, plain = found
    accuracy = interval(best.accuracy, best.low, best.high)
    text = f"On the set “{best.set}” the reward model “{best.arm}” is most accurate, {accuracy}"
    if plain is not None:
        text += f", against {interval(plain.accuracy, plain.low, plain.high)} for “plain”"
        if best.low is not None and plain.high is not None and best.low <= plain.high:
            text += "; the intervals overlap"
    return [text + "."]


def _policy_sentences(run: Run) -> list[str]:
    sentences = []
    wins = run.policy.wins if run.policy else []
    for w in [w for w in wins if w.b == wins[0].b][:4]:
        if w.score is None:
            continue
        judge = f", judged by {w.judge}" if w.judge else ""
        score = interval(w.score, w.low, w.high)
        text = f"Policy “{w.a}” scores {score} against “{w.b}” with {count(w.n)} answers{judge}"
        unclear = w.low is not None and w.high is not None and w.low <= 0.5 <= w.high
        sentences.append(text + (", which is no clear difference." if unclear else "."))
    return sentences


def _tiles(run: Run) -> list[tuple[str, str]]:
    tiles = []
    scored = next((s for s in run.strengths if s.result), None)
    if scored is not None and scored.result is not None:
        if scored.pairs is not None:
            tiles.append((count(scored.pairs.num_rows), "pairs weighed"))
        if scored.result.share_negative is not None:
            tiles.append((percent(scored.result.share_negative), f"below zero, {scored.scoring}"))
        for d in scored.result.detection or ():
            if d.scorer == "strength" and d.noise == "all" and d.auroc is not None:
                tiles.append((f"{d.auroc:.3f}", f"AUROC of wrong labels, {scored.scoring}"))
    found = _best_reward(run)
    if found is not None:
        tiles.append((f"{found[0].accuracy:.3f}", f"accuracy of {found[0].arm}, set {found[0].set}"))
    if run.policy and run.policy.wins and run.policy.wins[0].score is not None:
        first = run.policy.wins[0]
        tiles.append((f"{first.score:.3f}", f"score of {first.a} against {first.b}"))
    return tiles


def _made_section(run: Run) -> Section | None:
    stages = {"sft": run.sft, "rm": run.rm, "ppo": run.ppo, "dpo": run.dpo}
    flat = [
        (kind if name == kind else f"{kind}/{name}", s) for kind, held in stages.items() for name, s in held.items()
    ]
    if run.info is None and not run.recipe and run.summary is None and not flat:
        return None
    blocks: list[Block] = []
    costs = [(s.name, s.seconds, s.note or "") for s in (run.summary.stages if run.summary else [])]
    if not costs:
        costs = [(name, s.seconds, "") for name, s in flat if s.seconds is not None]
    if costs:
        total = sum(seconds or 0.0 for _, seconds, _ in costs)
        rows = [(n, s, s / total if s is not None and total else None, note) for n, s, note in costs]
        columns = [("stage", None), ("time", duration), ("share", percent), ("note", None)]
        if not any(note for *_, note in rows):
            columns, rows = columns[:3], [row[:3] for row in rows]  # type: ignore[misc]
        blocks.append(table(f"Cost by stage, {duration(total)} in all", columns, rows))
    if run.info is not None:
        versions = [(k, str(v) if v is not None else MISSING) for k, v in run.info.versions.items()]
        rows_made = [("steelyard", run.info.version), ("commit", run.info.commit or MISSING), *versions]
        rows_made += [("seed", str(run.info.seed)), ("started", str(run.info.started or MISSING))]
        blocks.append(table("Made with", (("what", None), ("value", None)), rows_made))
        blocks.append(Folded("Commands to reproduce", _commands(run), open=True))
    if run.recipe:
        blocks.append(Folded("Settings of the whole run", run.recipe))
    for name, stage in flat:
        if stage.config is not None:
            text = json.dumps(stage.config, indent=2, ensure_ascii=False, sort_keys=True)
            blocks.append(Folded(f"Settings: {name}/config.json", text))
        if stage.result:
            text = json.dumps(stage.result, indent=2, ensure_ascii=False, sort_keys=True)
            blocks.append(Folded(f"Result: {name}/result.json", text))
    return Section("made", "How it was made", "What is needed to repeat this run, and what it costs.", blocks)


def _commands(run: Run) -> str:
    info = run.info
    assert info is not None
    command = info.command if isinstance(info.command, str) else shlex.join(info.command)
    lines = [f"git checkout {info.commit}" if info.commit else "", command, f"steelyard report {shlex.quote(run.name)}"]
    return "\n".join(line for line in lines if line)
