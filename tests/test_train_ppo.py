"""PPO: one step against a plain float64 reference, what it learns, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from conftest import Folders
from steelyard import actors, rollout
from steelyard.baselines import BaselineConfig, read_baselines, sample_baselines
from steelyard.errors import InputError
from steelyard.models.policy import PolicyModel
from steelyard.sampling import Sample, SamplingConfig, sample
from steelyard.train import ppo
from steelyard.train.optim import OptimConfig
from steelyard.train.ppo import PPOConfig, train_ppo


@pytest.fixture(scope="module")
def stored(
    language_model: Folders, reward_model: Folders, planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Baselines of every prompt, k = 3."""
    config = BaselineConfig(
        policy=language_model("llama"), reward_model=reward_model("llama"), prompts=planted["prompts"], max_length=64,
        sampling=SamplingConfig(max_new_tokens=6),
    )  # fmt: skip
    return str(sample_baselines(config, tmp_path_factory.mktemp("baselines")))


@pytest.fixture
def base(language_model: Folders, reward_model: Folders, planted: dict[str, str]) -> dict[str, Any]:
    return {
        "policy": language_model("llama"), "reward_model": reward_model("llama"), "prompts": planted["prompts"],
        "steps": 1, "prompts_per_step": 4, "samples_per_prompt": 3, "max_length": 64,
        "sampling": SamplingConfig(max_new_tokens=6, temperature=0.8),
        "actor": OptimConfig(lr=1e-3), "critic": OptimConfig(lr=1e-3),
    }  # fmt: skip


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@dataclass
class Record:
    """What a run drew, the gradients that it handed to its optimisers, and the weights at which it took them."""

    prompts: list[list[tuple[int, ...]]]
    drawn: list[list[list[Sample]]]
    gradients: list[list[Tensor | None]]
    weights: list[list[Tensor]]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    kept = Record([], [], [], [])
    clip = torch.nn.utils.clip_grad_norm_

    def watch_sample(policy: Any, prompts: Any, keys: Any, **options: Any) -> Any:
        drawn = sample(policy, prompts, keys, **options)
        kept.prompts.append(list(prompts))
        kept.drawn.append(drawn)
        return drawn

    def watch_clip(parameters: Any, norm: float) -> Tensor:
        every = list(parameters)
        kept.gradients.append([None if p.grad is None else p.grad.clone() for p in every])
        kept.weights.append([p.detach().clone() for p in every])
        return clip(every, norm)

    monkeypatch.setattr(rollout, "sample", watch_sample)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch_clip)
    return kept


