"""Pairs to tokens and a language model to a reward model with a seeded head: `python prepare.py MODEL DATA PLAN`.

A process of its own, so that the benchmark's parent never imports torch (see rounds.py). PLAN holds the settings and
windows already; the pairs are added.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from plan import Pair, Plan

from steelyard.data.encode import Encoder
from steelyard.data.load import load_preferences
from steelyard.errors import InputError
from steelyard.models.reward import RewardModel


def prepare(model: str, data: str, path: Path) -> None:
    """Raises InputError if the data hold fewer usable pairs within max_length than the plan needs."""
    plan = Plan.read(path)
    wanted = plan.settings
    encoder = Encoder.load(model, max_length=wanted.max_length, on_overlong="drop")
    usable = encoder.encode(load_preferences(data, on_invalid="skip").preferences).trees
    needed = sum(plan.windows) * wanted.batch
    if len(usable) < needed:
        raise InputError(
            f"{data}: has {len(usable)} pairs within {wanted.max_length} tokens, {needed} are needed; ask for fewer "
            "steps or rounds, or raise --max-length"
        )
    order = np.random.default_rng(wanted.seed).permutation(len(usable))[:needed]
    pairs = [Pair(list(t.prompt), *(list(r) for r in t.responses)) for t in (usable[i] for i in order)]
    started = RewardModel.from_language_model(model, pad_id=encoder.pad_id, seed=wanted.seed)
    started.save(Path(wanted.start), encoder)
    replace(plan, pairs=pairs).write(path)


if __name__ == "__main__":
    try:
        prepare(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    except InputError as error:
        sys.exit(str(error))
