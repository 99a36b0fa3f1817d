"""Models on another device: with a pretended GPU everywhere, with a real one where there is one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from conftest import Folders
from pretend import DeviceMismatch, Pretence, pretended_gpu
from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.data.collate import collate
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_preferences
from steelyard.evaluate.features import FeatureConfig, examine_features
from steelyard.evaluate.policy import PolicyEvaluationConfig, answer
from steelyard.measure import StrengthConfig, measure, read_scores
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.train import ppo, reward
from steelyard.train.dpo import DPOConfig, train_dpo
from steelyard.train.metarm import MetaRMConfig, train_metarm
from steelyard.train.pairwise import read_pairs
from steelyard.train.reward import RewardConfig, reward_step, train_reward
from steelyard.train.sft import SFTConfig, train_sft

TREES = [Tree((5, 6, 7), ((8, 9, 10, 3), (11, 8))), Tree((12, 5), ((6, 6, 6, 6, 6), (7,)))]
SAMPLING = {"max_new_tokens": 5, "temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.3}
SHORT = {"max_length": 64, "max_tokens": 96}
Train = Callable[..., dict[str, Any]]


@contextmanager
def real_gpu() -> Iterator[None]:
    yield


# The same comparisons on both: what the pretence cannot see, the kernels, a real GPU shows.
GPUS = pytest.mark.parametrize(
    "gpu",
    [
        pytest.param(pretended_gpu, id="pretended"),
        pytest.param(
            real_gpu, id="real", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
        ),
    ],
)


def numbers(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_numbers(a: Path, b: Path) -> None:
    """The same steps with the same metrics, to the rounding of another order of sums."""
    left, right = numbers(a), numbers(b)
    assert len(left) == len(right) > 0
    for one, other in zip(left, right, strict=True):
        assert one == pytest.approx(other, rel=2e-3, abs=2e-4)


def both(train: Train, config: Any, tmp_path: Path, gpu: Any, **options: Any) -> None:
    """Train here and there; compare what was logged."""
    train(config, tmp_path / "cpu", quiet=True, **options)
    with gpu():
        elsewhere = type(config).model_validate(config.model_dump() | {"device": "cuda"})
        train(elsewhere, tmp_path / "cuda", quiet=True, **options)
    same_numbers(tmp_path / "cpu", tmp_path / "cuda")


class TestThePretence:
    """The tests below could not fail if these did not hold."""

    @pytest.mark.parametrize(
        "mixed",
        [
            lambda x: x + torch.ones(2, 2),
            lambda x: torch.ones(2, 2) @ x,
            lambda x: torch.cat([x, torch.ones(2, 2)]),
            lambda x: torch.zeros(2, 2).index_put_((torch.tensor([0]),), x[0]),
            lambda x: torch.ones(2, 2)[x[0] > 0],
            lambda x: x.numpy(),
            lambda x: torch.where(x > 0, x, torch.zeros(2, 2)),
        ],
    )
    def test_two_devices_do_not_mix(self, mixed: Callable[[Tensor], object]) -> None:
        with pretended_gpu(), pytest.raises(DeviceMismatch):
            mixed(torch.ones(2, 2, device="cuda"))

    def test_the_device_is_inherited_by_results_gradients_and_modules(self) -> None:
        with pretended_gpu() as pretence:
            layer = torch.nn.Linear(2, 2).to("cuda")
            y = layer(torch.ones(3, 2).to("cuda")).index_select(
                0, torch.tensor([0], device="cuda")
            ).sum() * torch.tensor(2.0)
            y.backward()
            assert layer.weight.grad is not None
            assert {x.device.type for x in (layer.weight, y, layer.weight.grad, torch.zeros_like(y))} == {"cuda"}
            assert y.cpu().device.type == torch.ones(2).device.type == "cpu"
            assert not pretence.reads["_local_scalar_dense"]
            y.item()
            assert pretence.reads["_local_scalar_dense"] == 1

    def test_a_backward_pass_is_watched_too(self) -> None:
        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Tensor:
                return gradients[0] * torch.full((2,), 2.0)  # forgets the device

        with pretended_gpu():
            x = torch.ones(2, device="cuda", requires_grad=True)
            y = Wrong.apply(x).sum()
            with pytest.raises(DeviceMismatch):
                y.backward()


class TestOneStep:
    @GPUS
    def test_rewards_log_probabilities_and_gradients(
        self, gpu: Any, language_model: Folders, reward_model: Folders
    ) -> None:
        def measured(device: str) -> list[Tensor]:
            scorer = RewardModel.load(reward_model("llama"), device=device)
            policy = PolicyModel.load(language_model("llama"), device=device, logit_chunk=4)
            batch = collate(TREES, 0, scorer.device)
            rewards = scorer(batch)
            first = policy(batch, repetition_penalty=1.2).full_BKR
            (rewards.sum() + first.sum()).backward()
            gradients = [p.grad for m in (scorer, policy) for p in m.parameters() if p.grad is not None]
            assert {x.device.type for x in [rewards, first, *gradients]} == {device}
            return [x.detach().cpu() for x in (rewards, first, *gradients)]

        here = measured("cpu")
        with gpu():
            there = measured("cuda")
        for a, b in zip(here, there, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    @GPUS
    @pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
    def test_other_families(self, gpu: Any, family: str, reward_model: Folders) -> None:
        here = RewardModel.load(reward_model(family)).score(TREES, pad_id=0)
        with gpu():
            there = RewardModel.load(reward_model(family), device="cuda").score(TREES, pad_id=0)
        np.testing.assert_allclose(here, there, rtol=1e-3, atol=1e-4)

    def test_a_forgotten_weight_would_be_found(
        self, reward_model: Folders, planted: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A batch left on the CPU stops the step: the tests of this file see what they are there for."""
        config = RewardConfig(data=planted["clean"], model=reward_model("llama"))
        encoder = Encoder.load(config.model)
        pairs, trees = read_pairs(config.data, encoder, range(3))
        with pretended_gpu():
            model = RewardModel.load(config.model, device="cuda")
            assert reward_step(model, pairs, trees, encoder, config).device.type == "cpu"
            monkeypatch.setattr(reward, "collate", lambda trees, pad_id, device: collate(trees, pad_id))
            with pytest.raises(DeviceMismatch):
                reward_step(model, pairs, trees, encoder, config)


