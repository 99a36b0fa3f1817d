"""Reward-model training: gradients against plain transformers, what the pairs' fields do, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit

import tiny
from conftest import Folders
from steelyard.data.encode import Encoder
from steelyard.errors import InputError
from steelyard.models.reward import RewardModel
from steelyard.train import reward
from steelyard.train.optim import OptimConfig
from steelyard.train.pairwise import freeze_below, read_pairs
from steelyard.train.reward import RewardConfig, reward_step, train_reward
from steelyard.types import Preference

CONFIG = RewardConfig(data="", model="")


@pytest.fixture
def encoder(language_model: Folders) -> Encoder:
    return Encoder.load(language_model("llama"))


@pytest.fixture
def pairs() -> list[Preference]:
    fields = [(0.0, 0.0, 1.0), (0.3, 0.5, 2.0), (1.0, -1.0, 0.5), (0.1, 2.0, 0.0), (0.0, 1.5, 3.0)]
    return [
        Preference(row["id"], row["prompt"], row["chosen"], row["rejected"], flip_prob=a, margin=m, weight=w)
        for row, (a, m, w) in zip(tiny.planted_pairs(5)[0], fields, strict=True)
    ]


def step(
    folder: str, encoder: Encoder, pairs: Sequence[Preference], config: RewardConfig = CONFIG
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = RewardModel.load(folder)
    seen = reward_step(model, pairs, encoder.encode(pairs).trees, encoder, config)
    return seen, {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    size = max(float(x.abs().max()) for x in b.values())
    return a.keys() == b.keys() and all(float((a[n] - b[n]).abs().max()) <= tolerance * size for n in a)


@pytest.mark.parametrize("margin_in_flip", [True, False])
def test_the_gradient_is_that_of_separate_sequences(
    margin_in_flip: bool, reward_model: Folders, encoder: Encoder, pairs: list[Preference]
) -> None:
    """Float64 reference: each text on its own through transformers, the loss from probabilities."""
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(reward_model("llama")).double()
    total: Any = 0.0
    losses, rewards = [], []
    for p in pairs:
        texts = [torch.tensor([encoder.prompt_ids(p.prompt) + encoder.response_ids(r)]) for r in (p.chosen, p.rejected)]
        chosen, rejected = (model(input_ids=ids).logits[0, 0] for ids in texts)
        d = chosen - rejected
        flipped = d - p.margin if margin_in_flip else d
        right, wrong = torch.sigmoid(d - p.margin), 1 - torch.sigmoid(flipped)
        loss = -(1 - p.flip_prob) * torch.log(right) - p.flip_prob * torch.log(wrong)
        total = total + p.weight * loss
        losses.append(loss.item())
        rewards.append([chosen.item(), rejected.item()])
    (total / 6.5).backward()
    config = RewardConfig(data="", model="", margin_in_flip=margin_in_flip)
    seen, gradient = step(reward_model("llama"), encoder, pairs, config)
    np.testing.assert_allclose(seen[:, 0].numpy(), losses, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(seen[:, 1].numpy(), [1, 2, 0.5, 0, 3])
    np.testing.assert_allclose(seen[:, 2:].numpy(), rewards, rtol=1e-4, atol=1e-5)
    assert same(gradient, {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}, 1e-4)


def test_the_token_budget_changes_neither_loss_nor_gradient(
    reward_model: Folders, encoder: Encoder, pairs: list[Preference]
) -> None:
    whole = step(reward_model("llama"), encoder, pairs)
    for max_tokens in (16, 40, 64):
        seen, gradient = step(
            reward_model("llama"), encoder, pairs, CONFIG.model_copy(update={"max_tokens": max_tokens})
        )
        torch.testing.assert_close(seen, whole[0], rtol=1e-4, atol=1e-5)
        assert same(gradient, whole[1])


def test_a_pair_without_weight_has_no_influence(
    reward_model: Folders, encoder: Encoder, pairs: list[Preference]
) -> None:
    without = [p for p in pairs if p.weight > 0]
    assert len(without) == 4
    assert same(step(reward_model("llama"), encoder, pairs)[1], step(reward_model("llama"), encoder, without)[1])
    silent = [replace(p, weight=0.0) for p in pairs]
    seen, gradient = step(reward_model("llama"), encoder, silent)
    assert not seen.any()
    assert gradient == {}


def test_only_the_ratio_of_weights_matters(reward_model: Folders, encoder: Encoder, pairs: list[Preference]) -> None:
    scaled = [replace(p, weight=7 * p.weight) for p in pairs]
    assert same(step(reward_model("llama"), encoder, scaled)[1], step(reward_model("llama"), encoder, pairs)[1])
    twice = [*pairs[:2], pairs[1]]  # a pair of weight 2 counts as two of weight 1
    once = [replace(p, weight=1.0) for p in twice]
    assert same(step(reward_model("llama"), encoder, once)[1], step(reward_model("llama"), encoder, pairs[:2])[1])


def test_a_certain_flip_is_the_swapped_pair(reward_model: Folders, encoder: Encoder, pairs: list[Preference]) -> None:
    wrong = [replace(p, flip_prob=1.0, margin=-0.7, weight=1.0) for p in pairs]
    swapped = [replace(p, chosen=p.rejected, rejected=p.chosen, flip_prob=0.0, margin=0.7) for p in wrong]
    a, b = step(reward_model("llama"), encoder, wrong), step(reward_model("llama"), encoder, swapped)
    torch.testing.assert_close(a[0][:, 0], b[0][:, 0], rtol=1e-4, atol=1e-5)
    assert same(a[1], b[1], 1e-4)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_the_planted_rule(planted_reward: Path, planted: dict[str, str]) -> None:
    logged = lines(planted_reward)
    examined = [line for line in logged if "validation/held-out/accuracy" in line]
    assert [line["step"] for line in examined] == [12, 24]
    assert examined[-1]["validation/held-out/accuracy"] > 0.95
    trained = [line for line in logged if "train/loss" in line]
    assert [line["step"] for line in trained] == [4, 8, 12, 16, 20, 24]
    assert trained[-1]["train/loss"] < 0.3 * trained[0]["train/loss"]
    assert trained[-1]["train/lr"] < trained[1]["train/lr"]


def test_what_it_leaves_is_what_the_model_computes(planted_reward: Path, planted: dict[str, str]) -> None:
    """The last examination and the kept mean and std, computed again from the saved model alone, in float64."""
    model = RewardModel.load(planted_reward / "model")
    encoder = Encoder.load(planted_reward / "model")
    rewards = model.score(read_pairs(planted["held-out"], encoder)[1], pad_id=encoder.pad_id).astype(np.float64)
    d = rewards[:, 0] - rewards[:, 1]
    confidence, hit = expit(np.abs(d)), d > 0
    bins = np.clip(np.ceil((confidence - 0.5) * 20) - 1, 0, 9).astype(int)
    ece = sum(abs(confidence[bins == b].sum() - hit[bins == b].sum()) for b in range(10)) / len(d)
    expected = {
        "accuracy": hit.mean(), "loss": -np.log(expit(d)).mean(), "margin": d.mean(), "ece": ece,
        "reward_mean": rewards.mean(), "reward_std": rewards.std(),
    }  # fmt: skip
    last = next(line for line in reversed(lines(planted_reward)) if "validation/held-out/loss" in line)
    assert {key.removeprefix("validation/held-out/"): v for key, v in last.items() if key != "step"} == pytest.approx(
        expected, rel=1e-5, abs=1e-7
    )
    own = model.score(read_pairs(planted["clean"], encoder)[1], pad_id=encoder.pad_id)
    assert model.normal == pytest.approx((own.mean(), own.std()), rel=1e-5)
    result = json.loads((planted_reward / "result.json").read_text())
    assert (result["reward_mean"], result["reward_std"]) == model.normal
    assert result["pairs"] == 96


def test_metrics_of_training_are_those_of_the_pairs_seen(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    """With a rate of practically zero the model stays as it began, so one pass can be recomputed from outside."""
    config = RewardConfig(
        data=planted["held-out"], model=language_model("llama"), batch_size=10, max_length=64,
        optim=OptimConfig(lr=1e-12), log_every=100, seed=4,
    )  # fmt: skip
    train_reward(config, tmp_path / "rm", quiet=True)
    model, encoder = RewardModel.load(tmp_path / "rm" / "model"), Encoder.load(language_model("llama"))
    rewards = model.score(read_pairs(planted["held-out"], encoder)[1], pad_id=encoder.pad_id).astype(np.float64)
    d = rewards[:, 0] - rewards[:, 1]
    (line,) = lines(tmp_path / "rm")
    expected = {
        "step": 7, "train/loss": np.log1p(np.exp(-d)).mean(), "train/accuracy": (d > 0).mean(),
        "train/margin": d.mean(), "train/reward_mean": rewards.mean(), "train/reward_std": rewards.std(),
        "train/lr": 1e-12 / 6,
    }  # fmt: skip
    assert line == pytest.approx(expected, rel=1e-4)


def test_only_the_top_layers_are_trained(language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
    for layers, moved in ((0, {"score.weight"}), (1, {"score.weight", "model.norm.weight"})):
        config = RewardConfig(
            data=planted["held-out"], model=language_model("llama"), batch_size=32, max_length=64,
            trainable_layers=layers, optim=OptimConfig(lr=1e-2),
        )  # fmt: skip
        train_reward(config, tmp_path / str(layers), quiet=True)
        before = RewardModel.from_language_model(language_model("llama"), pad_id=0, seed=0).hf.state_dict()
        after = RewardModel.load(tmp_path / str(layers) / "model").hf.state_dict()
        changed = {name for name in after if not torch.equal(before[name], after[name])}
        top = {n for n in after if n.startswith("model.layers.1.")} if layers else set()
        assert changed == moved | top


def test_rows_restrict_the_training_data(planted: dict[str, str], encoder: Encoder) -> None:
    everything, _ = read_pairs(planted["clean"], encoder)
    some, trees = read_pairs(planted["clean"], encoder, [3, 0, 3])
    assert [p.id for p in some] == [everything[i].id for i in (3, 0, 3)]
    assert len(trees) == 3
    with pytest.raises(InputError, match="no usable pair is left"):
        read_pairs(planted["clean"], encoder, [])


def test_a_file_of_identical_pairs_is_refused_for_what_it_is(encoder: Encoder, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "same.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w2"}] * 5)
    with pytest.raises(InputError, match=r"no usable pair is left .*\(5 pairs left out: chosen equals rejected\)"):
        read_pairs(data, encoder)


def test_pairs_that_all_weigh_nothing_are_refused(language_model: Folders, tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [row | {"weight": 0} for row in tiny.planted_pairs(4)[0]])
    with pytest.raises(InputError, match=r"d\.jsonl: all 4 usable pairs have weight 0.*`weight` above 0"):
        train_reward(RewardConfig(data=data, model=language_model("llama")), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_malformed_rows_stop_or_are_skipped_as_configured(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    rows = Path(planted["clean"]).read_text().splitlines()[:8]
    data = tmp_path / "torn.jsonl"
    data.write_text("\n".join([*rows, '{"prompt": "w1", "chosen"']) + "\n")
    settings: dict[str, Any] = {
        "data": str(data), "model": language_model("llama"), "max_length": 64, "validation": {"own": str(data)},
    }  # fmt: skip
    with pytest.raises(InputError, match=r"torn\.jsonl:9"):
        train_reward(RewardConfig(**settings), tmp_path / "a", quiet=True)
    skipping = RewardConfig(**settings, on_invalid="skip")
    assert train_reward(skipping, tmp_path / "b", quiet=True)["pairs"] == 8


def test_more_layers_than_there_are_is_refused(reward_model: Folders) -> None:
    with pytest.raises(InputError, match="at most the model's 2 layers, got 3"):
        freeze_below(RewardModel.load(reward_model("llama")), 3)


def test_plain_training_knows_nothing_of_contrastive_learning(planted_reward: Path) -> None:
    assert not any("train/contrastive_loss" in line for line in lines(planted_reward))
    assert "contrastive" not in json.loads((planted_reward / "result.json").read_text())


def test_dropout_that_a_model_brings_stays_off(planted: dict[str, str], tmp_path: Path) -> None:
    """It would follow no seed, and examinations in between would turn it on."""
    weights = []
    for name, rate in (("with", 0.5), ("without", 0.0)):
        start = tiny.build_model(tiny.build_config("gpt_neox", hidden_dropout=rate))
        config = RewardConfig(
            data=planted["held-out"], model=tiny.save_folder(start, tiny.build_tokenizer(), tmp_path / name),
            validation={"own": planted["held-out"]}, batch_size=16, max_length=64, eval_every=1,
        )  # fmt: skip
        train_reward(config, tmp_path / f"rm-{name}", quiet=True)
        weights.append(RewardModel.load(tmp_path / f"rm-{name}" / "model").state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[1])


def test_an_infinite_gradient_is_not_taken_in(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken in, it would leave weights that are no numbers in every later checkpoint, from which no run goes on."""
    config = RewardConfig(
        data=planted["clean"], model=language_model("llama"), max_length=64, batch_size=16, save_every=1, log_every=100
    )
    train_reward(config, tmp_path / "whole", quiet=True)
    honest, calls = reward.reward_step, 0

    def spoiled(model: RewardModel, *rest: Any) -> Any:
        nonlocal calls
        seen, calls = honest(model, *rest), calls + 1
        if calls == 3:
            assert model.head.weight.grad is not None
            model.head.weight.grad[0, 0] = torch.inf
        return seen

    monkeypatch.setattr(reward, "reward_step", spoiled)
    with pytest.raises(FloatingPointError, match=r"step 3: the norm of the reward model's gradient is inf.*optim\.lr"):
        train_reward(config, tmp_path / "stopped", quiet=True)
    train_reward(config, tmp_path / "stopped", quiet=True, resume=True)  # the spoiled step once more, unspoiled
    whole, stopped = (tmp_path / name / "model" / "model.safetensors" for name in ("whole", "stopped"))
    assert whole.read_bytes() == stopped.read_bytes()


def test_bfloat16_trains_float32_weights(language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
    config = RewardConfig(
        data=planted["clean"], model=language_model("llama"), max_length=64, precision="bfloat16", epochs=4,
        batch_size=16, optim=OptimConfig(lr=3e-3), validation={"held-out": planted["held-out"]},
    )  # fmt: skip
    train_reward(config, tmp_path / "rm", quiet=True)
    assert lines(tmp_path / "rm")[-1]["validation/held-out/accuracy"] > 0.9
    assert {x.dtype for x in RewardModel.load(tmp_path / "rm" / "model").state_dict().values()} == {torch.float32}
