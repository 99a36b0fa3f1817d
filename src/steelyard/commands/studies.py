"""Commands that run a study from a YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from steelyard.cli import VERBS
from steelyard.commands.common import Args, show
from steelyard.commands.files import from_file, study
from steelyard.errors import InputError
from steelyard.report import build_report
from steelyard.settings import command_line
from steelyard.study.contrastive import ContrastiveStudy, run_contrastive
from steelyard.study.data import run_data_study
from steelyard.study.data_config import DataStudy
from steelyard.study.metarm import MetaRMStudy, run_metarm
from steelyard.study.policy import run_policy_study
from steelyard.study.policy_config import PolicyStudy
from steelyard.study.rounds import RoundsStudy, run_rounds_study
from steelyard.study.strength import StrengthStudy, run_strength_study


def study_data(args: Args) -> None:
    """The analyses of Secrets of RLHF II on one data set."""
    verb = "study data"
    if not args or args[0].startswith("-"):
        if "-h" in args or "--help" in args:
            from_file(DataStudy, Path(), ["--help"], f"{verb} STUDY.yaml", VERBS[verb], None)
        raise InputError("name the study: `steelyard study data study.yaml --out runs/name`")
    config, extra = from_file(DataStudy, Path(args[0]), args[1:], f"{verb} STUDY.yaml", VERBS[verb], None)
    found = run_data_study(config, extra.out, resume=extra.resume, command=command_line())
    page = build_report(extra.out)
    show(json.loads((extra.out / "summary.json").read_text())["tables"])
    print("\n" + "\n".join(found.get("findings", [])))
    print(f"\nreport: {page}")


COMMANDS: dict[str, Callable[[Args], None]] = {
    "study contrastive": study(ContrastiveStudy, run_contrastive, "study contrastive"),
    "study data": study_data,
    "study metarm": study(MetaRMStudy, run_metarm, "study metarm"),
    "study rounds": study(RoundsStudy, run_rounds_study, "study rounds"),
    "study policy": study(PolicyStudy, run_policy_study, "study policy"),
    "study strength": study(StrengthStudy, run_strength_study, "study strength"),
}
