"""Log-probabilities of the distribution that was sampled from, by enumeration and against plain float64 code."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from conftest import Folders
from steelyard.data.collate import TreeBatch, collate
from steelyard.data.encode import Tree
from steelyard.models.next_token import Drawing, Nucleus, entropies, log_probability
from steelyard.models.policy import PolicyModel
from steelyard.sampling import SamplingConfig, sample

V, END, PAD = 6, 3, 0
PROMPTS = [(4, 5, 1), (2, 2, 1, 5, 0)]
SETTINGS: dict[str, dict[str, float]] = {
    "temperature": {"temperature": 0.7},
    "penalty": {"repetition_penalty": 1.6},
    "nucleus": {"top_p": 0.9},
    "all": {"temperature": 0.8, "repetition_penalty": 1.4, "top_p": 0.8},
}


@pytest.fixture
def small(one_thread: None) -> PolicyModel:
    """Six tokens, so that every sequence of two can be enumerated."""
    config = tiny.build_config(vocabulary=V, hidden_size=16, intermediate_size=16, initializer_range=0.25)
    model = tiny.build_model(config, seed=2)
    # torch's embedding takes no gradient at its padding index, which is a word like any other here.
    model.get_input_embeddings().padding_idx = None
    return PolicyModel(model)


def every_response() -> tuple[tuple[int, ...], ...]:
    return ((END,), *((a, b) for a, b in itertools.product(range(V), repeat=2) if a != END))


def reference(
    logits: np.ndarray, said: set[int], *, temperature: float = 1, top_p: float = 1, repetition_penalty: float = 1
) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities that are drawn from, the same before the nucleus is cut out), one row, in float64."""
    z = [float(x) for x in logits]
    for i in said:
        z[i] = z[i] / repetition_penalty if z[i] > 0 else z[i] * repetition_penalty
    weights = np.exp((np.array(z) - max(z)) / temperature)
    full = weights / weights.sum()
    kept, mass = [], 0.0
    for i in sorted(range(len(full)), key=lambda i: -full[i]):
        if mass >= top_p:
            break
        kept.append(i)
        mass += full[i]
    cut = np.array([full[i] / mass if i in kept else 0.0 for i in range(len(full))])
    return cut, full


def step(model: PolicyModel, ids: tuple[int, ...], **settings: float) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
    return reference(logits, set(ids), **settings)


def probability(model: PolicyModel, prompt: tuple[int, ...], response: tuple[int, ...], **settings: float) -> float:
    return math.prod(step(model, prompt + response[:t], **settings)[0][x] for t, x in enumerate(response))


def trees_of(model: PolicyModel, **settings: float) -> TreeBatch:
    """All responses that can be drawn, as many to each prompt."""
    possible = [[r for r in every_response() if probability(model, p, r, **settings) > 0] for p in PROMPTS]
    n = min(map(len, possible))
    return collate([Tree(p, tuple(r[:n])) for p, r in zip(PROMPTS, possible, strict=True)], PAD)


