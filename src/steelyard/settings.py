"""Settings of one command: a YAML file and dotted options, into a checked configuration."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml
from pydantic import ValidationError

from steelyard.config import Config
from steelyard.errors import InputError

C = TypeVar("C", bound=Config)
_PLACEHOLDER = "\0"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError with file and line."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such settings file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: settings must be `field: value` lines, got a {type(content).__name__}")
    return content


def parse(config: type[C], args: Sequence[str], *, verb: str, about: str, **extra: Any) -> tuple[C, Any]:
    """(configuration, other options) from `[settings.yaml] --option value ...`.

    `extra` are options beside the configuration: name -> (type, default or tyro.MISSING, help). Unknown options
    end the program with their names (status 2, as tyro does). Raises InputError for values out of bounds.
    """
    args = list(args)
    given: dict[str, Any] = {}
    if args and args[0].endswith((".yaml", ".yml")):
        given = read_yaml(args.pop(0))
    start = _start(config, given)
    fields: list[Any] = [("settings", Annotated[config, tyro.conf.arg(name="")])]
    for name, (kind, _, text) in extra.items():
        fields.append((name, Annotated[kind, tyro.conf.arg(help=text)]))
    holder = make_dataclass("Options", fields)
    default = holder(settings=start, **{name: value for name, (_, value, _) in extra.items()})
    try:
        parsed: Any = tyro.cli(
            holder, args=args, default=default, prog=f"steelyard {verb}", description=about,

        )  # fmt: skip
    except ValidationError as error:
        raise InputError(explain(error)) from None
    # tyro sets every field; what equals its default counts as not given, so that options without effect show.
    return checked(config, parsed.settings.model_dump(exclude_defaults=True)), parsed


def checked(config: type[C], values: dict[str, Any], where: str = "") -> C:
    """`config(**values)`; raises InputError that names each field, what it must be and what was received."""
    try:
        return config(**values)
    except ValidationError as error:
        raise InputError(explain(error, where)) from None


def explain(error: ValidationError, where: str = "") -> str:
    """One line per wrong field."""
    lines = []
    for e in error.errors():
        field = ".".join(map(str, (*([where] if where else []), *e["loc"])))
        if e["type"] == "extra_forbidden":
            lines.append(f"{field}: no such setting; remove it or check its spelling")
        elif e["type"] == "missing":
            lines.append(f"{field}: is needed")
        else:
            lines.append(
                f"{field}: {e['msg'].removeprefix('Value error, ')}, got {e['input']!r}" if field else e["msg"]
            )
    return "\n".join(lines)


def override(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Apply `section.field=value` changes (values in YAML) to nested settings. Raises InputError for other forms."""
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise InputError(f"an override is written section.field=value, got {change!r}")
        *parents, last = path.split(".")
        at = values
        for parent in parents:
            at = at.setdefault(parent, {})
            if not isinstance(at, dict):
                raise InputError(f"{change!r}: {parent} holds a value, not a section")
        at[last] = yaml.safe_load(text)
    return values


def command_line() -> str:
    """The command as it was given, for the report."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _start(config: type[C], given: dict[str, Any]) -> Any:
    """The YAML's values, checked; required fields that it lacks are left for the command line."""
    lacking = {n: _PLACEHOLDER for n, f in config.model_fields.items() if f.is_required() and n not in given}
    filled = checked(config, {**given, **lacking})
    values = {name: getattr(filled, name) for name in config.model_fields}
    start: Any = config.model_construct(**{**values, **dict.fromkeys(lacking, tyro.MISSING)})
    return start
