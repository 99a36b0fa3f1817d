"""Losses: hand-derived numbers, float64 loops, invariances, gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from steelyard.losses import (
    accuracy,
    bradley_terry,
    clipped_surrogate,
    dpo,
    entropy,
    implicit_reward,
    kl_k1,
    kl_k3,
    masked_mean,
    value_loss,
)

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def t(*values: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def random_pairs(n: int = 64) -> tuple[torch.Tensor, ...]:
    rng = np.random.default_rng(0)
    chosen, rejected, margin = torch.from_numpy(rng.normal(scale=2, size=(3, n)))
    return chosen, rejected, margin, torch.from_numpy(rng.uniform(size=n))


# DPO


def test_dpo_by_hand() -> None:
    # Log-ratios 4 ln 3 and 2 ln 3, beta 1/2: d = ln 3, sigmoid(d) = 3/4. Log-ratios that agree: d = 0.
    loss = dpo(t(4 * LN3 - 9, -5), t(2 * LN3 - 7, -8), t(-9, -6), t(-7, -9), beta=0.5)
    assert_close(loss, t(math.log(4 / 3), LN2))
    # a = 1/4 on the first; a margin of ln 3 takes all of its difference.
    soft = dpo(t(4 * LN3 - 9), t(2 * LN3 - 7), t(-9), t(-7), beta=0.5, flip_prob=t(0.25))
    assert_close(soft, t(0.75 * math.log(4 / 3) + 0.25 * LN4))
    assert_close(dpo(t(4 * LN3 - 9), t(2 * LN3 - 7), t(-9), t(-7), beta=0.5, margin=t(LN3)), t(LN2))
    assert_close(implicit_reward(t(-3, -1), t(-5, -1), beta=0.25), t(0.5, 0))


def test_dpo_gradient_weighs_by_how_wrong_the_implied_reward_is() -> None:
    """-beta sigmoid(-d) on the chosen response, its negative on the rejected one."""
    chosen, rejected, reference_chosen, reference_rejected = (x.requires_grad_() for x in (t(-3), t(-4), t(-5), t(-4)))
    dpo(chosen, rejected, reference_chosen, reference_rejected, beta=LN3 / 2).sum().backward()
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert_close(chosen.grad, t(-LN3 / 2 / 4))  # d = ln 3: sigmoid(-d) = 1/4
    assert_close(rejected.grad, t(LN3 / 2 / 4))


def test_dpo_of_a_certain_flip_is_that_of_the_swapped_pair() -> None:
    chosen, rejected, margin, _ = random_pairs()
    zero, one = torch.zeros_like(margin), torch.ones_like(margin)
    a = dpo(chosen, rejected, zero, zero + 1, beta=0.3, margin=margin, flip_prob=one)
    assert_close(a, dpo(rejected, chosen, zero + 1, zero, beta=0.3, margin=-margin))
    assert_close(a, dpo(chosen + 7, rejected + 7, zero, zero + 1, beta=0.3, margin=margin, flip_prob=one))


def test_dpo_refuses_shapes_that_would_broadcast() -> None:
    with pytest.raises(ValueError, match=r"reference_rejected \(2, 1\)"):
        dpo(t(1, 2), t(1, 2), t(1, 2), t(1, 2)[:, None], beta=0.1)


# Bradley-Terry


def test_bradley_terry_by_hand() -> None:
    # d = 0: -log 1/2. d = ln 3: sigmoid = 3/4. d = -ln 3: sigmoid = 1/4.
    loss = bradley_terry(t(1, LN3, 0), t(1, 0, LN3))
    assert_close(loss, t(LN2, math.log(4 / 3), LN4))


def test_margin_by_hand() -> None:
    # d - m = 0 for m = d, and d - m = ln 3 for m = d - ln 3.
    loss = bradley_terry(t(5, 5), t(3, 3), margin=t(2, 2 - LN3))
    assert_close(loss, t(LN2, math.log(4 / 3)))


def test_smoothing_by_hand() -> None:
    # d = ln 3, a = 1/4: 3/4 log(4/3) + 1/4 log 4.
    loss = bradley_terry(t(LN3), t(0), flip_prob=t(0.25))
    assert_close(loss, t(0.75 * math.log(4 / 3) + 0.25 * LN4))


def test_margin_in_both_terms_or_one_by_hand() -> None:
    # d = 2 ln 3, m = ln 3, a = 1/4: the shifted difference is ln 3, the plain one 2 ln 3 with sigmoid(-d) = 1/10.
    m, a = t(LN3), t(0.25)
    both = bradley_terry(t(2 * LN3), t(0), margin=m, flip_prob=a)
    first = bradley_terry(t(2 * LN3), t(0), margin=m, flip_prob=a, margin_in_flip=False)
    assert_close(both, t(0.75 * math.log(4 / 3) + 0.25 * LN4))
    assert_close(first, t(0.75 * math.log(4 / 3) + 0.25 * math.log(10)))


@pytest.mark.parametrize("margin_in_flip", [True, False])
def test_bradley_terry_against_a_loop_over_probabilities(margin_in_flip: bool) -> None:
    chosen, rejected, margin, a = random_pairs()
    got = bradley_terry(chosen, rejected, margin=margin, flip_prob=a, margin_in_flip=margin_in_flip)
    for i in range(len(got)):
        # Odds form: exp(r_c) against exp(r_r + m), and for the flipped label the other way round.
        up, down = math.exp(chosen[i]), math.exp(rejected[i])
        raised = down * math.exp(margin[i])
        label, flipped = up / (up + raised), (raised if margin_in_flip else down)
        expected = -(1 - a[i]) * math.log(label) - a[i] * math.log(flipped / (up + flipped))
        assert got[i].item() == pytest.approx(float(expected), rel=1e-12)


def test_swapping_the_responses_turns_flip_prob_and_margin_round() -> None:
    chosen, rejected, margin, a = random_pairs()
    assert_close(bradley_terry(chosen, rejected, flip_prob=a), bradley_terry(rejected, chosen, flip_prob=1 - a))
    assert_close(
        bradley_terry(chosen, rejected, margin=margin, flip_prob=a),
        bradley_terry(rejected, chosen, margin=-margin, flip_prob=1 - a),
    )


def test_a_certain_soft_label_is_a_flip_with_the_margin_of_the_new_label() -> None:
    # Soft + margin with m = mu = -2 at a = 1 against flip + margin with m = |mu| = 2.
    soft = bradley_terry(t(0.3), t(1.1), margin=t(-2), flip_prob=t(1))
    assert_close(soft, bradley_terry(t(1.1), t(0.3), margin=t(2)))


def test_the_optimum_is_the_margin_plus_the_log_odds() -> None:
    # d* = m + log((1 - a) / a) = -1 + ln(1/3) for a = 3/4: there the slope is 0, one step away it is not.
    d = t(-1 - LN3, -1 - LN3 + 0.1, -1 - LN3 - 0.1).requires_grad_()
    loss = bradley_terry(d, torch.zeros_like(d), margin=t(-1, -1, -1), flip_prob=t(0.75, 0.75, 0.75))
    (slope,) = torch.autograd.grad(loss.sum(), d)
    assert slope[0].abs() < 1e-12
    assert slope[1] > 1e-3
    assert slope[2] < -1e-3


def test_only_the_difference_matters_and_pairs_do_not_see_each_other() -> None:
    chosen, rejected, margin, a = random_pairs()
    whole = bradley_terry(chosen, rejected, margin=margin, flip_prob=a)
    assert_close(whole, bradley_terry(chosen + 7, rejected + 7, margin=margin, flip_prob=a))
    parts = [
        bradley_terry(chosen[s], rejected[s], margin=margin[s], flip_prob=a[s]) for s in (slice(5), slice(5, None))
    ]
    assert_close(whole, torch.cat(parts), rtol=0, atol=0)


def test_badly_wrong_pairs_keep_their_gradient() -> None:
    # d = -200: loss 200, slope -1. log(sigmoid(d) + eps) would give a slope of 0 here.
    for dtype in (torch.float32, torch.float64):
        chosen = torch.tensor([-200.0], dtype=dtype, requires_grad=True)
        loss = bradley_terry(chosen, torch.zeros(1, dtype=dtype), flip_prob=torch.zeros(1, dtype=dtype))
        loss.sum().backward()
        assert loss.item() == pytest.approx(200)
        assert chosen.grad is not None
        assert chosen.grad.item() == -1.0


def test_gradient_matches_finite_differences() -> None:
    chosen, rejected, margin, a = (x[:6] for x in random_pairs())
    chosen.requires_grad_()
    assert torch.autograd.gradcheck(lambda c: bradley_terry(c, rejected, margin=margin, flip_prob=a), (chosen,))


def test_half_precision_is_computed_in_float32() -> None:
    # 256 - 0.5 = 255.5 needs 9 significant bits; bfloat16 has 8 and would give a loss of 256.
    loss = bradley_terry(t(0.5, dtype=torch.bfloat16), t(256.0, dtype=torch.bfloat16))
    assert loss.dtype == torch.float32
    assert loss.item() == 255.5
    assert bradley_terry(t(1.0), t(2.0)).dtype == torch.float64


def test_silent_broadcasting_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chosen \(3,\), rejected \(3, 1\)"):
        bradley_terry(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"margin \(1,\)"):
        bradley_terry(torch.zeros(3), torch.zeros(3), margin=torch.zeros(1))


def test_accuracy_counts_a_tie_half_and_does_not_hide_nan() -> None:
    got = accuracy(t(2, 1, 1, math.nan), t(1, 2, 1, 0))
    assert got[:3].tolist() == [1.0, 0.0, 0.5]
    assert got[3].isnan()


# PPO


def test_clipped_surrogate_by_hand() -> None:
    # ratio 3/2, clip 0.2. A = 1: max(-1.5, -1.2), clipped. A = -1: max(1.5, 1.2), not. ratio 1/2 the other way round.
    new, old = t(math.log(1.5), math.log(1.5), -LN2, -LN2, 0), t(0, 0, 0, 0, 0)
    loss, clipped = clipped_surrogate(new, old, t(1, -1, 1, -1, 3), clip=0.2)
    assert_close(loss, t(-1.2, 1.5, -0.5, 0.8, -3))
    assert clipped.tolist() == [True, False, False, True, False]


def test_clipped_tokens_have_no_gradient_and_the_others_that_of_the_ratio() -> None:
    new = t(math.log(1.5), math.log(1.5), 0.0).requires_grad_()
    loss, clipped = clipped_surrogate(new, torch.zeros(3, dtype=torch.float64), t(1, -1, 2), clip=0.2)
    loss.sum().backward()
    # d(-A e^x)/dx = -A ratio: 0 where clipped, 1.5 for A = -1, -2 for A = 2 at ratio 1.
    assert new.grad is not None
    assert_close(new.grad, t(0, 1.5, -2))
    assert clipped.tolist() == [True, False, False]


def test_value_loss_by_hand() -> None:
    # V_old 0, R = 1, clip 0.2. V = 0.5: bounded to 0.2, 1/2 max(0.25, 0.64). V = 0.1: inside, 1/2 0.81.
    # V = -2: bounded to -0.2, 1/2 max(9, 1.44).
    values, old, returns = t(0.5, 0.1, -2), t(0, 0, 0), t(1, 1, 1)
    assert_close(value_loss(values, old, returns, clip=0.2), t(0.32, 0.405, 4.5))
    assert_close(value_loss(values, old, returns, clip=math.inf), t(0.125, 0.405, 4.5))


def test_entropy_by_hand() -> None:
    # Uniform over 4: ln 4. Two of four tokens cut off by sampling: ln 2. p = (3/4, 1/4): 3/4 ln 4/3 + 1/4 ln 4.
    cut = torch.tensor([[0.0, 0, 0, 0], [0, 0, -math.inf, -math.inf], [LN3, 0, -math.inf, -math.inf]]).double()
    cut.requires_grad_()
    got = entropy(cut)
    assert_close(got, t(LN4, LN2, 0.75 * math.log(4 / 3) + 0.25 * LN4))
    got.sum().backward()
    assert cut.grad is not None
    assert cut.grad.isfinite().all()
    # dH/dz_v = -p_v (log p_v + H). For p = (3/4, 1/4) at v = 0: -3/4 (ln 3/4 + H).
    assert cut.grad[2, 0].item() == pytest.approx(-0.75 * (math.log(0.75) + got[2].item()))


def test_kl_estimates_by_hand_and_in_expectation() -> None:
    # log p - log q = ln 2: k1 = ln 2, k3 = 1/2 - 1 + ln 2.
    assert_close(kl_k1(t(LN2), t(0)), t(LN2))
    assert_close(kl_k3(t(LN2), t(0)), t(LN2 - 0.5))
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    exact = sum(p[v] * math.log(p[v] / q[v]) for v in range(3))
    log_p, log_q = torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q))
    for estimate in (kl_k1, kl_k3):
        assert (torch.from_numpy(p) * estimate(log_p, log_q)).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (kl_k3(log_p, log_q) >= 0).all()


def test_masked_mean_counts_tokens_and_ignores_padding() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0], [10.0, math.nan, math.inf]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    # (1 + 2 + 3 + 10) / 4, not the mean of the row means (2 + 10) / 2.
    assert masked_mean(x, mask).item() == 4.0
    assert masked_mean(x > 2, mask).item() == 0.5
    assert masked_mean(x, torch.zeros_like(mask)).isnan()
