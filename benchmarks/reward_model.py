"""Reward-model training: Steelyard against TRL's RewardTrainer and a length-bucketed transformers loop.

    python benchmarks/reward_model.py --model FOLDER --data FILE [--precision bfloat16] [--threads 2]
    python benchmarks/reward_model.py --model FOLDER --data FILE --curve 20

See benchmarks/README.md for what is compared and how it is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from plan import Plan, Settings
from rounds import GIVE_BACK, Round, Worker, alternate, ratios, shown, spread, table, threads_env

HERE = Path(__file__).resolve().parent
VARIANTS = ("trl", "trl-nockpt", "hf-bucketed", "steelyard")
OURS = "steelyard"
CURVE_LIMIT = 1e-3  # largest difference of a step's loss from ours, float32


def main() -> None:
    """Measure, print, write; status 1 if `--curve` finds losses too far apart."""
    args = _arguments()
    curve = args.curve is not None
    warmup, steps, rounds = (0, args.curve, 1) if curve else (args.warmup, args.steps, args.rounds)
    # The bucketed loop sorts within a round; for a curve within a step, so that its steps hold the same pairs.
    windows = [1] * args.curve if curve else [*([warmup] if warmup else []), *[steps] * rounds]
    with prepared(args, windows) as (folder, plan):
        describe(plan)
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(w) for w in started(args.variants, args, folder)]
            about = {w.name: w.about for w in workers}
            found = alternate(workers, warmup=warmup, steps=steps, rounds=rounds)
    result = {
        "settings": {k: v for k, v in asdict(plan.settings).items() if k != "start"} | {"model": args.model_name},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "threads": args.threads},
        "tokens": token_counts(plan),
        "warmup": warmup,
        "steps": steps,
        "versions": {name: facts["versions"] for name, facts in about.items()},
        "loaded_bytes": {name: facts["peak_bytes"] for name, facts in about.items()},
        "rounds": {name: [asdict(r) for r in made] for name, made in found.items()},
        "summary": summary(found, pairs=steps * plan.settings.batch),
        # Steps of the bucketed loop hold other pairs, unless it may only sort within a step.
        "loss_difference": loss_differences(found, [n for n in found if curve or n != "hf-bucketed"]),
    }
    print()
    print(text(result))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "reward_model.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {args.out / 'reward_model.json'}")
    if curve and (far := [n for n, d in result["loss_difference"].items() if not d <= CURVE_LIMIT]):
        sys.exit(f"the loss of {', '.join(far)} differs from {OURS}'s by more than {CURVE_LIMIT} in some step")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    add = parser.add_argument
    add("--precision", choices=["float32", "bfloat16"], default="bfloat16", help="bfloat16 is TRL's default")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--micro", type=int, default=8, help="pairs at once in TRL; 8 is its default")
    add("--bucket", type=int, default=4, help="pairs of similar length at once in hf-bucketed")
    add("--curve", type=int, metavar="STEPS", help="compare losses over this many steps in float32; no measuring")
    add("--trl-python", type=Path, default=HERE / ".venv-trl/bin/python", help="interpreter of TRL's environment")
    args = parser.parse_args()
    if args.batch % args.micro:
        parser.error(f"--micro must divide --batch, got {args.micro} and {args.batch}")
    if any(v.startswith("trl") for v in args.variants) and not args.trl_python.exists():
        parser.error(f"{args.trl_python}: no such interpreter; make TRL's environment with `make bench-env`")
    if args.curve is not None:
        args.precision = "float32"
    return args


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark of reward models asks for."""
    add = parser.add_argument
    add("--model", required=True, help="folder of a language model, or of a reward model to continue")
    add("--data", required=True, help="preferences: any file that `steelyard train reward` reads")
    add("--threads", type=int, default=1, help="of each process; with 1 the CPU times are comparable under load")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="on a GPU peak memory is the GPU's")
    add("--batch", type=int, default=16, help="pairs a step")
    add("--max-tokens", type=int, default=2048, help="tokens at once in Steelyard; its default")
    add(
        "--max-length", type=int, default=1024, help="pairs with a longer sequence are left out, for all; TRL's default"
    )
    add(
        "--give-back",
        action="store_true",
        help="sleeping programs give freed memory back, which their next turn pays for",
    )
    add("--lr", type=float, default=1e-5, help="learning rate, constant")
    add("--warmup", type=int, default=2, help="unmeasured steps before the first round")
    add("--steps", type=int, default=8, help="steps of each program in a round")
    add("--rounds", type=int, default=5, help="how often each program has its turn")
    add("--seed", type=int, default=0, help="choice and order of the pairs, new head")
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the result and the workers' logs")


