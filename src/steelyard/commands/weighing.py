"""Commands on preference files: weigh, repair, simulate."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from steelyard.cli import VERBS
from steelyard.commands.common import OUT, RESUME, Args, show
from steelyard.data.export import fits_json, refuse_annotated, write_annotated, write_published
from steelyard.data.load import FINDINGS, LoadReport, load_preferences
from steelyard.errors import InputError
from steelyard.measure import StrengthConfig, measure, read_scores
from steelyard.report import build_report
from steelyard.run_dir import write_json_atomic
from steelyard.settings import command_line, parse
from steelyard.stages import truth_column
from steelyard.summary import describe_run, tables


class AuditConfig(StrengthConfig):
    """Weigh every preference of a file and say which ones to doubt."""

    truth_column: str | None = Field(
        None, description="column with 1 label right, -1 wrong, 0 tie: to see how well it works, never to train on"
    )


def audit(args: Args) -> None:
    """Strength of each pair, the file back with columns, a report with the worst pairs."""
    if args and not args[0].startswith("-") and not args[0].endswith((".yaml", ".yml")):
        args = ["--data", *args]
    config, extra = parse(
        AuditConfig, args, verb="audit", about=VERBS["audit"] + " (the file may be given first, without --data)",
        out=OUT, resume=RESUME,
    )  # fmt: skip
    _weigh(config, config.truth_column, extra.out, extra.resume, report=True)


def strength(args: Args) -> None:
    """As `audit`, without a report."""
    config, extra = parse(StrengthConfig, args, verb="strength", about=VERBS["strength"], out=OUT, resume=RESUME)
    _weigh(config, None, extra.out, extra.resume, report=False)


def _weigh(config: StrengthConfig, column: str | None, out: Path, resume: bool, *, report: bool) -> None:
    began = time.time()
    loaded = load_preferences(config.data, on_invalid=config.on_invalid)
    print(loaded.report.text())
    refuse_annotated(loaded)
    annotated = out / ("annotated.jsonl" if fits_json(loaded.rows) else "annotated.parquet")
    published = out / "published_format.jsonl"
    named = ("report.html", "run.json", "summary.json") if report else ()
    _refuse_mixing(config, out, annotated, published, *(out / name for name in named))
    truth = truth_column(loaded.preferences, column, config.data)
    own = StrengthConfig(**{k: getattr(config, k) for k in config.model_fields_set if k in StrengthConfig.model_fields})
    folder = out / "strength" / config.scoring
    measured = measure(own, loaded.preferences, folder, truth=truth, resume=resume)
    result = json.loads((folder / "result.json").read_text())
    if result["left_out"]:
        print(result["left_out"])
    strengths = {p.id: s for p, s in zip(loaded.preferences, measured, strict=True) if s is not None}
    reasons = json.loads(path.read_text()) if (path := folder / "left_out.json").exists() else {}
    write_annotated(loaded, strengths, annotated, reasons=reasons, overwrite=True)
    scores, index = read_scores(folder)
    write_published(
        [loaded.preferences[i] for i in index], published,
        chosen_scores_NM=scores[..., 0].T, rejected_scores_NM=scores[..., 1].T, overwrite=True,
    )  # fmt: skip
    actions = result["actions"]
    print(
        f"{result['pairs']} pairs weighed by {result['members']} reward models in {result['seconds']:.0f} s: "
        f"{result['share_negative']:.1%} have a negative mean margin; suggested: flip {actions['flip']}, soften "
        f"{actions['soften']}, keep {actions['keep']}"
    )
    print(f"annotated rows: {annotated}\npublished format: {published}")
    if report:
        name = f"Audit of {Path(config.data).name}"
        about = describe_run(name, config.seed, began, command_line())
        write_json_atomic(out / "run.json", about | {"seconds": time.time() - began})
        summary = {
            "tables": [*tables(out), _rows_table(loaded.report, result)],
            "stages": [{"name": "strength", "seconds": result["seconds"], "note": ""}],
        }
        write_json_atomic(out / "summary.json", summary)
        show(summary["tables"])
        print(f"report: {build_report(out)}")


def _refuse_mixing(config: StrengthConfig, out: Path, *written: Path) -> None:
    """Raise InputError, before anything runs, where a file would be written over another measurement or the input."""
    for path in written:
        if path.exists() and path.samefile(config.data):
            raise InputError(f"{path}: is the input, and would be written over; give another --out")
    for other in sorted((out / "strength").glob("*/config.json")):
        if other.parent.name != config.scoring:
            raise InputError(
                f"{out}: holds a measurement {other.parent.name}, whose {written[0].name} would be written over; give "
                "another --out (`steelyard run` measures both ways in one folder, with `scorings`)"
            )
    begun = (out / "strength" / config.scoring / "config.json").exists()
    if not begun and (there := [path for path in written if path.exists()]):
        raise InputError(f"{there[0]}: exists already, and would be written over; give another --out, or remove it")


def _rows_table(report: LoadReport, result: dict[str, Any]) -> dict[str, Any]:
    """What became of the file's rows, for the terminal and the report."""
    rows = [["read", report.rows]]
    rows += [[f"{kind}: {FINDINGS.get(kind, 'malformed, skipped')}", n] for kind, n in sorted(report.counts.items())]
    rows.append(["weighed", result["pairs"]])
    return {
        "title": f"Rows of {Path(report.file).name}",
        "columns": ["", "rows"],
        "rows": rows,
        "note": result["left_out"],
    }


COMMANDS = {"audit": audit, "strength": strength}
