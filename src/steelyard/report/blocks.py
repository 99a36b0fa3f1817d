"""What a page is made of: sections of tables, figures and texts, and how numbers are written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

MISSING = "–"
_NARROW = "\u202f"
_LOOKS_NUMERIC = re.compile(r"^[-+−]?\d[\d.,\s±\[\]()%–−+eE-]*$")
_DASHES = ("", "5 2", "2 1.6", "7 2 1.6 2")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_GREY = 8
_COLOURS = (0, 1, 2, 3, 4, 5, 6, 7, 9)

KNOWN_ARMS = {
    "sft": "the starting policy",
    "plain": "all labels as given",
    "contrastive": "rewards less the mean reward of baseline responses",
    "flip": "weakest labels flipped",
    "margin": "adaptive margin from the strength",
    "flip+margin": "weakest labels flipped, then margin",
    "soft": "soft labels below zero",
    "soft+margin": "soft labels below zero, and margin",
    "drop": "weakest pairs dropped",
    "random flip": "as many labels flipped at random (control)",
    "oracle flip": "the wrong labels flipped (upper bound)",
}


@dataclass(frozen=True, slots=True)
class Style:
    """Colour (an index of the page's palette), dash and marker of one series, the same in every figure."""

    colour: int
    dash: str = ""
    marker: str = "o"


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of a legend."""

    label: str
    style: Style
    note: str = ""


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot."""

    title: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Figure:
    """Plots that are read together, with a plain reading and the figure of the paper that they mirror."""

    title: str
    reading: str
    panels: Sequence[Panel]
    keys: Sequence[Key] = ()
    mirrors: str = ""
    kind: str = "figure"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as written; `numeric` says which columns are right-aligned."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool]
    note: str = ""
    mirrors: str = ""
    kind: str = "table"


@dataclass(frozen=True, slots=True)
class WinBars:
    """Bars of win, tie and lose in per cent; one mapping a comparison."""

    title: str
    reading: str
    rows: Sequence[Mapping[str, Any]]
    mirrors: str = ""
    kind: str = "wins"


@dataclass(frozen=True, slots=True)
class Pairs:
    """Preference pairs side by side."""

    title: str
    reading: str
    pairs: Sequence[Mapping[str, Any]]
    mirrors: str = ""
    kind: str = "pairs"


@dataclass(frozen=True, slots=True)
class Samples:
    """Prompts with responses side by side."""

    title: str
    reading: str
    samples: Sequence[Mapping[str, Any]]
    mirrors: str = ""
    kind: str = "samples"


@dataclass(frozen=True, slots=True)
class Folded:
    """Long plain text, folded."""

    title: str
    text: str
    open: bool = False
    kind: str = "folded"


Block = Figure | Table | WinBars | Pairs | Samples | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page. `tiles` are headline figures: (value, what it is)."""

    id: str
    title: str
    intro: str
    blocks: Sequence[Block] = ()
    tiles: Sequence[tuple[str, str]] = ()
    keys: Sequence[Key] = field(default_factory=tuple)


def arm_styles(arms: Iterable[str]) -> dict[str, Style]:
    """One style for each arm, known arms first, so that an arm looks the same in every figure of a page."""
    known = list(KNOWN_ARMS)
    names = sorted(set(arms), key=lambda a: (known.index(a.lower()) if a.lower() in known else len(known), a))
    styles, position = {}, 0
    for name in names:
        if name.lower() == "sft":
            styles[name] = Style(_GREY)
            continue
        styles[name] = series_style(position)
        position += 1
    return styles


def series_style(position: int) -> Style:
    """Style of the n-th series: nine colours; dash and marker tell apart where colour does not."""
    return Style(_COLOURS[position % 9], _DASHES[position % 4], _MARKERS[position % 8])


def arm_keys(styles: Mapping[str, Style], arms: Iterable[str]) -> tuple[Key, ...]:
    """Legend of those `arms`, in the page's order."""
    wanted = set(arms)
    return tuple(Key(a, s, KNOWN_ARMS.get(a.lower(), "")) for a, s in styles.items() if a in wanted)


def decimals(places: int) -> Callable[[Any], str]:
    """A writer of numbers with that many decimals; what is missing or not finite is a dash."""

    def write(value: Any) -> str:
        if value is None or not math.isfinite(value):
            return MISSING
        text = f"{value:.{places}f}"
        return re.sub(r"^-(?=0\.?0*$)", "", text).replace("-", "−")

    return write


def count(value: Any) -> str:
    """A whole number, grouped from 10 000 on."""
    if value is None or not math.isfinite(value):
        return MISSING
    text = f"{int(value):,}" if abs(value) >= 10_000 else str(int(value))
    return text.replace(",", _NARROW).replace("-", "−")


def seeds_of(seeds: Sequence[int]) -> str:
    """How many seeds, in words: `1 seed`, `5 seeds`."""
    return f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"


def over(seeds: int, units: str) -> str:
    """What an interval is drawn over, in words."""
    return f"seeds and {units}" if seeds > 1 else f"{units} alone (there is one seed; nothing is known of another)"


def percent(value: float | None, places: int = 1) -> str:
    """A share as per cent."""
    return MISSING if value is None or not math.isfinite(value) else f"{decimals(places)(100 * value)}\u00a0%"


def interval(value: float | None, low: float | None, high: float | None, places: int = 3) -> str:
    """A number and its interval: 0.712 [0.695, 0.729]."""
    write = decimals(places)
    known = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return f"{write(value)} [{write(low)}, {write(high)}]" if known else write(value)


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42 s, 3 min 12 s, 2 h 05 min."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f}\u00a0s"
    whole = round(seconds)
    hours, minutes = divmod(whole // 60, 60)
    if hours:
        return f"{hours}\u00a0h {minutes:02d}\u00a0min"
    return f"{minutes}\u00a0min {whole % 60:02d}\u00a0s" if minutes else f"{whole}\u00a0s"


def table(
    title: str,
    columns: Sequence[tuple[str, Callable[[Any], str] | None]],
    rows: Iterable[Sequence[Any]],
    *,
    note: str = "",
    mirrors: str = "",
) -> Table:
    """A table of raw values: a column with a writer holds numbers, one without holds words.

    Columns of numbers that are missing in every row are left out.
    """
    values = list(rows)
    kept = [i for i, (_, write) in enumerate(columns) if write is None or any(row[i] is not None for row in values)]
    cells = [[_cell(row[i], columns[i][1]) for i in kept] for row in values]
    numeric = [columns[i][1] is not None for i in kept]
    return Table(title, [columns[i][0] for i in kept], cells, numeric, note, mirrors)


def _cell(value: Any, write: Callable[[Any], str] | None) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return MISSING
    return write(value) if write else str(value)


def free_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Table:
    """A table of any values: precision and alignment follow from what each column holds."""
    writers = [_writer([row[i] for row in rows]) for i in range(len(columns))]
    cells = [[write(value) for write, value in zip(writers, row, strict=True)] for row in rows]
    numeric = [all(_is_numeric(row[i]) for row in rows) for i in range(len(columns))]
    return Table(title, columns, cells, numeric, note)


def _is_numeric(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_LOOKS_NUMERIC.match(value.strip())) or value.strip() in ("", MISSING, "-")
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _writer(values: Sequence[Any]) -> Callable[[Any], str]:
    numbers = [abs(v) for v in values if isinstance(v, float) and math.isfinite(v)]
    largest = max(numbers, default=0.0)
    places = next((p for bound, p in ((10, 3), (100, 2), (1000, 1)) if largest < bound), 0)
    tiny = 0 < largest < 0.01

    def write(value: Any) -> str:
        if value is None:
            return MISSING
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, int):
            return count(value)
        if isinstance(value, float):
            return f"{value:.3g}".replace("-", "−") if tiny else decimals(places)(value)
        return str(value)

    return write
