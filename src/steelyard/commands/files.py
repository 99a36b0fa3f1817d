"""Commands whose settings stand in a YAML file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import tyro
from pydantic import Field

from steelyard.cli import VERBS
from steelyard.commands.common import RESUME, Args, show
from steelyard.config import Config
from steelyard.errors import InputError
from steelyard.report import build_report
from steelyard.settings import checked, command_line, option_names, override, parse, read_yaml

C = TypeVar("C", bound=Config)


def from_file(config: type[C], path: Path, args: Args, verb: str, about: str, out: Path | None) -> tuple[C, Any]:
    """(settings of the YAML file with the changes of --set, --out and --resume)."""

    class RunOptions(Config):
        """Where to, and changes of single settings."""

        set: tuple[str, ...] = Field(
            (), description="changes such as `device=cuda` or `section.field=value` (values in YAML)"
        )

    for name in option_names(args):
        if name.partition(".")[0] in config.model_fields:
            raise InputError(f"--{name}: is a field of the file; change it there, or with `--set {name}=VALUE`")
    where = (Path, tyro.MISSING if out is None else out, "folder to write to")
    options, extra = parse(RunOptions, args, verb=verb, about=about, yaml_first=False, out=where, resume=RESUME)
    values = read_yaml(path)
    if set(values) - set(config.model_fields) and (others := _takers(set(values))):
        raise InputError(
            f"{path}: has the fields of a file for `steelyard {'` or `steelyard '.join(others)}`; use that"
        )
    return checked(config, override(values, options.set), lambda f: f"{path.name}: {f}"), extra


def _takers(names: set[str]) -> list[str]:
    """The verbs whose files have all these fields."""
    from steelyard.commands.studies import STUDIES
    from steelyard.recipe import Recipe
    from steelyard.rounds_settings import RoundsConfig

    kinds: dict[str, type[Config]] = {"run": Recipe, "iterate": RoundsConfig}
    kinds |= {f"study {name}": kind for name, (kind, _) in STUDIES.items()}
    return [verb for verb, kind in kinds.items() if names <= set(_listed(kind))]


def _listed(config: type[Config]) -> dict[str, str]:
    """What the help says of each field of a file; fields without a description are not for users."""
    fields = {}
    for name, field in config.model_fields.items():
        default = field.get_default(call_default_factory=True)
        several = "some" if isinstance(default, tuple) else "one"
        said = [f"{several} of {', '.join(choices)}"] if (choices := _choices(field.annotation)) else []
        if field.is_required():
            said.append("required")
        elif isinstance(default, str | int | float | tuple):
            said.append(f"default: {list(default) if isinstance(default, tuple) else default}")
        if field.description:
            fields[name] = field.description + (f" ({'; '.join(said)})" if said else "")
    return fields


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return list(map(str, get_args(kind)))
    return [choice for part in get_args(kind) for choice in _choices(part)]


def study(
    config_type: type[Config], function: Callable[..., dict[str, Any]], verb: str, file: str = "study"
) -> Callable[[Args], None]:
    """The command of a study or recipe: `steelyard study KIND STUDY.yaml --out FOLDER`; `file` is what it reads."""
    fields = "\n".join(f"- {name}: {said}" for name, said in _listed(config_type).items())
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
