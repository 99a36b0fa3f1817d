"""Commands that change labels and need no model: simulate and repair."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import tyro

from steelyard.cli import VERBS
from steelyard.commands.common import OUT, Args
from steelyard.data.export import write_preferences
from steelyard.data.load import OnInvalid, load_preferences
from steelyard.denoise import RepairOptions, repair, undoubted
from steelyard.errors import InputError
from steelyard.run_dir import write_text_atomic
from steelyard.scorer import load_scorer
from steelyard.settings import parse
from steelyard.simulate.annotators import AnnotatorConfig, annotate
from steelyard.simulate.write import WorldConfig, write_world


def simulate(args: Args) -> None:
    """A small world; or, with --data and --scorer, the user's pairs relabelled by noisy annotators."""
    if any(a.partition("=")[0] == "--data" for a in args):
        return _relabel(args)
    if {"-h", "--help"} & set(args):
        with contextlib.suppress(SystemExit):  # with which a help ends
            _write_world(args)
        return _relabel(args)
    return _write_world(args)


def _write_world(args: Args) -> None:
    about = "write a small world with a known truth; with --data, relabel your own pairs"
    config, extra = parse(WorldConfig, args, verb="simulate", about=about, out=OUT)
    for name, path in write_world(config, extra.out).items():
        print(f"{name}: {path}")


def _relabel(args: Args) -> None:
    noise, extra = parse(
        AnnotatorConfig, args, verb="simulate", about="with --data: relabel pairs with noisy annotators",
        data=(str, tyro.MISSING, "preferences to relabel"),
        scorer=(str, tyro.MISSING, "module:function (prompt, response) -> float that knows the truth"),
        out=(Path, tyro.MISSING, "file to write (.jsonl, .csv, .parquet); the truth goes to NAME.truth.jsonl"),
        seed=(int, 0, "seed of the annotators"), on_invalid=(OnInvalid, "error", "malformed rows: error or skip"),
    )  # fmt: skip
    loaded = load_preferences(extra.data, on_invalid=extra.on_invalid)
    print(loaded.report.text())
    known = _new_beside(extra.out, ".truth.jsonl")
    labels, truth = annotate(loaded.preferences, load_scorer(extra.scorer), noise, extra.seed)
    write_preferences(labels, extra.out)
    lines = [
        {"id": t.id, "wrong": t.wrong, "noise": t.noise, "gold_chosen": t.gold_chosen, "gold_rejected": t.gold_rejected}
        for t in truth
    ]
    write_text_atomic(known, "".join(json.dumps(line) + "\n" for line in lines))
    print(f"{sum(t.wrong for t in truth)} of {len(truth)} labels are wrong; labels: {extra.out}")


def repair_command(args: Args) -> None:
    """Repair an annotated file."""
    options, extra = parse(
        RepairOptions, args, verb="repair", about=VERBS["repair"],
        data=(str, tyro.MISSING, "annotated preferences, as `audit` or `strength` write them"),
        out=(Path, tyro.MISSING, "file to write (.jsonl, .csv, .parquet); the evidence goes to NAME.changes.jsonl"),
        on_invalid=(OnInvalid, "error", "malformed rows: error or skip"),
    )  # fmt: skip
    if options.recipe == "oracle flip":
        raise InputError("--recipe oracle flip needs the truth; use it in a recipe (`steelyard run`) with truth_column")
    loaded = load_preferences(extra.data, on_invalid=extra.on_invalid)
    print(loaded.report.text())
    if not loaded.strengths and options.recipe != "keep":
        raise InputError(f"{extra.data}: no strengths in it; measure them first (`steelyard audit` or `strength`)")
    log = _new_beside(extra.out, ".changes.jsonl")
    strengths = [loaded.strengths.get(p.id) for p in loaded.preferences]
    repaired, changes = repair(loaded.preferences, strengths, options)
    write_preferences(repaired, extra.out)
    rows = [{"id": c.id, "action": c.action, "evidence": c.evidence} for c in changes]
    write_text_atomic(log, "".join(json.dumps(row) + "\n" for row in rows))
    counts = {a: sum(c.action == a for c in changes) for a in dict.fromkeys(c.action for c in changes)}
    said = ", ".join(f"{a} {n}" for a, n in counts.items()) or "nothing changed"
    print(f"{len(repaired)} of {len(loaded.preferences)} pairs written to {extra.out}: {said}\nevidence: {log}")
    if note := undoubted(strengths, options):
        print(note)


def _new_beside(out: Path, suffix: str) -> Path:
    """The second file that a command writes. Raises InputError if there is one: it tells of other labels."""
    path = out.with_suffix(suffix)
    if path.exists():
        raise InputError(f"{path}: exists already, and would be written over; choose another --out, or remove it")
    return path


COMMANDS = {"simulate": simulate, "repair": repair_command}
