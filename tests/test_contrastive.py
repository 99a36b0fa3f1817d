"""Contrastive learning: the losses by hand and against float64 references, dropout, exact gradients, training."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

import lives
import tiny
from conftest import Folders, Life
from steelyard.data.collate import collate
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.losses import differences, pairs, simcse, sinkhorn, swav
from steelyard.losses.contrastive import unit
from steelyard.models.dropout import dropout
from steelyard.models.reward import RewardModel
from steelyard.settings import parse
from steelyard.train.contrastive import ContrastiveConfig, contrastive_step, new_prototypes
from steelyard.train.optim import OptimConfig
from steelyard.train.reward import RewardConfig, reward_step, train_reward
from steelyard.types import Preference

COMBINATIONS = [(m, f) for m in ("simcse", "swav") for f in ("pairs", "differences")]
SINKHORN: dict[str, Any] = {"epsilon": 0.05, "iterations": 3}


def t(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def two_views(n: int = 9, d: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, d)) * rng.uniform(0.1, 30, (n, 1))
    return base + 0.3 * rng.normal(size=(n, d)), base + 0.3 * rng.normal(size=(n, d))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def numpy_codes(scores: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
    """SwAV's own listing: prototypes in rows, samples in columns, plain exponentials."""
    q = np.exp(scores / epsilon).T
    q /= q.sum()
    K, N = q.shape
    for _ in range(iterations):
        q /= q.sum(1, keepdims=True)
        q /= K
        q /= q.sum(0, keepdims=True)
        q /= N
    return (q * N).T


# Losses


def test_simcse_by_hand() -> None:
    # Cosines at tau = 1 / ln 2: s_1 sees (1, 0): 2 / (2 + 1). s_2 sees (0, -1): 1/2 / (1 + 1/2). Lengths do not count.
    loss = simcse(t([[3, 0], [0, 5]]), t([[2, 0], [0, -7]]), temperature=1 / math.log(2))
    assert_close(loss, torch.tensor([math.log(3 / 2), math.log(3)], dtype=torch.float64))


def test_simcse_of_equal_views_of_one_direction_is_chance() -> None:
    same = t([[1, 2], [2, 4], [0.5, 1]])
    assert_close(simcse(same, same, temperature=0.05), torch.full((3,), math.log(3), dtype=torch.float64))


def test_a_difference_meets_its_mirror() -> None:
    # One pair: the counterpart has cosine 1, the mirror -1; tau = 2 / ln 3 makes their ratio 3.
    h = differences(t([[4, 1]]), t([[1, 5]]))
    assert h.tolist() == [[3, -4], [-3, 4]]
    assert_close(simcse(h, 2 * h, temperature=2 / math.log(3)), torch.full((2,), math.log(4 / 3), dtype=torch.float64))


def test_pairs_are_all_chosen_then_all_rejected() -> None:
    assert pairs(t([[1], [2]]), t([[3], [4]])).flatten().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_simcse_against_a_loop(temperature: float) -> None:
    s, other = two_views()
    expected = []
    for i in range(len(s)):
        odds = [math.exp(cosine(s[i], other[j]) / temperature) for j in range(len(s))]
        expected.append(-math.log(odds[i] / sum(odds)))
    found = simcse(torch.from_numpy(s), torch.from_numpy(other), temperature=temperature)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)
    assert np.std(expected) > 1e-3


def test_sinkhorn_by_hand() -> None:
    # Odds [[2, 1], [1, 1]]: columns (2/3, 1/2), (1/3, 1/2); rows (4/7, 3/7), (2/5, 3/5).
    scores = t([[math.log(2), 0], [0, 0]]) * 0.5
    assert_close(sinkhorn(scores, epsilon=0.5, iterations=1), t([[4 / 7, 3 / 7], [2 / 5, 3 / 5]]))


