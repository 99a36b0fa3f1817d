"""Commands whose settings stand in a YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import tyro
from pydantic import Field

from steelyard.cli import VERBS
from steelyard.commands.common import RESUME, Args, show
from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.report import build_report
from steelyard.settings import checked, command_line, override, parse, read_yaml

C = TypeVar("C", bound=Config)


def from_file(config: type[C], path: Path, args: Args, verb: str, about: str, out: Path | None) -> tuple[C, Any]:
    """(settings of the YAML file with the changes of --set, --out and --resume)."""

    class RunOptions(Config):
        """Where to, and changes of single settings."""

        set: tuple[str, ...] = Field((), description="changes such as `reward.epochs=2` (values in YAML)")

    where = (Path, tyro.MISSING if out is None else out, "folder to write to")
    options, extra = parse(RunOptions, args, verb=verb, about=about, out=where, resume=RESUME)
    return checked(config, override(read_yaml(path), options.set), lambda f: f"{path.name}: {f}"), extra


def study(
    config_type: type[Config], function: Callable[..., dict[str, Any]], verb: str, file: str = "study"
) -> Callable[[Args], None]:
    """The command of a study: `steelyard study KIND STUDY.yaml --out FOLDER`; `file` is what it reads."""
    fields = "\n".join(f"- {name}: {field.description}" for name, field in config_type.model_fields.items())
    usage = f"{verb} {file.upper()}.yaml"
    about = f"{VERBS[verb]}. The file holds:\n\n{fields}"

    def command(args: Args) -> None:
        if not args or args[0].startswith("-"):
            if "-h" in args or "--help" in args:
                from_file(config_type, Path(), ["--help"], usage, about, None)
            raise InputError(f"name the {file}: `steelyard {verb} {file}.yaml --out runs/name`")
        config, extra = from_file(config_type, Path(args[0]), args[1:], usage, about, None)
        found = function(config, extra.out, resume=extra.resume, command=command_line())
        page = build_report(extra.out)
        show(json.loads((extra.out / "summary.json").read_text())["tables"])
        if "findings" in found:
            print("\n" + "\n".join(found["findings"]))
        print(f"\nreport: {page}")

    return command
