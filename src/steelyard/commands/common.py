"""What the commands share: options that all have, files that are never overwritten, tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from steelyard.errors import InputError
from steelyard.run_dir import write_json_atomic

Args = Sequence[str]
OUT: Any = (Path, tyro.MISSING, "folder to write to")
RESUME: Any = (bool, False, "go on with the run that the folder holds")


def new(path: Path) -> Path:
    """A file that can be written. Raises InputError if it is there: results are never overwritten."""
    if path.exists():
        raise InputError(f"{path}: exists already; give another folder (--out)")
    if file := next((p for p in path.parents if p.is_file()), None):
        raise InputError(f"{file}: must be a folder, but it is a file; give another path (--out)")
    return path


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(path, content)


def show(found: Sequence[dict[str, Any]]) -> None:
    """Print tables as the report has them, cells whole: in a file as wide as it takes, on a narrow terminal folded."""
    console = Console()
    for t in found:
        table = Table(title=t["title"], title_justify="left", caption=t.get("note"), caption_justify="left")
        for i, column in enumerate(t["columns"]):
            table.add_column(str(column), justify="left" if i == 0 else "right", overflow="fold")
        for row in t["rows"]:
            table.add_row(*(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row))
        if not console.is_terminal:
            wanted = Measurement.get(console, console.options.update(max_width=1000), table).maximum
            console.width = max(console.width, wanted)
        console.print()
        console.print(table)
