"""What an update follows, shares and stops at: the sampled distribution, LoRA, a shared critic, KL, guards."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from conftest import Folders
from steelyard import rollout
from steelyard.actors import Models, ValueHead
from steelyard.baselines import BaselineConfig, drawn_otherwise, sample_baselines
from steelyard.data.collate import collate
from steelyard.data.encode import Tree
from steelyard.errors import InputError
from steelyard.models.lora import has_adapters, trained_state, without_adapters
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.running import RunningScale
from steelyard.sampling import SamplingConfig, sample
from steelyard.train import ppo
from steelyard.train.optim import OptimConfig
from steelyard.train.ppo import PPOConfig, stream_keys, train_ppo

LORA = {"rank": 4, "alpha": 8.0}
TREES = [Tree((5, 6, 7), ((8, 9, 10, 3), (11, 8))), Tree((12, 5), ((6, 6, 6, 6, 6), (7,)))]


@pytest.fixture
def base(language_model: Folders, reward_model: Folders, planted: dict[str, str]) -> dict[str, Any]:
    return {
        "policy": language_model("llama"), "reward_model": reward_model("llama"), "prompts": planted["prompts"],
        "reward": "plain", "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 3, "max_length": 64,
        "kl_coef": 0.3, "sampling": SamplingConfig(max_new_tokens=5, temperature=0.8),
        "actor": OptimConfig(lr=5e-3, decay=False), "critic": OptimConfig(lr=5e-3, decay=False),
    }  # fmt: skip


def train(settings: dict[str, Any], out: Path, **options: Any) -> list[dict[str, Any]]:
    train_ppo(PPOConfig.model_validate(settings), out, quiet=True, **options)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def small_baselines(base: dict[str, Any], out: Path) -> str:
    """Two scored baselines for each prompt."""
    config = BaselineConfig(
        policy=base["policy"], reward_model=base["reward_model"], prompts=base["prompts"], max_length=64,
        sampling=SamplingConfig(max_new_tokens=5), k=2,
    )  # fmt: skip
    return str(sample_baselines(config, out))


def weights(folder: str | Path) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in PolicyModel.load(folder).state_dict().items()}


class TestSampledDistribution:
    SAMPLING = SamplingConfig(max_new_tokens=5, temperature=0.8, top_p=0.8, repetition_penalty=1.3)

    def test_the_first_update_is_on_policy(self, base: dict[str, Any], tmp_path: Path) -> None:
        """The ratio is 1 and KL 0 only if rollouts and update speak of one distribution."""
        slow = {"actor": OptimConfig(lr=1e-3, decay=False)}
        settings = base | slow | {"sampling": self.SAMPLING, "minibatches": 2, "epochs": 2, "max_tokens": 32}
        first, last = train(settings, tmp_path / "ppo")
        assert first["ppo/kl"] == first["ppo/kl_plain"] == 0.0
        assert first["ppo/updates"] == 4
        assert 0 < first["ppo/kl_update"] < 1
        assert last["ppo/kl"] != last["ppo/kl_plain"]
        once = train(base | {"sampling": self.SAMPLING, "steps": 1}, tmp_path / "once")[0]
        assert once["ppo/kl_update"] == pytest.approx(0.0, abs=1e-8)
        assert once["ppo/clip_fraction"] == 0.0

    def test_micro_batches_find_their_own_nuclei(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        gradients: list[list[Tensor]] = []
        clip = torch.nn.utils.clip_grad_norm_

        def watch(parameters: Any, norm: float) -> Tensor:
            every = list(parameters)
            gradients.append([p.grad.clone() for p in every if p.grad is not None])
            return clip(every, norm)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
        for name, changes in (("whole", {}), ("pieces", {"max_tokens": 32}), ("chunks", {"logit_chunk": 3})):
            train(base | {"sampling": self.SAMPLING, "steps": 1} | changes, tmp_path / name)
        whole, _, pieces, _, chunks, _ = gradients
        assert float(max(g.abs().max() for g in whole)) > 0.01
        torch.testing.assert_close(whole, pieces, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(whole, chunks, rtol=1e-3, atol=1e-5)

    def test_kl_is_measured_before_the_nucleus_is_cut_out(self, base: dict[str, Any]) -> None:
        """In a nucleus of one token policy and reference agree on everything; the KL must not."""
        config = PPOConfig.model_validate(base | {"sampling": SamplingConfig(top_p=1e-6, max_new_tokens=5)})
        models = Models(config)
        with torch.no_grad():
            models.policy.hf.lm_head.weight.mul_(1.5)
        ids = [t.prompt for t in TREES]
        drawn = rollout.draw(models, ids, ["a", "b"], config.sampling, k=2, seed=0)
        found = rollout.roll_out(models, ids, drawn, config)
        assert found.kept is not None
        assert not found.logprobs_NKT.any()
        assert found.entropy == 0.0
        assert (found.kl_NKT.sum(-1) > 0.1).all()
        torch.testing.assert_close(found.kl_NKT.sum(-1), found.kl_plain_NK)

    def test_both_kls_are_those_of_plain_sequences(self, base: dict[str, Any]) -> None:
        config = PPOConfig.model_validate(base | {"sampling": self.SAMPLING})
        models = Models(config)
        with torch.no_grad():
            models.policy.hf.lm_head.weight.mul_(1.3)
        ids = [t.prompt for t in TREES]
        drawn = rollout.draw(models, ids, ["a", "b"], config.sampling, k=2, seed=0)
        found = rollout.roll_out(models, ids, drawn, config)
        assert models.reference is not None
        for n, k in ((0, 0), (1, 1)):
            said, sums = list(ids[n]), np.zeros(2)
            for token in drawn[n][k].tokens:
                for sign, model in ((1, models.policy), (-1, models.reference)):
                    with torch.no_grad():
                        z = model.hf(input_ids=torch.tensor([said])).logits[0, -1].double()
                    plain = torch.log_softmax(z, -1)[token].item()
                    seen = torch.tensor(sorted(set(said)))
                    z[seen] = torch.where(z[seen] > 0, z[seen] / 1.3, z[seen] * 1.3)
                    sums += sign * np.array([torch.log_softmax(z / 0.8, -1)[token].item(), plain])
                said.append(token)
            assert found.kl_NKT[n, k].sum().item() == pytest.approx(sums[0], abs=1e-3)
            assert found.kl_plain_NK[n, k].item() == pytest.approx(sums[1], abs=1e-3)


def test_baselines_that_were_drawn_otherwise_are_named(
    base: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are drawn at temperature 1 with 5 tokens at most."""
    stored = small_baselines(base, tmp_path)
    settings = base | {"reward": "contrastive", "baselines": stored, "steps": 1}
    train(settings | {"sampling": SamplingConfig(max_new_tokens=5, rows=3)}, tmp_path / "same")
    assert capsys.readouterr().err == ""
    train(settings | {"sampling": SamplingConfig(max_new_tokens=4, temperature=0.8)}, tmp_path / "other")
    said = "temperature 1 for the baselines, 0.8 here; max_new_tokens 5 for the baselines, 4 here"
    assert f"warning: {stored}: not drawn as PPO samples: {said}\n" in capsys.readouterr().err
    assert drawn_otherwise(stored, SamplingConfig(max_new_tokens=5), "float32") == ""
    said = "precision float32 for the baselines, bfloat16 here"
    assert drawn_otherwise(stored, SamplingConfig(max_new_tokens=5), "bfloat16") == said


