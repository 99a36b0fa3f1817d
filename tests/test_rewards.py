"""Rewards: hand-derived numbers, what contrastive rewards provably do, exact resumption."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from steelyard.rewards import (
    Aggregate,
    Transform,
    aggregate,
    clip,
    contrastive,
    lsc,
    missing_eos,
    par,
    percentile,
    references,
    relative,
    shape,
    token_rewards,
)
from steelyard.running import KLController, RunningScale, RunningStd, ScaleMode


def test_contrastive_by_hand() -> None:
    # 5 - (1 + 2 + 6)/3 and 0 - (-1 - 1 - 4)/3.
    got = contrastive(torch.tensor([5.0, 0.0]), torch.tensor([[1.0, 2, 6], [-1, -1, -4]]))
    assert got.tolist() == [2.0, 2.0]


def test_contrastive_refuses_baselines_that_do_not_fit() -> None:
    for baselines in (torch.ones(2), torch.ones(3, 2), torch.ones(2, 0), torch.ones(1, 3)):
        for transform in (contrastive, par):
            with pytest.raises(ValueError, match="baselines must be"):
                transform(torch.ones(2), baselines)


def test_a_prompts_own_offset_cancels() -> None:
    rewards, baselines = torch.tensor([1.0, 2.0]), torch.tensor([[0.0, 1.0], [3.0, 5.0]])
    offset = torch.tensor([4.0, -8.0])
    assert torch.equal(contrastive(rewards + offset, baselines + offset[:, None]), contrastive(rewards, baselines))


@pytest.mark.parametrize(("c0", "c1"), [(0.0, 0.0), (0.3, 0.1), (0.2, 0.5)])
def test_flip_rates_of_a_prompt_cancel_or_shrink(c0: float, c1: float) -> None:
    # A binary true reward, seen through flip rates c0 = P(1|0) and c1 = P(0|1): the expected contrastive reward is
    # (1 - c0 - c1) (P(r* = 1) - P(r*_base = 1)), the bias c0 gone. Here P = 0.7 against 0.4.
    rng = np.random.default_rng(1)
    n, k = 200_000, 3

    def seen(truth: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(rng.random(truth.shape) < np.where(truth, c1, c0), ~truth, truth)).float()

    raw, base = seen(rng.random(n) < 0.7), seen(rng.random((n, k)) < 0.4)
    got = contrastive(raw, base).mean().item()
    # The standard error is at most sqrt(1/4 + 1/12) / sqrt(n) = 0.0013; 5 of them.
    assert got == pytest.approx((1 - c0 - c1) * 0.3, abs=0.0065)
    # Raw rewards do carry the bias: c0 + (1 - c0 - c1) 0.7.
    assert raw.mean().item() == pytest.approx(c0 + (1 - c0 - c1) * 0.7, abs=0.0065)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_variance_falls_from_between_plus_within_to_within_times_one_plus_one_over_k(k: int) -> None:
    # Policy = SFT: r = prompt offset (tau = 2) + response (s = 0.5).
    rng = np.random.default_rng(2)
    n, tau, s = 100_000, 2.0, 0.5
    offset = rng.normal(scale=tau, size=(n, 1))
    scores = torch.from_numpy(offset + rng.normal(scale=s, size=(n, k + 1)))
    raw, base = scores[:, 0], scores[:, 1:]
    # The relative standard error of a variance is sqrt(2/n) = 0.0045; 5 of them.
    assert raw.var().item() == pytest.approx(tau**2 + s**2, rel=0.0225)
    assert contrastive(raw, base).var().item() == pytest.approx(s**2 * (1 + 1 / k), rel=0.0225)


# Nonlinear transforms


def test_par_by_hand() -> None:
    # sigmoid(0) = 1/2; sigmoid(ln 3) = 3/4 and sigmoid(-ln 3) = 1/4; the mean of 1/2 and 3/4 is 5/8.
    ln3 = math.log(3)
    got = par(torch.tensor([2.0, ln3, 0.0]), torch.tensor([[2.0, 2.0], [0.0, ln3], [ln3, -ln3]]))
    assert got.tolist() == pytest.approx([0.5, 0.625, 0.5], abs=1e-6)


def test_lsc_by_hand() -> None:
    # log(1/2), log(3/4), log(1/4).
    ln3 = math.log(3)
    got = lsc(torch.tensor([5.0, ln3, 1.0]), torch.tensor([5.0, 0.0, 1 + ln3]))
    assert got.tolist() == pytest.approx([-math.log(2), math.log(0.75), -math.log(4)], abs=1e-6)
    with pytest.raises(ValueError, match="pair up"):
        lsc(torch.ones(2), torch.ones(1))


def test_par_and_lsc_against_float64() -> None:
    rng = np.random.default_rng(4)
    rewards, baselines = rng.normal(scale=4, size=50), rng.normal(scale=4, size=(50, 3))
    mine = par(torch.from_numpy(rewards), torch.from_numpy(baselines)).numpy()
    theirs = [np.mean([1 / (1 + math.exp(b - r)) for b in row]) for r, row in zip(rewards, baselines, strict=True)]
    np.testing.assert_allclose(mine, theirs, atol=1e-6)
    mine = lsc(torch.from_numpy(rewards), torch.from_numpy(baselines[:, 0])).numpy()
    theirs = [-math.log1p(math.exp(b - r)) for r, b in zip(rewards, baselines[:, 0], strict=True)]
    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_par_and_lsc_rise_with_the_reward_and_keep_their_bounds() -> None:
    rewards = torch.linspace(-6, 6, 101)
    bounded, below = par(rewards, torch.tensor([[-1.0, 2.0]]).expand(101, 2)), lsc(rewards, torch.ones(101))
    for got in (bounded, below):
        assert (got.diff() > 0).all()
    assert (bounded > 0).all()
    assert (bounded < 1).all()
    assert (below < 0).all()


def test_huge_differences_neither_overflow_nor_lose_the_gradient() -> None:
    rewards = torch.tensor([-1e4, 1e4], requires_grad=True)
    got = lsc(rewards, torch.zeros(2))
    assert got.tolist() == [-1e4, 0.0]
    got.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [1.0, 0.0]
    assert par(rewards.detach(), torch.zeros(2, 1)).tolist() == [0.0, 1.0]


def test_a_nonlinear_transform_can_turn_two_policies_round_and_contrastive_cannot() -> None:
    # One prompt, baseline 0. Policy a earns 1 always; b earns 12 one time in ten, else 0: means 1 and 1.2.
    a, b = torch.ones(10), torch.tensor([12.0] + [0.0] * 9)
    base = torch.zeros(10, 1)
    assert contrastive(a, base).mean() < contrastive(b, base).mean()
    assert par(a, base).mean() > par(b, base).mean()
    assert lsc(a, base[:, 0]).mean() > lsc(b, base[:, 0]).mean()


def test_percentile_by_hand() -> None:
    baselines = torch.tensor([[3.0, 1.0, 2.0], [6.0, 4.0, 5.0]])
    # Ranks 0, 1, 2: the 75th percentile stands at rank 1.5. Pooled: ranks 0 to 5, rank 3.75.
    assert percentile(baselines, 75).tolist() == [2.5, 5.5]
    assert percentile(baselines, 100).tolist() == [3.0, 6.0]
    assert percentile(baselines, 75, pooled=True).tolist() == [4.75, 4.75]
    with pytest.raises(ValueError, match="between 0 and 100"):
        percentile(baselines, 101)
    with pytest.raises(ValueError, match="baselines must be"):
        percentile(torch.ones(3), 50)


# The whole way


def test_the_whole_way_by_hand() -> None:
    rewards, ended = torch.tensor([3.0, -1.0]), torch.tensor([True, False])
    base = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    # Against the means 2 and 1: 1 and -2. Doubled: 2 and -4. Clipped: 2 and -3. The second was cut off: -3.5.
    rest = {"scale": 2.0, "limit": 3.0, "missing_eos_penalty": 0.5}
    assert shape(rewards, base, ended, how="contrastive", **rest).tolist() == [2.0, -3.5]
    # Plain: 6 and -2, clipped to 3.
    assert shape(rewards, None, ended, how="plain", **rest).tolist() == [3.0, -2.5]
    # Nothing but the transform is asked for.
    assert shape(rewards, base, ended, how="contrastive").tolist() == [1.0, -2.0]


def test_the_whole_way_of_par_and_lsc() -> None:
    rewards, ended = torch.tensor([3.0, -1.0]), torch.tensor([True, False])
    base = torch.tensor([[1.0, 3.0], [0.0, 2.0]])
    sigmoid = [[1 / (1 + math.exp(b - r)) for b in row] for r, row in zip((3, -1), base.tolist(), strict=True)]
    expected = [np.mean(sigmoid[0]), np.mean(sigmoid[1]) - 0.5]
    assert shape(rewards, base, ended, how="par", missing_eos_penalty=0.5).tolist() == pytest.approx(expected)
    # The medians are 2 and 1; of all four scores 1.5.
    for pooled, levels in ((False, (2.0, 1.0)), (True, (1.5, 1.5))):
        against = references(base, "lsc", lsc_percentile=50, pooled=pooled)
        assert against.tolist() == [[levels[0]], [levels[1]]]
        expected = [-math.log1p(math.exp(level - r)) for level, r in zip(levels, (3, -1), strict=True)]
        assert shape(rewards, against, ended, how="lsc").tolist() == pytest.approx(expected)


def test_shrunk_references_are_for_contrastive_rewards_alone() -> None:
    base = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert references(base, "contrastive", baseline="shrunk").tolist() == [[2.25], [5.75]]
    assert references(base, "contrastive") is base
    for how in ("par", "lsc"):
        with pytest.raises(ValueError, match=f"goes with contrastive rewards, got '{how}'"):
            references(base, how, baseline="shrunk")  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["plain", "contrastive", "par", "lsc"])
def test_no_response_is_paid_by_its_company(how: Transform) -> None:
    rng = np.random.default_rng(5)
    rewards, base = torch.from_numpy(rng.normal(size=20)), torch.from_numpy(rng.normal(size=(20, 3)))
    ended = torch.from_numpy(rng.random(20) < 0.5)
    against = None if how == "plain" else references(base, how)
    rest = {"scale": 1.5, "limit": 0.8, "missing_eos_penalty": 0.3}
    whole = shape(rewards, against, ended, how=how, **rest)
    for part in (slice(0, 1), slice(1, 20)):
        mine = shape(rewards[part], None if against is None else against[part], ended[part], how=how, **rest)
        assert_close(mine, whole[part], rtol=0, atol=0)


def test_references_go_with_relative_rewards_only() -> None:
    with pytest.raises(ValueError, match="references go with"):
        relative(torch.ones(2), torch.ones(2, 1), "plain")
    with pytest.raises(ValueError, match="references go with"):
        relative(torch.ones(2), None, "par")
    with pytest.raises(ValueError, match="baselines must be"):
        relative(torch.ones(2), torch.ones(3, 1), "lsc")
    # A column of raw baselines would be taken for the percentile.
    with pytest.raises(ValueError, match=r"got 2: pass references\(baselines, 'lsc'\)"):
        relative(torch.ones(2), torch.ones(2, 2), "lsc")


def test_a_misspelt_name_is_not_taken_for_another() -> None:
    with pytest.raises(ValueError, match="how must be one of plain, contrastive, par, lsc, got 'parr'"):
        references(torch.ones(2, 2), "parr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"how must be one of .*, got 'parr'"):
        relative(torch.ones(2), torch.ones(2, 2), "parr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="baseline must be one of mean, shrunk, got 'mena'"):
        references(torch.ones(2, 2), "contrastive", baseline="mena")  # type: ignore[arg-type]


# Ensembles


def test_aggregates_by_hand() -> None:
    # (1, 0, 5) has mean 2, minimum 0, and deviations -1, -2, 3.
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0], [5.0, 0.0]])
    variance = (1 + 4 + 9) / 3
    expected: dict[Aggregate, list[float]] = {
        "mean": [2.0, 0.0], "worst": [0.0, 0.0], "uncertainty-weighted": [2 - 0.3 * variance, 0.0],
    }  # fmt: skip
    for how, numbers in expected.items():
        assert aggregate(rewards, how, uncertainty_weight=0.3).tolist() == pytest.approx(numbers, abs=1e-6)
    grid = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))
    assert aggregate(grid, "worst").shape == (2, 3)


def test_one_model_is_its_own_ensemble() -> None:
    rewards = torch.tensor([[0.5, -2.0]])
    for how in ("mean", "worst", "uncertainty-weighted"):
        assert torch.equal(aggregate(rewards, how), rewards[0])


def test_aggregates_refuse_what_has_no_meaning() -> None:
    for bad, match in (
        ({"how": "best"}, "how must be"),
        ({"how": "mean", "uncertainty_weight": -1.0}, "uncertainty_weight"),
        ({"how": "mean", "rewards_MB": torch.ones(0, 2)}, "M >= 1"),
    ):
        with pytest.raises(ValueError, match=match):
            aggregate(**({"rewards_MB": torch.ones(2, 2)} | bad))


# Scaling

R, C = torch.tensor([3.0, -1.0]), torch.tensor([0.5, -1.5])


def test_scale_modes_by_hand() -> None:
    # mean |r| = 2, mean |c| = 1, mean r = 1, mean c = -1/2.
    expected: dict[ScaleMode, float] = {"none": 1.0, "abs": 2.0, "signed": -2.0}
    for mode, factor in expected.items():
        scale = RunningScale(mode, warmup=1)
        scale.update(R, C)
        assert scale.factor == factor


def test_scaled_rewards_return_to_the_original_scale() -> None:
    rng = np.random.default_rng(0)
    scale = RunningScale(warmup=1)
    raw = torch.from_numpy(rng.normal(scale=8, size=1000))
    small = torch.from_numpy(rng.normal(scale=0.1, size=1000))
    scale.update(raw, small)
    assert (small * scale.factor).abs().mean().item() == pytest.approx(raw.abs().mean().item(), rel=1e-12)


def test_the_floor_keeps_the_factor_finite() -> None:
    # mean |c| = 0 and mean c = 0: the divisor is the floor, so 2 / 0.5 and 1 / 0.5.
    expected: dict[ScaleMode, float] = {"abs": 4.0, "signed": 2.0}
    for mode, factor in expected.items():
        scale = RunningScale(mode, floor=0.5, warmup=1)
        scale.update(R, torch.zeros(2))
        assert scale.factor == factor
    signed = RunningScale("signed", floor=0.5, warmup=1)
    signed.update(R, torch.tensor([-0.25, 0.0]))
    # The floor keeps the sign: mean c = -1/8 becomes -1/2.
    assert signed.factor == -2.0


def test_the_warmup_counts_examples() -> None:
    scale = RunningScale(warmup=4)
    assert scale.factor == 1.0
    scale.update(R, C)
    assert scale.factor == 1.0
    scale.update(R, C)
    assert scale.factor == 2.0


def test_batches_may_be_split_anywhere() -> None:
    rng = np.random.default_rng(0)
    r, c = torch.from_numpy(rng.normal(size=(2, 40)))
    whole, parts = RunningScale(warmup=1), RunningScale(warmup=1)
    whole.update(r, c)
    for low, high in ((0, 1), (1, 30), (30, 40)):
        parts.update(r[low:high], c[low:high])
    assert parts.factor == pytest.approx(whole.factor, rel=1e-13)


@pytest.mark.parametrize("mode", ["abs", "signed"])
def test_a_restored_scale_continues_bit_for_bit(mode: ScaleMode) -> None:
    rng = np.random.default_rng(3)
    batches = torch.from_numpy(rng.normal(size=(6, 2, 7)))
    straight, first = RunningScale(mode, warmup=1), RunningScale(mode, warmup=1)
    for r, c in batches:
        straight.update(r, c)
    for r, c in batches[:3]:
        first.update(r, c)
    resumed = RunningScale(mode, warmup=1)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for r, c in batches[3:]:
        resumed.update(r, c)
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.factor == straight.factor != 1.0


def test_a_saved_state_stays_as_it_was() -> None:
    scale = RunningScale(warmup=1)
    scale.update(R, C)
    saved = scale.state_dict()
    scale.update(R, C)
    assert (saved["count"], scale.state_dict()["count"]) == (2.0, 4.0)


def test_bad_values_never_reach_the_running_means() -> None:
    scale = RunningScale(warmup=1)
    with pytest.raises(ValueError, match="finite"):
        scale.update(torch.tensor([math.nan]), torch.tensor([1.0]))
    with pytest.raises(ValueError, match="pair up"):
        scale.update(torch.ones(2), torch.ones(1))
    assert scale.state_dict()["count"] == 0
    with pytest.raises(ValueError, match="the state must hold"):
        scale.load_state_dict({"count": 1.0})
    with pytest.raises(ValueError, match="the state must hold"):
        scale.load_state_dict({**scale.state_dict(), "reward": math.nan})
    for bad in ({"mode": "ratio"}, {"floor": 0.0}, {"floor": math.inf}, {"warmup": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RunningScale(**bad)


def test_running_std_by_hand() -> None:
    # (1, 3) then (5, 7): mean 4, squared deviations 9 + 1 + 1 + 9, population variance 5.
    scale = RunningStd(warmup=3)
    scale.update(torch.tensor([1.0, 3.0]))
    assert scale.factor == 1.0, "two examples are fewer than the warm-up's three"
    scale.update(torch.tensor([5.0, 7.0]))
    assert scale.factor == pytest.approx(1 / math.sqrt(5), rel=1e-15)
    assert scale.state_dict() == {"count": 4.0, "mean": 4.0, "squares": 20.0}


def test_running_std_is_that_of_all_rewards_and_keeps_its_digits_far_from_zero() -> None:
    rewards = 1e6 + np.random.default_rng(0).normal(size=600)
    scale = RunningStd(warmup=1)
    for low, high in ((0, 1), (1, 250), (250, 250), (250, 600)):
        scale.update(torch.from_numpy(rewards[low:high]))
    assert 1 / scale.factor == pytest.approx(np.std(rewards), rel=1e-8)


def test_running_std_has_a_floor_and_refuses_what_would_spoil_it() -> None:
    scale = RunningStd(floor=0.25, warmup=1)
    scale.update(torch.ones(3))
    assert scale.factor == 4.0
    with pytest.raises(ValueError, match="finite"):
        scale.update(torch.tensor([1.0, math.inf]))
    assert scale.state_dict()["count"] == 3
    for state in ({"count": 1.0}, {**scale.state_dict(), "mean": math.nan}):
        with pytest.raises(ValueError, match="the state must hold"):
            scale.load_state_dict(state)
    for bad in ({"floor": 0.0}, {"warmup": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RunningStd(**bad)


def test_a_restored_running_std_continues_bit_for_bit() -> None:
    batches = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 7)))
    straight, first, resumed = (RunningStd(warmup=1) for _ in range(3))
    for batch in batches:
        straight.update(batch)
    for batch in batches[:3]:
        first.update(batch)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for batch in batches[3:]:
        resumed.update(batch)
    assert resumed.state_dict() == straight.state_dict()
    assert resumed.factor == straight.factor != 1.0


# Shaping


def test_clip_by_hand() -> None:
    got = clip(torch.tensor([-3.0, -0.5, 0.8, 3.0, math.nan]), 0.8)
    assert_close(got, torch.tensor([-0.8, -0.5, 0.8, 0.8, math.nan]), equal_nan=True)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="> 0"):
            clip(torch.ones(1), limit)


def test_missing_eos_by_hand() -> None:
    got = missing_eos(torch.tensor([1.0, 1.0]), torch.tensor([True, False]), penalty=3.0)
    assert got.tolist() == [1.0, -2.0]
    with pytest.raises(ValueError, match=">= 0"):
        missing_eos(torch.ones(1), torch.ones(1, dtype=torch.bool), penalty=-1.0)


def test_the_kl_weight_is_steered_by_hand() -> None:
    steered = KLController(0.2, target=6.0, horizon=1000)
    steered.update(6.6, 100)  # a tenth too far: + 0.1 * 100 / 1000
    assert steered.coef == pytest.approx(0.2 * 1.01)
    steered.update(600.0, 100)  # the error counts 0.2 at most
    assert steered.coef == pytest.approx(0.2 * 1.01 * 1.02)
    steered.update(-3.0, 100)
    assert steered.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)
    again = KLController(0.2, target=6.0, horizon=1000)
    again.load_state_dict(steered.state_dict())
    assert again.coef == steered.coef
    fixed = KLController(0.2)
    fixed.update(600.0, 100)
    assert fixed.coef == 0.2
    for wrong in ({"target": 0.0}, {"target": 1.0, "horizon": 0}):
        with pytest.raises(ValueError, match="must be > 0"):
            KLController(0.2, **wrong)
    with pytest.raises(ValueError, match="must be > 0"):
        KLController(0.0, target=1.0)
    with pytest.raises(ValueError, match="must hold finite"):
        again.load_state_dict({"coef": float("nan")})


def test_token_rewards_by_hand() -> None:
    # kl_coef 1/2; row 0 has three real tokens and score 10, row 1 one real token and score -4.
    kl = torch.tensor([[2.0, 0.0, -2.0], [4.0, math.nan, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    got = token_rewards(torch.tensor([10.0, -4.0]), kl, mask, kl_coef=0.5)
    assert got.tolist() == [[-1.0, 0.0, 11.0], [-6.0, 0.0, 0.0]]


def test_token_rewards_add_up_to_the_penalised_score() -> None:
    # Eq. 3: the sum over tokens is r - kl_coef * KL, wherever the response ends and however wide the batch is.
    rng = np.random.default_rng(0)
    lengths = [1, 4, 7]
    kl, scores = rng.normal(size=(3, 7)), rng.normal(size=3)
    mask = np.arange(7) < np.array(lengths)[:, None]
    got = token_rewards(torch.from_numpy(scores), torch.from_numpy(kl), torch.from_numpy(mask), kl_coef=0.1)
    wide = token_rewards(
        torch.from_numpy(scores),
        torch.from_numpy(np.pad(kl, ((0, 0), (0, 5)), constant_values=9.0)),
        torch.from_numpy(np.pad(mask, ((0, 0), (0, 5)))),
        kl_coef=0.1,
    )
    for b, n in enumerate(lengths):
        expected = scores[b] - 0.1 * sum(kl[b, t] for t in range(n))
        assert got[b].sum().item() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(wide[:, :7], got)
    assert (wide[:, 7:] == 0).all()


def test_an_empty_response_would_lose_its_score() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    with pytest.raises(ValueError, match=r"none in rows \[1\]"):
        token_rewards(torch.ones(2), torch.zeros(2, 2), mask, kl_coef=0.1)
    with pytest.raises(ValueError, match="must be"):
        token_rewards(torch.ones(3), torch.zeros(2, 2), mask, kl_coef=0.1)
