"""Sampling: Steelyard against transformers' `generate(num_return_sequences=k)` on the same prompts, in turn.

    python benchmarks/sampling.py --model FOLDER --data FILE [--precision bfloat16] [--threads 2]

See benchmarks/README.md for what is compared and how it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from rounds import alternate
from task_options import HERE, add_task_arguments, compared, prepared, record, shown_table, started, write

SLOW, OURS = "generate", "steelyard"
VARIANTS = (SLOW, "generate-sorted", "steelyard-transformers", OURS)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_task_arguments(parser, prompts=32)
    add = parser.add_argument
    add("--variants", nargs="+", choices=VARIANTS, default=[SLOW, OURS], metavar="NAME", help=", ".join(VARIANTS))
    add("--at-once", type=int, default=8, help="prompts of similar length in one call of generate-sorted")
    args = parser.parse_args()
    with prepared(args, rollouts=False, options={"at_once": args.at_once}) as (path, task):
        mean = sum(map(len, task.prompts)) / len(task.prompts)
        print(f"{len(task.prompts)} prompts of {mean:.0f} tokens (at most {max(map(len, task.prompts))}), k = {task.k}")
        command = [sys.executable, str(HERE / "sampling_workers.py")]
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(w) for w in started(dict.fromkeys(args.variants, command), args, path)]
            found = alternate(workers, warmup=args.warmup, steps=args.steps, rounds=args.rounds)
    result = record(args, task, workers, found)
    counts = {name: [r.tokens for r in made] for name, made in found.items()}
    if task.fixed:
        result["compared"] = compared(found, SLOW, unit=len(task.prompts) * task.k * task.new_tokens * args.steps)
        unit = "tokens"
    else:
        # Responses end where they will: the programs draw different ones, so responses are counted, not tokens.
        result["compared"] = compared(found, SLOW, unit=len(task.prompts) * task.k * args.steps)
        unit = "responses"
    length = f"{task.new_tokens} tokens each" if task.fixed else f"at most {task.new_tokens} tokens"
    print(
        f"\n{result['settings']['model']}, {task.precision}, {task.threads} thread(s), {len(task.prompts)} prompts x "
        f"{task.k} responses, {length}; median (smallest - largest) of {args.rounds} round(s)\n"
        f"{shown_table(result['compared'], SLOW, unit, 1)}\ntokens drawn in each round: {counts}"
    )
    write(result, args.out, "sampling")


if __name__ == "__main__":
    main()
