"""Advantages: hand-derived numbers, a loop over explicit discounted sums, invariances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from steelyard.advantages import gae, group_mean, leave_one_out, over_greedy, per_token, whiten


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_gae_by_hand() -> None:
    # gamma = lam = 1/2, r = (0, 0, 1), V = (1, 2, 4), nothing after the end:
    # delta = (0 + 1 - 1, 0 + 2 - 2, 1 + 0 - 4) = (0, 0, -3), A_2 = -3, A_1 = -3/4, A_0 = -3/16.
    rewards, values = torch.tensor([[0.0, 0, 1]]), torch.tensor([[1.0, 2, 4]])
    advantages, returns = gae(rewards, values, ones(1, 3), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[-3 / 16, -3 / 4, -3]]
    assert returns.tolist() == [[1 - 3 / 16, 2 - 3 / 4, 1]]


def test_gae_against_explicit_sums() -> None:
    rng = np.random.default_rng(0)
    lengths, width, gamma, lam = [5, 1, 8, 0], 8, 0.9, 0.95
    rewards, values = rng.normal(size=(2, 4, width))
    mask = np.arange(width) < np.array(lengths)[:, None]
    got, returns = gae(
        torch.from_numpy(rewards), torch.from_numpy(values), torch.from_numpy(mask), gamma=gamma, lam=lam
    )
    for b, n in enumerate(lengths):
        for t in range(width):
            expected = 0.0
            # sum_l (gamma lam)^l delta_{t+l}, every delta from scratch.
            for s in range(t, n):
                after = values[b, s + 1] if s + 1 < n else 0.0
                expected += (gamma * lam) ** (s - t) * (rewards[b, s] + gamma * after - values[b, s])
            assert got[b, t].item() == pytest.approx(expected, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(expected + values[b, t] if t < n else 0, abs=1e-5)


def test_undiscounted_returns_are_the_rewards_to_come() -> None:
    # gamma = lam = 1: R_t = sum of rewards from t on, whatever the values say.
    rewards, values = torch.tensor([[1.0, 2, 4]]), torch.tensor([[9.0, -9, 5]])
    assert gae(rewards, values, ones(1, 3), gamma=1, lam=1)[1].tolist() == [[7, 6, 4]]


def test_gae_does_not_see_padding_nor_other_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([[2], [6], [4]])
    clean = gae(rewards, values, mask, gamma=0.9, lam=0.9)
    dirty = gae(rewards.masked_fill(~mask, torch.nan), values.masked_fill(~mask, 1e9), mask, gamma=0.9, lam=0.9)
    for one, other in zip(clean, dirty, strict=True):
        assert torch.equal(one, other)
        assert (one[~mask] == 0).all()
    alone = gae(rewards[:1, :2], values[:1, :2], mask[:1, :2], gamma=0.9, lam=0.9)
    assert torch.equal(alone[0], clean[0][:1, :2])


def test_advantages_are_constants() -> None:
    values = torch.zeros(1, 3, requires_grad=True)
    advantages, returns = gae(torch.ones(1, 3), values, ones(1, 3), gamma=1, lam=1)
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_gae_refuses_left_padding_and_other_shapes() -> None:
    with pytest.raises(ValueError, match="right-padded"):
        gae(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[False, True]]), gamma=1, lam=1)
    with pytest.raises(ValueError, match="one shape"):
        gae(torch.ones(1, 2), torch.ones(1, 3), ones(1, 2), gamma=1, lam=1)


def test_whiten_by_hand_and_does_not_add_the_mean_back() -> None:
    # (1, 3) has mean 2 and std 1; 99 is padding. With the mean added back it would be (1, 3).
    got = whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    assert_close(got, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_whiten_removes_shift_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 9, generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [1], [4], [7]])
    got = whiten(x, mask)
    assert got[mask].mean().abs() < 1e-6
    assert got[mask].square().mean().item() == pytest.approx(1, abs=1e-5)
    assert_close(whiten(5 * x + 3, mask), got, atol=1e-5, rtol=1e-5)
    assert torch.equal(whiten(x.masked_fill(~mask, torch.nan), mask), got)


def test_equal_values_whiten_to_nothing() -> None:
    # 0.1 is not exact in binary: its mean is off by a rounding error, which must not become 1.
    got = whiten(torch.full((7, 11), 0.1), ones(7, 11))
    assert got.abs().max() < 1e-3


def test_whiten_refuses_an_empty_mask() -> None:
    with pytest.raises(ValueError, match="at least one real token"):
        whiten(torch.ones(2, 2), ~ones(2, 2))


def test_leave_one_out_by_hand() -> None:
    # 6 - (0 + 3)/2, 0 - (6 + 3)/2, 3 - (6 + 0)/2.
    assert_close(leave_one_out(torch.tensor([[6.0, 0, 3]])), torch.tensor([[4.5, -4.5, 0]]))


def test_leave_one_out_against_a_loop() -> None:
    rewards = np.random.default_rng(0).normal(size=(5, 4))
    got = leave_one_out(torch.from_numpy(rewards))
    for b in range(5):
        for k in range(4):
            others = [rewards[b, j] for j in range(4) if j != k]
            assert got[b, k].item() == pytest.approx(rewards[b, k] - sum(others) / 3, abs=1e-6)


def test_group_mean_by_hand() -> None:
    # mean 2, deviations (2, -2, 0, 0), population variance (4 + 4) / 4 = 2.
    rewards = torch.tensor([[4.0, 0, 2, 2], [0.3, 0.3, 0.3, 0.3]])
    assert_close(group_mean(rewards, normalise=False), torch.tensor([[2.0, -2, 0, 0], [0, 0, 0, 0]]))
    root = 2**0.5
    assert_close(
        group_mean(rewards, normalise=True),
        torch.tensor([[root, -root, 0, 0], [0, 0, 0, 0]]),
        atol=1e-3,
        rtol=1e-6,
    )


@pytest.mark.parametrize("shift", [-3.0, 10.0])
def test_a_prompts_own_offset_cancels(shift: float) -> None:
    rewards = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    moved = rewards + torch.tensor([[0.0], [shift], [2 * shift]])
    assert_close(leave_one_out(moved), leave_one_out(rewards), atol=1e-5, rtol=1e-5)
    assert_close(group_mean(moved, normalise=True), group_mean(rewards, normalise=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1), (6,), (2, 2, 2)])
def test_rewards_are_groups_of_two_responses_or_more(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.ones(shape))
    with pytest.raises(ValueError, match="at least 2"):
        group_mean(torch.ones(shape), normalise=True)


def test_over_greedy_by_hand() -> None:
    got = over_greedy(torch.tensor([[4.0, 1.0], [0.0, -2.0]]), torch.tensor([3.0, -2.0]))
    assert got.tolist() == [[1.0, -2.0], [2.0, 0.0]]
    for greedy in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(ValueError, match="greedy rewards must be"):
            over_greedy(torch.ones(2, 2), greedy)


def test_every_token_carries_its_responses_advantage() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert per_token(torch.tensor([2.0, -1.0]), mask).tolist() == [[2.0, 2.0, 0.0], [-1.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match="must be"):
        per_token(torch.ones(3), mask)
