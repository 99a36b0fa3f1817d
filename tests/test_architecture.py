"""Who may import whom, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "src" / "steelyard"
BASE = {"errors", "config", "types"}
MATHS = {"losses", "strength", "denoise", "rewards", "variance", "running", "advantages"}
TOOLS = {"run_dir", "checkpoint", "parallel", "memory", "progress", "group"}
ROOMS = {"models", "data", "sampling"}
WORK = {"train", "evaluate", "baselines", "rollout", "probe", "measure", "members", "scorer", "iterate"}
WORK |= {"ppo_settings", "rounds_settings", "actors", "watch"}
MAY_IMPORT = {
    "errors": set(), "config": set(), "types": set(),
    **dict.fromkeys(TOOLS, {"errors"} | TOOLS),
    **dict.fromkeys(MATHS, BASE | MATHS),
    **dict.fromkeys(ROOMS, BASE | MATHS | ROOMS),
    "report": BASE | {"run_dir"},
    "simulate": BASE,
    **dict.fromkeys(WORK, BASE | MATHS | TOOLS | ROOMS | WORK),
}  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports must be absolute"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def owner(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("steelyard.")}
    if owner(path) in MAY_IMPORT:
        assert ours - {owner(path), "__version__"} <= MAY_IMPORT[owner(path)]


def test_stages_of_training_do_not_import_each_other() -> None:
    stages = {path.stem for path in (ROOT / "train").glob("*.py")} - {"__init__", "optim", "pairwise", "contrastive"}
    for stage in stages:
        for name in imports(ROOT / "train" / f"{stage}.py"):
            assert not any(name.startswith(f"steelyard.train.{other}") for other in stages - {stage}), (stage, name)


def test_light_commands_do_not_import_torch() -> None:
    code = "import sys, steelyard.report, steelyard.run_dir, steelyard.types; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for path in (ROOT / "report").rglob("*.py"):
        assert not any(name.split(".")[0] == "torch" for name in imports(path)), path
