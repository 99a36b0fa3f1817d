"""One PPO update: Steelyard against TRL's last PPOTrainer on the same rollouts, in turn.

    python benchmarks/ppo.py --model FOLDER --data FILE [--precision bfloat16] [--threads 2]

See benchmarks/README.md for what is compared, how it is measured, and how TRL's environment is made.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rounds import Worker, alternate
from task import Task
from task_options import HERE, add_task_arguments, compared, prepared, record, shown_table, started, write

SLOW = "trl"
VARIANTS = (SLOW, "steelyard", "steelyard-shared")


def main() -> None:
    """Measure, print, write."""
    args = _arguments()
    options = {name: getattr(args, name) for name in ("micro", "epochs", "minibatches", "lr", "max_tokens")}
    options["logit_chunk"] = args.logit_chunk
    with prepared(args, rollouts=True, options=options) as (path, task):
        _describe(task)
        commands = {
            v: [str(args.trl_python.absolute()) if v == SLOW else sys.executable, str(HERE / "ppo_workers.py")]
            for v in args.variants
        }
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(w) for w in _in_precision(commands, args, path)]
            found = alternate(workers, warmup=args.warmup, steps=args.steps, rounds=args.rounds)
    result = record(args, task, workers, found)
    result["compared"] = compared(found, SLOW, unit=args.steps)
    rows = len(task.prompts) * task.k
    print(
        f"\n{result['settings']['model']}, {task.precision}, {task.threads} thread(s), {rows} responses to "
        f"{len(task.prompts)} prompts, {args.epochs} epoch(s); median (smallest - largest) of {args.rounds} round(s) "
        f"of {args.steps} update(s)\n{shown_table(result['compared'], SLOW, 'updates', 4)}"
    )
    for name, made in found.items():
        print(f"{name}: {made[0].tokens / args.steps:.0f} tokens an update, policy loss {made[0].losses[0]:.5f}")
    write(result, args.out, "ppo")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser, prompts=8)
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--epochs", type=int, default=2, help="passes over the rollouts in an update")
    add("--minibatches", type=int, default=1, help="optimiser steps a pass; TRL makes one whatever it is told")
    add("--micro", type=int, default=8, help="responses at once in TRL; 8 is its default")
    add("--max-tokens", type=int, default=4096, help="tokens at once in Steelyard")
    add("--logit-chunk", type=int, help="positions whose logits are in memory at once in Steelyard")
    add("--lr", type=float, default=1e-6, help="learning rate, constant")
    add("--trl-python", type=Path, default=HERE / ".venv-trl-ppo/bin/python", help="interpreter of TRL's environment")
    args = parser.parse_args()
    if args.prompts * args.k % args.micro:
        parser.error(f"--micro must divide prompts x k = {args.prompts * args.k}, got {args.micro}")
    if SLOW in args.variants and not args.trl_python.exists():
        parser.error(f"{args.trl_python}: no such interpreter; benchmarks/README.md says how TRL's environment is made")
    return args


def _in_precision(commands: Mapping[str, Sequence[str]], args: argparse.Namespace, path: Path) -> Iterator[Worker]:
    """PPOTrainer leaves the precision to `accelerate launch --cpu --mixed_precision`, which sets these variables."""
    said = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    if args.precision == "bfloat16":
        said["ACCELERATE_MIXED_PRECISION"] = "bf16"
    for worker in started(commands, args, path):
        yield replace(worker, env={**worker.env, **said}) if worker.name == SLOW else worker


def _describe(task: Task) -> None:
    lengths = [len(r) for group in task.responses for r in group]
    print(
        f"{len(task.prompts)} prompts of {sum(map(len, task.prompts)) / len(task.prompts):.0f} tokens (at most "
        f"{max(map(len, task.prompts))}), {len(lengths)} responses of {sum(lengths) / len(lengths):.0f}"
    )


if __name__ == "__main__":
    main()
