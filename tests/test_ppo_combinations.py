"""PPO with every reward and every advantage: what each is paid, what is refused and why, and when a run stops."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from torch import Tensor

import tiny
from conftest import Folders
from steelyard import actors, rollout
from steelyard.baselines import BaselineConfig, read_baselines, sample_baselines
from steelyard.data.encode import Tree
from steelyard.errors import InputError
from steelyard.models.reward import RewardModel
from steelyard.recipe import build
from steelyard.rollout import Rollouts
from steelyard.sampling import Sample, SamplingConfig, sample
from steelyard.settings import parse
from steelyard.train import ppo
from steelyard.train.optim import OptimConfig
from steelyard.train.ppo import PPOConfig, train_ppo

OF_THE_CRITIC = {"ppo/value_loss", "ppo/value_mean", "ppo/explained_variance"}


@pytest.fixture(scope="module")
def stored(
    language_model: Folders, reward_model: Folders, planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Baselines of every prompt, k = 3."""
    config = BaselineConfig(
        policy=language_model("llama"), reward_model=reward_model("llama"), prompts=planted["prompts"], max_length=64,
        sampling=SamplingConfig(max_new_tokens=5),
    )  # fmt: skip
    return str(sample_baselines(config, tmp_path_factory.mktemp("baselines")))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> str:
    """Another reward model, on a scale of its own."""
    config = tiny.build_config()
    config.steelyard_reward = [-2.0, 0.5]
    folder = tmp_path_factory.mktemp("second")
    return tiny.save_folder(tiny.build_model(config, seed=7, head=True), tiny.build_tokenizer(), folder)


@pytest.fixture(scope="module")
def twice(stored: str, second: str, language_model: Folders, planted: dict[str, str]) -> str:
    """The same baselines, scored by `second`."""
    config = BaselineConfig(
        policy=language_model("llama"), reward_model=second, prompts=planted["prompts"], max_length=64,
        sampling=SamplingConfig(max_new_tokens=5),
    )  # fmt: skip
    return str(sample_baselines(config, Path(stored).parent))


