"""What is drawn has the distribution that the model and the settings define, whatever it is drawn together with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

import tiny
from conftest import Folders
from steelyard.models.policy import PolicyModel
from steelyard.sampling import Sample, SamplingConfig, draw, sample

V, END, PAD = 6, 3, 0


@pytest.fixture(scope="module")
def small() -> PolicyModel:
    """Six tokens, so that every sequence of two can be enumerated."""
    config = tiny.build_config(vocabulary=V, hidden_size=16, intermediate_size=16, initializer_range=0.25)
    return PolicyModel(tiny.build_model(config, seed=2))


def reference_probabilities(
    logits: np.ndarray, seen: set[int], *, temperature: float, top_p: float, repetition_penalty: float
) -> np.ndarray:
    """One row, in plain Python and float64: penalty, temperature, softmax, nucleus, renormalise."""
    values = [float(x) for x in logits]
    for i in seen:
        values[i] = values[i] / repetition_penalty if values[i] > 0 else values[i] * repetition_penalty
    weights = [np.exp((x - max(values)) / temperature) for x in values]
    share = [w / sum(weights) for w in weights]
    kept, mass = [], 0.0
    for i in sorted(range(len(share)), key=lambda i: -share[i]):
        if mass >= top_p:
            break
        kept.append(i)
        mass += share[i]
    return np.array([share[i] / mass if i in kept else 0.0 for i in range(len(share))])


def enumerate_sequences(model: PolicyModel, prompt: tuple[int, ...], **settings: float) -> dict[tuple[int, ...], float]:
    """Exact probabilities of all responses of at most two tokens, by plain forward passes of single sequences."""

    def step(ids: tuple[int, ...]) -> np.ndarray:
        with torch.no_grad():
            logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].numpy()
        return reference_probabilities(logits, set(ids), **settings)

    exact: dict[tuple[int, ...], float] = {}
    for first, p in enumerate(step(prompt)):
        if first == END:
            exact[(first,)] = p
        else:
            for second, q in enumerate(step((*prompt, first))):
                exact[first, second] = p * q
    return exact


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0},
        {"temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.4},
    ],
    ids=["plain", "tempered"],
)
def test_the_distribution_is_that_of_exact_enumeration(small: PolicyModel, settings: dict[str, float]) -> None:
    prompt, k = (4, 5, 1), 4000
    exact = enumerate_sequences(small, prompt, **settings)
    assert sum(exact.values()) == pytest.approx(1.0)
    config = SamplingConfig.model_validate(settings | {"max_new_tokens": 2, "rows": k})
    (drawn,) = sample(small, [prompt], ["x"], k=k, config=config, end_id=END, pad_id=PAD, seed=7)
    counts = Counter(s.tokens for s in drawn)
    assert {t for t in counts if exact[t] == 0} == set(), "a token outside the nucleus was drawn"
    large = [t for t, p in exact.items() if p * k >= 5]
    observed = [counts[t] for t in large] + [k - sum(counts[t] for t in large)]
    expected = [exact[t] * k for t in large] + [k - sum(exact[t] * k for t in large)]
    if expected[-1] < 1:
        assert observed[-1] <= 5
        observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
    assert len(large) >= 5
    assert chisquare(observed, expected).pvalue > 1e-3
    assert all(s.ended == (s.tokens[-1] == END) for s in drawn)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("repetition_penalty", [1.0, 1.7])
def test_a_draw_inverts_the_reference_distribution(top_p: float, repetition_penalty: float) -> None:
    rng = np.random.default_rng(0)
    settings = {"temperature": 0.8, "top_p": top_p, "repetition_penalty": repetition_penalty}
    for _ in range(20):
        logits, seen = rng.normal(0, 3, 9).astype(np.float32), set(rng.integers(0, 9, 3).tolist())
        edges = np.cumsum(reference_probabilities(logits, seen, **settings))
        uniform = rng.random(50)
        uniform = uniform[np.abs(edges[:, None] - uniform).min(0) > 1e-5]
        expected = [int(np.argmax(edges > u)) for u in uniform]
        # A token that was said twice counts once.
        said = torch.tensor([*seen, *seen]).repeat(len(uniform), 1)
        rows = torch.from_numpy(logits).repeat(len(uniform), 1)
        found = draw(rows, torch.from_numpy(uniform), SamplingConfig.model_validate(settings), said)
        assert found.tolist() == expected


def test_the_ends_of_the_unit_interval_never_draw_an_impossible_token() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
    assert draw(logits, torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64), SamplingConfig()).tolist() == [1, 2]


PROMPTS = [tuple(range(5, 5 + n)) for n in (3, 9, 1, 6, 6)]
KEYS = list("abcde")


def run(model: PolicyModel, which: list[int], **options: Any) -> dict[str, list[Sample]]:
    settings: dict[str, Any] = {"max_new_tokens": 12, "rows": 64} | options
    k, seed = settings.pop("k", 3), settings.pop("seed", 1)
    config = SamplingConfig.model_validate(settings)
    prompts, keys = [PROMPTS[i] for i in which], [KEYS[i] for i in which]
    drawn = sample(model, prompts, keys, k=k, config=config, end_id=tiny.EOS, pad_id=tiny.PAD, seed=seed)
    return dict(zip(keys, drawn, strict=True))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_company_order_and_rows_do_not_change_a_sample(family: str, language_model: Folders) -> None:
    model = PolicyModel.load(language_model(family))
    everything = run(model, [0, 1, 2, 3, 4])
    assert run(model, [4, 2, 0, 3, 1]) == everything
    assert run(model, [0, 1, 2, 3, 4], rows=1) == everything
    assert run(model, [2], rows=3) == {"c": everything["c"]}
    assert {key: drawn[:2] for key, drawn in everything.items()} == run(model, [0, 1, 2, 3, 4], k=2)
    assert len({s.tokens for drawn in everything.values() for s in drawn}) == 15, "streams must differ"
    assert run(model, [0, 1, 2, 3, 4], seed=2) != everything


def test_repetition_penalty_counts_the_prompt_but_not_the_padding(language_model: Folders) -> None:
    """The padding token may occur in a prompt itself; beside a longer prompt it must weigh the same."""
    model = PolicyModel.load(language_model("llama"))
    config = SamplingConfig(repetition_penalty=5.0, max_new_tokens=6)
    prompts = [(tiny.BOS, 7), (7, 8), (9, 10, 11, 12, 13, 14)]

    def tokens(which: list[int], pad_id: int) -> list[list[Sample]]:
        chosen, keys = [prompts[i] for i in which], [str(i) for i in which]
        return sample(model, chosen, keys, k=8, config=config, end_id=tiny.EOS, pad_id=pad_id, seed=0)

    apart = [tokens([i], tiny.PAD)[0] for i in range(3)]
    assert tokens([0, 1, 2], tiny.PAD) == apart
    assert tokens([0, 1, 2], tiny.BOS) == apart


def test_each_prompt_is_read_once_and_finished_samples_cost_nothing(language_model: Folders) -> None:
    model = PolicyModel.load(language_model("llama"))
    read: list[int] = []
    hook = model.hf.register_forward_pre_hook(lambda _, __, kw: read.append(kw["input_ids"].numel()), with_kwargs=True)
    prompts = [(5, 6, 7, 8), (9, 10, 11, 12)]
    config = SamplingConfig(max_new_tokens=30, sampler="transformers")
    drawn = sample(model, prompts, ["a", "b"], k=5, config=config, end_id=tiny.EOS, pad_id=tiny.PAD, seed=3)
    hook.remove()
    assert read[0] == 8
    # A sample's last token is drawn but never read.
    assert sum(read[1:]) == sum(len(s.tokens) - 1 for group in drawn for s in group)
    assert len({len(s.tokens) for group in drawn for s in group}) > 2


def test_max_new_tokens_cuts_off_and_says_so(language_model: Folders) -> None:
    model = PolicyModel.load(language_model("llama"))
    long = run(model, [0, 1, 2, 3, 4], max_new_tokens=40)
    short = run(model, [0, 1, 2, 3, 4], max_new_tokens=3)
    for key in KEYS:
        for full, cut in zip(long[key], short[key], strict=True):
            assert cut.tokens == full.tokens[:3]
            assert cut.ended == (tiny.EOS in cut.tokens) == (cut.tokens[-1] == tiny.EOS)
    flags = {s.ended for drawn in short.values() for s in drawn}
    assert flags == {True, False}


def test_a_missing_key_is_refused_and_the_mode_is_put_back(language_model: Folders) -> None:
    model = PolicyModel.load(language_model("llama"))
    with pytest.raises(ValueError, match="one key per prompt"):
        sample(model, [(5,)], [], k=1, config=SamplingConfig(), end_id=3, pad_id=0, seed=0)
    model.train()
    run(model, [0])
    assert model.training
