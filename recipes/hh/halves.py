"""Split HH pairs into a half for the reward model of the run and a half for its judge, and pick short prompts.

python recipes/hh/halves.py hh/train.jsonl.gz hh/validation.jsonl.gz FOLDER

No conversation stands in both halves, so a judge trained on the second has seen none of the run's data.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from steelyard.data.export import write_preferences
from steelyard.data.load import load_preferences
from steelyard.data.split import prompt_key, split_by_prompt
from steelyard.types import Preference

LONGEST = 240  # characters of a prompt: what a small model on a CPU answers in reasonable time


def write_prompts(pairs: Iterable[Preference], path: Path) -> None:
    """The distinct short prompts of the pairs, in their order."""
    short = {prompt_key(p.prompt): p.prompt for p in pairs if len(prompt_key(p.prompt)) <= LONGEST}
    turns = [p if isinstance(p, str) else [{"role": m.role, "content": m.content} for m in p] for p in short.values()]
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in turns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("validation")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if there := [p for name in ("prompts.jsonl", "eval_prompts.jsonl") if (p := args.out / name).exists()]:
        parser.error(f"{there[0]} exists already; name another folder")
    pairs = load_preferences(args.train, on_invalid="skip").preferences
    ours, judges = split_by_prompt(pairs, validation_share=0.5, seed=0, by="first turn")
    write_preferences(ours, args.out / "rm.jsonl")
    write_preferences(judges, args.out / "judge.jsonl")
    write_prompts(ours, args.out / "prompts.jsonl")
    write_prompts(load_preferences(args.validation, on_invalid="skip").preferences, args.out / "eval_prompts.jsonl")


if __name__ == "__main__":
    main()