def reference(
    config: PPOConfig, prompts: Sequence[tuple[int, ...]], drawn: Sequence[Sequence[Sample]], baseline: Any
) -> tuple[dict[str, float], list[Tensor], list[Tensor]]:
    """One step, text by text, in float64, on transformers' own classes: metrics and both gradients."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy: Any = AutoModelForCausalLM.from_pretrained(config.policy).double()
    critic: Any = AutoModelForSequenceClassification.from_pretrained(config.reward_model).double()
    mean, std = critic.config.steelyard_reward
    texts = []
    for n, (prompt, group) in enumerate(zip(prompts, drawn, strict=True)):
        for s in group:
            ids = torch.tensor([prompt + s.tokens])
            own = slice(len(prompt) - 1, len(prompt) + len(s.tokens) - 1)
            logits = policy(input_ids=ids).logits[0, own]
            at = (torch.arange(len(s.tokens)), torch.tensor(s.tokens))
            logp = torch.log_softmax(logits / config.sampling.temperature, -1)
            values = (critic.score(critic.model(input_ids=ids).last_hidden_state)[0, own, 0] - mean) / std
            raw = critic(input_ids=ids).logits[0, 0].item()
            normal = (raw - mean) / std
            contrast = normal - float(np.mean([(b - mean) / std for b in baseline[n]])) if baseline else normal
            texts.append(
                {
                    "logp": logp[at], "values": values, "raw": raw, "normal": normal, "contrast": contrast,
                    "entropy": -(logp.exp() * logp).sum(-1).detach(), "ended": s.ended,
                    "nll": -torch.log_softmax(logits, -1)[at].detach(),
                }
            )  # fmt: skip
    sizes = [np.mean(np.abs([t[key] for t in texts])) for key in ("normal", "contrast")]
    signed = [np.mean([t[key] for t in texts]) for key in ("normal", "contrast")]
    factor = {"none": 1.0, "abs": sizes[0] / sizes[1], "signed": signed[0] / signed[1]}[config.scaling]
    advantages, returns = [], []
    for t in texts:
        paid = t["contrast"] * (factor if baseline else 1.0)
        limit = config.reward_clip or np.inf
        t["paid"] = min(max(paid, -limit), limit) - (0.0 if t["ended"] else config.missing_eos_penalty)
        v = [*t["values"].tolist(), 0.0]
        T = len(v) - 1
        rewards = [0.0] * (T - 1) + [t["paid"]]  # the policy is the reference: no KL yet
        delta = [rewards[i] + config.gamma * v[i + 1] - v[i] for i in range(T)]
        a = [sum((config.gamma * config.lam) ** (j - i) * delta[j] for j in range(i, T)) for i in range(T)]
        advantages.append(a)
        returns.append([x + y for x, y in zip(a, v, strict=False)])
    every = np.concatenate(advantages)
    total: Any = 0.0
    value_total: Any = 0.0
    for t, a, r in zip(texts, advantages, returns, strict=True):
        white = torch.tensor((np.array(a) - every.mean()) / every.std())
        total = total - (white * torch.exp(t["logp"] - t["logp"].detach())).sum() / len(every)
        value_total = value_total + 0.5 * ((t["values"] - torch.tensor(r)) ** 2).sum() / len(every)
    total.backward()
    value_total.backward()
    target = np.concatenate(returns)
    residual = target - np.concatenate([t["values"].detach().numpy() for t in texts])
    metrics = {
        "ppo/reward_raw": np.mean([t["raw"] for t in texts]),
        "ppo/reward_std": np.std([t["raw"] for t in texts]),
        "ppo/reward_shaped": np.mean([t["paid"] for t in texts]),
        "ppo/return": np.mean([t["paid"] for t in texts]),
        "ppo/kl": 0.0,
        "ppo/ppl_sft": np.exp(np.concatenate([t["nll"] for t in texts]).mean()),
        "ppo/length": len(every) / len(texts),
        "ppo/ended": np.mean([t["ended"] for t in texts]),
        "ppo/entropy": np.concatenate([t["entropy"] for t in texts]).mean(),
        "ppo/advantage_std": every.std(),
        "ppo/explained_variance": 1 - residual.var() / target.var(),
        "ppo/value_loss": value_total.item(),
        "ppo/policy_loss": 0.0,  # whitened advantages have mean 0
        "ppo/clip_fraction": 0.0,
        "ppo/scale": factor if baseline else 1.0,
    }
    grads = [[p.grad for p in model.parameters() if p.grad is not None] for model in (policy, critic)]
    return {k: float(v) for k, v in metrics.items()}, grads[0], grads[1]


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {"reward": "plain"},
    "contrastive, k=1": {"k": 1, "scaling": "none"},
    "contrastive, k=2, abs, clipped": {"k": 2, "scaling": "abs", "reward_clip": 0.6, "missing_eos_penalty": 0.3},
    "contrastive, signed, raw": {"scaling": "signed", "normalise": True, "gamma": 0.9, "lam": 0.5},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_is_that_of_a_plain_float64_reference(
    shape: str, base: dict[str, Any], stored: str, record: Record, tmp_path: Path
) -> None:
    scaled = {} if SHAPES[shape].get("scaling") == "none" else {"scale_floor": 1e-6, "scale_warmup": 1}
    settings = SHAPES[shape] if shape == "plain" else SHAPES[shape] | scaled | {"baselines": stored}
    for max_tokens in (32, 8192):
        config = PPOConfig.model_validate(base | settings | {"max_tokens": max_tokens})
        train_ppo(config, tmp_path / str(max_tokens), quiet=True)
    prompts, drawn = record.prompts[0], record.drawn[0]
    assert record.drawn[1] == drawn
    baseline = None
    if shape != "plain":
        kept = read_baselines(stored, k=config.k, policy=config.policy, reward_model=base["reward_model"])
        baseline = [kept[" ".join(tiny.VOCABULARY[i] for i in p)].tolist() for p in prompts]
    metrics, actor, critic = reference(config, prompts, drawn, baseline)
    for run in range(2):
        for found, expected in zip(record.gradients[2 * run : 2 * run + 2], (actor, critic), strict=True):
            assert len(found) == len(expected)
            for mine, theirs in zip(found, expected, strict=True):
                assert mine is not None
                error, size = float((mine - theirs).abs().max()), float(theirs.abs().max())
                assert error < 1e-3 * size + 1e-5, (error, size)
    for name_of_run in ("32", "8192"):
        (line,) = lines(tmp_path / name_of_run)
        for name, value in metrics.items():
            assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_a_step_in_bfloat16_points_where_float64_does(base: dict[str, Any], record: Record, tmp_path: Path) -> None:
    config = PPOConfig.model_validate(base | {"reward": "plain", "precision": "bfloat16"})
    train_ppo(config, tmp_path / "ppo", quiet=True)
    metrics, *gradients = reference(config, record.prompts[0], record.drawn[0], None)
    for found, expected in zip(record.gradients, gradients, strict=True):
        mine, theirs = (torch.cat([x.flatten().double() for x in part]) for part in (found, expected))  # type: ignore[union-attr]
        assert float(torch.cosine_similarity(mine, theirs, 0)) > 0.98
        assert float(mine.norm() / theirs.norm()) == pytest.approx(1, abs=0.05)
    (line,) = lines(tmp_path / "ppo")
    assert line["ppo/reward_raw"] == pytest.approx(metrics["ppo/reward_raw"], abs=0.02)
    assert line["ppo/kl"] == 0.0
    assert line["ppo/length"] == pytest.approx(metrics["ppo/length"])


def by_text(
    folder: Any, kind: Any, weights: list[Tensor] | None, read: Any, texts: Sequence[tuple[tuple[int, ...], Sample]]
) -> tuple[Any, list[Tensor]]:
    """(a model of transformers in float64 with these weights, what `read(model, ids)` gives where tokens are drawn)."""
    model = kind.from_pretrained(folder).double()
    for p, w in zip(model.parameters(), weights or (), strict=weights is not None):
        p.data.copy_(w)
    found = []
    for prompt, s in texts:
        own = slice(len(prompt) - 1, len(prompt) + len(s.tokens) - 1)
        found.append(read(model, torch.tensor([prompt + s.tokens]))[0, own])
    return model, found


def test_a_second_pass_clips_as_a_plain_float64_reference_does(
    base: dict[str, Any], record: Record, tmp_path: Path
) -> None:
    """Second step, second pass: the policy has left the SFT model, and since it sampled; both clips bind."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    fast = {name: OptimConfig(lr=lr, decay=False, warmup=0) for name, lr in (("actor", 6e-3), ("critic", 1e-3))}
    config = PPOConfig.model_validate(
        base | fast | {"reward": "plain", "steps": 2, "epochs": 2, "clip": 0.1, "value_clip": 0.05, "kl_coef": 0.3}
    )
    train_ppo(config, tmp_path / "ppo", quiet=True)
    texts = [(p, s) for p, group in zip(record.prompts[1], record.drawn[1], strict=True) for s in group]
    critic_kind = AutoModelForSequenceClassification
    sft: Any = critic_kind.from_pretrained(config.reward_model)
    mean, std = sft.config.steelyard_reward

    def logp(weights: list[Tensor] | None) -> tuple[Any, list[Tensor]]:
        model, logits = by_text(config.policy, AutoModelForCausalLM, weights, lambda m, x: m(input_ids=x).logits, texts)
        at = [(torch.arange(len(s.tokens)), torch.tensor(s.tokens)) for _, s in texts]
        return model, [torch.log_softmax(x / 0.8, -1)[i] for x, i in zip(logits, at, strict=True)]

    def value(weights: list[Tensor]) -> tuple[Any, list[Tensor]]:
        def read(m: Any, x: Tensor) -> Tensor:
            found: Tensor = (m.score(m.model(input_ids=x).last_hidden_state)[..., 0] - mean) / std
            return found

        return by_text(config.reward_model, critic_kind, weights, read, texts)

    with torch.no_grad():
        (_, ref), (_, old), (_, seen) = logp(None), logp(record.weights[4]), value(record.weights[5])
        paid = [(sft(input_ids=torch.tensor([p + s.tokens])).logits[0, 0].item() - mean) / std for p, s in texts]
    advantages, returns = [], []
    for r, o, v, reward in zip(ref, old, seen, paid, strict=True):
        rewards, values = -0.3 * (o - r), torch.cat([v, torch.zeros(1).double()])
        rewards[-1] += reward
        delta = rewards + values[1:] - values[:-1]
        a = torch.stack([sum(0.95 ** (j - i) * delta[j] for j in range(i, len(v))) for i in range(len(v))])  # type: ignore[misc]
        advantages.append(a)
        returns.append(a + v)
    every = torch.cat(advantages)
    (policy, now), (critic, values_now) = logp(record.weights[6]), value(record.weights[7])
    ratio = torch.exp(torch.cat(now) - torch.cat(old))
    white = (every - every.mean()) / every.std(correction=0)
    bounded = ratio.clamp(0.9, 1.1)
    torch.maximum(-white * ratio, -white * bounded).mean().backward()
    v, v_old, target = torch.cat(values_now), torch.cat(seen), torch.cat(returns)
    near = torch.minimum(torch.maximum(v, v_old - 0.05), v_old + 0.05)
    (0.5 * torch.maximum((v - target) ** 2, (near - target) ** 2)).mean().backward()
    assert 0.1 < (ratio != bounded).double().mean() < 0.9, "some tokens are clipped, and some are not"
    assert 0.1 < (v != near).double().mean() < 0.9
    assert max(float((o - r).abs().max()) for o, r in zip(old, ref, strict=True)) > 0.1
    for found, model in ((record.gradients[6], policy), (record.gradients[7], critic)):
        expected = [p.grad for p in model.parameters() if p.grad is not None]
        for mine, theirs in zip(found, expected, strict=True):
            assert mine is not None
            error, size = float((mine - theirs).abs().max()), float(theirs.abs().max())
            assert error < 1e-3 * size + 1e-5, (error, size)


