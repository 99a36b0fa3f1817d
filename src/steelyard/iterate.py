"""Rounds: sample from the moved policy, renew the reward model, PPO, examine (Secrets of RLHF II, section 3.2).

A reward model learned from the SFT model's neighbourhood judges badly where PPO leads. So each round draws responses
from the policy as it is, trains the reward model once more (MetaRM on those responses, plainly, or not at all), goes
on with PPO from that policy, and examines it. The KL is measured from the SFT model throughout. The best round is
kept, by a criterion that is not the reward that was optimised; when the examination turns, it stops.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steelyard.baselines import fingerprint, sample_baselines
from steelyard.data.encode import Encoder
from steelyard.data.load import load_preferences, load_prompts, say_if_shared
from steelyard.errors import InputError
from steelyard.evaluate.examination import training_length
from steelyard.evaluate.policy import PolicyEvaluationConfig
from steelyard.evaluate.rounds import CURRENT, FIRST, GOLD, JUDGE, Pairs, choose, examine_round, held_out
from steelyard.models.reward import require_reward_model
from steelyard.rounds_settings import (
    Round,
    RoundsConfig,
    baselines_config,
    check_settings,
    criterion,
    evaluation_config,
    meta_config,
    ppo_config,
    relative,
    reward_config,
)
from steelyard.run_dir import RunDir, write_json_atomic
from steelyard.scorer import load_scorer
from steelyard.train.metarm import MetaRMConfig, train_metarm
from steelyard.train.pairwise import read_pairs
from steelyard.train.ppo import train_ppo, training_prompts
from steelyard.train.reward import train_reward
from steelyard.types import Prompt

RECORD = "rounds.json"


def run_rounds(config: RoundsConfig, out: Path, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Go through the rounds, leaving a folder for each in `out`; returns the record, also in `out/rounds.json`.

    Killed at any moment and resumed, it leaves the same bytes. Raises InputError for settings that do not fit, before
    anything runs.
    """
    check(config)
    run = RunDir.open(out, config, resume=resume)
    with run:
        if run.finished:
            return json.loads((out / RECORD).read_text())
        run.restore()
        say_if_shared(config.prompts, config.eval_prompts)
        prompts, encoder, _ = examination(config)
        training_prompts(ppo_config(config, Round(1, "", ""), baselines=""), encoder, quiet=True)
        _require_files(config)
        now = Round(0, config.sft, config.reward_model)
        examined: list[dict[str, Any]] = []
        for number in range(config.rounds + 1):
            failure = ""
            try:
                now = advance(config, now, out, quiet=quiet) if number else now
                examined.append(_examine(config, now, prompts, encoder.max_length, out))
            except FloatingPointError as error:
                # A guard of PPO's, training that diverged, a policy that can answer no more: this way leads no
                # further, and what there is, is kept. Of the SFT model there must be an answer.
                if not examined:
                    raise
                failure = f"round {number} failed: {error.__cause__ or error}"
            record = _record(config, examined, failure)
            write_json_atomic(out / RECORD, record)
            if record["best"] is not None:
                _keep(config, record["best"], out)
            if not quiet:
                print(_line(record), flush=True)
            if record["stopped"]:
                break
        run.finish({"rounds": len(examined) - 1, "best": record["best"], "stopped": record["stopped"]})
        return record


def advance(config: RoundsConfig, before: Round, out: Path, *, quiet: bool) -> Round:
    """The next round, up to its policy. Every stage does nothing where it has finished before."""
    number, folder = before.number + 1, _folder(out, before.number + 1)
    reward_model = config.reward_model
    if config.reward != "fixed":
        meta = ""
        if config.reward == "metarm":
            meta = str(sample_baselines(meta_config(config, number, before.policy), folder / "meta"))
        start = before.reward_model if config.reward_from == "previous" else config.reward_model
        wanted = reward_config(config, number, model=start, meta=meta)
        if isinstance(wanted, MetaRMConfig):
            train_metarm(wanted, folder / "rm", resume=True, quiet=quiet)
        else:
            train_reward(wanted, folder / "rm", resume=True, quiet=quiet)
        reward_model = str(folder / "rm" / "model")
    now = Round(number, before.policy, reward_model)
    baselines = ""
    if relative(config):
        baselines = str(sample_baselines(baselines_config(config, now), out / "baselines"))
    train_ppo(ppo_config(config, now, baselines=baselines), folder / "ppo", resume=True, quiet=quiet)
    return now._replace(policy=str(folder / "ppo" / "model"))


def check(config: RoundsConfig) -> None:
    """Raise InputError for settings or models that do not fit together."""
    check_settings(config)
    encoder = Encoder.load(config.sft)
    require_reward_model(config.reward_model)
    encoder.require_same(config.reward_model, what="reward model", of=config.sft)
    if config.judge is not None:
        require_reward_model(config.judge)
        encoder.require_same(config.judge, what="judge", of=config.sft)
        _require_another(config, config.judge)


def _require_files(config: RoundsConfig) -> None:
    """Read what is wanted only after round 0: a missing file or a bad row should not be found hours later."""
    if config.meta_prompts is not None:
        load_prompts(config.meta_prompts)
    if config.data is not None:
        load_preferences(config.data, on_invalid=reward_config(config, 1, model="", meta="").on_invalid)


def _require_another(config: RoundsConfig, judge: str) -> None:
    if fingerprint(judge) == fingerprint(config.reward_model):
        raise InputError(f"judge: {judge} is the reward model itself; what was optimised cannot judge")
    stage = Path(judge).parent / "config.json"
    data = json.loads(stage.read_text()).get("data") if stage.exists() else None
    first = Path(config.reward_model).parent / "config.json"
    known = {config.data, json.loads(first.read_text()).get("data") if first.exists() else None}
    if data is not None and Path(data).resolve() in {Path(d).resolve() for d in known if d is not None}:
        raise InputError(f"judge: {judge} was trained on {data}, as the rounds are; give one trained on other data")


