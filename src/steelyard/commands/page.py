"""The command that draws a report."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from steelyard.cli import VERBS
from steelyard.commands.common import Args
from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.report import build_report
from steelyard.settings import parse


def report(args: Args) -> None:
    """The HTML page of a run folder."""

    class ReportOptions(Config):
        """Report options."""

        out: Path | None = Field(None, description="page to write; none given: report.html in the run folder")

    if not args or args[0].startswith("-"):
        parse(ReportOptions, args, verb="report RUN", about=VERBS["report"], yaml_first=False)
        raise InputError("name the run folder: `steelyard report runs/demo`")
    options, _ = parse(ReportOptions, args[1:], verb="report RUN", about=VERBS["report"], yaml_first=False)
    print(f"report: {build_report(Path(args[0]), options.out)}")


COMMANDS = {"report": report}