class LikesGood(torch.nn.Module):
    """A reward of 1 for every "good" in the response."""

    def forward(self, batch: Any) -> Tensor:
        said: Tensor = (batch.response_BKR == tiny.VOCABULARY.index("good")) & batch.mask_BKR
        return said.sum(-1).float()


class Planted(actors.Models):
    """PPO's models with a reward that cannot be gamed."""

    def __init__(self, config: PPOConfig) -> None:
        super().__init__(config)
        self.reward = LikesGood()


@pytest.mark.parametrize("kl_coef", [0.0, 5.0])
def test_a_reward_for_one_word_raises_that_word_and_the_kl_penalty_holds_back(
    kl_coef: float, base: dict[str, Any], stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppo, "Models", Planted)
    config = PPOConfig.model_validate(
        base | {
            "reward": "contrastive", "baselines": stored, "steps": 16, "prompts_per_step": 12, "samples_per_prompt": 4,
            "actor": OptimConfig(lr=5e-3, decay=False), "critic": OptimConfig(lr=5e-3, decay=False),
            "kl_coef": kl_coef, "gold": "tiny:count_good", "sample_every": 8,
        }
    )  # fmt: skip
    result = train_ppo(config, tmp_path / "ppo", quiet=True)
    logged = lines(tmp_path / "ppo")
    start, end = (np.mean([line["ppo/gold"] for line in part]) for part in (logged[:3], logged[-3:]))
    kl = np.mean([line["ppo/kl"] for line in logged[-3:]])
    assert logged[0]["ppo/kl"] == 0.0
    if kl_coef:
        assert kl < 4.0
        return
    assert end > 3 * start + 0.5
    assert kl > 10.0
    assert [line["ppo/reward_raw"] for line in logged] == pytest.approx([line["ppo/gold"] for line in logged])
    # Without a KL penalty, what is paid is all there is.
    assert all(line["ppo/return"] == pytest.approx(line["ppo/reward_shaped"], abs=1e-5) for line in logged)
    samples = [json.loads(line) for line in (tmp_path / "ppo" / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [8] * 4 + [16] * 4
    assert "good" in " ".join(s["response"] for s in samples[-4:])
    assert result["ppo/gold"] == logged[-1]["ppo/gold"]
    assert train_ppo(config, tmp_path / "ppo", resume=True, quiet=True) == result


def test_while_the_critic_warms_up_the_policy_stays(base: dict[str, Any], tmp_path: Path) -> None:
    config = PPOConfig.model_validate(base | {"reward": "plain", "steps": 3, "critic_warmup": 2, "epochs": 2})
    train_ppo(config, tmp_path / "ppo", quiet=True)
    logged = lines(tmp_path / "ppo")
    assert [line["ppo/kl"] for line in logged] == [0.0] * 3
    assert [line["ppo/policy_loss"] for line in logged[:2]] == [0.0] * 2
    before, after = (PolicyModel.load(f).state_dict() for f in (config.policy, tmp_path / "ppo" / "model"))
    assert any(not torch.equal(before[name], after[name]) for name in before), "the third step trains it"


def test_the_scale_of_the_reward_model_does_not_matter(base: dict[str, Any], record: Record, tmp_path: Path) -> None:
    """A head and a mean and std scaled alike are the same normalised reward, hence the same step."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(base["reward_model"])
    with torch.no_grad():
        model.score.weight *= 64
    model.config.steelyard_reward = [64 * x for x in model.config.steelyard_reward]
    other = tiny.save_folder(model, tiny.build_tokenizer(), tmp_path / "rm")
    for name, folder in (("a", base["reward_model"]), ("b", other)):
        settings = base | {"reward": "plain", "reward_model": folder}
        train_ppo(PPOConfig.model_validate(settings), tmp_path / name, quiet=True)
    for mine, theirs in zip(record.gradients[0], record.gradients[2], strict=True):
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


class TestRefusals:
    def refuse(self, match: str, tmp_path: Path, base: dict[str, Any], **settings: Any) -> None:
        with pytest.raises(InputError, match=match):
            train_ppo(PPOConfig.model_validate(base | settings), tmp_path / "out", quiet=True)
        assert not (tmp_path / "out" / "result.json").exists()

    def test_options_without_effect(self, base: dict[str, Any], tmp_path: Path, stored: str) -> None:
        useless = {"baselines": stored, "k": 2}
        self.refuse("^baselines, k: no effect with reward = plain", tmp_path, base | useless, reward="plain")
        self.refuse("^scaling: no effect", tmp_path, base, reward="plain", scaling="none")
        resolved = PPOConfig.model_validate(base | {"reward": "plain"}).model_dump()
        assert train_ppo(PPOConfig.model_validate(resolved), tmp_path / "fine", quiet=True)["steps"] == 1

    def test_baselines_that_do_not_belong(
        self, base: dict[str, Any], tmp_path: Path, stored: str, planted_reward: Path
    ) -> None:
        self.refuse("contrastive rewards need a scored baseline file", tmp_path, base)
        b = base | {"baselines": stored}
        another = tiny.build_model(tiny.build_config(), seed=9)
        policy = tiny.save_folder(another, tiny.build_tokenizer(), tmp_path / "policy")
        self.refuse("sampled from another model", tmp_path, b, policy=policy)
        self.refuse("scored by another model", tmp_path, b, reward_model=str(planted_reward / "model"))
        self.refuse("holds 3 responses per prompt, 5 are wanted", tmp_path, b, k=5)
        more = [{"prompt": "w1 w1 w1"}, *({"prompt": p} for p in self.prompts(base))]
        other = tiny.write_jsonl(tmp_path / "more.jsonl", more)
        self.refuse("no baselines for 1 of 13 prompts; sample them first", tmp_path, b, prompts=other)

    def prompts(self, base: dict[str, Any]) -> list[str]:
        return [json.loads(line)["prompt"] for line in Path(base["prompts"]).read_text().splitlines()]

    def test_models_that_do_not_fit_together(
        self, base: dict[str, Any], tmp_path: Path, language_model: Folders
    ) -> None:
        self.refuse("not a reward model", tmp_path, base, reward="plain", reward_model=language_model("llama"))
        tokenizer = tiny.build_tokenizer(words=(*tiny.VOCABULARY[:-1], "other"))
        other = tiny.save_folder(tiny.build_model(tiny.build_config(), head=True), tokenizer, tmp_path / "other")
        self.refuse("must share one tokenizer", tmp_path, base, reward="plain", reward_model=other)
        config = tiny.build_config()
        config.steelyard_reward = [0.0, 0.0]
        flat = tiny.save_folder(tiny.build_model(config, head=True), tiny.build_tokenizer(), tmp_path / "flat")
        self.refuse("its rewards have no spread", tmp_path, base, reward="plain", reward_model=flat)

    def test_a_template_of_its_own_reads_prompts_differently(self, base: dict[str, Any], tmp_path: Path) -> None:
        tokenizer = tiny.build_tokenizer(chat_template=tiny.CHAT)
        other = tiny.save_folder(tiny.build_model(tiny.build_config(), head=True), tokenizer, tmp_path / "other")
        self.refuse("must share one tokenizer", tmp_path, base, reward="plain", reward_model=other)

    def test_too_few_prompts_and_an_unknown_gold_scorer(self, base: dict[str, Any], tmp_path: Path) -> None:
        base |= {"reward": "plain"}
        self.refuse(
            "12 of 12 .* prompts_per_step = 13 needs more: lower it, or add prompts$",
            tmp_path,
            base,
            prompts_per_step=13,
        )
        self.refuse("3 of 3 .* needs more: .*; limit = 3 lets only the first prompts in", tmp_path, base, limit=3)
        self.refuse("0 of 12 prompts leave room", tmp_path, base, max_length=8)
        self.refuse("a scorer is named `module:function`", tmp_path, base, gold="tiny")
        self.refuse("a scorer is named `module:function`", tmp_path, base, gold="tiny:nothing")

    def test_a_reward_that_diverges_stops_with_advice(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(actors.Models, "normal", lambda self, raw: raw * float("nan"))
        with pytest.raises(FloatingPointError, match=r"step 1: .* not finite; lower actor\.lr"):
            train_ppo(PPOConfig.model_validate(base | {"reward": "plain"}), tmp_path / "out", quiet=True)
