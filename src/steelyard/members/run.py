"""Train the members of an ensemble and let each judge its pairs; what they cost, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from steelyard.data.distinct import tokens_of
from steelyard.data.encode import Encoder, Tree
from steelyard.members.config import StrengthConfig
from steelyard.members.cost import Cost, metered
from steelyard.members.head import head_scores, read_features
from steelyard.members.lora import lora_member, require_peft
from steelyard.members.trained import reward_config, trained_member
from steelyard.models.load import read_config
from steelyard.models.reward import RewardModel
from steelyard.parallel import default_workers, run_jobs
from steelyard.train.reward import NORMAL_PAIRS, open_cache
from steelyard.types import Preference

Member = Callable[[StrengthConfig, int, "list[int] | None", "list[Tree]", int, Path], np.ndarray]
MEMBERS: dict[str, Member] = {"full": trained_member, "layers": trained_member, "lora": lora_member}


def run_members(
    config: StrengthConfig,
    encoder: Encoder,
    trees: list[Tree],
    index: list[int],
    keys: Sequence[str],
    plan: Bool[np.ndarray, "M N"] | None,
    out: Path,
    *,
    pairs: Sequence[Preference],
    quiet: bool,
) -> tuple[Float[np.ndarray, "M N 2"], Cost, list[Cost]]:
    """(scores, the cost of what the members share, the cost of each member).

    `index[i]` says which usable pair of the file `trees[i]` and `pairs[i]` are, `plan` which member judges which tree
    (None: all).
    """
    if config.backend == "head":
        return head_scores(config, encoder, trees, keys, plan, out, pairs=pairs, quiet=quiet)
    if config.backend == "lora":
        require_peft()
    shared = prepare(config, encoder, trees, out, quiet=quiet)
    jobs, tokens = [], []
    for m in range(config.members):
        judged = trees if plan is None else [trees[i] for i in np.flatnonzero(plan[m])]
        seen = trees if plan is None else [trees[i] for i in np.flatnonzero(~plan[m])]
        train = None if plan is None else [index[i] for i in np.flatnonzero(~plan[m])]
        jobs.append((config, m, train, judged, encoder.pad_id, out / "members" / f"{m:02d}"))
        tokens.append(member_tokens(config, seen, judged))
    results = run_jobs(
        run_member,
        jobs,
        workers=min(config.workers or default_workers(config.device), config.members),
        labels=[f"member {m}" for m in range(config.members)],
        on_done=None if quiet else lambda m, _: print(f"  member {m + 1} of {config.members} done", flush=True),
    )
    scores = np.full((config.members, len(trees), 2), np.nan, dtype=np.float32)
    for m, (own, _) in enumerate(results):
        scores[m, slice(None) if plan is None else np.flatnonzero(plan[m])] = own
    costs = [Cost(count, *measured) for count, (_, measured) in zip(tokens, results, strict=True)]
    return scores, shared, costs


def prepare(config: StrengthConfig, encoder: Encoder, trees: Sequence[Tree], out: Path, *, quiet: bool) -> Cost:
    """Compute once what the members of a run in `out`, and of others beside it, read of the frozen trunk."""
    with metered() as cost:
        if config.backend == "head":
            cost.tokens = read_features(config, encoder, trees, out, quiet=quiet)[2]
        if config.backend == "layers":
            settings = reward_config(config, 0, cache=out.parent / "activations")
            model = RewardModel.from_language_model(
                config.model, pad_id=encoder.pad_id, seed=config.seed, precision=config.precision, device=config.device
            )
            before = open_cache(settings, model, [])
            missing = sum(map(len, before.missing(trees, config.max_tokens))) if before is not None else 0
            open_cache(settings, model, trees, quiet=quiet)
            cost.tokens = shared_tokens(config, missing)
    return cost


def shared_tokens(config: StrengthConfig, tokens: int) -> float:
    """What a pass of so many tokens through what members share costs, in tokens through the whole model."""
    return {"head": float(tokens), "layers": tokens * (1 - _trained_share(config))}.get(config.backend, 0.0)


def member_tokens(config: StrengthConfig, train: Sequence[Tree], judged: Sequence[Tree]) -> float:
    """Tokens that one member's training and judging push through the model, as `Cost` counts them."""
    trained = config.member.epochs * sum(map(len, train))
    scored = tokens_of(judged, config.max_tokens)
    if config.backend == "lora":
        return 2 * trained + scored
    if config.keep_members:
        # `train_reward` ends by scoring some of its pairs, for the reward's mean and std.
        scored += tokens_of(train[:: -(-len(train) // NORMAL_PAIRS)], config.max_tokens)
    top = _trained_share(config)
    below = 0.0 if config.backend == "layers" else 1 - top
    return trained * (3 * top + below) + scored * (top + below)


def _trained_share(config: StrengthConfig) -> float:
    depth = read_config(config.model).get_text_config().num_hidden_layers
    n = config.trainable_layers
    return 1.0 if n is None else n / float(depth)


def run_member(
    config: StrengthConfig, m: int, train: list[int] | None, judged: list[Tree], pad_id: int, out: Path
) -> tuple[Float[np.ndarray, "n 2"], tuple[float, float, float]]:
    """Member m's scores of what it judges, and (wall, cpu, memory); read back if it has been here before."""
    done = out.with_suffix(".npz")
    if not done.exists():
        with metered() as cost:
            scores = MEMBERS[config.backend](config, m, train, judged, pad_id, out)
        if not np.isfinite(scores).all():
            # Stored, they would count as abstentions: the ensemble would be smaller than it says.
            raise FloatingPointError(
                f"seed {config.seed + m}: {np.sum(~np.isfinite(scores))} of {scores.size} rewards are not "
                "finite: its training diverged. Lower its learning rate, in a new folder"
            )
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = done.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.savez(file, scores=scores, cost=np.array([cost.wall, cost.cpu, cost.memory]))
        temporary.replace(done)
    stored = np.load(done)
    wall, cpu, memory = stored["cost"].tolist()
    return stored["scores"], (wall, cpu, memory)
