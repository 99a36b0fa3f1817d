"""Settings of one command: a YAML file and dotted options, into a checked configuration."""

from __future__ import annotations

import copy
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import field, make_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
import yaml
from pydantic import ValidationError

from steelyard.config import Config, explain
from steelyard.errors import InputError

C = TypeVar("C", bound=Config)


class _Once(yaml.SafeLoader):
    """Refuses a name that stands twice in one section, where YAML's own loader silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    problem = f"{key.value} stands twice in one section, and the first would be lost; keep one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises InputError with file and line."""
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Once)
    except FileNotFoundError:
        raise InputError(f"{path}: no such settings file") from None
    except OSError as error:
        raise InputError(f"{path}: must be a readable file of settings: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 at byte offset {error.start}; convert the file to UTF-8") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {str(error).replace('<unicode string>', str(path))}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{path}: settings must be `field: value` lines, got a {type(content).__name__}")
    return content


def parse(
    config: type[C], args: Sequence[str], *, verb: str, about: str, yaml_first: bool = True, **extra: Any
) -> tuple[C, Any]:
    """(configuration, other options) from `[settings.yaml] --option value ...`; without `yaml_first`, options alone.

    `extra` are options beside the configuration: name -> (type, default or tyro.MISSING, help). Only fields that the
    file or an option names count as set, even at their default. Unknown or unreadable options end the program with
    their names (status 2, as tyro does). Raises InputError for everything else.
    """
    args = list(args)
    path = args.pop(0) if yaml_first and args and args[0].endswith((".yaml", ".yml")) else None
    if yaml_first:
        about += (
            f".\n\nSettings may stand in a YAML file, given first: `steelyard {verb} settings.yaml ...`; options win"
        )
    given = {} if path is None else read_yaml(path)
    fields: list[Any] = [("settings", Annotated[_draft(config, given), tyro.conf.arg(name="")])]
    for name, (kind, value, text) in extra.items():
        kind = Annotated[kind, tyro.conf.arg(help=text)]
        fields.append((name, kind) if value is tyro.MISSING else (name, kind, field(default=value)))
    holder = make_dataclass("Options", fields, kw_only=True)
    parsed: Any = tyro.cli(holder, args=args, prog=f"steelyard {verb}", description=about)
    options = option_names(args)
    _require_names_once(config, args)
    chosen = [found for name in options if (found := _find(config, name))]
    values = copy.deepcopy(given)
    for dotted in chosen:
        value = parsed.settings
        for part in dotted.split("."):
            value = getattr(value, part)
        _put(values, dotted, value, f"--{dotted}")
    file = "" if path is None else f"{path}: "
    try:
        return checked(config, values, lambda f: f"--{f.replace('_', '-')}" if f in chosen else f"{file}{f}"), parsed
    except InputError as error:
        sections = [
            name for name, value in given.items() if isinstance(value, dict) and name not in config.model_fields
        ]
        if len(sections) < 2:
            raise
        hint = f"{path} looks like a recipe or a study; `steelyard run` and `steelyard study ...` take those"
        raise InputError(f"{error}\n{hint}") from None


def checked(config: type[C], values: dict[str, Any], label: Callable[[str], str] = str) -> C:
    """`config(**values)`; raises InputError that names each field, what it must be and what was received."""
    try:
        return config(**values)
    except ValidationError as error:
        raise InputError(explain(error, label)) from None
    except TypeError:
        raise InputError(f"settings must have names of text, got {list(values)}") from None


def override(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Apply `section.field=value` changes (values in YAML) to nested settings. Raises InputError for other forms."""
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals or not path:
            raise InputError(f"an override is written section.field=value, got {change!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{change!r}: the value is not valid YAML: {getattr(error, 'problem', error)}") from None
        _put(values, path, value, repr(change))
    return values


def command_line() -> str:
    """The command as a shell takes it, for the report."""
    return shlex.join(["steelyard", *sys.argv[1:]])


def _put(values: dict[str, Any], dotted: str, value: Any, where: str) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise InputError(f"{where}: {parent} holds a value, not a section")
    values[last] = value


def _draft(config: type[Config], given: Any = (), start: Config | None = None) -> Any:
    """A dataclass with the fields of `config` and none of its checks, which tyro would report in pydantic's words.

    `start` holds the defaults where they are not the class's own; fields in `given` are no longer required.
    """
    fields: list[Any] = []
    for name, info in config.model_fields.items():
        kind: Any = info.annotation
        required = info.is_required() and start is None
        default = None if required else getattr(start, name) if start else info.get_default(call_default_factory=True)
        if isinstance(default, Config):
            kind = _draft(type(default), start=default)
            default = kind()
        elif required and name in given:
            kind, required = kind | None, False
        kind = Annotated[kind, tyro.conf.arg(help=info.description)]
        fields.append((name, kind) if required else (name, kind, field(default_factory=partial(copy.copy, default))))
    return make_dataclass(config.__name__, fields, kw_only=True)


def option_names(args: Sequence[str]) -> list[str]:
    """Names of the options, with underscores. Raises InputError if one occurs twice: the first would be lost."""
    names = [a[2:].partition("=")[0].replace("-", "_") for a in args if a.startswith("--")]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"--{name.replace('_', '-')}: given twice; give it once, with all its values behind it")
    return names


def _require_names_once(config: type[Config], args: Sequence[str]) -> None:
    """Raise InputError where `--validation NAME FILE ...` and its like give one name twice: the first would be lost."""
    for name, info in config.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        if info.annotation == dict[str, str] and option in args:
            rest = list(args[args.index(option) + 1 :])
            names = rest[: next((i for i, a in enumerate(rest) if a.startswith("--")), len(rest))][::2]
            if twice := next((n for n in names if names.count(n) > 1), None):
                raise InputError(
                    f"{option}: {twice} is named twice, and the first would be lost; give each its own name"
                )


def _find(config: type[Config], name: str) -> str | None:
    """The dotted field that an option sets (`optim.no_decay` sets `optim.decay`); None for another option."""
    first, _, rest = name.partition(".")
    fields = config.model_fields
    if rest and first in fields:
        default = fields[first].get_default(call_default_factory=True)
        found = _find(type(default), rest) if isinstance(default, Config) else None
        return f"{first}.{found}" if found else None
    return next((n for n in (name, name.removeprefix("no_")) if n in fields), None)