def examination(config: RoundsConfig) -> tuple[list[Prompt], Encoder, PolicyEvaluationConfig]:
    """(held-out prompts, what reads them, how answers are drawn). Raises InputError for too few prompts."""
    encoder = Encoder.load(config.sft, max_length=ppo_config(config, Round(1, "", ""), baselines="").max_length)
    how = evaluation_config(config)
    return held_out(config.eval_prompts, encoder, how), encoder, how


def _folder(out: Path, number: int) -> Path:
    return out / f"round-{number:02d}"


def _examine(config: RoundsConfig, now: Round, prompts: Sequence[Prompt], length: int, out: Path) -> dict[str, Any]:
    target = _folder(out, now.number) / "examine" / "round.json"
    if not target.exists():
        rewards = {FIRST: config.reward_model, CURRENT: now.reward_model}
        if config.judge is not None:
            rewards[JUDGE] = config.judge
        found = examine_round(
            now.policy, config.sft, rewards, prompts, load_scorer(config.gold) if config.gold else None,
            _validation(config), evaluation_config(config), max_length=length,
        )  # fmt: skip
        write_json_atomic(target, {"round": now.number} | found)
    return json.loads(target.read_text())


def _validation(config: RoundsConfig) -> dict[str, Pairs]:
    """The validation sets, read as the reward model's training reads them."""
    rm = reward_config(config, 1, model="", meta="")
    fixed = config.reward == "fixed" and config.validation
    length = training_length(config.reward_model, None) if fixed else rm.max_length
    encoder = Encoder.load(config.sft, max_length=length, on_overlong=rm.on_overlong)
    return {name: read_pairs(path, encoder, on_invalid=rm.on_invalid) for name, path in config.validation.items()}


def _record(config: RoundsConfig, examined: Sequence[Mapping[str, Any]], failure: str = "") -> dict[str, Any]:
    """What rounds.json holds; nothing in it depends on where the folder is."""
    by, why = criterion(config)
    best, stopped = None, failure
    if by is not None:
        best = choose(examined, by, config.kl_price, config.keep)
        since = len(examined) - 1 - best["round"]
        if not failure and config.patience is not None and since >= config.patience:
            better = "better round than" if config.keep == "best" else "round told apart as better than"
            stopped = f"the examination has turned: no {better} {best['round']} for {since}"
        best["model"] = f"round-{best['round']:02d}/ppo/model" if best["round"] else config.sft
    return {
        "kind": "rounds",
        "reward": config.reward,
        "reward_from": config.reward_from,
        "baselines": config.baselines if relative(config) else None,
        "meta_prompts": config.meta_prompts,
        "criterion": {"by": by, "why": why, "kl_price": config.kl_price, "keep": config.keep},
        "rounds": [{"round": e["round"], **e["row"], "accuracy": e["accuracy"]} for e in examined],
        "best": best,
        "stopped": stopped,
    }


def _line(record: Mapping[str, Any]) -> str:
    row = record["rounds"][-1]
    shown = [f"{n} {row[n]:.3f}" for n in (GOLD, JUDGE, FIRST, CURRENT, "kl", "ppl_sft", "length") if n in row]
    said = f"round {row['round']}: {', '.join(shown)}"
    if record["best"] is not None:
        said += f"; kept so far: round {record['best']['round']}"
    return f"{said}; {record['stopped']}" if record["stopped"] else said


def _keep(config: RoundsConfig, best: Mapping[str, Any], out: Path) -> None:
    """`best/best.json`, and beside it `model`: a link to the best round's model."""
    folder = out / "best"
    write_json_atomic(folder / "best.json", dict(best))
    target = Path("..") / best["model"] if best["round"] else Path(config.sft).resolve()
    link, partial = folder / "model", folder / ".model.partial"
    partial.unlink(missing_ok=True)
    partial.symlink_to(target, target_is_directory=True)
    os.replace(partial, link)


def rounds_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """The rounds, for people: one row each, the kept one marked."""
    names = [n for n in (GOLD, JUDGE, FIRST, CURRENT) if n in record["rounds"][0]]
    words = {FIRST: "first reward model", CURRENT: "current reward model"}
    kept = None if record["best"] is None else record["best"]["round"]
    rows = []
    for r in record["rounds"]:
        label = ("0 (SFT)" if r["round"] == 0 else str(r["round"])) + (" kept" if r["round"] == kept else "")
        cells = [f"{r[n]:.3f} [{r[f'{n}_low']:.3f}, {r[f'{n}_high']:.3f}]" for n in names]
        rows.append([label, *cells, r["kl"], r["ppl_sft"], r["length"]])
    earliest = record["criterion"].get("keep") == "earliest"  # Records of earlier versions do not say.
    how = " The earliest round not told apart from the best is kept." if earliest else ""
    note = f"Chosen by: {record['criterion']['why']}.{how}"
    if record["best"] is not None:
        gain = record["best"]["gain"]
        note += (
            f" Round {kept} was chosen on half of the prompts; on the other half it is worth {gain['value']:.3f} "
            f"[{gain['low']:.3f}, {gain['high']:.3f}] more than the SFT model."
        )
    columns = ["round", *(words.get(n, n) for n in names), "KL to SFT", "PPL under SFT", "length"]
    return {"title": "Rounds", "columns": columns, "rows": rows, "note": f"{note} {record['stopped']}".strip()}