def test_sinkhorn_uses_every_row_once_and_all_columns_alike() -> None:
    scores = torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, (12, 5)))
    q = sinkhorn(scores, epsilon=0.2, iterations=500)
    assert_close(q.sum(1), torch.ones(12, dtype=torch.float64))
    assert_close(q.sum(0), torch.full((5,), 12 / 5, dtype=torch.float64))
    # It scales rows and columns and does nothing else: what is left over has rank one in the logarithm.
    rest = q.log() - scores / 0.2
    assert_close(rest - rest[:1] - rest[:, :1] + rest[0, 0], torch.zeros(12, 5, dtype=torch.float64), atol=1e-9, rtol=0)
    assert_close(sinkhorn(scores, **SINKHORN).sum(1), torch.ones(12, dtype=torch.float64))


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_against_swavs_own_listing(iterations: int) -> None:
    scores = np.random.default_rng(2).uniform(-1, 1, (7, 4))
    found = sinkhorn(torch.from_numpy(scores), epsilon=0.05, iterations=iterations)
    np.testing.assert_allclose(found.numpy(), numpy_codes(scores, 0.05, iterations), rtol=1e-9)


def test_a_tiny_epsilon_does_not_overflow() -> None:
    q = sinkhorn(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), epsilon=1e-3, iterations=3)
    assert_close(q, torch.eye(2))


def test_swav_by_hand() -> None:
    # Two opposite features on two opposite prototypes: codes as good as hard, each view predicts its own with odds
    # exp(1 / tau) : exp(-1 / tau) = 3, so log(4/3) from either side.
    h = t([[2, 0], [-5, 0]])
    loss = swav(h, 3 * h, t([[7, 0], [-0.1, 0]]), temperature=2 / math.log(3), **SINKHORN)
    assert_close(loss, torch.full((2,), 2 * math.log(4 / 3), dtype=torch.float64))


def test_swav_against_a_loop() -> None:
    a, b = two_views()
    c = np.random.default_rng(3).normal(size=(4, 5))
    scores = [np.array([[cosine(x, k) for k in c] for x in h]) for h in (a, b)]
    q_a, q_b = (numpy_codes(x, 0.05, 3) for x in scores)
    expected = np.zeros(len(a))
    for i in range(len(a)):
        for x, q in ((scores[0][i], q_b[i]), (scores[1][i], q_a[i])):
            odds = [math.exp(v / 0.1) for v in x]
            expected[i] -= sum(q[k] * math.log(odds[k] / sum(odds)) for k in range(len(c)))
    ta, tb, tc = (torch.from_numpy(x) for x in (a, b, c))
    found = swav(ta, tb, tc, temperature=0.1, **SINKHORN)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)
    assert_close(swav(tb, ta, tc, temperature=0.1, **SINKHORN), found)


def test_gradients_reach_features_and_prototypes_and_not_codes() -> None:
    s, other = (torch.from_numpy(x).requires_grad_() for x in two_views())
    simcse(s, other, temperature=0.5).sum().backward()
    assert s.grad is not None
    assert other.grad is not None
    assert s.grad.abs().sum() > 0
    assert other.grad.abs().sum() > 0
    # Only the direction counts, so no gradient points along the feature.
    assert_close((s.grad * s).sum(1), torch.zeros(9, dtype=torch.float64), atol=1e-12, rtol=0)

    # Codes as constants: the gradient of a loss whose codes are given from outside.
    a, b = (torch.from_numpy(x).requires_grad_() for x in two_views(seed=4))
    c = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ours = torch.autograd.grad(swav(a, b, c, temperature=0.1, **SINKHORN).sum(), (a, b, c))
    z_a, z_b = (h / h.norm(dim=1, keepdim=True) @ (c / c.norm(dim=1, keepdim=True)).T for h in (a, b))
    q_a, q_b = (torch.from_numpy(numpy_codes(z.detach().numpy(), 0.05, 3)) for z in (z_a, z_b))
    given = -(q_b * (z_a / 0.1).log_softmax(1)).sum() - (q_a * (z_b / 0.1).log_softmax(1)).sum()
    for found, expected in zip(ours, torch.autograd.grad(given, (a, b, c)), strict=True):
        assert_close(found, expected)
        assert expected.abs().max() > 1e-3
    assert not sinkhorn(a @ c.T, **SINKHORN).requires_grad


