"""What every configuration has in common: frozen, no unknown field, errors in plain words."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

Seed = Annotated[int, Field(ge=0)]


def _paths(value: Any) -> Any:
    # Before the union is tried: its own error speaks of every branch, by the name of its type.
    if isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)):
        return value
    raise ValueError(f"must be a path, or a list of paths, got {value!r}")


Paths = Annotated[str | tuple[str, ...], BeforeValidator(_paths)]


class Config(BaseModel):
    """Base of all configurations: immutable, unknown fields refused by name, defaults validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, values: Any) -> Any:
        """A section given in part keeps the rest of the default that this configuration has for it.

        Without this, `actor: {lr: 1e-4}` would also bring back the decay that PPO's default for it turns off.
        """
        if not isinstance(values, Mapping):
            return values
        completed = dict(values)
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True) if isinstance(values.get(name), Mapping) else None
            if isinstance(default, Config):
                completed[name] = default.model_dump(exclude_unset=True) | dict(values[name])
        return completed

    @model_validator(mode="before")
    @classmethod
    def _measure_precision(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("precision") != "auto" or "precision" not in cls.model_fields:
            return values
        return {**values, "precision": fastest_precision(str(values.get("device", "cpu")))}

    def given(self) -> set[str]:
        """The fields that somebody chose, to refuse those that would have no effect.

        Where every field is set (a resolved file, a command line), it cannot be told which were chosen: then those
        that differ from their default.
        """
        fields = type(self).model_fields
        # A resolved file leaves out what is not written at its default (a device).
        unwritten = {n for n, field in fields.items() if field.exclude_if and field.exclude_if(getattr(self, n))}
        if self.model_fields_set | unwritten != set(fields):
            return set(self.model_fields_set)
        return {n for n, field in fields.items() if getattr(self, n) != field.get_default(call_default_factory=True)}


def merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` settings over the `shared` ones, section by section."""
    both = {n: merged(shared[n], v) for n, v in own.items() if isinstance(v, dict) and isinstance(shared.get(n), dict)}
    return {**shared, **own, **both}


@functools.cache
def fastest_precision(device: str) -> str:
    """`bfloat16` if a layer's products (forward, both gradients) take less than .8 of float32's time, measured here and
    now, else `float32`. What runs is recorded under that name, never as "auto"."""
    import torch

    def seconds(dtype: torch.dtype) -> float:
        x, w, g = (torch.ones(shape, dtype=dtype, device=device) for shape in ((256, 512), (512, 512), (256, 512)))
        best = float("inf")
        for _ in range(4):  # the first warms up
            began = time.perf_counter()
            out = x @ w.T, g @ w, g.T @ x
            float(out[-1][0, 0])  # waits for a GPU
            best = min(best, time.perf_counter() - began)
        return best

    try:
        return "bfloat16" if seconds(torch.bfloat16) < 0.8 * seconds(torch.float32) else "float32"
    except (RuntimeError, AssertionError):  # no such device: that field says so itself
        return "float32"


def _reachable(name: str) -> str:
    """The name of a device. Raises ValueError unless torch reaches it here."""
    kind, colon, number = name.partition(":")
    if name == "cpu":
        return name
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise ValueError(f"must be cpu, cuda or cuda:N, got {name!r}")
    import torch

    if int(number or 0) >= (found := torch.cuda.device_count()):
        why = f"torch finds {found} CUDA devices here" if torch.version.cuda else "this torch is built without CUDA"
        raise ValueError(f"{name!r} cannot be reached: {why}; use cpu, or mend the driver or the installation of torch")
    return name


Device = Annotated[
    str,
    AfterValidator(_reachable),
    # Not written where it is the default, so that runs from before there were devices can be resumed.
    Field(exclude_if=lambda name: name == "cpu", description="where the models run: cpu, cuda or cuda:N"),
]
"""A field `device: Device = "cpu"` of a stage that runs models."""


_MUST = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length}",
    "dict_type": "must be a section of `name: value` lines",
    "model_type": "must be a section of `name: value` lines",
}


def explain(error: ValidationError, label: Callable[[str], str] = str) -> str:
    """One line per wrong field: what it must be, what was received. `label` says where the dotted field stands."""
    lines = []
    for e in error.errors():
        field = ".".join(map(str, e["loc"]))
        if e["type"] == "value_error":
            message = e["msg"].removeprefix("Value error, ")
        elif e["type"] == "extra_forbidden":
            message = "no such setting; remove it or check its spelling"
        elif e["type"] == "missing":
            message = "is needed; give it"
        else:
            must = _MUST.get(e["type"], e["msg"].replace("Input should be", "must be"))
            message = f"{must.format(**e.get('ctx', {}))}, got {e['input']!r}"
        place = label(field).rstrip(".: ")
        lines.append(f"{place}: {message}" if place else message)
    return "\n".join(lines)