@contextlib.contextmanager
def prepared(args: argparse.Namespace, windows: Sequence[int]) -> Iterator[tuple[Path, Plan]]:
    """A folder with the plan and the model that all start from; gone at the end."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # when stopped, leave no copy of the model behind
    args.model_name = Path(args.model).resolve().name
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out, prefix="work-") as scratch:
        path = Path(scratch) / "plan.json"
        settings = Settings(
            start=str(Path(scratch).resolve() / "start"),
            precision=args.precision,
            threads=args.threads,
            device=args.device,
            batch=args.batch,
            micro=getattr(args, "micro", args.batch),
            bucket=getattr(args, "bucket", args.batch),
            max_tokens=args.max_tokens,
            max_length=args.max_length,
            lr=args.lr,
            seed=args.seed,
        )
        Plan(settings, [], list(windows)).write(path)
        command = [sys.executable, str(HERE / "prepare.py"), args.model, args.data, str(path)]
        if subprocess.run(command, env=os.environ | threads_env(args.threads)).returncode:
            sys.exit("nothing was measured")
        yield Path(scratch), Plan.read(path)


def started(names: Sequence[str], args: argparse.Namespace, folder: Path) -> Iterator[Worker]:
    """The workers, to be entered one after the other: loading at once would add up their peaks."""
    for name in names:
        python = str(args.trl_python.absolute()) if name.startswith("trl") else sys.executable
        command = [python, str(HERE / "workers.py"), name, str(folder / "plan.json")]
        environment = threads_env(args.threads) | (GIVE_BACK if args.give_back else {})
        yield Worker(name, command, args.out / f"{name}.log", environment)


# ---- numbers ---------------------------------------------------------------------------------------------------


def token_counts(plan: Plan) -> dict[str, int]:
    """Tokens of all steps: prompts counted once a pair, and once a sequence. Without padding."""
    return {
        "shared": sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in plan.pairs),
        "sequences": sum(len(s) for p in plan.pairs for s in p.sequences),
        "pairs": len(plan.pairs),
    }


def summary(found: Mapping[str, Sequence[Round]], pairs: int) -> dict[str, Any]:
    """Per program: pairs/s by wall and by CPU time, peak memory, tokens computed; its times over ours."""
    rows: dict[str, Any] = {}
    for name, made in found.items():
        rows[name] = {
            "pairs_per_second": spread([pairs / r.seconds for r in made]),
            "pairs_per_cpu_second": spread([pairs / r.cpu_seconds for r in made]),
            "peak_bytes": made[-1].peak_bytes,
            "tokens_per_pair": sum(r.tokens for r in made) / (pairs * len(made)),
        }
        if OURS in found and name != OURS:
            ours = found[OURS]
            rows[name]["time_over_ours"] = ratios([r.seconds for r in made], [r.seconds for r in ours])
            rows[name]["cpu_time_over_ours"] = ratios([r.cpu_seconds for r in made], [r.cpu_seconds for r in ours])
            rows[name]["peak_over_ours"] = made[-1].peak_bytes / ours[-1].peak_bytes
    return rows


def loss_differences(found: Mapping[str, Sequence[Round]], names: Sequence[str]) -> dict[str, float]:
    """Largest |loss - our loss| over all measured steps, for these programs."""
    if OURS not in found:
        return {}

    def curve(made: Sequence[Round]) -> list[float]:
        return [loss for r in made for loss in r.losses]

    ours = curve(found[OURS])
    return {n: max(abs(a - b) for a, b in zip(curve(found[n]), ours, strict=True)) for n in names if n != OURS}


def text(result: Mapping[str, Any]) -> str:
    """The result for people."""
    rows = [["", "pairs/s", "pairs/CPU s", "tokens/pair", "peak GB", "time / ours", "CPU time / ours", "peak / ours"]]
    for name, s in result["summary"].items():
        over = [shown(s[k]) if k in s else "1" for k in ("time_over_ours", "cpu_time_over_ours")]
        rows.append(
            [
                name,
                shown(s["pairs_per_second"]),
                shown(s["pairs_per_cpu_second"]),
                f"{s['tokens_per_pair']:.0f}",
                f"{s['peak_bytes'] / 1e9:.2f}",
                *over,
                f"{s.get('peak_over_ours', 1):.2f}",
            ]
        )
    settings = result["settings"]
    said = [
        f"{settings['model']}, {settings['precision']}, {settings['device']}, {settings['threads']} thread(s), "
        f"{settings['batch']} pairs a step; median (smallest - largest) of "
        f"{len(next(iter(result['rounds'].values())))} round(s) of {result['steps']} step(s)",
        table(rows),
    ]
    for name, difference in result["loss_difference"].items():
        said.append(f"largest difference of a step's loss, {name} - {OURS}: {difference:.2g}")
    return "\n".join(said)


def describe(plan: Plan) -> None:
    """Say what is about to be computed."""
    counts = token_counts(plan)
    pairs = counts["pairs"]
    print(
        f"{pairs} pairs; {counts['shared'] / pairs:.0f} tokens a pair with the prompt once, "
        f"{counts['sequences'] / pairs:.0f} as two sequences"
    )


if __name__ == "__main__":
    main()
