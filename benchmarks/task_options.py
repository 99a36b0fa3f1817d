"""What the parents of the sampling and PPO benchmarks have in common: options, preparation, the record."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rounds import GIVE_BACK, Round, Worker, ratios, shown, spread, table, threads_env
from task import Task

HERE = Path(__file__).resolve().parent


def add_task_arguments(parser: argparse.ArgumentParser, *, prompts: int) -> None:
    """Options of both benchmarks."""
    add = parser.add_argument
    add("--model", required=True, help="folder of a language model")
    add("--data", required=True, help="prompts or preferences: any file that `steelyard sample` reads")
    add("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="of all programs")
    add("--threads", type=int, default=1, help="of each process; with 1 the CPU times are comparable under load")
    add("--prompts", type=int, default=prompts, help="prompts at once")
    add("--k", type=int, default=4, help="responses to each prompt")
    add("--new-tokens", type=int, default=64, help="tokens of a response")
    add("--natural", action="store_true", help="responses may end earlier (else all have --new-tokens)")
    add("--max-prompt", type=int, default=256, help="longer prompts are left out")
    add("--warmup", type=int, default=1, help="unmeasured steps before the first round")
    add("--steps", type=int, default=1, help="steps of each program in a round")
    add("--rounds", type=int, default=5, help="how often each program has its turn")
    add("--seed", type=int, default=0, help="choice of the prompts, draws")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the result and the workers' logs")


@contextlib.contextmanager
def prepared(
    args: argparse.Namespace, *, rollouts: bool, options: Mapping[str, Any] | None = None
) -> Iterator[tuple[Path, Task]]:
    """The path of a complete task, and the task; gone at the end."""
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix="work-") as scratch:
        path = Path(scratch).resolve() / "task.json"
        Task(
            start=str(path.parent),
            precision=args.precision,
            threads=args.threads,
            k=args.k,
            new_tokens=args.new_tokens,
            fixed=not args.natural,
            max_prompt=args.max_prompt,
            seed=args.seed,
            options=dict(options or {}),
        ).write(path)
        command = [sys.executable, str(HERE / "prepare_task.py"), args.model, args.data, str(path), str(args.prompts)]
        command += ["rollouts"] if rollouts else []
        if subprocess.run(command, env=os.environ | threads_env(args.threads)).returncode:
            sys.exit("nothing was measured")
        yield path, Task.read(path)


def started(names: Mapping[str, Sequence[str]], args: argparse.Namespace, path: Path) -> Iterator[Worker]:
    """The workers, to be entered one after the other; `names` give each one's interpreter and file."""
    environment = threads_env(args.threads) | GIVE_BACK  # a phase's peak must not hold what the phase before left
    for name, command in names.items():
        yield Worker(name, [*command, name, str(path)], args.out / f"{name}.log", environment)


def record(
    args: argparse.Namespace, task: Task, workers: Sequence[Worker], found: Mapping[str, Sequence[Round]]
) -> dict[str, Any]:
    """Everything that was seen, for the JSON."""
    return {
        "settings": task.about() | {"model": Path(args.model).resolve().name, "prompts": len(task.prompts)},
        "prompt_tokens": [len(p) for p in task.prompts],
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": args.threads},
        "warmup": args.warmup,
        "steps": args.steps,
        "about": {w.name: w.about for w in workers},
        "rounds": {name: [asdict(r) for r in made] for name, made in found.items()},
    }


def compared(found: Mapping[str, Sequence[Round]], slow: str, unit: float) -> dict[str, Any]:
    """Per program: `unit` over its times, peak memory, and how many times longer `slow` takes and how much more it
    holds. The unit is that of one round."""
    rows: dict[str, Any] = {}
    for name, made in found.items():
        rows[name] = {
            "per_second": spread([unit / r.seconds for r in made]),
            "per_cpu_second": spread([unit / r.cpu_seconds for r in made]),
            "peak_bytes": max(r.peak_bytes for r in made),
        }
        if slow in found and name != slow:
            theirs = found[slow]
            rows[name]["times_faster"] = ratios([r.seconds for r in theirs], [r.seconds for r in made])
            rows[name]["cpu_times_faster"] = ratios([r.cpu_seconds for r in theirs], [r.cpu_seconds for r in made])
            rows[name]["peak_share"] = rows[name]["peak_bytes"] / max(r.peak_bytes for r in theirs)
    return rows


def shown_table(rows: Mapping[str, Any], slow: str, unit: str, digits: int) -> str:
    """The comparison for people."""
    head = ["", f"{unit}/s", f"{unit}/CPU s", "peak GB", f"faster than {slow}", "by CPU time", "share of its memory"]
    lines = [head]
    for name, row in rows.items():
        ratio = [shown(row[key]) if key in row else "1" for key in ("times_faster", "cpu_times_faster")]
        share = f"{row['peak_share']:.2f}" if "peak_share" in row else "1"
        speed = [shown(row[key], digits) for key in ("per_second", "per_cpu_second")]
        lines.append([name, *speed, f"{row['peak_bytes'] / 1e9:.2f}", *ratio, share])
    return table(lines)


def write(result: Mapping[str, Any], out: Path, name: str) -> None:
    """The record beside the logs."""
    path = out / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {path}")
