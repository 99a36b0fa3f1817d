"""The draw of a token alone: Steelyard's inverse CDF in two levels against softmax and `multinomial`, in turn.

    python benchmarks/draw.py [--rows 128] [--threads 1]

See benchmarks/README.md for what is compared. One process, for nothing here is large: logits are drawn once, and every
round gives both programs the same ones.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rounds import ratios, shown, spread, table
from torch import Tensor
from transformers.generation.logits_process import TopPLogitsWarper

from steelyard.sampling.settings import SamplingConfig
from steelyard.sampling.tokens import draw

SIZES = (6_400, 49_152, 151_936)  # vocabularies of MiniMind2, SmolLM2 and Qwen 2.5
TOP_P = (1.0, 0.9)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--rows", type=int, default=128, help="samples that take their next token at once")
    add("--vocabulary", type=int, nargs="+", default=list(SIZES), metavar="SIZE")
    add("--steps", type=int, default=20, help="draws of each program in a round")
    add("--rounds", type=int, default=5, help="how often each program has its turn")
    add("--threads", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("runs/benchmarks"), help="folder for the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [["vocabulary", "logits", "top_p", "multinomial, ms a draw", "steelyard", "multinomial over steelyard"]]
    cells = []
    for size in args.vocabulary:
        torch.manual_seed(args.seed)
        noise_RV = torch.randn(args.rows, size)
        # A nucleus of tens, as a language model's mostly is, and one of hundreds or thousands.
        shapes = {"peaked": 0.5 * noise_RV - 1.5 * torch.arange(1.0, size + 1).log(), "flat": 3 * noise_RV}
        for (shape, logits_RV), top_p in itertools.product(shapes.items(), TOP_P):
            peer, own = _in_turn(logits_RV, top_p, args.steps, args.rounds)
            cell = {"vocabulary": size, "logits": shape, "top_p": top_p, "multinomial": peer, "steelyard": own}
            cells.append(cell)
            milliseconds = [spread([1e3 * s / args.steps for s in seconds]) for seconds in (peer, own)]
            rows.append([f"{size:,}", shape, str(top_p), *map(shown, milliseconds), shown(ratios(peer, own))])
    print(
        f"{args.rows} rows, float32, {args.threads} thread(s); median (smallest - largest) of {args.rounds} round(s) "
        f"of {args.steps} draws\n{table(rows)}"
    )
    result = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "seconds_of_rounds": cells,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "draw.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {args.out / 'draw.json'}")


def _in_turn(logits_RV: Tensor, top_p: float, steps: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of each round: (softmax and multinomial, as in `generate`; Steelyard)."""
    cut = TopPLogitsWarper(top_p) if top_p < 1 else None
    config = SamplingConfig(top_p=top_p)

    def peer() -> None:
        scores_RV = cut(None, logits_RV) if cut else logits_RV
        torch.multinomial(scores_RV.softmax(-1), 1)

    def own() -> None:
        draw(logits_RV, torch.rand(len(logits_RV)), config)

    programs = (peer, own)
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            taken = _seconds(programs[which], steps)
            if number:  # the first round warms up
                seconds[which].append(taken)
    return seconds


def _seconds(program: Callable[[], None], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        program()
    return time.perf_counter() - start


if __name__ == "__main__":
    with torch.inference_mode():
        main()