@pytest.mark.parametrize("name", SETTINGS)
def test_log_probabilities_are_those_that_are_drawn_from(name: str, small: PolicyModel) -> None:
    settings = SETTINGS[name]
    batch = trees_of(small, **settings)
    with torch.no_grad():
        found = small(batch, **settings)
    B, K, _ = batch.mask_BKR.shape
    assert K >= 5
    for b, k in itertools.product(range(B), range(K)):
        response = batch.response_BKR[b, k][batch.mask_BKR[b, k]].tolist()
        for t, token in enumerate(response):
            before = (*PROMPTS[b], *response[:t])
            cut, full = step(small, before, **settings)
            plain = step(small, before)[1]
            assert found.sampled_BKR[b, k, t].item() == pytest.approx(math.log(cut[token]), abs=1e-4)
            assert found.full_BKR[b, k, t].item() == pytest.approx(math.log(full[token]), abs=1e-4)
            assert found.plain_BKR[b, k, t].item() == pytest.approx(math.log(plain[token]), abs=1e-4)
            entropy = -sum(p * math.log(p) for p in cut if p > 0)
            assert found.entropy_BKR[b, k, t].item() == pytest.approx(entropy, abs=1e-4)
    assert (found.kept is None) == ("top_p" not in settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_policy_gradient_is_that_of_the_expected_reward(name: str, small: PolicyModel) -> None:
    """sum_y mu(y) r(y) grad log mu(y), with the nucleus as sampled, against finite differences of sum_y mu(y) r(y)
    in which every nucleus is chosen anew."""
    settings, prompt = SETTINGS[name], PROMPTS[0]
    rng = np.random.default_rng(3)
    worth = {r: float(rng.normal()) for r in every_response()}

    responses = tuple(r for r in worth if probability(small, prompt, r, **settings) > 0)
    batch, how = collate([Tree(prompt, responses)], PAD), Drawing(**settings)
    with torch.no_grad():
        old = small(batch, **settings)
    now = small.sampled(small.states(batch), batch, how, old.kept)
    torch.testing.assert_close(now, old.sampled_BKR)
    weight = torch.tensor([worth[r] for r in responses]) * old.sampled_BKR[0].sum(-1).exp()
    (weight * now[0].sum(-1)).sum().backward()

    generator, exact = torch.Generator().manual_seed(1), copy.deepcopy(small).double()
    directions = [torch.randn(p.shape, generator=generator) for p in small.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(small.parameters(), directions, strict=True))
    size, values = 3e-5, []  # Llama's norm computes in float32: smaller steps drown in rounding
    for shift in (size, -2 * size):
        with torch.no_grad():
            for p, d in zip(exact.parameters(), directions, strict=True):
                p.add_(d, alpha=shift)
        values.append(sum(probability(exact, prompt, r, **settings) * worth[r] for r in worth))
    assert abs(slope) > 0.05
    assert (values[0] - values[1]) / (2 * size) == pytest.approx(slope, rel=5e-3)


def test_an_update_keeps_the_nucleus_of_the_time_of_sampling(small: PolicyModel) -> None:
    """After a large move tokens drawn lie outside the new nucleus; over the old one the ratio stays finite, and the
    probabilities of what could be drawn still sum to 1."""
    settings, prompt = SETTINGS["nucleus"], PROMPTS[0]
    kept = [v for v, p in enumerate(step(small, prompt, **settings)[0]) if p > 0]
    batch = collate([Tree(prompt, tuple((v,) for v in kept))], PAD)
    with torch.no_grad():
        old = small(batch, **settings)
        generator = torch.Generator().manual_seed(5)
        for p in small.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
        moved = step(small, prompt, **settings)[0]
        assert any(moved[v] == 0 for v in kept)
        now = small.sampled(small.states(batch), batch, Drawing(**settings), old.kept)
    assert now.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.isfinite(now).all()
    with pytest.raises(ValueError, match="must be given"):
        small.sampled(small.states(batch), batch, Drawing(**settings))
    with pytest.raises(ValueError, match="where a gradient is taken"):
        small(batch, **settings)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_sampler_draws_can_always_be_drawn(name: str, language_model: Folders) -> None:
    """The sampler reads with a cache, the update in trees: nothing it draws may be impossible there."""
    model = PolicyModel.load(language_model("llama"))
    config = SamplingConfig.model_validate(SETTINGS[name] | {"max_new_tokens": 12})
    prompts = [(5, 6, 7), (8, 9, 10, 11, 8, 9), (12,)]
    drawn = sample(model, prompts, list("abc"), k=6, config=config, end_id=tiny.EOS, pad_id=tiny.PAD, seed=3)
    batch = collate([Tree(p, tuple(s.tokens for s in g)) for p, g in zip(prompts, drawn, strict=True)], tiny.PAD)
    with torch.no_grad():
        found = model(batch, **SETTINGS[name])
        again = model.sampled(model.states(batch), batch, Drawing(**SETTINGS[name]), found.kept)
    assert torch.isfinite(found.sampled_BKR).all()
    assert torch.equal(found.sampled_BKR, again)
    assert (found.sampled_BKR >= found.full_BKR - 1e-5).all(), "cutting others out makes what is left likelier"
    if found.kept is not None:
        assert len(found.kept.counts_n) == int(batch.mask_BKR.sum())
        # Without the token drawn being put in, the nucleus already holds it.
        allowed = found.kept.split([1] * len(found.kept.counts_n))
        for before, tokens in (
            (p + s.tokens[:t], s.tokens[t:]) for p, s in [(prompts[0], drawn[0][0])] for t in (0, 1)
        ):
            cut, _ = step(model, before, **SETTINGS[name])
            assert cut[tokens[0]] > 0
            row = len(before) - len(prompts[0])
            assert sorted(allowed[row].tokens_L.tolist()) == [v for v in range(len(cut)) if cut[v] > 0]


def grads(model: PolicyModel) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["temperature", "all"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_reading_logits_in_chunks_changes_nothing(name: str, chunk: int, language_model: Folders) -> None:
    settings = SETTINGS[name]
    trees = [Tree((5, 6, 7), ((8, 9, 10, 3), (11, 8))), Tree((12, 5), ((6, 6, 6, 6, 6), (7,)))]
    batch = collate(trees, tiny.PAD)
    whole = PolicyModel.load(language_model("llama"))
    pieces = PolicyModel.load(language_model("llama"), logit_chunk=chunk)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(batch.mask_BKR.shape, generator=generator)
    kept = None
    results: list[Any] = []
    for model in (whole, pieces):
        with torch.no_grad():
            found = model(batch, **settings)
        kept = kept or found.kept
        if kept is not None:
            assert torch.equal(kept.tokens_L, found.kept.tokens_L)
        now = model.sampled(model.states(batch), batch, Drawing(**settings), kept)
        (now * weight).sum().backward()
        results.append((found[:4], now.detach()))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads(whole), grads(pieces), rtol=1e-4, atol=1e-5)


def test_chunks_hold_fewer_logits_at_once(language_model: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PolicyModel.load(language_model("llama"), logit_chunk=4)
    rows: list[int] = []
    model.hf.get_output_embeddings().register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    batch = collate([Tree((5, 6), ((7,) * 9,))], tiny.PAD)
    model.sampled(model.states(batch), batch, Drawing()).sum().backward()
    assert rows == [4, 4, 1, 1, 4, 4], "once forward; again, piece by piece, as the gradient comes by"


def test_one_log_probability_and_its_gradient_are_torchs() -> None:
    z = torch.randn(5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([0, 8, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda x: log_probability(x, tokens), (z,))
    torch.testing.assert_close(log_probability(z, tokens), torch.log_softmax(z, -1)[torch.arange(5), tokens])
    torch.testing.assert_close(entropies(z), torch.distributions.Categorical(logits=z).entropy())


def test_within_a_nucleus_they_are_those_of_a_softmax_over_it() -> None:
    z = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    kept = [[8, 0, 3], [5], [1, 2, 3, 4, 6], [7, 0]]
    nuclei = Nucleus(
        torch.tensor([v for row in kept for v in row], dtype=torch.int32), torch.tensor([len(x) for x in kept])
    )
    tokens = torch.tensor([3, 5, 1, 0])
    assert torch.autograd.gradcheck(lambda x: log_probability(x, tokens, nuclei), (z,))
    hidden = torch.ones(4, 9, dtype=torch.bool)
    for row, columns in enumerate(kept):
        hidden[row, columns] = False
    every = torch.log_softmax(z.masked_fill(hidden, -torch.inf), -1)
    torch.testing.assert_close(log_probability(z, tokens, nuclei), every[torch.arange(4), tokens])
    theirs = [
        torch.distributions.Categorical(logits=row[columns]).entropy() for row, columns in zip(z, kept, strict=True)
    ]
    torch.testing.assert_close(entropies(z, nuclei), torch.stack(theirs))


def test_nuclei_can_be_taken_apart_and_joined() -> None:
    whole = Nucleus(torch.tensor([4, 1, 0, 2, 2], dtype=torch.int32), torch.tensor([2, 1, 2]))
    parts = whole.split([1, 2])
    assert [p.tokens_L.tolist() for p in parts] == [[4, 1], [0, 2, 2]]
    assert [p.counts_n.tolist() for p in parts] == [[2], [1, 2]]
    again = Nucleus.join(parts)
    assert again.tokens_L.tolist() == [4, 1, 0, 2, 2]
    values, rows, columns = whole.of(torch.arange(15).view(3, 5))
    assert (values.tolist(), rows.tolist()) == ([4, 1, 5, 12, 12], [0, 0, 1, 2, 2])
    assert columns.tolist() == [4, 1, 0, 2, 2]
