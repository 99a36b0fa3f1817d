"""Offline baselines: k responses of the SFT model to every prompt, scored once (Contrastive Rewards, step 1).

Two Parquet files lie side by side: the responses, keyed by model, tokenizer and sampling settings, and their
scores, keyed by the reward model as well. What is there is used again; a changed setting makes a new file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from pydantic import Field

from steelyard.config import Config, Device
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_prompts
from steelyard.data.split import prompt_key
from steelyard.errors import InputError
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel, require_reward_model
from steelyard.models.trunk import Precision
from steelyard.sampling import SamplingConfig, sample
from steelyard.types import Prompt
from steelyard.variance import variances

# What of the sampling settings decides what a response may be.
_DECIDES = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "min_new_tokens")


class BaselineConfig(Config):
    """Offline sampling of baseline responses."""

    policy: str = Field(description="model folder to sample from: the SFT model")
    prompts: str = Field(description="prompts: JSONL, CSV or Parquet, or a preference file")
    reward_model: str | None = Field(None, description="reward-model folder that scores the responses")
    k: int = Field(3, ge=1, description="responses per prompt; the paper uses 3 (1 and 5 in its ablation)")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="how responses are drawn")
    limit: int | None = Field(None, ge=1, description="use only the first prompts of the file")
    max_length: int = Field(512, ge=8, description="tokens of prompt and response together")
    max_tokens: int = Field(8192, ge=16, description="tokens scored at once (memory, not results)")
    precision: Precision = Field("float32", description="arithmetic of the trunks")
    device: Device = "cpu"
    seed: int = Field(0, ge=0, description="of the sampling")


_READ = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")  # of a model's folder


def fingerprint(folder: str | Path) -> str:
    """A digest of everything in a model folder that decides what it computes: weights, configuration, tokenizer."""
    digest = hashlib.sha256()
    names = [p for p in Path(folder).iterdir() if p.suffix in _READ]
    for path in sorted(names):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def sample_baselines(config: BaselineConfig, out: Path) -> Path:
    """Write (or find) the responses and, with a reward model, their scores in `out`; returns the last file.

    Raises InputError if a model or the prompts cannot be read, the models' tokenizers differ, or no prompt leaves room.
    """
    encoder = Encoder.load(config.policy, max_length=config.max_length)
    if config.reward_model is not None:
        require_reward_model(config.reward_model)
        encoder.require_same(config.reward_model, what="reward model", of=config.policy)
    out.mkdir(parents=True, exist_ok=True)
    prompts = {baseline_key(p.prompt, encoder): p.prompt for p in load_prompts(config.prompts).items[: config.limit]}
    settings = {
        "policy": fingerprint(config.policy),
        "prompts": _digest(list(prompts)),
        "k": config.k,
        "sampling": config.sampling.model_dump(exclude={"rows", "gpu_memory"}),
        "max_length": config.max_length,
        "seed": config.seed,
    }
    if config.precision != "float32":
        settings["precision"] = config.precision
    responses = out / f"responses-{_digest(settings)}.parquet"
    if not responses.exists():
        _write(responses, _responses(config, encoder, prompts), settings)
    if config.reward_model is None:
        return responses
    settings |= {"reward_model": fingerprint(config.reward_model)}
    scores = out / f"scores-{_digest(settings)}.parquet"
    if not scores.exists():
        table = pq.read_table(responses)
        _write(scores, table.append_column("reward", pa.array(_score(config, encoder, table))), settings)
    return scores


def baseline_key(prompt: Prompt, encoder: Encoder) -> str:
    """What names a prompt's baselines: its `prompt_key`, and for one user turn its role where that makes other tokens.

    Without a chat template a text is read as it stands, and the same text as a turn as part of a transcript.
    """
    if not encoder.templated and not isinstance(prompt, str) and len(prompt) == 1:
        return f"{prompt[0].role}:{prompt[0].content}"
    return prompt_key(prompt)


def read_baselines(
    path: str | Path, *, k: int | None, policy: str | Sequence[str] | None, reward_model: str
) -> dict[str, Float[np.ndarray, "K"]]:
    """Baseline rewards by `baseline_key`.

    `policy`: the model, or one of the models, that the responses may come from; None: not asked. Raises InputError if
    the file is no whole scored file of `sample_baselines`, was made with another policy or reward model (the rewards
    would not compare), or holds fewer than k responses a prompt. A k smaller than the stored one uses the first k.
    """
    if not Path(path).is_file():
        kind = "a folder, not a file: name one of its scores-*.parquet" if Path(path).exists() else "no such file"
        raise InputError(f"{path}: {kind}; `steelyard sample` makes baseline files")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path}: must be a baseline file of `steelyard sample` (Parquet): {error}") from None
    settings = _settings(table.schema)
    if "policy" in settings and "reward_model" not in settings:
        raise InputError(f"{path}: these responses have no scores; run `steelyard sample` with a reward model")
    if not {"policy", "k"} <= settings.keys() or not {"key", "reward"} <= set(table.column_names):
        raise InputError(f"{path}: is no whole baseline file, as `steelyard sample` writes them; sample again")
    if policy is not None:
        policies = [policy] if isinstance(policy, str) else list(policy)
        if settings["policy"] not in map(fingerprint, policies):
            raise InputError(
                f"{path}: these baselines were sampled from another model than {' or '.join(policies)}; run `steelyard "
                "sample` with this policy"
            )
    if settings["reward_model"] != fingerprint(reward_model):
        raise InputError(
            f"{path}: these baselines were scored by another model than {reward_model}; in its place name the file "
            "that this one scored, or run `steelyard sample` with this reward model"
        )
    stored = settings["k"]
    if k is not None and k > stored:
        raise InputError(f"{path}: holds {stored} responses per prompt, {k} are wanted; sample again with k = {k}")
    rewards: dict[str, list[float]] = {}
    for key, reward in zip(table["key"].to_pylist(), table["reward"].to_pylist(), strict=True):
        if not math.isfinite(reward):
            raise InputError(f"{path}: holds rewards that are not finite; score a new file with `steelyard sample`")
        rewards.setdefault(key, []).append(reward)
    if short := [key for key, values in rewards.items() if len(values) != stored]:
        raise InputError(
            f"{path}: holds {len(rewards[short[0]])} of {stored} responses to the prompt {short[0]!r}; rows were lost: "
            "sample again"
        )
    return {key: np.array(values[: k or stored], dtype=np.float32) for key, values in rewards.items()}


def require_same_responses(paths: Sequence[str | Path]) -> None:
    """Raise InputError unless scored files, one by each of several reward models, hold the same responses in one order.

    Only then can an ensemble's scores of one response be aggregated.
    """
    first, *others = paths
    said = _said(first) if others else None
    for path in others:
        if _said(path) != said:
            raise InputError(
                f"{path}: holds other responses than {first}; run `steelyard sample` with each reward model and the "
                "same policy, prompts, k, sampling and seed, in one folder: it samples once"
            )


def _said(path: str | Path) -> pa.Table:
    """Prompts and responses of a file."""
    wanted = ["key", "response_tokens"]
    if not set(wanted) <= set(pq.read_schema(path).names):
        raise InputError(f"{path}: is no whole baseline file, as `steelyard sample` writes them; sample again")
    return pq.read_table(path, columns=wanted)


def drawn_otherwise(path: str | Path, sampling: SamplingConfig, precision: Precision) -> str:
    """How the stored responses were drawn and scored differently than here, by setting; empty if not at all."""
    settings = _settings(pq.read_schema(path))
    stored, wanted = settings.get("sampling", {}), sampling.model_dump()
    differ = [
        f"{name} {stored[name]:g} for the baselines, {wanted[name]:g} here"
        for name in _DECIDES
        if name in stored and stored[name] != wanted[name]
    ]
    if (other := settings.get("precision", "float32")) != precision:
        differ.append(f"precision {other} for the baselines, {precision} here")
    return "; ".join(differ)


def _settings(schema: pa.Schema) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads((schema.metadata or {}).get(b"steelyard", b"{}"))
    return settings


def outlook(path: str | Path) -> str:
    """What a scored baseline file says of contrastive rewards, in a sentence: the variance they begin with.

    With the policy at the SFT model a plain reward has variance tau^2 + s^2, a contrastive one s^2 (1 + 1/k), and over
    shrunk baselines less than either.
    """
    table = pq.read_table(path)
    k = int(_settings(table.schema)["k"])
    rewards_NK = np.array(table["reward"].to_pylist()).reshape(-1, k)
    if min(rewards_NK.shape) < 2:
        return "too few baselines to tell the variance between prompts from that within"
    found = variances(rewards_NK)
    if found.plain == 0:
        return "all baselines have the same reward: the reward model tells nothing apart here"
    ratio, shrunk = found.contrastive(k) / found.plain, found.shrunk(k) / found.plain
    return (
        f"{100 * found.between / found.plain:.0f} % of the rewards' variance lies between prompts: contrastive rewards "
        f"over these {k} baselines begin with {ratio:.2f} times the variance of plain ones (above 1 they add noise); "
        f"with baseline = shrunk {shrunk:.2f} times"
    )


def _responses(config: BaselineConfig, encoder: Encoder, prompts: Mapping[str, Prompt]) -> pa.Table:
    policy = PolicyModel.load(config.policy, precision=config.precision, device=config.device)
    ids = [encoder.prompt_ids(p) for p in prompts.values()]
    fits = encoder.with_room(list(prompts.values()), config.sampling.max_new_tokens, config.prompts)
    names = list(prompts)
    keys = [names[i] for i in fits]
    drawn = sample(
        policy,
        [ids[i] for i in fits],
        keys,
        k=config.k,
        config=config.sampling,
        end_id=encoder.end_id,
        pad_id=encoder.pad_id,
        seed=config.seed,
    )
    rows = [(key, ids[i], s) for key, i, group in zip(keys, fits, drawn, strict=True) for s in group]
    return pa.table(
        {
            "key": [key for key, _, _ in rows],
            "prompt": [encoder.tokenizer.decode(list(prompt)) for _, prompt, _ in rows],
            "response": [encoder.decode(s.tokens) for _, _, s in rows],
            "prompt_tokens": [list(prompt) for _, prompt, _ in rows],
            "response_tokens": [list(s.tokens) for _, _, s in rows],
            "ended": [s.ended for _, _, s in rows],
        }
    )


def _score(config: BaselineConfig, encoder: Encoder, table: pa.Table) -> Float[np.ndarray, "N"]:
    if config.reward_model is None:
        raise ValueError("scoring needs a reward model")
    model = RewardModel.load(config.reward_model, precision=config.precision, device=config.device)
    prompts, responses = table["prompt_tokens"].to_pylist(), table["response_tokens"].to_pylist()
    starts = range(0, len(prompts), config.k)
    trees = [Tree(tuple(prompts[i]), tuple(tuple(r) for r in responses[i : i + config.k])) for i in starts]
    rewards = model.score(trees, pad_id=encoder.pad_id, max_tokens=config.max_tokens).reshape(-1)
    if bad := np.flatnonzero(~np.isfinite(rewards)).tolist():
        raise InputError(
            f"{config.reward_model}: gives {len(bad)} of {len(rewards)} responses a reward that is not finite, first "
            f"to prompt {table['prompt'][bad[0]].as_py()!r}; use a sound reward model, or precision = float32"
        )
    return rewards


def _digest(settings: Any) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, table: pa.Table, settings: dict[str, Any]) -> None:
    table = table.replace_schema_metadata({"steelyard": json.dumps(settings, sort_keys=True)})
    temporary = path.with_suffix(".tmp")
    pq.write_table(table, temporary)
    os.replace(temporary, path)