class TestTraining:
    @GPUS
    @pytest.mark.parametrize("contrastive", [{}, {"method": "simcse"}, {"method": "swav", "prototypes": 3}])
    def test_reward_models(
        self, gpu: Any, contrastive: dict[str, Any], language_model: Folders, planted: dict[str, str], tmp_path: Path
    ) -> None:
        if contrastive and gpu is real_gpu:
            # Masks follow from a generator of the device. Where next to nothing is dropped, both devices must agree.
            contrastive = contrastive | {"dropout": 1e-12}
        settings: dict[str, Any] = {"optim": {"lr": 1e-3}, "eval_every": 2, "log_every": 1, "save_every": 1, **SHORT}
        config = RewardConfig(
            data=planted["held-out"], model=language_model("llama"), validation={"v": planted["held-out"]}, epochs=0.1,
            contrastive=contrastive, **settings,
        )  # fmt: skip
        both(train_reward, config, tmp_path, gpu)

    @GPUS
    def test_meta_and_sampled_responses(
        self, gpu: Any, language_model: Folders, reward_model: Folders, planted: dict[str, str], tmp_path: Path
    ) -> None:
        sampled = BaselineConfig(
            policy=language_model("llama"), prompts=planted["prompts"], reward_model=reward_model("llama"),
            sampling=SAMPLING, **SHORT,
        )  # fmt: skip
        meta = sample_baselines(sampled, tmp_path / "cpu-samples")
        with gpu():
            sample_baselines(sampled.model_copy(update={"device": "cuda"}), tmp_path / "cuda-samples")
        if gpu is not real_gpu:  # A GPU's rounding may turn a token.
            names = [sorted(p.name for p in (tmp_path / d).iterdir()) for d in ("cpu-samples", "cuda-samples")]
            assert names[0] == names[1]
        config = MetaRMConfig(
            data=planted["held-out"], model=reward_model("llama"), meta=str(meta), k=3, eta=1e-3, epochs=0.5,
            optim={"lr": 1e-3}, log_every=1, save_every=1, validation={"v": planted["held-out"]}, **SHORT,
        )  # fmt: skip
        both(train_metarm, config, tmp_path, gpu)

    @GPUS
    def test_sft(self, gpu: Any, language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
        config = SFTConfig(
            data=planted["demonstrations"], validation=planted["demonstrations"], model="scratch", epochs=0.5,
            tokenizer=language_model("llama"), scratch={"layers": 1, "width": 32, "heads": 2, "context": 64},
            batch_size=8, log_every=1, save_every=1, optim={"lr": 1e-3}, **SHORT,
        )  # fmt: skip
        both(train_sft, config, tmp_path, gpu)

    @GPUS
    def test_dpo(
        self, gpu: Any, language_model: Folders, reward_model: Folders, planted: dict[str, str], tmp_path: Path
    ) -> None:
        # Its own reference would leave differences of rounding alone, whose signs mean nothing.
        other = tiny.save_folder(tiny.build_model(tiny.build_config(), seed=7), tiny.build_tokenizer(), tmp_path / "r")
        config = DPOConfig(
            reference=other,
            data=planted["held-out"], model=language_model("llama"), prompts=planted["prompts"], answers=3, epochs=0.1,
            reward_model=reward_model("llama"), sampling={"max_new_tokens": 5}, eval_every=1, log_every=1, save_every=1,
            validation={"v": planted["held-out"]}, optim={"lr": 1e-3}, **SHORT,
        )  # fmt: skip
        both(train_dpo, config, tmp_path, gpu)


@pytest.fixture
def ppo_settings(language_model: Folders, reward_model: Folders, planted: dict[str, str]) -> dict[str, Any]:
    return {
        "policy": language_model("llama"), "reward_model": reward_model("llama"), "prompts": planted["prompts"],
        "reward": "plain", "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 3, "minibatches": 2, "epochs": 2,
        "kl_coef": 0.3, "sampling": SAMPLING, "actor": {"lr": 1e-3, "decay": False}, "save_every": 1,
        "critic": {"lr": 1e-3, "decay": False}, **SHORT,
    }  # fmt: skip


class TestPPO:
    @GPUS
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"logit_chunk": 3, "stop_epochs_at_kl": 0.5},
            {"critic_model": "shared"},
            {"advantage": "remax", "lora": {"rank": 2}},
            {"reward": "contrastive", "scale_warmup": 1},
        ],
    )
    def test_steps(self, gpu: Any, changes: dict[str, Any], ppo_settings: dict[str, Any], tmp_path: Path) -> None:
        settings = ppo_settings | changes
        if "advantage" in changes:
            del settings["critic"]
        if gpu is real_gpu:  # Later steps follow from tokens that a GPU's rounding may turn.
            settings |= {"steps": 1}
        if changes.get("reward") == "contrastive":
            sampled = {n: settings[n] for n in ("policy", "prompts", "reward_model", "sampling", "max_length")}
            settings["baselines"] = str(sample_baselines(BaselineConfig(**sampled), tmp_path))
        both(ppo.train_ppo, ppo.PPOConfig(**settings), tmp_path, gpu)

    def test_a_resumed_run_repeats_its_bytes(self, ppo_settings: dict[str, Any], tmp_path: Path) -> None:
        with pretended_gpu():
            config = ppo.PPOConfig(**ppo_settings, device="cuda")
            ppo.train_ppo(config, tmp_path / "whole", quiet=True)

            def stop(step: int, steps: int, policy: PolicyModel) -> None:
                if step == 2:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                ppo.train_ppo(config, tmp_path / "cut", quiet=True, look=stop)
            ppo.train_ppo(config, tmp_path / "cut", quiet=True, resume=True)
        assert (tmp_path / "whole/metrics.jsonl").read_bytes() == (tmp_path / "cut/metrics.jsonl").read_bytes()

    def test_nothing_is_read_in_the_middle_of_a_micro_batch(
        self, ppo_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a GPU each number that is read waits for everything asked of it before."""
        pretences: list[Pretence] = []
        read: list[int] = []
        plain = ppo.backward

        def watch(*arguments: Any) -> Tensor:
            before = pretences[0].reads.total()
            found = plain(*arguments)
            read.append(pretences[0].reads.total() - before)
            return found

        monkeypatch.setattr(ppo, "backward", watch)
        with pretended_gpu() as pretence:
            pretences.append(pretence)
            ppo.train_ppo(ppo.PPOConfig(**ppo_settings | {"steps": 1}, device="cuda"), tmp_path, quiet=True)
        assert read == [0] * 4


class TestMeasuring:
    @pytest.mark.parametrize("backend", ["head", "layers", "lora", "full"])
    def test_strength(self, backend: Any, language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
        trained: dict[str, Any] = {} if backend == "head" else {"member": {"epochs": 0.5}, "workers": 1}
        if backend == "layers":
            trained["member"]["trainable_layers"] = 1
        config = StrengthConfig(
            data=planted["held-out"], model=language_model("llama"), backend=backend, members=2, **trained, **SHORT
        )
        pairs = load_preferences(config.data).preferences
        measure(config, pairs, tmp_path / "cpu" / "run", quiet=True)
        with pretended_gpu():
            elsewhere = config.model_copy(update={"device": "cuda"})
            measure(elsewhere, pairs, tmp_path / "cuda" / "run", quiet=True)
        here, there = (read_scores(tmp_path / d / "run")[0] for d in ("cpu", "cuda"))
        np.testing.assert_allclose(here, there, rtol=1e-2, atol=1e-3)

    def test_policies_and_features(
        self, language_model: Folders, reward_model: Folders, planted: dict[str, str]
    ) -> None:
        folder, judge = language_model("llama"), reward_model("llama")
        encoder = Encoder.load(folder, max_length=64)

        def answers(device: str) -> Any:
            config = PolicyEvaluationConfig(sampling={"max_new_tokens": 5}, device=device)
            return answer(folder, folder, judge, ["w1 w2", "w3"], encoder, tiny.count_good, config)

        def figures(device: str) -> Any:
            config = FeatureConfig(models={"a": judge}, data=planted["held-out"], device=device, max_length=64)
            return [row["value"] for row in examine_features("a", config)["rows"]]

        here = answers("cpu"), figures("cpu")
        with pretended_gpu():
            there = answers("cuda"), figures("cuda")
        assert here[0].texts == there[0].texts
        np.testing.assert_allclose(here[0].proxy_NK, there[0].proxy_NK, rtol=1e-3, atol=1e-4)
        assert here[1] == pytest.approx(there[1], abs=1e-3)