def test_a_zero_feature_has_cosine_zero_and_no_gradient() -> None:
    h = t([[0, 0], [3, 4]]).requires_grad_()
    loss = simcse(h, t([[1, 0], [0, 1]]), temperature=1.0)
    assert loss[0].item() == pytest.approx(math.log(2))
    loss.sum().backward()
    assert h.grad is not None
    assert h.grad[0].tolist() == [0, 0]
    assert h.grad[1].abs().sum() > 0


def test_half_precision_is_computed_in_float32_and_shapes_must_agree() -> None:
    h = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert simcse(h, h, temperature=0.05).dtype == torch.float32
    assert swav(h, h, h, temperature=0.1, **SINKHORN).dtype == torch.float32
    assert differences(h, h).dtype == torch.float32
    for wrong in (lambda: simcse(h, h[:2], temperature=1.0), lambda: pairs(h, h[:, :2]), lambda: differences(h[:1], h)):
        with pytest.raises(ValueError, match="one shape"):
            wrong()
    with pytest.raises(ValueError, match="one shape"):
        swav(h, h[:1], h, temperature=0.1, **SINKHORN)
    with pytest.raises(ValueError, match=r"got \(3, 4\) and \(3, 2\)"):
        swav(h, h, h[:, :2], temperature=0.1, **SINKHORN)


# Dropout


TREES = [Tree((6, 7, 8), ((9, 10, tiny.EOS), (11, tiny.EOS))), Tree((12, 5), ((5, 13, 14, tiny.EOS), (6, tiny.EOS)))]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_views_differ_with_dropout_and_are_identical_without(family: str, reward_model: Folders) -> None:
    model = RewardModel.load(reward_model(family))
    batch = collate(TREES, tiny.PAD)
    plain, state, before = model(batch), torch.get_rng_state(), model.state_dict()

    def view(rate: float, seed: int) -> torch.Tensor:
        with dropout(model.trunk, rate, seed):
            rewards: torch.Tensor = model(batch)
            return rewards

    # Layers that are hooked run their own code, which rounds otherwise.
    torch.testing.assert_close(view(0.0, 1), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(view(0.05, 1), view(0.05, 1))
    assert (view(0.05, 1) != view(0.05, 2)).all()
    assert (view(0.05, 1) != plain).all()
    # Nothing is left: neither numbers nor weights nor random state.
    assert torch.equal(model(batch), plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.state_dict().keys() == before.keys()


def test_dropout_drops_its_share_and_keeps_the_mean(reward_model: Folders) -> None:
    model = RewardModel.load(reward_model("llama"))
    attention: Any = model.trunk.layers[0].self_attn
    inputs: dict[str, Any] = {"hidden_states": torch.randn(4, 200, 32, generator=torch.Generator().manual_seed(0))}
    inputs |= {"attention_mask": None, "position_embeddings": (torch.ones(1, 200, 8), torch.zeros(1, 200, 8))}
    with torch.no_grad():
        plain = attention(**inputs)[0]
        with dropout(model.trunk, 0.25, 3):
            dropped = attention(**inputs)[0]
    gone = dropped == 0
    assert gone.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert_close(dropped[~gone], plain[~gone] / 0.75)


def test_dropout_ends_even_after_an_error_and_refuses_unknown_layers(reward_model: Folders) -> None:
    model = RewardModel.load(reward_model("llama"))
    plain = model(collate(TREES, tiny.PAD))
    with pytest.raises(ZeroDivisionError), dropout(model.trunk, 0.5, 0):
        raise ZeroDivisionError
    assert torch.equal(model(collate(TREES, tiny.PAD)), plain)
    strange = torch.nn.Module()
    strange.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])
    with pytest.raises(InputError, match="dropout needs layers with one of self_attn, attention, attn, got 0"):
        dropout(strange, 0.1, 0).__enter__()
    with pytest.raises(InputError, match="it has none"):
        dropout(torch.nn.Linear(2, 2), 0.1, 0).__enter__()


