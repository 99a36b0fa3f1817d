"""Commands that run several stages: a recipe, and rounds."""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path
from typing import Any

from steelyard.cli import VERBS
from steelyard.commands.common import Args, show
from steelyard.commands.files import from_file, study
from steelyard.iterate import rounds_table, run_rounds
from steelyard.pipeline import run_recipe
from steelyard.recipe import Recipe
from steelyard.report import build_report
from steelyard.rounds_settings import RoundsConfig
from steelyard.run_dir import write_json_atomic
from steelyard.settings import command_line
from steelyard.summary import describe_run


def demo(args: Args) -> None:
    """The built-in recipe `demo.yaml`, with overrides."""
    about = VERBS["demo"] + (
        ", in about ten minutes on two cores. --set changes its recipe, whose fields `steelyard run --help` lists"
    )
    with resources.as_file(resources.files("steelyard") / "recipes" / "demo.yaml") as path:
        recipe, extra = from_file(Recipe, path, args, "demo", about, Path("runs/demo"))
    summary = run_recipe(recipe, extra.out, resume=extra.resume, command=command_line())
    page = build_report(extra.out)
    show(summary["tables"])
    print(f"\nreport: {page}")


def rounds(config: RoundsConfig, out: Path, *, resume: bool, command: str) -> dict[str, Any]:
    """The rounds, and what the report says of the run."""
    began = time.time()
    record = run_rounds(config, out, resume=resume)
    if not (out / "run.json").exists():
        write_json_atomic(out / "run.json", describe_run(f"Rounds: {config.reward}", config.seed, began, command))
    write_json_atomic(out / "summary.json", {"tables": [rounds_table(record)]})
    return record


COMMANDS = {
    "demo": demo,
    "run": study(Recipe, run_recipe, "run", "recipe"),
    "iterate": study(RoundsConfig, rounds, "iterate", "settings"),
}
