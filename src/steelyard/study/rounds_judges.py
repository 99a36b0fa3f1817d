"""Judges of a study of rounds: which round would users keep who have no gold, and what does that round give them?

A judge is a reward model trained on other pairs. It is trained when the rounds are over and reads the answers of their
examination drawn once more, so that a study may be judged later.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from steelyard.data.export import write_preferences
from steelyard.data.load import load_prompts
from steelyard.data.split import prompt_key
from steelyard.evaluate.rounds import FIRST, GOLD, JUDGE, Keep, choose, examine_round
from steelyard.evaluate.seeds import compare_arms
from steelyard.iterate import examination
from steelyard.rounds_settings import RoundsConfig
from steelyard.run_dir import write_json_atomic
from steelyard.simulate.world import gold
from steelyard.simulate.write import WorldConfig, make_tables
from steelyard.types import Preference

JUDGED: Final = "judge.json"
LAST: Final = "last round"
BY_JUDGE: Final = "judge: best"
Rule = tuple[str, Keep, float] | int
"""What keeps a round: criterion, `keep`, `kl_price`; or the same round always."""


def rules(prices: Sequence[float], rounds: int) -> dict[str, Rule]:
    """All rules by name, for so many rounds."""
    found: dict[str, Rule] = {"gold: best": (GOLD, "best", 0.0)}
    # The first reward model is the judge's control: what does not need other data to tell. And the rounds by number
    # are the control of all rules: what stopping early gives without a criterion.
    for name, by in (("judge", JUDGE), ("first reward model", FIRST)):
        for price in (0.0, *prices):
            less = f" less {price:g} a nat" if price else ""
            found[f"{name}{less}: best"] = (by, "best", price)
            found[f"{name}{less}: earliest"] = (by, "earliest", price)
    return found | {f"round {n}": n for n in range(1, rounds)} | {LAST: rounds}


def write_judge_pairs(world: WorldConfig, count: int, held_out: str, out: Path) -> Path:
    """`count` pairs (a few fewer) of the world `world`, which must have another seed than the study's; those that ask
    a held-out prompt are left out."""
    if not out.exists():
        examined = {prompt_key(p.prompt) for p in load_prompts(held_out).items}
        sizes = {"sft": 1, "preferences": count, "rl_prompts": 1, "eval_prompts": 1}
        rows = make_tables(world.model_copy(update=sizes))["preferences"]
        pairs = [Preference(**row) for row in rows]
        out.parent.mkdir(exist_ok=True)
        write_preferences([p for p in pairs if prompt_key(p.prompt) not in examined], out)
    return out


def judge_run(config: RoundsConfig, judge: str, run: Path) -> None:
    """The judge's rewards of the answers of all rounds of one run, beside their examinations: examine/judge.json.

    Raises RuntimeError if answers, drawn once more, are others than those that were examined.
    """
    prompts, encoder, how = examination(config)
    for folder in sorted(run.glob("round-*")):
        examined, target = folder / "examine" / "round.json", folder / "examine" / JUDGED
        if target.exists() or not examined.exists():
            continue
        policy = config.sft if folder.name == "round-00" else str(folder / "ppo" / "model")
        rewards = {FIRST: config.reward_model, JUDGE: judge}
        length = encoder.max_length
        again = examine_round(policy, config.sft, rewards, prompts, gold, {}, how, max_length=length)["values"]
        if not np.allclose(again[GOLD], json.loads(examined.read_text())["values"][GOLD]):
            raise RuntimeError(f"{examined}: its answers cannot be drawn again; did another version begin the study?")
        write_json_atomic(target, {JUDGE: again[JUDGE]})


def _chosen(rule: Rule, rounds: Sequence[Mapping[str, Any]]) -> int:
    """The number of the round that a rule keeps."""
    return rule if isinstance(rule, int) else int(choose(rounds, rule[0], rule[2], rule[1])["round"])


def choices(
    examined: Mapping[tuple[str, int], Sequence[Mapping[str, Any]]],
    arms: Sequence[str],
    seeds: Sequence[int],
    prices: Sequence[float],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(gold of the round that each rule keeps, mean of the arms, less the judge's best; which round that is, by run).

    `examined`: the rounds of each arm and seed, judged, as many of all. All rules choose on every other prompt; gold is
    of the rest.
    """
    kept, gold_of = [], dict[str, list[Any]]()
    known = rules(prices, len(next(iter(examined.values()))) - 1)
    for rule, how in known.items():
        for seed in seeds:
            of_arms = []
            for arm in arms:
                rounds = examined[arm, seed]
                number = _chosen(how, rounds)
                rest = np.array(rounds[number]["values"][GOLD])[1::2]
                kept.append({"rule": rule, "arm": arm, "seed": seed, "round": number, "gold": float(rest.mean())})
                of_arms.append(rest)
            gold_of.setdefault(rule, []).append(np.mean(of_arms, 0))
    prompts = next(iter(examined.values()))[0]["prompts"][1::2]
    values = {rule: np.stack(v) for rule, v in gold_of.items()}
    clusters = [p for p in prompts for _ in range(values[LAST].shape[2])]
    flat = {rule: v.reshape(len(v), -1) for rule, v in values.items()}
    rows = compare_arms(flat, clusters=clusters, control=BY_JUDGE)
    return [{"set": "the round kept", "measure": "gold", **row} for row in rows], kept
