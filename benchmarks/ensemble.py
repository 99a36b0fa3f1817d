"""Ten exact members, or as many as you like: `steelyard strength --backend full` against as many runs of TRL.

    python benchmarks/ensemble.py --model FOLDER --data FILE [--pairs 32] [--members 2] [--rounds 2]

Whole jobs, from the start of the process to the scores on disk: every member trains on all pairs once and scores them
all. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rounds import ratios, shown, spread, table, threads_env

HERE = Path(__file__).resolve().parent
TRL, OURS = "trl", "steelyard"


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    env = os.environ | threads_env(args.threads) | {"HF_HUB_OFFLINE": "1"}
    ours, theirs = [sys.executable], [str(args.trl_python.absolute())]
    worker = str(HERE / "ensemble_workers.py")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in args.variants}
    with tempfile.TemporaryDirectory(dir=args.out) as scratch:
        folder = Path(scratch)
        settings = {name: getattr(args, name) for name in ("pairs", "batch", "micro", "max_length", "precision", "lr")}
        (folder / "settings.json").write_text(json.dumps(settings))
        log = args.out / "ensemble.log"
        with log.open("w") as out:
            _timed([*ours, worker, "prepare", str(folder), args.model, args.data], env, out)
            for n in range(args.rounds):
                for name in args.variants[:: 1 if n % 2 == 0 else -1]:
                    target = folder / f"{name}-{n}"
                    if name == TRL:
                        runs = [[*theirs, worker, "trl", str(folder), str(target), str(m)] for m in range(args.members)]
                    else:
                        runs = [[*ours, worker, "steelyard", str(folder), str(target), str(args.members), args.model]]
                    costs = [_timed(run, env, out) for run in runs]
                    found[name].append((sum(wall for wall, _ in costs), sum(cpu for _, cpu in costs)))
                    print(
                        f"round {n + 1}  {name:<10} {found[name][-1][0]:8.1f} s {found[name][-1][1]:8.1f} s CPU",
                        flush=True,
                    )
    result = {"settings": settings | {"members": args.members, "threads": args.threads, "model": Path(args.model).name}}
    rows = [["", "seconds", "CPU seconds", "steelyard faster", "by CPU time"]]
    for name, made in found.items():
        sums = [spread([c[i] for c in made]) for i in (0, 1)]
        faster = [ratios([c[i] for c in made], [c[i] for c in found[OURS]]) for i in (0, 1)]
        result[name] = {"rounds": made, "faster": faster}
        rows.append([name, *(shown(x, 1) for x in sums), *(shown(x) for x in faster)])
    print(
        f"\n{args.members} members, {args.pairs} pairs, {args.rounds} round(s); median (smallest - largest)\n"
        f"{table(rows)}"
    )
    path = args.out / "ensemble.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {path}")


def _timed(command: list[str], env: dict[str, str], log: object) -> tuple[float, float]:
    """(wall, CPU of the process and all that it started); ends the benchmark if the command fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)  # type: ignore[call-overload]
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(
            f"{' '.join(command)}: failed with status {os.waitstatus_to_exitcode(status)}; its output is in the log"
        )
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="folder of a language model")
    add("--data", required=True, help="preferences")
    add("--pairs", type=int, default=64, help="pairs that every member trains on and scores")
    add("--members", type=int, default=10, help="members of the ensemble, and runs of TRL")
    add("--rounds", type=int, default=2, help="repetitions; who begins changes")
    add("--batch", type=int, default=16, help="pairs a step")
    add("--micro", type=int, default=8, help="pairs at once in TRL; 8 is its default")
    add("--max-length", type=int, default=512, help="longer pairs are left out")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the products")
    add("--lr", type=float, default=1e-5, help="learning rate")
    add("--threads", type=int, default=1, help="threads of each process")
    add("--trl-python", type=Path, default=HERE / ".venv-trl/bin/python", help="interpreter of TRL's environment")
    add("--variants", nargs="+", choices=(TRL, OURS), default=[TRL, OURS], help="what is run; our own always")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for ensemble.json and the log")
    args = parser.parse_args()
    if OURS not in args.variants:
        parser.error(f"--variants: {OURS} must be among them, all are compared with it")
    if TRL in args.variants and not args.trl_python.exists():
        parser.error(f"{args.trl_python}: no such interpreter; benchmarks/README.md says how TRL's environment is made")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