@pytest.fixture
def base(language_model: Folders, reward_model: Folders, planted: dict[str, str]) -> dict[str, Any]:
    return {
        "policy": language_model("llama"), "reward_model": reward_model("llama"), "prompts": planted["prompts"],
        "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 3, "max_length": 64, "kl_coef": 0.3,
        "sampling": SamplingConfig(max_new_tokens=5, temperature=0.8), "actor": OptimConfig(lr=5e-3, decay=False),
    }  # fmt: skip


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Watch:
    """What a run drew, was paid and learned from, step by step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.draws: list[tuple[list[tuple[int, ...]], list[list[Sample]]]] = []
        self.paid: list[tuple[Rollouts, Tensor]] = []
        self.updates: list[tuple[Rollouts, Tensor]] = []
        self.gradients: list[list[Tensor]] = []
        shape, update, clip = rollout.shape_rewards, ppo.update, torch.nn.utils.clip_grad_norm_

        def watch_sample(policy: Any, prompts: Any, keys: Any, **options: Any) -> Any:
            self.draws.append((list(prompts), sample(policy, prompts, keys, **options)))
            return self.draws[-1][1]

        def watch_shape(rollouts: Rollouts, *rest: Any, **options: Any) -> Tensor:
            self.paid.append((rollouts, shape(rollouts, *rest, **options)))
            return self.paid[-1][1]

        def watch_update(learner: Any, rollouts: Rollouts, advantages: Tensor, *rest: Any) -> Any:
            self.updates.append((rollouts, advantages))
            return update(learner, rollouts, advantages, *rest)

        def watch_clip(parameters: Any, norm: float) -> Tensor:
            every = list(parameters)
            self.gradients.append([p.grad.clone() for p in every])
            return clip(every, norm)

        monkeypatch.setattr(rollout, "sample", watch_sample)
        monkeypatch.setattr(rollout, "shape_rewards", watch_shape)
        monkeypatch.setattr(ppo, "update", watch_update)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch_clip)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


REWARDS: dict[str, dict[str, Any]] = {
    "plain": {"reward": "plain"},
    "contrastive": {"reward": "contrastive", "k": 2},
    "contrastive, bounded": {"reward": "contrastive", "k": 2, "reward_clip": 0.4},
    "par": {"reward": "par"},
    "lsc": {"reward": "lsc", "lsc_percentile": 50},
    "lsc, all": {"reward": "lsc", "lsc_reference": "all"},
    "ensemble": {"reward": "plain", "aggregate": "worst"},
    "ensemble, contrastive": {"reward": "contrastive", "k": 2, "aggregate": "uncertainty-weighted"},
    "ensemble, par": {"reward": "par", "aggregate": "worst"},
    "ensemble, lsc": {"reward": "lsc", "lsc_percentile": 50},
}
ADVANTAGES: dict[str, dict[str, Any]] = {
    "gae": {"advantage": "gae", "critic": OptimConfig(lr=1e-3)},
    "rloo": {"advantage": "rloo"},
    "group": {"advantage": "group", "group_std": False},
    "remax": {"advantage": "remax"},
    "remax, one sample": {"advantage": "remax", "samples_per_prompt": 1},
}
ALLOWED = [
    (reward, advantage, scaled)
    for reward, advantage, scaled in itertools.product(REWARDS, ADVANTAGES, (False, True))
    if not reward.endswith("contrastive") or advantage == "gae"
]


def settings(base: dict[str, Any], reward: str, stored: tuple[str, str], second: str) -> dict[str, Any]:
    several = reward.startswith("ensemble")
    made = base | REWARDS[reward] | ({"reward_model": (base["reward_model"], second)} if several else {})
    return made | ({} if made["reward"] == "plain" else {"baselines": stored if several else stored[0]})


@pytest.mark.parametrize(("reward", "advantage", "scaled"), ALLOWED)
def test_every_allowed_combination_runs(
    reward: str, advantage: str, scaled: bool, base: dict[str, Any], stored: str, twice: str, second: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    scaling = {"scaling": "std", "scale_warmup": 4} if scaled else {}
    both = (stored, twice)
    config = PPOConfig.model_validate(settings(base, reward, both, second) | ADVANTAGES[advantage] | scaling)
    train_ppo(config, tmp_path / "ppo", quiet=True)
    first, last = lines(tmp_path / "ppo")
    assert first["ppo/kl"] == 0 < abs(last["ppo/kl"])
    assert first["ppo/advantage_std"] > 0
    assert OF_THE_CRITIC & set(last) == (OF_THE_CRITIC if advantage == "gae" else set())
    if reward.endswith("par"):
        assert 0 < first["ppo/reward_shaped"] < first["ppo/scale"]
    if "lsc" in reward:
        assert first["ppo/reward_shaped"] < 0
    names = (tmp_path / "ppo" / "model").iterdir()
    assert "model.safetensors" in {path.name for path in names}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "one response and rloo": ({"advantage": "rloo", "samples_per_prompt": 1}, "rloo compares the responses .* got 1"),
    "one response and group": ({"advantage": "group", "samples_per_prompt": 1}, "group compares the responses"),
    **{
        f"contrastive and {name}": (
            {"reward": "contrastive", "advantage": name, "baselines": "b"},
            f"advantage = {name} with reward = contrastive: the baseline cancels",
        )
        for name in ("rloo", "group", "remax")
    },
    "par without baselines": ({"reward": "par"}, "par rewards need a scored baseline file"),
    "lsc without baselines": ({"reward": "lsc"}, "lsc rewards need a scored baseline file"),
    "critic options": (
        {"advantage": "rloo", "critic": OptimConfig(lr=1e-3), "lam": 0.9, "gamma": 0.9, "value_clip": 0.1},
        "critic, gamma, lam, value_clip: no effect with advantage = rloo, which has no critic",
    ),
    "critic warm-up": ({"advantage": "remax", "critic_warmup": 1}, "critic_warmup: no effect with advantage = remax"),
    "a group's std": ({"advantage": "rloo", "group_std": False}, "group_std: no effect with advantage = rloo"),
    "scaling of par": ({"reward": "par", "baselines": "b", "scaling": "abs"}, "scaling: no effect with reward = par"),
    "warm-up of no scaling": ({"reward": "lsc", "baselines": "b", "scale_warmup": 5}, "scale_warmup: no effect"),
    "baseline of par": ({"reward": "par", "baselines": "b", "baseline": "shrunk"}, "baseline: no effect with reward"),
    "shrinking one": (
        {"reward": "contrastive", "advantage": "gae", "baselines": "b", "baseline": "shrunk", "k": 1},
        "k: one baseline a prompt does not tell how noisy it is",
    ),
    "k of plain": ({"k": 2, "scaling": "std"}, "k: no effect with reward = plain"),
    "bound of par": ({"reward": "par", "baselines": "b", "reward_clip": 1.0}, "reward_clip: no effect with reward"),
    "percentile of one": (
        {"reward": "lsc", "baselines": "b", "k": 1, "lsc_percentile": 9}, "lsc_percentile: no effect with k = 1"
    ),
    "a scale that the group divides out": (
        {"advantage": "group", "scaling": "std", "kl_coef": 0.0}, "scaling: no effect with advantage = group and"
    ),
    "percentile of par": ({"reward": "par", "baselines": "b", "lsc_percentile": 9}, "lsc_percentile: no effect with"),
    "aggregate of one": ({"aggregate": "worst"}, "aggregate: no effect with one reward model"),
    "weight of the mean": (
        {"reward_model": ("a", "b"), "uncertainty_weight": 1.0}, "uncertainty_weight: no effect with aggregate = mean"
    ),
    "two reward models, one baseline file": (
        {"reward_model": ("a", "b"), "reward": "par", "baselines": "b"},
        "baselines: must name one scored file for each reward model, in their order, got 1 for 2",
    ),
    "one reward model, two baseline files": (
        {"reward": "par", "baselines": ("b", "c")}, "baselines: must name one scored file .* got 2 for 1"
    ),
    "an end held back": ({"sampling": {"min_new_tokens": 2}}, "min_new_tokens: must be 0 in PPO, got 2"),
    "no reward model": ({"reward_model": ()}, "must name one or several different folders"),
    "one reward model twice": ({"reward_model": ("a", "./a/")}, "must name one or several different folders"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_with_its_reason(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason):
        train_ppo(PPOConfig.model_validate(base | {"reward": "plain"} | changes), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [3, [1], {"a": "b"}])
def test_what_are_no_paths_is_refused_in_one_line(wrong: Any) -> None:
    settings = {"policy": "p", "prompts": "q", "reward_model": "r", "baselines": wrong}
    with pytest.raises(InputError) as refused:
        build(PPOConfig, "ppo", settings)
    assert str(refused.value) == f"ppo.baselines: must be a path, or a list of paths, got {wrong!r}"


def totals(rollouts: Rollouts, paid: Tensor, kl_coef: float) -> np.ndarray:
    """Eq. 3 by response: what is paid less the KL of its tokens."""
    kl, mask = rollouts.kl_NKT.double().numpy(), rollouts.mask_NKT.numpy()
    return paid.double().numpy() - kl_coef * np.where(mask, kl, 0).sum(-1)


def rloo(rewards: np.ndarray) -> np.ndarray:
    return np.array([[r - np.mean(np.delete(row, k)) for k, r in enumerate(row)] for row in rewards])


def group(rewards: np.ndarray) -> np.ndarray:
    return np.array([(row - np.mean(row)) / np.std(row) for row in rewards])


@pytest.mark.parametrize(("name", "expected"), [("rloo", rloo), ("group", group)])
def test_advantages_in_a_step_are_those_of_numpy(
    name: str, expected: Callable[[np.ndarray], np.ndarray], base: dict[str, Any], watch: Watch, tmp_path: Path
) -> None:
    config = PPOConfig.model_validate(base | {"reward": "plain", "advantage": name})
    train_ppo(config, tmp_path / "ppo", quiet=True)
    for (rollouts, advantages), (_, paid) in zip(watch.updates, watch.paid, strict=True):
        raw = rollouts.rewards_NK.double().numpy()
        np.testing.assert_allclose(paid.numpy(), (raw - 0.3) / 1.7, atol=1e-5)
        per_response = expected(totals(rollouts, paid, 0.3))
        mask = rollouts.mask_NKT.numpy()
        theirs = np.where(mask, per_response[:, :, None], 0).reshape(-1, mask.shape[-1])
        np.testing.assert_allclose(advantages.numpy(), theirs, rtol=1e-4, atol=1e-4)
    assert watch.updates[1][0].kl_NKT.abs().max() > 0.01, "the second step's KL is part of what is compared"


def test_the_gradient_of_rloo_is_that_of_transformers_in_float64(
    base: dict[str, Any], watch: Watch, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config = PPOConfig.model_validate(base | {"reward": "plain", "advantage": "rloo", "steps": 1, "max_tokens": 32})
    train_ppo(config, tmp_path / "ppo", quiet=True)
    (prompts, drawn), (rollouts, paid) = watch.draws[0], watch.paid[0]
    advantages = rloo(totals(rollouts, paid, 0.3))
    policy: Any = AutoModelForCausalLM.from_pretrained(config.policy).double()
    loss, tokens = torch.zeros((), dtype=torch.float64), 0
    for prompt, responses, row in zip(prompts, drawn, advantages, strict=True):
        for s, advantage in zip(responses, row, strict=True):
            logits = policy(input_ids=torch.tensor([prompt + s.tokens])).logits[0, len(prompt) - 1 : -1]
            chosen = torch.log_softmax(logits / 0.8, -1)[torch.arange(len(s.tokens)), torch.tensor(s.tokens)]
            loss, tokens = loss - float(advantage) * chosen.sum(), tokens + len(s.tokens)
    (loss / tokens).backward()
    assert len(watch.gradients) == 1, "there is no critic to train"
    for mine, theirs in zip(watch.gradients[0], policy.parameters(), strict=True):
        assert float((mine - theirs.grad).abs().max()) < 1e-3 * float(theirs.grad.abs().max()) + 1e-5


def test_remax_takes_the_greedy_responses_reward(base: dict[str, Any], watch: Watch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = PPOConfig.model_validate(base | {"reward": "plain", "advantage": "remax"})
    train_ppo(config, tmp_path / "ppo", quiet=True)
    # The first step's policy is the SFT model: its most probable tokens, one by one.
    policy: Any = AutoModelForCausalLM.from_pretrained(config.policy)
    (prompts, drawn), (asked, greedy) = watch.draws[:2]
    assert asked == prompts
    assert [len(responses) for responses in drawn] == [3] * 4
    for prompt, (response,) in zip(prompts, greedy, strict=True):
        said: tuple[int, ...] = ()
        while len(said) < 5 and tiny.EOS not in said:
            said += (int(policy(input_ids=torch.tensor([prompt + said])).logits[0, -1].argmax()),)
        assert response.tokens == said
    assert len(watch.paid) == 4
    for step, (rollouts, advantages) in enumerate(watch.updates):
        (sampled, paid), (baseline, alone) = watch.paid[2 * step : 2 * step + 2]
        assert sampled is rollouts
        theirs = totals(sampled, paid, 0.3) - totals(baseline, alone, 0.3)
        np.testing.assert_allclose(advantages.view_as(rollouts.kl_NKT)[:, :, 0].numpy(), theirs, atol=1e-4)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_shrunk_baselines_are_shrunk_to_all_prompts_not_to_the_batch(
    base: dict[str, Any], stored: str, watch: Watch, tmp_path: Path
) -> None:
    settings = {"reward": "contrastive", "baseline": "shrunk", "baselines": stored, "scaling": "none", "steps": 1}
    config = PPOConfig.model_validate(base | settings)
    train_ppo(config, tmp_path / "ppo", quiet=True)
    (rollouts, paid) = watch.paid[0]
    taken = (rollouts.rewards_NK.double().numpy() - 0.3) / 1.7 - paid.numpy()
    found = read_baselines(stored, k=None, policy=config.policy, reward_model=config.reward_models[0])
    raw = np.stack(list(found.values()))
    means = raw.astype(float).mean(1)
    within = raw.astype(float).var(1, ddof=1).mean() / raw.shape[1]
    weight = max(0.0, 1 - within / means.var(ddof=1))
    known = (means.mean() + weight * (means - means.mean()) - 0.3) / 1.7
    assert len(known) > len(taken) == 4
    for row in taken:
        assert np.abs(known[:, None] - row).min(0).max() < 1e-5
        assert np.ptp(row) < 1e-5, "one number for all responses to a prompt"


@pytest.mark.parametrize("reward", ["par", "lsc", "lsc, all"])
def test_par_and_lsc_are_paid_against_the_stored_baselines(
    reward: str, base: dict[str, Any], stored: str, watch: Watch, tmp_path: Path
) -> None:
    bound = 0.6 if reward == "par" else 2.0
    config = PPOConfig.model_validate(settings(base, reward, (stored, ""), "") | {"steps": 1, "reward_clip": bound})
    train_ppo(config, tmp_path / "ppo", quiet=True)
    kept = read_baselines(stored, k=None, policy=config.policy, reward_model=base["reward_model"])
    (rollouts, paid), prompts = watch.paid[0], watch.draws[0][0]
    for n, prompt in enumerate(prompts):
        ours = np.float64(kept[" ".join(tiny.VOCABULARY[i] for i in prompt)])
        every = np.concatenate(list(kept.values())).astype(float)
        for raw, got in zip(rollouts.rewards_NK[n].tolist(), paid[n].tolist(), strict=True):
            expected = {
                "par": np.mean(sigmoid((raw - ours) / 1.7)),
                "lsc": math.log(sigmoid((raw - np.median(ours)) / 1.7)),
                "lsc, all": math.log(sigmoid((raw - np.percentile(every, 85)) / 1.7)),
            }[reward]
            assert got == pytest.approx(np.clip(expected, -bound, bound), abs=1e-5)


@pytest.mark.parametrize("how", ["mean", "worst", "uncertainty-weighted"])
def test_an_ensemble_aggregates_normalised_scores(
    how: str, base: dict[str, Any], second: str, watch: Watch, tmp_path: Path
) -> None:
    weight = {"uncertainty_weight": 2.0} if how == "uncertainty-weighted" else {}
    folders = (base["reward_model"], second)
    config = PPOConfig.model_validate(
        base | {"reward": "plain", "reward_model": folders, "aggregate": how, "steps": 1} | weight
    )
    train_ppo(config, tmp_path / "ppo", quiet=True)
    prompts, drawn = watch.draws[0]
    trees = [Tree(p, tuple(s.tokens for s in row)) for p, row in zip(prompts, drawn, strict=True)]
    first, other = (RewardModel.load(f).score(trees, pad_id=tiny.PAD).astype(float) for f in folders)
    a, b = (first - 0.3) / 1.7, (other + 2.0) / 0.5
    # The population variance of two numbers is a quarter of their squared difference; its weight is 2.
    expected = {"mean": (a + b) / 2, "worst": np.minimum(a, b), "uncertainty-weighted": (a + b - (a - b) ** 2) / 2}[how]
    np.testing.assert_allclose(watch.paid[0][1].numpy(), expected, rtol=1e-4, atol=1e-4)
    assert lines(tmp_path / "ppo")[0]["ppo/reward_raw"] == pytest.approx(expected.mean(), abs=1e-4)


def aggregated(first: np.ndarray, other: np.ndarray, how: str) -> np.ndarray:
    """Raw scores of the two reward models to one, by hand, in float64."""
    a, b = (first.astype(float) - 0.3) / 1.7, (other.astype(float) + 2.0) / 0.5
    # The population variance of two numbers is a quarter of their squared difference.
    return {"mean": (a + b) / 2, "worst": np.minimum(a, b), "uncertainty-weighted": (a + b - (a - b) ** 2 / 4) / 2}[how]


@pytest.mark.parametrize("how", ["mean", "worst", "uncertainty-weighted"])
@pytest.mark.parametrize("reward", ["contrastive", "par", "lsc"])
def test_an_ensembles_baselines_are_aggregated_like_its_rewards(
    reward: str, how: str, base: dict[str, Any], stored: str, twice: str, second: str, watch: Watch, tmp_path: Path
) -> None:
    folders, files = (base["reward_model"], second), (stored, twice)
    own = {"contrastive": {"scaling": "none"}, "par": {}, "lsc": {"lsc_percentile": 50}}[reward]
    config = PPOConfig.model_validate(
        base | {"reward": reward, "reward_model": folders, "baselines": files, "aggregate": how, "steps": 1} | own
    )
    train_ppo(config, tmp_path / "ppo", quiet=True)
    kept = [
        read_baselines(f, k=None, policy=config.policy, reward_model=m) for f, m in zip(files, folders, strict=True)
    ]
    prompts, drawn = watch.draws[0]
    trees = [Tree(p, tuple(s.tokens for s in row)) for p, row in zip(prompts, drawn, strict=True)]
    ours = aggregated(*(RewardModel.load(f).score(trees, pad_id=tiny.PAD) for f in folders), how)
    for n, prompt in enumerate(prompts):
        key = " ".join(tiny.VOCABULARY[i] for i in prompt)
        theirs = aggregated(kept[0][key], kept[1][key], how)
        expected = {
            "contrastive": ours[n] - theirs.mean(),
            "par": sigmoid(ours[n][:, None] - theirs).mean(-1),
            "lsc": np.log(sigmoid(ours[n] - np.median(theirs))),
        }[reward]
        np.testing.assert_allclose(watch.paid[0][1][n].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_an_ensembles_baselines_must_be_its_own_and_of_the_same_responses(
    base: dict[str, Any], stored: str, twice: str, second: str, language_model: Folders, planted: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    base |= {"reward": "par", "reward_model": (base["reward_model"], second)}
    with pytest.raises(InputError, match=r"scored by another model than .*; in its place name the file that"):
        train_ppo(PPOConfig.model_validate(base | {"baselines": (twice, stored)}), tmp_path / "a", quiet=True)
    config = BaselineConfig(
        policy=language_model("llama"), reward_model=second, prompts=planted["prompts"], max_length=64, seed=1,
        sampling=SamplingConfig(max_new_tokens=5),
    )  # fmt: skip
    other = str(sample_baselines(config, tmp_path / "other"))
    with pytest.raises(InputError, match="holds other responses than"):
        train_ppo(PPOConfig.model_validate(base | {"baselines": (stored, other)}), tmp_path / "b", quiet=True)


def test_running_std_divides_by_the_std_of_all_rewards_so_far(
    base: dict[str, Any], watch: Watch, tmp_path: Path
) -> None:
    config = PPOConfig.model_validate(base | {"reward": "plain", "scaling": "std", "scale_warmup": 13})
    train_ppo(config, tmp_path / "ppo", quiet=True)
    first, last = lines(tmp_path / "ppo")
    assert first["ppo/scale"] == 1.0, "12 rollouts are fewer than the warm-up's 13"
    normal = [(rollouts.rewards_NK.double().numpy() - 0.3) / 1.7 for rollouts, _ in watch.paid]
    assert last["ppo/scale"] == pytest.approx(1 / np.std(normal), rel=1e-5)
    np.testing.assert_allclose(watch.paid[1][1].numpy(), normal[1] / np.std(normal), rtol=1e-4, atol=1e-5)


def test_the_greedy_responses_do_not_enter_the_running_std(base: dict[str, Any], watch: Watch, tmp_path: Path) -> None:
    changes = {"reward": "plain", "advantage": "remax", "scaling": "std", "scale_warmup": 1, "steps": 1}
    train_ppo(PPOConfig.model_validate(base | changes), tmp_path / "ppo", quiet=True)
    sampled = watch.paid[0][0].rewards_NK.double().numpy() / 1.7
    assert lines(tmp_path / "ppo")[0]["ppo/scale"] == pytest.approx(1 / np.std(sampled), rel=1e-5)


@pytest.mark.parametrize(("advantage", "loaded"), [("gae", 2), ("rloo", 1), ("group", 1), ("remax", 1)])
def test_only_gae_loads_a_critic(
    advantage: str, loaded: int, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str] = []
    load = RewardModel.load

    def counted(folder: str, **options: Any) -> RewardModel:
        folders.append(folder)
        return load(folder, **options)

    monkeypatch.setattr(RewardModel, "load", counted)
    config = PPOConfig.model_validate(base | {"reward": "plain", "advantage": advantage})
    assert (actors.Models(config).critic is not None) == (advantage == "gae")
    assert len(folders) == loaded


def test_a_reward_model_whose_spread_was_never_measured_is_named(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = PPOConfig.model_validate(base | {"reward": "plain"})
    actors.Models(config)
    assert "warning" not in capsys.readouterr().err
    bare = tiny.build_model(tiny.build_config(), seed=7, head=True)
    other = tiny.save_folder(bare, tiny.build_tokenizer(), tmp_path / "bare")
    actors.Models(config.model_copy(update={"reward_model": other}))
    assert f"warning: {other}: no mean and std of its rewards" in capsys.readouterr().err
    actors.Models(config.model_copy(update={"reward_model": other, "normalise": False}))
    assert "warning" not in capsys.readouterr().err
    with pytest.raises(InputError, match=f"{other}: no mean and std .* cannot be set beside others"):
        actors.Models(config.model_copy(update={"reward_model": (config.reward_model, other)}))


class TestGuards:
    def stop(self, match: str, tmp_path: Path, settings: dict[str, Any]) -> None:
        with pytest.raises(FloatingPointError, match=match):
            train_ppo(PPOConfig.model_validate(settings), tmp_path / "out", quiet=True)
        assert not (tmp_path / "out" / "result.json").exists()

    def test_rewards_that_no_longer_differ(self, base: dict[str, Any], tmp_path: Path) -> None:
        changes = {"reward": "plain", "min_reward_std": 1e3}
        self.stop("step 1: the rewards' std .* fell below min_reward_std = 1000", tmp_path, base | changes)

    def test_prompts_may_differ_where_their_responses_do_not(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One answer to each prompt: the rewards of the whole step still have a spread."""

        def by_prompt(self: RewardModel, batch: Any) -> Tensor:
            return torch.arange(len(batch.last_BK)).float()[:, None].expand(batch.last_BK.shape)

        monkeypatch.setattr(RewardModel, "forward", by_prompt)
        changes = {"reward": "plain", "min_reward_std": 1e-6}
        self.stop("step 1: the rewards' std of a prompt's responses, 0, fell below", tmp_path, base | changes)

    def test_a_gold_scorer_without_a_number(self, base: dict[str, Any], tmp_path: Path) -> None:
        """No guard of PPO's: rounds would take it for a policy that went wrong."""
        settings = base | {"gold": "tiny:no_number", "reward": "plain"}
        with pytest.raises(InputError, match=r"tiny:no_number: must return a finite number, got nan for the response"):
            train_ppo(PPOConfig.model_validate(settings), tmp_path / "out", quiet=True)

    def test_a_policy_that_left(self, base: dict[str, Any], tmp_path: Path) -> None:
        faster = {"actor": OptimConfig(lr=0.1, decay=False), "kl_coef": 0.0, "steps": 9}
        self.stop(
            "step [2-9]: the KL of .* rose above max_kl = 0.5",
            tmp_path,
            base | faster | {"reward": "plain", "max_kl": 0.5},
        )

    def test_scores_that_are_no_numbers(
        self, base: dict[str, Any], stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(RewardModel, "forward", lambda self, batch: torch.full(batch.last_BK.shape, math.nan))
        match = "step 1: the rewards of 12 of 12 responses are not finite: the reward model is at fault"
        self.stop(match, tmp_path, base | {"baselines": stored})


def test_the_command_line_names_several_reward_models() -> None:
    args = ["--policy", "p", "--reward-model", "a", "b", "--prompts", "q", "--out", "o", "--aggregate", "worst"]
    config, _ = parse(PPOConfig, args, verb="train ppo", about="", out=(Path, tyro.MISSING, "folder"))
    assert config.reward_models == ("a", "b")
    one, _ = parse(PPOConfig, [*args[:4], *args[5:]], verb="train ppo", about="", out=(Path, tyro.MISSING, "folder"))
    assert (one.reward_model, one.reward_models) == ("a", ("a",))
