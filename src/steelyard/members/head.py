"""`head` members: Bradley-Terry models linear in features of the frozen trunk (steelyard.probe)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from steelyard.baselines import fingerprint
from steelyard.data.distinct import tokens_of
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.members.config import StrengthConfig
from steelyard.members.cost import Cost, metered
from steelyard.models.reward import RewardModel
from steelyard.probe import Probes, bootstrap_rows, features, layer_choice
from steelyard.run_dir import write_json_atomic
from steelyard.strength import out_of_fold_plan
from steelyard.train.pairwise import require_weight
from steelyard.types import Preference


def read_features(
    config: StrengthConfig, encoder: Encoder, trees: Sequence[Tree], out: Path, *, quiet: bool
) -> tuple[Float[np.ndarray, "N 2 F"], list[int], int]:
    """(features, the layers they are from, tokens computed: 0 if they were there)."""
    model = RewardModel.from_language_model(
        config.model, pad_id=encoder.pad_id, seed=config.seed, precision=config.precision, device=config.device
    )
    chosen = layer_choice(model.hf.config.get_text_config().num_hidden_layers, config.layers)
    # Beside the run's folder, so that both scorings of one data set share the pass.
    key = hashlib.sha256(repr((fingerprint(config.model), chosen, config.precision, trees)).encode()).hexdigest()[:16]
    path = out.parent / f"features-{key}.npy"
    computed = 0 if path.exists() else tokens_of(trees, config.max_tokens)
    table = features(model, trees, chosen, path, pad_id=encoder.pad_id, max_tokens=config.max_tokens, quiet=quiet)
    return table, chosen, computed


def penalty_split(
    config: StrengthConfig,
    keys: Sequence[str],
    plan: Bool[np.ndarray, "M N"] | None,
    weighs_N: Bool[np.ndarray, "N"],
) -> Bool[np.ndarray, "N"]:
    """The pairs held out to choose the penalty by: in-sample half of the prompts, or of a single prompt's pairs.

    Raises InputError if no pair that weighs something is held out, or none is left.
    """
    if plan is not None:
        held_out = plan[0]
    elif len(keys) == 1:
        held_out = np.ones(1, bool)
    else:
        units: Sequence[str | int] = keys if len(set(keys)) > 1 else range(len(keys))
        held_out = out_of_fold_plan(units, members=2, folds=2, seed=config.seed)[0]
    if not (weighs_N[held_out].any() and weighs_N[~held_out].any()):
        raise InputError(
            f"{config.data}: too few pairs to choose the penalty by held-out loss ({weighs_N.sum()} with a `weight` "
            "above 0); set --penalty, or add data"
        )
    return held_out


def head_scores(
    config: StrengthConfig,
    encoder: Encoder,
    trees: Sequence[Tree],
    keys: Sequence[str],
    plan: Bool[np.ndarray, "M N"] | None,
    out: Path,
    *,
    pairs: Sequence[Preference] | None = None,
    quiet: bool,
) -> tuple[Float[np.ndarray, "M N 2"], Cost, list[Cost]]:
    """(the members' scores, the cost of what they share, the cost of each).

    `pairs`, one to a tree, count by their `weight` and `flip_prob`; without them all count alike.
    """
    N = len(trees)
    if pairs is not None:
        require_weight(config.data, pairs)
        with_margin = sum(p.margin != 0 for p in pairs)
        if with_margin and not quiet:
            print(
                f"{config.data}: {with_margin} pairs have a `margin`, which head members do not read; the backends "
                "full, lora and layers do"
            )
    with metered() as shared:
        table, chosen, computed = read_features(config, encoder, trees, out, quiet=quiet)
        probes = Probes(table, pairs)
        penalty = config.penalty
        if penalty is None:
            held_out = penalty_split(config, keys, plan, probes.weight_N2.sum(1) > 0)
            penalty = probes.choose_penalty(held_out, config.seed)
    shared.tokens = computed
    scores = np.full((config.members, N, 2), np.nan, dtype=np.float32)
    costs = []
    for m in range(config.members):
        with metered() as cost:
            train = bootstrap_rows(keys, config.seed + m) if plan is None else np.flatnonzero(~plan[m])
            judged = np.arange(N) if plan is None else np.flatnonzero(plan[m])
            scores[m, judged] = probes.scores(probes.fit(train, penalty, config.seed + m), judged)
        costs.append(cost)
    write_json_atomic(out / "probe.json", {"layers": chosen, "penalty": penalty, "features": table.shape[-1]})
    return scores, shared, costs
