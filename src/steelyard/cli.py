"""The command line: one thin command per verb. Exit status: 0 done, 1 failure, 2 bad input, 130 interrupted.

Every verb that trains or measures reads its settings from a YAML file (`steelyard train reward settings.yaml`),
from dotted options (`--optim.lr 1e-4`), or both; options win. What a verb does stands in a module of
`steelyard.commands`, which alone is imported when it runs: what needs no model does not wait for torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

VERBS = {
    "demo": "the main job on the built-in small world: weigh, repair, train, optimise, report",
    "audit": "which preferences in a file are wrong, and how sure is that: annotated file and report",
    "simulate": "write a small world with a known truth, or relabel your pairs with noisy annotators",
    "train sft": "supervised fine-tuning",
    "train reward": "train a reward model on weighed preferences",
    "train ppo": "train a policy on plain or contrastive rewards",
    "train dpo": "train a policy straight from weighed preferences (DPO), an offline baseline",
    "train metarm": "train a reward model that still tells a shifted policy's responses apart (MetaRM)",
    "iterate": "rounds of sampling, reward model (MetaRM), PPO and examination, the best one kept: YAML, resumable",
    "strength": "measure preference strength by the vote of M reward models: `audit` without the report",
    "repair": "flip, soften, margin or drop: write the repaired preferences",
    "sample": "sample baseline responses offline and score them",
    "evaluate reward": "examine reward models on preference files, RewardBench 1 and 2, RM-Bench",
    "evaluate policy": "examine policies: gold, proxy, KL, win / tie / lose",
    "evaluate judge": "win / tie / lose by a judge model (any OpenAI-compatible endpoint) or a reward model",
    "evaluate features": "how far the features of chosen and rejected responses lie apart, with t-SNE pictures",
    "study contrastive": "contrastive learning against its control, arms by seeds: a YAML file, resumable",
    "study data": "what kinds of preference data do and what repairs are worth: a YAML file, resumable",
    "study metarm": "MetaRM against its controls, arms by seeds: a YAML file, resumable",
    "study rounds": "rounds with and without MetaRM on the small world, arms by seeds: a YAML file, resumable",
    "study policy": "gold and proxy reward against KL for ways of training policies: a YAML file, resumable",
    "study strength": "how well kinds of ensembles find wrong labels, against their cost: a YAML file, resumable",
    "report": "one self-contained HTML page from a run folder",
    "run": "a whole recipe from a YAML file, resumable",
}
GROUPS = {v.split()[0] for v in VERBS if " " in v}
MODULES = {
    "weighing": ("audit", "strength"),
    "labels": ("simulate", "repair"),
    "training": ("train", "sample"),
    "examining": ("evaluate",),
    "studies": ("study",),
    "whole": ("demo", "run", "iterate"),
    "page": ("report",),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    verb = next((v for n in (2, 1) if (v := " ".join(args[:n])) in VERBS), None)
    from steelyard.errors import InputError
    from steelyard.memory import keep_freed_memory
    from steelyard.parallel import JobError

    try:
        if (text := _told(args)) is not None:
            print(text, flush=True)
            return 0
        if verb is None:
            return _unknown(args)
        keep_freed_memory()
        module = next(name for name, first in MODULES.items() if verb.split()[0] in first)
        commands = importlib.import_module(f"steelyard.commands.{module}")
        commands.COMMANDS[verb](args[len(verb.split()) :])
        return 0
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes on a machine one says it
            print(f"steelyard {verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run folders can be resumed with --resume", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader went away (`| head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        print(f"steelyard {verb}: {error.filename}: {error.strerror}; give another path", file=sys.stderr)
        return 2
    except (FloatingPointError, JobError) as error:
        print(f"steelyard {verb}: {error}", file=sys.stderr)
        return 1


def _told(args: Sequence[str]) -> str | None:
    """What is asked for that needs no verb to run: an overview or the version."""
    if not args or args[0] in ("-h", "--help"):
        return overview()
    if args[0] in GROUPS and args[1:2] in (["-h"], ["--help"]):
        return overview(args[0])
    if args[0] == "--version":
        from steelyard import __version__

        return f"steelyard {__version__}"
    return None


def overview(group: str = "") -> str:
    """What `steelyard --help` prints; of one group of verbs, `steelyard GROUP --help`."""
    verbs = {v: what for v, what in VERBS.items() if group in ("", v.split()[0])}
    width = max(map(len, verbs)) + 2
    lines = [f"  {verb:<{width}}{what}" for verb, what in verbs.items()]
    return "\n".join(
        [
            "steelyard: weigh, repair and learn from human preferences",
            "",
            *lines,
            "",
            "`steelyard VERB --help` explains a verb and all its options. Try `steelyard demo` first.",
            "Exit status: 0 done, 1 failure, 2 bad input, 130 interrupted.",
        ]
    )


def _unknown(args: list[str]) -> int:
    import difflib

    if args[0] in GROUPS:
        wanted = " or ".join(v for v in VERBS if v.startswith(f"{args[0]} "))
        print(f"steelyard {args[0]}: say which: {wanted}", file=sys.stderr)
        return 2
    close = difflib.get_close_matches(args[0], [v.split()[0] for v in VERBS], n=1)
    hint = f" Did you mean `{close[0]}`?" if close else ""
    print(f"steelyard: unknown verb {args[0]!r}.{hint} `steelyard --help` lists them all.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