# One step


@pytest.fixture
def encoder(language_model: Folders) -> Encoder:
    return Encoder.load(language_model("llama"))


@pytest.fixture
def weighed() -> list[Preference]:
    fields = [(0.0, 0.0, 1.0), (0.3, 0.5, 2.0), (1.0, -1.0, 0.5), (0.1, 2.0, 0.0), (0.0, 1.5, 3.0)]
    return [
        Preference(row["id"], row["prompt"], row["chosen"], row["rejected"], flip_prob=a, margin=m, weight=w)
        for row, (a, m, w) in zip(tiny.planted_pairs(5)[0], fields, strict=True)
    ]


def configured(method: str, features: str = "pairs", max_tokens: int = 4096, **options: Any) -> RewardConfig:
    section = {"method": method, "features": features} | options
    return RewardConfig.model_validate({"data": "", "model": "", "max_tokens": max_tokens, "contrastive": section})


def step(
    folder: str, encoder: Encoder, pairs: Sequence[Preference], config: RewardConfig, number: int = 1
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = RewardModel.load(folder).eval()
    prototypes = new_prototypes(config, model.head.in_features)
    trees = encoder.encode(pairs).trees
    seen = contrastive_step(model, pairs, trees, encoder, config, step=number, prototypes=prototypes)
    gradient = {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}
    return seen, gradient if prototypes is None or prototypes.grad is None else gradient | {"C": prototypes.grad}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    size = max(float(x.abs().max()) for x in b.values())
    return a.keys() == b.keys() and all(float((a[n] - b[n]).abs().max()) <= tolerance * size for n in a)


class Masks:
    """The masks of a step, recorded as it draws them, so that a reference can be computed in one graph."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import steelyard.train.contrastive as module

        self.seeds: list[int] = []

        def recorded(trunk: torch.nn.Module, rate: float, seed: int) -> Any:
            assert rate == 0.05
            self.seeds.append(seed)
            return dropout(trunk, rate, seed)

        monkeypatch.setattr(module, "dropout", recorded)


@pytest.mark.parametrize(("method", "features"), COMBINATIONS)
@pytest.mark.parametrize("max_tokens", [40, 120, 4096])
def test_the_gradient_is_that_of_one_graph_over_the_batch(
    method: str, features: str, max_tokens: int, reward_model: Folders, encoder: Encoder,
    weighed: list[Preference], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Reference: both views of every micro-batch in one graph, one loss, one backward; weights by hand."""
    from steelyard.data.collate import pack

    masks = Masks(monkeypatch)
    config = configured(method, features, max_tokens)
    seen, gradient = step(reward_model("llama"), encoder, weighed, config)
    trees = encoder.encode(weighed).trees
    groups = pack([len(x) for x in trees], max_tokens)
    assert len(groups) == {40: 3, 120: 1, 4096: 1}[max_tokens]
    passes = 1 if max_tokens == 4096 else 2  # both views of 120 tokens are too much at once
    assert len(masks.seeds) == passes * 2 * len(groups)
    assert len(set(masks.seeds)) == 2 * len(groups)
    assert masks.seeds == masks.seeds[: 2 * len(groups)] * passes

    model = RewardModel.load(reward_model("llama")).eval()
    prototypes = new_prototypes(config, 32)
    f = torch.zeros(2, 5, 2, 32)
    for job, seed in enumerate(masks.seeds[: 2 * len(groups)]):
        with dropout(model.trunk, 0.05, seed):
            f = f.index_put(
                (torch.tensor(job % 2), torch.tensor(groups[job // 2])),
                model.features(collate([trees[i] for i in groups[job // 2]], encoder.pad_id)),
            )
    rewards = (f @ model.head.weight[0]).double()
    share = torch.tensor([1, 2, 0.5, 0, 3]) / 6.5
    total: Any = 0.0
    for v in (0, 1):
        for i, p in enumerate(weighed):
            right = torch.sigmoid(rewards[v, i, 0] - rewards[v, i, 1] - p.margin)
            loss = -(1 - p.flip_prob) * torch.log(right) - p.flip_prob * torch.log(1 - right)
            total = total + share[i] * loss / 2
    kept = [0, 1, 2, 4]  # the pair without weight is nobody's negative
    s, other = f[0, kept].double(), f[1, kept].double()
    if features == "pairs":
        s, other = s.transpose(0, 1).reshape(8, 32), other.transpose(0, 1).reshape(8, 32)
    else:
        s, other = (torch.cat([x[:, 0] - x[:, 1], x[:, 1] - x[:, 0]]) for x in (s, other))
    if prototypes is None:
        each, beta = simcse(s, other, temperature=0.05), 1.0
    else:
        assert prototypes.shape == ((50 if features == "pairs" else 20), 32)
        each = swav(other, s, prototypes.double(), temperature=0.1, **SINKHORN)
        beta = 0.1 if features == "pairs" else 0.5
    contrast = (each[:4] + each[4:]) / 2
    (total + beta * (contrast * share[kept]).sum()).backward()

    expected = {n: p.grad for n, p in model.hf.named_parameters() if p.grad is not None}
    if prototypes is not None:
        assert prototypes.grad is not None
        expected["C"] = prototypes.grad
    assert close(gradient, expected, 1e-4)
    assert_close(seen[kept, 4].double(), contrast.detach(), rtol=1e-4, atol=1e-5)
    assert seen[3, 4] == 0
    assert_close(seen[:, 2:4], rewards.detach().float().mean(0), rtol=1e-4, atol=1e-5)
    assert_close((seen[:, 0] * share).sum().item(), total.item(), rtol=1e-4, atol=1e-5)


def test_beta_zero_is_the_plain_loss_on_two_dropout_views(
    reward_model: Folders, encoder: Encoder, weighed: list[Preference], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = Masks(monkeypatch)
    seen, gradient = step(reward_model("llama"), encoder, weighed, configured("simcse", beta=0.0))
    model = RewardModel.load(reward_model("llama")).eval()
    trees = encoder.encode(weighed).trees
    views = []
    for seed in masks.seeds:
        with dropout(model.trunk, 0.05, seed):
            views.append(reward_step(model, weighed, trees, encoder, RewardConfig(data="", model="")))
    assert len(views) == 2
    expected = {n: p.grad / 2 for n, p in model.hf.named_parameters() if p.grad is not None}
    assert close(gradient, expected)
    assert_close(seen[:, :4], (views[0] + views[1]) / 2)
    assert seen[:, 4].sum() > 0, "the control still says what the term would be"
    assert not close(step(reward_model("llama"), encoder, weighed, configured("simcse"))[1], expected, 1e-2)


@pytest.mark.parametrize(("method", "features"), COMBINATIONS)
def test_weights_count_by_their_ratio_and_zero_is_absence(
    method: str, features: str, reward_model: Folders, encoder: Encoder, weighed: list[Preference]
) -> None:
    config = configured(method, features)
    whole = step(reward_model("llama"), encoder, weighed, config)
    scaled = step(reward_model("llama"), encoder, [replace(p, weight=7 * p.weight) for p in weighed], config)
    assert close(scaled[1], whole[1])
    silent = step(reward_model("llama"), encoder, [replace(p, weight=0.0) for p in weighed], config)
    assert silent[1] == {}
    assert not silent[0].any()


def test_masks_follow_seed_step_micro_batch_and_view(
    reward_model: Folders, encoder: Encoder, weighed: list[Preference], monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = Masks(monkeypatch)
    config = configured("simcse", max_tokens=40)
    for number, seed in ((1, 0), (1, 0), (2, 0), (1, 1)):
        step(reward_model("llama"), encoder, weighed, config.model_copy(update={"seed": seed}), number)
    assert len(masks.seeds) == 4 * 12
    runs = [masks.seeds[12 * i : 12 * i + 6] for i in range(4)]
    assert runs[0] == runs[1]
    assert len({*runs[0], *runs[2], *runs[3]}) == 18


# Settings


def test_the_papers_numbers_are_the_defaults() -> None:
    found = {
        c: ContrastiveConfig.model_validate(dict(zip(("method", "features"), c, strict=True))) for c in COMBINATIONS
    }
    assert {c: x.numbers() for c, x in found.items()} == {
        ("simcse", "pairs"): {"beta": 1, "temperature": 0.05},
        ("simcse", "differences"): {"beta": 1, "temperature": 0.05},
        ("swav", "pairs"): {"beta": 0.1, "temperature": 0.1, "prototypes": 50},
        ("swav", "differences"): {"beta": 0.5, "temperature": 0.1, "prototypes": 20},
    }
    assert {x.dropout for x in found.values()} == {0.05}
    own = ContrastiveConfig(method="swav", beta=0.0, temperature=0.3, prototypes=7)
    assert own.numbers() == {"beta": 0, "temperature": 0.3, "prototypes": 7}
    assert RewardConfig(data="", model="").contrastive.method is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 1.0}, r"beta: no effect without a method \(simcse or swav\)"),
        ({"features": "pairs", "dropout": 0.1}, "dropout, features: no effect without a method"),
        ({"method": "simcse", "prototypes": 50}, "prototypes: no effect without method = swav"),
        ({"method": "simcse", "epsilon": 0.1, "iterations": 5}, "epsilon, iterations: no effect without method = swav"),
        ({"method": "simcse", "dropout": 0.0}, "greater than 0"),
        ({"method": "simcse", "temperature": 0.0}, "greater than 0"),
        ({"method": "simcse", "beta": -1}, "greater than or equal to 0"),
    ],
)
def test_options_without_effect_or_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ContrastiveConfig.model_validate(settings)


def test_the_command_line_reaches_it_and_a_written_configuration_is_read_again() -> None:
    args = ["--data", "d", "--model", "m", "--contrastive.method", "swav", "--contrastive.prototypes", "9"]
    config, _ = parse(RewardConfig, args, verb="train reward", about="")
    assert config.contrastive == ContrastiveConfig(method="swav", prototypes=9)
    for again in (config, RewardConfig(data="", model=""), configured("simcse", "differences")):
        assert RewardConfig.model_validate_json(again.model_dump_json()) == again
    with pytest.raises(InputError, match="no effect without a method"):
        parse(RewardConfig, ["--data", "d", "--model", "m", "--contrastive.beta", "2"], verb="train reward", about="")


def test_features_that_cannot_change_are_refused() -> None:
    frozen: dict[str, Any] = {"data": "", "model": "", "trainable_layers": 0}
    with pytest.raises(ValidationError, match="no effect with trainable_layers = 0"):
        RewardConfig.model_validate(frozen | {"contrastive": {"method": "simcse"}})
    control = RewardConfig.model_validate(frozen | {"contrastive": {"method": "simcse", "beta": 0}})
    assert control.contrastive.beta == 0


# Training


def training(planted: dict[str, str], model: str, **section: Any) -> RewardConfig:
    return RewardConfig.model_validate(
        {
            "data": planted["held-out"], "model": model, "validation": {"own": planted["held-out"]}, "batch_size": 16,
            "epochs": 2, "max_length": 64, "optim": {"lr": 3e-3}, "save_every": 3, "log_every": 4, "eval_every": 4,
            "contrastive": section,
        }
    )  # fmt: skip


@pytest.mark.parametrize(("method", "features"), COMBINATIONS)
def test_it_trains_and_leaves_an_ordinary_reward_model(
    method: str, features: str, language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    from steelyard.train.pairwise import read_pairs

    config = training(planted, language_model("llama"), method=method, features=features)
    result = train_reward(config, tmp_path / "rm", quiet=True)
    assert result["contrastive"] == config.contrastive.numbers()
    logged = [json.loads(line) for line in (tmp_path / "rm" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in logged if "train/loss" in line]
    assert [line["step"] for line in trained] == [4, 8]
    assert all(line["train/contrastive_loss"] > 0 for line in trained)
    assert trained[1]["train/loss"] < trained[0]["train/loss"]
    assert any(f.name == "step-00000006" for f in (tmp_path / "rm" / "checkpoints").iterdir())

    plain = RewardModel.from_language_model(language_model("llama"), pad_id=0, seed=0)
    weights = load_file(tmp_path / "rm" / "model" / "model.safetensors")
    assert weights.keys() == plain.hf.state_dict().keys()
    encoder = Encoder.load(tmp_path / "rm" / "model")
    trees = read_pairs(planted["held-out"], encoder)[1]
    scores = RewardModel.load(tmp_path / "rm" / "model").score(trees, pad_id=encoder.pad_id)
    theirs: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm" / "model").eval()
    with torch.no_grad():
        for tree, row in list(zip(trees, scores, strict=True))[:5]:
            found = [theirs(input_ids=torch.tensor([tree.prompt + r])).logits.item() for r in tree.responses]
            np.testing.assert_allclose(found, row, rtol=1e-4, atol=1e-5)
    # Examined without dropout: the last examination is what the plain model says of the same pairs.
    last = [line for line in logged if "validation/own/margin" in line][-1]
    assert last["validation/own/margin"] == pytest.approx(float((scores[:, 0] - scores[:, 1]).mean()), rel=1e-5)


def test_the_term_changes_the_model_and_the_control_does_not_see_its_settings(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    def weights(**section: Any) -> bytes:
        out = tmp_path / "-".join(map(str, section.values()))
        train_reward(training(planted, language_model("llama"), **section), out, quiet=True)
        return (out / "model" / "model.safetensors").read_bytes()

    control = weights(method="simcse", beta=0.0)
    assert weights(method="simcse", beta=0.0, temperature=0.5) == control
    assert weights(method="swav", beta=0.0) == control
    assert weights(method="simcse", beta=1.0) != control


def train_until(config: RewardConfig, out: Path, steps: int) -> None:
    """A job: train, and be killed at the optimiser's step number `steps` of this life."""
    lives.die_at_step(steps)
    train_reward(config, out, resume=True, quiet=True)


def test_a_killed_run_continues_to_the_same_bytes(
    language_model: Folders, planted: dict[str, str], life: Life, one_thread: None, tmp_path: Path
) -> None:
    config = training(planted, language_model("llama"), method="swav", features="differences")
    config = config.model_copy(update={"max_tokens": 128, "optim": OptimConfig(lr=3e-3, weight_decay=0.1)})
    train_reward(config, tmp_path / "whole", quiet=True)
    killed = tmp_path / "killed"
    # Killed in its fifth step, after the checkpoint of the third.
    assert life(train_until, config, killed, 5) == -signal.SIGKILL
    assert [f.name for f in (killed / "checkpoints").glob("step-*")] == ["step-00000003"]
    train_reward(config, killed, resume=True, quiet=True)
    for name in ("model/model.safetensors", "metrics.jsonl", "result.json"):
        assert (killed / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    last = "checkpoints/step-00000006"
    states = sorted((tmp_path / "whole" / last).glob("*.safetensors"))
    assert states
    for path in states:
        assert (killed / last / path.name).read_bytes() == path.read_bytes()


def test_prototypes_are_trained(language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    config = training(planted, language_model("llama"), method="swav")
    train_reward(config, tmp_path / "rm", quiet=True)
    (state,) = (tmp_path / "rm" / "checkpoints" / "step-00000006").glob("*.safetensors")
    kept, begun = load_file(state)["prototypes"], new_prototypes(config, 32)
    assert begun is not None
    assert_close(unit(begun), begun.detach())
    assert (kept - begun.detach()).abs().mean() > 1e-3
