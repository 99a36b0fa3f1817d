"""A MetaRM step against a plain step on the same batches: time and peak memory.

    python benchmarks/metarm.py --model FOLDER --data FILE [--threads 2]

The meta batch is the step's own pairs, two responses to each prompt: both passes of Algorithm 1 compute the same
tokens as the plain step's one, so twice its time is what the algorithm itself asks for. float32, as MetaRM needs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
from dataclasses import asdict
from typing import Any

from reward_model import add_common_arguments, describe, prepared, started
from rounds import alternate, ratios, shown, spread, table

TIME_LIMIT = 2.2  # of a plain step
PLAIN, META = "steelyard", "metarm"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    args = parser.parse_args()
    args.precision = "float32"
    with prepared(args, [*([args.warmup] if args.warmup else []), *[args.steps] * args.rounds]) as (folder, plan):
        describe(plan)
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(w) for w in started([PLAIN, META], args, folder)]
            about = {w.name: w.about for w in workers}
            found = alternate(workers, warmup=args.warmup, steps=args.steps, rounds=args.rounds)
    gradient = 4 * about[PLAIN]["parameters"]
    plain, meta = found[PLAIN], found[META]
    result: dict[str, Any] = {
        "settings": {k: v for k, v in asdict(plan.settings).items() if k != "start"} | {"model": args.model_name},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": args.threads},
        "versions": about[PLAIN]["versions"],
        "rounds": {name: [asdict(r) for r in made] for name, made in found.items()},
        "seconds_per_step": {name: spread([r.seconds / args.steps for r in made]) for name, made in found.items()},
        "time_over_plain": ratios([r.seconds for r in meta], [r.seconds for r in plain]),
        "cpu_time_over_plain": ratios([r.cpu_seconds for r in meta], [r.cpu_seconds for r in plain]),
        "gradient_bytes": gradient,
        "extra_bytes": meta[-1].peak_bytes - plain[-1].peak_bytes,
    }
    rows = [["", "s/step", "peak GB"]]
    for name, made in found.items():
        rows.append([name, shown(result["seconds_per_step"][name]), f"{made[-1].peak_bytes / 1e9:.2f}"])
    print(
        f"\n{args.model_name}, float32, {args.threads} thread(s), {args.batch} pairs a step; median (smallest - "
        f"largest) of {args.rounds} round(s) of {args.steps} step(s)\n{table(rows)}\n"
        f"time over plain: {shown(result['time_over_plain'])}, CPU time {shown(result['cpu_time_over_plain'])}; "
        f"limit {TIME_LIMIT}\n"
        f"memory over plain: {result['extra_bytes'] / 1e6:.0f} MB; one gradient has {gradient / 1e6:.0f} MB"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "metarm.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {args.out / 'metarm.json'}")


if __name__ == "__main__":
    main()