class TestStreams:
    def test_copies_of_a_prompt_have_streams_of_their_own(self) -> None:
        assert stream_keys(["a", "b", "a", "a", ".1/a"]) == ["/a", "/b", ".1/a", ".2/a", "/.1/a"]

    def test_repeated_prompts_draw_different_samples_whatever_else_is_drawn(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        drawn: list[dict[str, Any]] = []

        def watch(policy: Any, prompts: Any, keys: Any, **options: Any) -> Any:
            found = sample(policy, prompts, keys, **options)
            drawn.append(dict(zip(keys, found, strict=True)))
            return found

        monkeypatch.setattr(rollout, "sample", watch)
        for name, texts in (("twice", ["w1 w2", "w1 w2", "w3"]), ("once", ["w4", "w1 w2", "w5 w6"])):
            file = tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": t} for t in texts])
            train(base | {"prompts": file, "prompts_per_step": 3, "steps": 1}, tmp_path / name)
        twice, once = drawn
        assert twice["1/w1 w2"] != twice["1.1/w1 w2"]
        assert once["1/w1 w2"] == twice["1/w1 w2"]


class TestKL:
    def test_the_weight_is_steered_by_the_kl_of_the_step_before(self, base: dict[str, Any], tmp_path: Path) -> None:
        settings = base | {"kl_target": 0.5, "kl_horizon": 60, "steps": 5, "critic_warmup": 1}
        logged = train(settings, tmp_path / "ppo")
        # 12 responses a step are a fifth of the horizon. While only the critic learns, nothing is steered.
        expected = [0.3, 0.3]
        for line in logged[1:-1]:
            error = np.clip((line["ppo/kl"] - 0.5) / 0.5, -0.2, 0.2)
            expected.append(expected[-1] * (1 + error / 5))
        assert [line["ppo/kl_coef"] for line in logged] == pytest.approx(expected)
        assert len(set(expected)) > 2

    @pytest.mark.parametrize(("scale_kl", "weight", "price"), [(False, 0.3, 0.15), (True, 0.6, 0.3)])
    def test_a_negative_factor_never_pays_for_distance(
        self, scale_kl: bool, weight: float, price: float, base: dict[str, Any], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """The signed ratio may be negative, here -2: a nat still costs 0.3, or with scale_kl 2 * 0.3."""
        stored = small_baselines(base, tmp_path)
        monkeypatch.setattr(RunningScale, "factor", -2.0)
        scaled = {"reward": "contrastive", "baselines": stored, "scaling": "signed", "scale_kl": scale_kl}
        _, line = train(base | scaled, tmp_path / "ppo")
        assert line["ppo/kl"] > 1e-3
        assert line["ppo/return"] == pytest.approx(line["ppo/reward_shaped"] - weight * line["ppo/kl"], rel=1e-4)
        assert line["ppo/kl_price"] == pytest.approx(price)

    @pytest.mark.parametrize("scaling", ["abs", "std"])
    def test_scaling_the_penalty_keeps_the_trade_between_reward_and_kl(
        self, scaling: str, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        baselines = small_baselines(base, tmp_path)
        paid: list[tuple[Tensor, Tensor]] = []
        pay = ppo.pay

        def watch(rollouts: Any, *rest: Any, **options: Any) -> Any:
            found = pay(rollouts, *rest, **options)
            paid.append((found[1].sum(-1), found[0].flatten() - rollouts.kl_NKT.flatten(0, 1).sum(-1) * 0.3))
            return found

        monkeypatch.setattr(ppo, "pay", watch)
        contrastive = {"reward": "contrastive", "baselines": baselines, "scaling": scaling, "scale_warmup": 1}
        _, plain = train(base | contrastive, tmp_path / "reward alone")
        _, line = train(base | contrastive | {"scale_kl": True}, tmp_path / "both")
        torch.testing.assert_close(*paid[1], rtol=1e-4, atol=1e-4)
        assert plain["ppo/kl_price"] == pytest.approx(0.3 / plain["ppo/scale"])
        assert line["ppo/kl_price"] == pytest.approx(0.3)
        assert abs(line["ppo/scale"] - 1) > 0.05
        together, apart = paid[3]
        extra = together - apart
        kl = (line["ppo/scale"] - 1) * 0.3 * line["ppo/kl"]
        assert extra.mean().item() == pytest.approx(-kl, abs=1e-4)

    def test_epochs_end_where_the_policy_has_moved_far_enough(self, base: dict[str, Any], tmp_path: Path) -> None:
        settings = base | {"epochs": 6, "minibatches": 2, "steps": 1, "actor": OptimConfig(lr=2e-2, decay=False)}
        (free,) = train(settings, tmp_path / "free")
        (held,) = train(settings | {"stop_epochs_at_kl": 0.02}, tmp_path / "held")
        assert free["ppo/updates"] == 12
        assert 1 <= held["ppo/updates"] < 12
        assert held["ppo/kl_update"] > 0.02
        (tight,) = train(settings | {"stop_epochs_at_kl": 1e-12}, tmp_path / "tight")
        assert tight["ppo/updates"] == 1, "the first step is on policy and always taken"


class TestLora:
    def settings(self, base: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return base | {"lora": LORA} | changes

    def test_only_adapters_learn_and_the_model_that_is_saved_is_merged(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made: list[Models] = []

        class Kept(Models):
            def __init__(self, config: PPOConfig) -> None:
                super().__init__(config)
                made.append(self)

        monkeypatch.setattr(ppo, "Models", Kept)
        logged = train(self.settings(base, steps=3), tmp_path / "ppo")
        assert logged[0]["ppo/kl"] == 0.0
        assert abs(logged[-1]["ppo/kl"]) > 1e-3
        (models,) = made
        assert models.reference is None
        batch, before = collate(TREES, tiny.PAD), PolicyModel.load(base["policy"])
        saved = PolicyModel.load(tmp_path / "ppo" / "model")
        assert not has_adapters(saved)
        with torch.no_grad():
            now = models.policy(batch).plain_BKR
            torch.testing.assert_close(saved(batch).plain_BKR, now, rtol=1e-4, atol=1e-4)
            assert (before(batch).plain_BKR - now).abs().max() > 0.01
            with without_adapters(models.policy):
                torch.testing.assert_close(models.policy(batch).plain_BKR, before(batch).plain_BKR)
        old, new = weights(base["policy"]), weights(tmp_path / "ppo" / "model")
        assert old.keys() == new.keys()
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed == {n for n in old if n.endswith("_proj.weight")}

    def test_the_reference_is_the_model_without_adapters(self, base: dict[str, Any]) -> None:
        models = Models(PPOConfig.model_validate(self.settings(base)))
        apart = Models(PPOConfig.model_validate(base))
        with torch.no_grad():
            for name, p in models.policy.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.05)
        batch = collate(TREES, tiny.PAD)
        torch.testing.assert_close(models.refer(batch), apart.refer(batch), rtol=1e-5, atol=1e-5)
        (now, _), (then, _) = models.act(batch), apart.act(batch)
        assert (now.sampled_BKR - then.sampled_BKR).abs().max() > 0.01
        assert all(p.requires_grad == (".lora_" in n) for n, p in models.policy.named_parameters())

    @pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
    def test_other_families(self, family: str, base: dict[str, Any], language_model: Folders, tmp_path: Path) -> None:
        folders = {"policy": language_model(family), "critic_model": "shared"}
        first, last = train(self.settings(base, **folders), tmp_path / "ppo")
        assert first["ppo/kl"] == 0.0 < abs(last["ppo/kl"])

    def test_a_checkpoint_holds_the_adapters_alone(self, base: dict[str, Any]) -> None:
        learner = ppo.Learner(PPOConfig.model_validate(self.settings(base)))
        tensors, state = learner.state()
        assert all(".lora_" in n for n in tensors if n.startswith("policy."))
        with torch.no_grad():
            for p in trained_state(learner.models.policy).values():
                p.add_(1.0)
        other = ppo.Learner(PPOConfig.model_validate(self.settings(base, seed=5)))
        other.restore(tensors, state)
        batch = collate(TREES, tiny.PAD)
        assert torch.equal(other.models.act(batch)[0].plain_BKR, learner.models.act(batch)[0].plain_BKR)
        with pytest.raises(ValueError, match="must hold the tensors that are trained"):
            ppo.Learner(PPOConfig.model_validate(base)).restore(tensors, state)

    def test_names_that_no_layer_has(self, base: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"lora\.targets: .*nothing_proj"):
            train(self.settings(base, lora=LORA | {"targets": ("nothing_proj",)}), tmp_path / "ppo")
        with pytest.raises(ValueError, match="alpha: no effect without rank"):
            PPOConfig.model_validate(base | {"lora": {"alpha": 4.0}})


class TestSharedCritic:
    def test_one_forward_serves_both_and_the_gradient_is_the_sum(
        self, base: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoModelForCausalLM

        config = PPOConfig.model_validate(base | {"critic_model": "shared", "value_coef": 0.25})
        models = Models(config)
        assert isinstance(models.critic, ValueHead)
        with torch.no_grad():
            models.critic.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
            models.critic.linear.bias.fill_(0.3)
        passes: list[Any] = []
        states = PolicyModel.states
        monkeypatch.setattr(PolicyModel, "states", lambda self, b: passes.append(b) or states(self, b))
        batch = collate(TREES, tiny.PAD)
        mask, shape = batch.mask_BKR, batch.mask_BKR.shape
        now, values = models.act(batch)
        assert values is not None
        assert len(passes) == 1
        generator = torch.Generator().manual_seed(1)
        advantage, returns = (torch.randn(shape, generator=generator) for _ in range(2))
        total = int(mask.sum())
        sums = ppo.backward(models, batch, [now.sampled_BKR, advantage, values, returns], None, total, 1, config)
        assert len(passes) == 2

        theirs: Any = AutoModelForCausalLM.from_pretrained(config.policy).double()
        head = torch.nn.Linear(32, 1).double()
        head.load_state_dict({k: v.double() for k, v in models.critic.linear.state_dict().items()})
        loss: Any = 0.0
        value_sum = 0.0
        for b, tree in enumerate(TREES):
            for k, response in enumerate(tree.responses):
                n, own = len(response), slice(len(tree.prompt) - 1, -1)
                output = theirs(input_ids=torch.tensor([tree.prompt + response]), output_hidden_states=True)
                logp = torch.log_softmax(output.logits[0, own] / 0.8, -1)[torch.arange(n), torch.tensor(response)]
                v = head(output.hidden_states[-1][0, own])[:, 0]
                torch.testing.assert_close(values[b, k, :n].double(), v, rtol=1e-4, atol=1e-4)
                error = 0.5 * (v - returns[b, k, :n]).square()
                loss = loss + (0.25 * error - advantage[b, k, :n] * torch.exp(logp - logp.detach())).sum() / total
                value_sum += float(error.detach().sum())
        loss.backward()
        assert sums[2] == pytest.approx(value_sum, rel=1e-4)
        for mine, other in zip(models.policy.parameters(), theirs.parameters(), strict=True):
            assert mine.grad is not None
            assert float((mine.grad - other.grad).abs().max()) < 1e-3 * float(other.grad.abs().max()) + 1e-5
        torch.testing.assert_close(models.critic.linear.weight.grad.double(), head.weight.grad, rtol=1e-3, atol=1e-5)

    def test_while_it_warms_up_only_the_head_learns(self, base: dict[str, Any], tmp_path: Path) -> None:
        learner = ppo.Learner(PPOConfig.model_validate(base | {"critic_model": "shared"}))
        before = {k: v.clone() for k, v in learner.models.policy.state_dict().items()}
        settings = base | {"critic_model": "shared", "critic_warmup": 3, "steps": 4, "epochs": 2}
        moved: list[bool] = []

        def look(step: int, steps: int, policy: PolicyModel) -> None:
            after = policy.state_dict()
            moved.append(any(not torch.equal(before[name], after[name]) for name in before))

        logged = train(settings, tmp_path / "ppo", look=look)
        assert moved == [False, False, False, True]
        assert logged[0]["ppo/value_mean"] == 0.0 != logged[2]["ppo/value_mean"]
        assert [line["ppo/kl_update"] for line in logged[:3]] == [0.0] * 3

    def test_no_second_model_is_loaded_and_the_policy_learns(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folders: list[str] = []
        load = RewardModel.load
        monkeypatch.setattr(RewardModel, "load", lambda folder, **o: folders.append(folder) or load(folder, **o))
        logged = train(base | {"critic_model": "shared", "steps": 3, "epochs": 2}, tmp_path / "ppo")
        assert folders == [base["reward_model"]]
        assert abs(logged[-1]["ppo/kl"]) > 1e-3
        assert {"ppo/value_loss", "ppo/explained_variance"} <= logged[0].keys()
        names = set(weights(tmp_path / "ppo" / "model"))
        assert names == set(weights(base["policy"])), "the head is no part of the policy that is saved"


def test_the_actors_schedule_begins_when_it_learns(base: dict[str, Any]) -> None:
    """Six steps, the first two the critic's alone. Actor: 4 steps, half of them warm-up; critic: 6, half warm-up."""
    optim = OptimConfig(lr=1.0, warmup=0.5)
    settings = base | {"steps": 6, "critic_warmup": 2, "actor": optim, "critic": optim}
    learner = ppo.Learner(PPOConfig.model_validate(settings))
    rates: dict[str, list[float]] = {"actor": [], "critic": []}
    for step in range(6):
        learner.set_rates(step, 6)
        for name, (_, _, optimizer) in learner.parts.items():
            rates[name].append(optimizer.param_groups[0]["lr"])
    assert rates["actor"][2:] == pytest.approx([1 / 2, 1, 1, 1 / 2])
    assert rates["critic"] == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a weight of 0 that is steered": ({"kl_coef": 0.0, "kl_target": 1.0}, "kl_coef: must be above 0"),
    "a horizon shorter than a step": ({"kl_target": 1.0, "kl_horizon": 2}, "kl_horizon: must be above a fifth"),
    "a horizon without target": ({"kl_horizon": 5}, "kl_horizon: no effect without kl_target"),
    "one update that clips": ({"clip": 0.1}, "clip: no effect with one optimiser step"),
    "several raw scales": (
        {"reward_model": ["a", "b"], "normalise": False}, "normalise: must be on with several reward models",
    ),
    "one update that stops": ({"stop_epochs_at_kl": 0.1}, "stop_epochs_at_kl: no effect with one optimiser step"),
    "weight of a separate critic": ({"value_coef": 0.5}, "value_coef: no effect with critic_model = separate"),
    "a shared critic without one": (
        {"advantage": "rloo", "critic_model": "shared"}, "critic, critic_model: no effect with advantage = rloo"
    ),
    "scaled KL of plain rewards": ({"scale_kl": True}, "scale_kl: no effect with reward = plain"),
    "scaled KL without scaling": (
        {"reward": "contrastive", "baselines": "b", "scaling": "none", "scale_kl": True},
        "scale_kl: no effect with scaling = none",
    ),
    "warm-up of no scaling": (
        {"reward": "contrastive", "baselines": "b", "scaling": "none", "scale_warmup": 5, "scale_floor": 0.1},
        "scale_floor, scale_warmup: no effect with scaling = none",
    ),
    "a critic that warms up for ever": ({"critic_warmup": 2}, "critic_warmup: must be below steps = 2, got 2"),
    "uneven minibatches": ({"minibatches": 3}, "minibatches: must divide prompts_per_step = 4, got 3"),
    "scaled KL without KL": ({"scaling": "std", "kl_coef": 0.0, "scale_kl": True}, "scale_kl: no effect with kl_coef"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_settings_without_effect_are_refused(name: str, base: dict[str, Any], tmp_path: Path) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(InputError, match=reason):
        train(base | changes, tmp_path / "out")


class TestGuards:
    def stop(self, match: str, settings: dict[str, Any], out: Path) -> dict[str, Any]:
        with pytest.raises(FloatingPointError, match=match) as error:
            train(settings, out)
        (path,) = out.glob("offending-step-*.json")
        assert str(path) in str(error.value)
        record: dict[str, Any] = json.loads(path.read_text())
        assert all(name in str(error.value) for name in record["worst"])
        return record

    def test_a_kl_that_explodes_names_the_worst_prompts(self, base: dict[str, Any], tmp_path: Path) -> None:
        faster = {"actor": OptimConfig(lr=0.1, decay=False), "kl_coef": 0.0, "steps": 9, "max_kl": 0.5}
        record = self.stop(r"step \d: the KL of", base | faster, tmp_path / "out")
        assert len(record["prompts"]) == 4
        kl = {p["id"]: sum(r["kl"] for r in p["responses"]) for p in record["prompts"]}
        assert record["worst"] == sorted(kl, key=lambda name: -kl[name])[:3]
        assert np.mean([r["kl"] for p in record["prompts"] for r in p["responses"]]) == pytest.approx(
            record["metrics"]["ppo/kl"], rel=1e-4
        )
        texts = [json.loads(line)["prompt"] for line in Path(base["prompts"]).read_text().splitlines()]
        assert all(p["prompt"] in texts and len(p["responses"]) == 3 for p in record["prompts"])

    def test_a_reward_that_is_no_number_comes_first(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: Any, batch: Any) -> Tensor:
            rewards = torch.zeros(batch.last_BK.shape)
            rewards[1, 2] = math.nan
            return rewards

        monkeypatch.setattr(RewardModel, "forward", broken)
        record = self.stop("step 1: the rewards of 1 of 12 responses are not finite", base, tmp_path / "out")
        (bad,) = [p for p in record["prompts"] if any(r["reward"] == "nan" for r in p["responses"])]
        assert record["worst"][0] == bad["id"]

    def test_a_greedy_response_without_a_reward_names_its_prompt(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: Any, batch: Any) -> Tensor:
            rewards = torch.zeros(batch.last_BK.shape)
            if rewards.shape[1] == 1:
                rewards[2] = math.inf
            return rewards

        monkeypatch.setattr(RewardModel, "forward", broken)
        match = "step 1: the rewards of 1 of 4 greedy responses are not finite: the reward model is at fault"
        settings = {name: x for name, x in base.items() if name != "critic"} | {"advantage": "remax"}
        record = self.stop(match, settings, tmp_path / "out")
        (bad,) = [p for p in record["prompts"] if p["greedy_reward"] == "inf"]
        assert record["worst"][0] == bad["id"]

    def test_a_critic_without_a_number_names_its_prompt(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        values = Models.values

        def broken(self: Models, batch: Any, states: Tensor | None = None) -> Tensor | None:
            found = values(self, batch, states)
            assert found is not None
            found[-1, -1, 0] = math.nan
            return found

        monkeypatch.setattr(Models, "values", broken)
        record = self.stop("step 1: .*advantage_std.* is not finite", base, tmp_path / "out")
        (bad,) = [p for p in record["prompts"] if any(r["values"] == "nan" for r in p["responses"])]
        assert record["worst"][0] == bad["id"]

    def test_a_gradient_that_is_no_number_moves_nothing(
        self, base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        learners: list[Any] = []
        backward = ppo.backward

        def broken(models: Models, *rest: Any) -> Any:
            learners.append(models)
            sums = backward(models, *rest)
            next(iter(models.policy.parameters())).grad.fill_(math.nan)  # type: ignore[union-attr]
            return sums

        monkeypatch.setattr(ppo, "backward", broken)
        self.stop("step 1: the norm of the actor's gradient is nan", base, tmp_path / "out")
        before = weights(base["policy"])
        assert all(torch.equal(x, before[name]) for name, x in learners[0].policy.state_dict().items())

    def test_rewards_that_no_longer_differ(self, base: dict[str, Any], tmp_path: Path) -> None:
        record = self.stop("step 1: the rewards' std", base | {"min_reward_std": 1e3}, tmp_path / "out")
        assert record["step"] == 1
        spread = {p["id"]: np.ptp([r["reward"] for r in p["responses"]]) for p in record["prompts"]}
        assert record["worst"] == sorted(spread, key=spread.__getitem__)[:3]


def test_a_step_never_rests_on_a_few_prompts(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 9 prompts one is left over in each pass of 4 a step; minibatches part what there is evenly."""
    sizes: list[int] = []
    honest = ppo.take_step

    def watch(learner: Any, task: Any, chosen: Sequence[int], *rest: Any) -> Any:
        sizes.append(len(chosen))
        return honest(learner, task, chosen, *rest)

    monkeypatch.setattr(ppo, "take_step", watch)
    train(base | {"limit": 9, "steps": 5}, tmp_path / "ppo")
    assert sizes == [4] * 5
    config = PPOConfig.model_validate(base | {"minibatches": 4, "epochs": 2, "prompts_per_step": 8})
    for n, parts in ((8, [2] * 4), (7, [1, 2, 2, 2]), (4, [1] * 4), (3, [1] * 3)):
        found = list(ppo._minibatches(n, 1, config))
        assert sorted(map(len, found)) == sorted(parts * 2)
        assert sorted(i for part in found[: len(found) // 2] for i in part) == list(range(n))


def test_whitening_is_over_the_whole_step(
    base: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Minibatches see advantages that were whitened together: each alone has a mean, all together have none."""
    seen: list[tuple[Sequence[Tensor], Tensor]] = []
    backward = ppo.backward

    def watch(models: Models, batch: Any, per_token: Sequence[Tensor], *rest: Any) -> Any:
        seen.append((per_token, batch.mask_BKR))
        return backward(models, batch, per_token, *rest)

    monkeypatch.setattr(ppo, "backward", watch)
    train(base | {"minibatches": 4, "steps": 1}, tmp_path / "ppo")
    parts = [per_token[1][mask] for per_token, mask in seen]
    assert len(parts) == 4
    every = torch.cat(parts)
    assert every.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert every.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)
    assert max(abs(p.mean().item()) for p in parts) > 0.05
