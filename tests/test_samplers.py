"""The samplers agree: with each other, with the policy's own log-probabilities, with what they were asked for."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import tiny
from conftest import Folders
from steelyard.data.collate import collate
from steelyard.data.encode import Tree
from steelyard.errors import InputError
from steelyard.models.lora import LoraConfig
from steelyard.models.next_token import cut_nucleus
from steelyard.models.policy import PolicyModel
from steelyard.sampling import Sample, SamplingConfig, sample
from steelyard.sampling.cached import CacheReader
from steelyard.sampling.loop import Reader
from steelyard.sampling.shared import SharedReader, _chunks, refusal
from steelyard.sampling.tokens import invert
from steelyard.train.optim import OptimConfig

SHARED = ("llama", "qwen2", "qwen3")
PROMPTS = [tuple(range(5, 5 + n)) for n in (3, 9, 1, 6, 6)]
KEYS = list("abcde")


def load(language_model: Folders, family: str = "llama", **options: Any) -> PolicyModel:
    return PolicyModel.load(language_model(family), **options)


def run(model: PolicyModel, sampler: str, *, k: int = 3, seed: int = 1, **settings: Any) -> list[list[Sample]]:
    config = SamplingConfig.model_validate({"max_new_tokens": 12, "sampler": sampler} | settings)
    return sample(model, PROMPTS, KEYS, k=k, config=config, end_id=tiny.EOS, pad_id=tiny.PAD, seed=seed)


@pytest.mark.parametrize("sampler", ["shared", "transformers"])
@pytest.mark.parametrize("settings", [{}, {"top_p": 0.8, "temperature": 0.7}])
def test_logits_that_are_no_numbers_stop_the_drawing(
    sampler: str, settings: dict[str, Any], language_model: Folders
) -> None:
    model = load(language_model)
    run(model, sampler, **settings)
    with torch.no_grad():
        model.hf.get_output_embeddings().weight[7] = torch.nan
    with pytest.raises(FloatingPointError, match=r"logits at token 1 of \d+ responses are not finite"):
        run(model, sampler, **settings)


# ---- one sampler, the others -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.5}, {"min_new_tokens": 5}, {"max_new_tokens": 1}],
    ids=["plain", "shaped", "min", "one"],
)
def test_shared_prompts_give_the_tokens_of_transformers(
    family: str, k: int, settings: dict[str, Any], language_model: Folders
) -> None:
    model = load(language_model, family)
    ours = run(model, "shared", k=k, **settings)
    assert ours == run(model, "transformers", k=k, **settings)
    assert run(model, "auto", k=k, **settings) == ours
    lengths = {len(s.tokens) for group in ours for s in group}
    assert max(lengths) > 1 or settings.get("max_new_tokens") == 1
    assert min(lengths) > settings.get("min_new_tokens", 0)


def test_auto_reads_other_models_through_their_own_code(language_model: Folders) -> None:
    model = load(language_model, "gpt_neox")
    assert run(model, "auto") == run(model, "transformers")
    with pytest.raises(InputError, match=r"shared: GPTNeoXModel is not a stack of Llama.*use auto"):
        run(model, "shared")
    with pytest.raises(ValueError, match="not a stack"):
        SharedReader(model)


def test_what_shared_layers_would_get_wrong_is_left_to_transformers(language_model: Folders) -> None:
    model = load(language_model)
    assert refusal(model, 10**6) is None
    hook = model.hf.base_model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: None)
    assert refusal(model, 1) == "it has hooks"
    hook.remove()
    model.hf.base_model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert "GELU" in str(refusal(model, 1))
    assert run(model, "auto") == run(model, "transformers")
    windowed = PolicyModel(tiny.build_model(tiny.build_config("qwen2", use_sliding_window=True, sliding_window=16,
                                                              max_window_layers=0)))  # fmt: skip
    assert refusal(windowed, 16) is None
    assert "sliding window of 16" in str(refusal(windowed, 17))


def test_adapters_are_added_to_the_weights(language_model: Folders) -> None:
    pytest.importorskip("peft")
    model = load(language_model)
    plain = run(model, "shared")
    model.adapt(LoraConfig(rank=2), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    adapted = run(model, "shared")
    assert adapted == run(model, "transformers")
    assert adapted != plain


# ---- the model's own numbers -----------------------------------------------------------------------------------


def said_by(reader: Reader, trees: list[Tree]) -> Tensor:
    """(B, K, R): log-probabilities of given responses of one length as a reader computes them, token by token."""
    k, length = len(trees[0].responses), len(trees[0].responses[0])
    rows = torch.tensor([r for t in trees for r in t.responses])
    logits, found = reader.start([t.prompt for t in trees], k=k, room=length - 1), []
    for t in range(length):
        found.append(torch.log_softmax(logits, -1).gather(-1, rows[:, t : t + 1])[:, 0])
        if t + 1 < length:
            logits = reader.read(rows[:, t])
    return torch.stack(found, -1).view(len(trees), k, length)


def some_trees(k: int = 3, length: int = 7) -> list[Tree]:
    rng = np.random.default_rng(0)
    return [
        Tree(p, tuple(tuple(rng.integers(0, len(tiny.VOCABULARY), length).tolist()) for _ in range(k))) for p in PROMPTS
    ]


@torch.no_grad()
@pytest.mark.parametrize("family", SHARED)
def test_log_probabilities_are_the_policys(family: str, language_model: Folders) -> None:
    model, trees = load(language_model, family), some_trees()
    policys = model(collate(trees, tiny.PAD)).plain_BKR
    torch.testing.assert_close(said_by(SharedReader(model), trees), policys, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(said_by(CacheReader(model, pad_id=0), trees), policys, rtol=1e-5, atol=2e-5)


@torch.no_grad()
def test_bfloat16_stays_near_float32(language_model: Folders) -> None:
    exact = said_by(SharedReader(load(language_model)), some_trees())
    model = load(language_model, precision="bfloat16")
    rounded = said_by(SharedReader(model), some_trees())
    assert 0 < (rounded - exact).abs().max() < 0.25
    assert (rounded - exact).abs().mean() < 0.03
    assert run(model, "shared") == run(model, "shared")


@torch.no_grad()
def test_the_other_attention_is_the_same(language_model: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes, on a CPU."""
    from steelyard.sampling import shared

    model, trees = load(language_model), some_trees()
    fused, ours = said_by(SharedReader(model), trees), shared._attention

    def elsewhere(q: Tensor, *rest: Any) -> Any:
        class Named:
            device = torch.device("cuda")
            shape = q.shape

            def __matmul__(self, other: Tensor) -> Tensor:
                return q @ other

        return ours(Named(), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shared, "_attention", elsewhere)
    torch.testing.assert_close(said_by(SharedReader(model), trees), fused, rtol=1e-5, atol=1e-5)


# ---- memory ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_kept_once_and_memory_stays_as_taken(language_model: Folders) -> None:
    reader = SharedReader(load(language_model))
    with torch.no_grad():
        reader.start(PROMPTS, k=4, room=6)
        before = [x.data_ptr() for pair in (*reader.prefix, *reader.suffix) for x in pair]
        for pair in reader.prefix:
            assert [tuple(x.shape) for x in pair] == [(5, 2, 9, 8)] * 2, "5 prompts of at most 9 tokens, once each"
        for pair in reader.suffix:
            assert [tuple(x.shape) for x in pair] == [(20, 2, 6, 8)] * 2
        for _ in range(3):
            reader.read(torch.full((len(reader.slot_R),), 7))
            reader.leave(torch.arange(len(reader.slot_R)) % 3 != 0)
    assert before == [x.data_ptr() for pair in (*reader.prefix, *reader.suffix) for x in pair]


def test_a_group_s_memory_is_free_before_the_next_is_taken(
    language_model: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = SharedReader(load(language_model))
    with torch.no_grad():
        reader.start(PROMPTS, k=4, room=6)
        old = [weakref.ref(x) for pair in (*reader.prefix, *reader.suffix) for x in pair]
        alive, take = [], reader._cache

        def watched(*args: Any, **more: Any) -> Tensor:
            alive.append(sum(x() is not None for x in old))
            return take(*args, **more)

        monkeypatch.setattr(reader, "_cache", watched)
        reader.start(PROMPTS, k=4, room=6)
    assert alive == [0] * len(old)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_rows_that_leave_do_not_disturb_those_that_stay(seed: int, language_model: Folders) -> None:
    """Random leavings, whole prompts among them, against a reader that nobody leaves."""
    model, rng = load(language_model), np.random.default_rng(seed)
    k, rows = 3, 15
    tokens = torch.from_numpy(rng.integers(0, len(tiny.VOCABULARY), (rows, 8)))
    full, some = SharedReader(model), SharedReader(model)
    full.start(PROMPTS, k=k, room=8)
    some.start(PROMPTS, k=k, room=8)
    here = torch.arange(rows)
    for t in range(8):
        expected, found = full.read(tokens[:, t]), some.read(tokens[here, t])
        torch.testing.assert_close(found, expected[here], rtol=1e-4, atol=1e-4)
        keep = torch.from_numpy(rng.random(len(here)) > 0.3)
        keep[rng.integers(len(here))] = True
        here = here[some.leave(keep)]
    assert len(here) < 6
    assert len(some.lengths_p) == len({i // k for i in here.tolist()}), "prompts without samples are gone"


@torch.no_grad()
def test_every_order_in_which_two_prompts_end_leaves_the_others_their_own(language_model: Folders) -> None:
    """The rows that stay are as many as the slots then, but need not stand in their order."""
    model, k, prompts = load(language_model), 2, PROMPTS[:4]
    tokens = torch.arange(8 * 5).view(8, 5) % (len(tiny.VOCABULARY) - 4) + 4
    full, some = SharedReader(model), SharedReader(model)
    full.start(prompts, k=k, room=5)
    expected = [full.read(tokens[:, t]) for t in range(5)]
    moved = 0
    for ending in combinations(range(4), 2):
        for order in permutations(row for p in ending for row in (k * p, k * p + 1)):
            some.start(prompts, k=k, room=5)
            here = torch.arange(8)
            for t in range(5):
                torch.testing.assert_close(some.read(tokens[here, t]), expected[t][here], rtol=1e-4, atol=1e-4)
                if t < 4:
                    here = here[some.leave(here != order[t])]
            moved += (some.slot_R // k).tolist() != [0, 0, 1, 1]
    assert moved > 10


def test_prompts_are_read_in_pieces_of_bounded_size() -> None:
    assert _chunks([3000, 1000, 900, 4096, 5000, 10]) == [(0, 1), (1, 3), (3, 4), (4, 5), (5, 6)]
    assert _chunks([5]) == [(0, 1)]


def test_each_prompt_is_read_once_and_finished_samples_cost_nothing(
    language_model: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, read = load(language_model), []
    layers = SharedReader._run

    def counted(self: SharedReader, x: Tensor, *rest: Any) -> Tensor:
        read.append(len(x))
        return layers(self, x, *rest)

    monkeypatch.setattr(SharedReader, "_run", counted)
    drawn = run(model, "shared", k=5, max_new_tokens=30)
    assert read[0] == sum(map(len, PROMPTS)), "no padding, no copies"
    # A sample's last token is drawn but never read.
    assert sum(read[1:]) == sum(len(s.tokens) - 1 for group in drawn for s in group)
    assert read[-1] < read[1]


# ---- draws -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 127, 128, 129, 300, 1024])
def test_two_levels_invert_the_whole_sum(V: int) -> None:
    rng = np.random.default_rng(V)
    weights = rng.random((40, V)) * (rng.random((40, V)) > 0.5)
    weights[:, rng.integers(V)] = 1e-3
    uniform = rng.random(40)
    uniform[:2] = 0.0, 1 - 2**-53
    edges = weights.astype(np.float32).astype(np.float64).cumsum(-1)
    target = uniform * edges[:, -1]
    clear = np.abs(edges - target[:, None]).min(-1) > 1e-6 * edges[:, -1]
    clear[:2] = True
    expected = [(edges[i] > target[i]).argmax() for i in range(40)]
    found = invert(torch.from_numpy(weights).float(), torch.from_numpy(uniform)).tolist()
    assert [f for f, c in zip(found, clear, strict=True) if c] == [e for e, c in zip(expected, clear, strict=True) if c]
    assert all(weights[i, v] > 0 for i, v in enumerate(found))
    assert clear.sum() > 30


def test_a_block_whose_sum_was_rounded_up_never_yields_an_impossible_token() -> None:
    weights = torch.zeros(1, 256)
    weights[0, :100] = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 1e-3 + 0.1
    for uniform in (1 - 2**-53, 1 - 2**-30, 1 - 2**-24):
        assert invert(weights, torch.tensor([uniform], dtype=torch.float64)).item() == 99


def reference_nucleus(row: np.ndarray, top_p: float) -> set[int]:
    kept, mass = set(), 0.0
    for i in sorted(range(len(row)), key=lambda i: (-row[i], i)):
        if mass >= top_p * row.sum():
            break
        kept.add(i)
        mass += row[i]
    return kept


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["peaked", "flat", "equal", "few"])
def test_the_nucleus_is_that_of_a_full_sort(kind: str, top_p: float) -> None:
    """Peaked: found among the largest; flat: in a bin further down; equal: the lower id comes first, by a full sort."""
    rng = np.random.default_rng(1)
    V = {"peaked": 2500, "flat": 2500, "equal": 2500, "few": 40}[kind]
    rows = np.exp(rng.normal(0, {"peaked": 5.0, "flat": 0.1, "equal": 1.0, "few": 2.0}[kind], (6, V)))
    if kind == "equal":
        # Eighths, so that every sum is exact and edges fall on ties.
        rows = rng.integers(1, 4, (6, V)) / 8
    rows = rows.astype(np.float32)
    found = cut_nucleus(torch.from_numpy(rows), top_p).numpy()
    for row, cut in zip(rows, found, strict=True):
        kept = set(np.nonzero(cut)[0].tolist())
        assert len(kept ^ reference_nucleus(row.astype(np.float64), top_p)) <= (0 if kind != "flat" else 1)
        assert (cut[sorted(kept)] == row[sorted(kept)]).all()


def test_where_the_largest_do_not_reach_a_bin_is_sorted_instead_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of these weights are exact, so the nucleus is the reference's to the token; so are edges that meet a sum."""
    rng = np.random.default_rng(2)
    # 2,000 different weights of 13 bits: a nucleus of hundreds of tokens, and no ties.
    rows = np.stack([rng.permutation(np.arange(1, 2001)) for _ in range(8)]).astype(np.float32) / 8192
    sorted_sizes: list[int] = []
    honest = torch.Tensor.sort
    monkeypatch.setattr(
        torch.Tensor, "sort", lambda self, **how: sorted_sizes.append(self.shape[-1]) or honest(self, **how)
    )
    for top_p in (0.25, 0.5, 0.75, 0.96875):
        found = cut_nucleus(torch.from_numpy(rows), top_p).numpy()
        for row, cut in zip(rows, found, strict=True):
            assert set(np.nonzero(cut)[0].tolist()) == reference_nucleus(row.astype(np.float64), top_p)
            assert torch.equal(cut_nucleus(torch.from_numpy(row)[None], top_p)[0], torch.from_numpy(cut)), "company"
    assert 0 < max(sorted_sizes) < 300, "a bin holds an eighth of a power of 2"
    assert np.array_equal(cut_nucleus(torch.from_numpy(rows).double(), top_p).numpy(), found), "float64: by a sort"


def test_rows_without_a_finite_sum_do_not_disturb_the_nucleus_of_others() -> None:
    rows = torch.rand(3, 500, generator=torch.Generator().manual_seed(0))
    alone = cut_nucleus(rows[1:2], 0.9)
    rows[0, 7], rows[2, 8] = torch.tensor(float("nan")), -torch.tensor(float("nan"))
    found = cut_nucleus(rows, 0.9)
    assert torch.equal(found[1:2], alone)
    assert invert(found, torch.full((3,), 0.5)).tolist()[::2] == [-1, -1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 0.7, "repetition_penalty": 1.6}])
def test_many_prompts_side_by_side_draw_from_their_own_distributions(
    settings: dict[str, float], language_model: Folders
) -> None:
    """Second tokens given the first, by chi-square against PolicyModel's probabilities; three prompts in one batch."""
    model, k = load(language_model), 1500
    config = SamplingConfig.model_validate(settings | {"max_new_tokens": 2, "rows": 3 * k})
    drawn = sample(
        model, PROMPTS[:3], KEYS[:3], k=k, config=config, end_id=tiny.EOS, pad_id=tiny.PAD, seed=11
    )  # fmt: skip
    tested = 0
    for prompt, group in zip(PROMPTS[:3], drawn, strict=True):
        first, n = Counter(s.tokens[0] for s in group if len(s.tokens) == 2).most_common(1)[0]
        everything = tuple((first, v) for v in range(len(tiny.VOCABULARY)))
        with torch.no_grad():
            found = model(collate([Tree(prompt, everything)], tiny.PAD), **settings)
        # Outside the nucleus `sampled` still gives the token itself, which PolicyModel takes as drawn: cut by share.
        logp = found.full_BKR[0, :, 1].double()
        probability = np.exp(logp.numpy())
        kept = sorted(reference_nucleus(probability, settings.get("top_p", 1.0)))
        share = np.array([probability[v] if v in kept else 0 for v in range(len(probability))])
        share /= share.sum()
        counts = Counter(s.tokens[1] for s in group if s.tokens[:1] == (first,) and len(s.tokens) == 2)
        assert all(share[v] > 0 for v in counts)
        large = [v for v in range(len(share)) if share[v] * n >= 5]
        observed = [counts[v] for v in large] + [n - sum(counts[v] for v in large)]
        expected = [share[v] * n for v in large] + [n - sum(share[v] * n for v in large)]
        if expected[-1] < 1:
            observed[-2:], expected[-2:] = [sum(observed[-2:])], [sum(expected[-2:])]
        if len(expected) > 1:
            tested += 1
            assert chisquare(observed, expected).pvalue > 1e-3
    assert tested >= 2


def test_settings_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ValueError, match="min_new_tokens: must be at most max_new_tokens = 4, got 5"):
        SamplingConfig(max_new_tokens=4, min_new_tokens=5)


# ---- vLLM ------------------------------------------------------------------------------------------------------


class FakeEngine:
    """Speaks as much of vLLM's interface as is used, refuses everything else, and draws with our own sampler."""

    made: list[FakeEngine] = []  # noqa: RUF012

    def __init__(self, model: str, *, skip_tokenizer_init: bool, dtype: str, generation_config: str,
                 enable_prefix_caching: bool, gpu_memory_utilization: float) -> None:  # fmt: skip
        assert (skip_tokenizer_init, generation_config, enable_prefix_caching) == (True, "vllm", True)
        assert 0 < gpu_memory_utilization <= 1
        assert dtype in ("float32", "bfloat16")
        self.folder, self.calls = model, [0, 0]
        self.policy = PolicyModel.load(model)
        self.cached = False
        FakeEngine.made.append(self)

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        assert not self.cached, "prompts computed with old weights"
        answers = []
        for prompt, p in zip(prompts, params, strict=True):
            config = SamplingConfig(
                temperature=p["temperature"], top_p=p["top_p"], repetition_penalty=p["repetition_penalty"],
                max_new_tokens=p["max_tokens"], min_new_tokens=p["min_tokens"],
            )  # fmt: skip
            (end_id,) = p["stop_token_ids"]
            assert set(prompt) == {"prompt_token_ids"}
            ids = tuple(prompt["prompt_token_ids"])
            ((drawn,),) = sample(
                self.policy, [ids], [str(p["seed"])], k=1, config=config, end_id=end_id, pad_id=0, seed=0
            )
            tokens = drawn.tokens[:-1] if drawn.ended and p["seed"] % 2 else drawn.tokens
            output = types.SimpleNamespace(token_ids=list(tokens), finish_reason="stop" if drawn.ended else "length")
            answers.append(types.SimpleNamespace(outputs=[output]))
        return answers

    def collective_rpc(self, method: str) -> None:
        assert method == "reload_weights"
        self.policy, self.cached = PolicyModel.load(self.folder), True
        self.calls[0] += 1

    def reset_prefix_cache(self) -> None:
        self.cached = False
        self.calls[1] += 1


def parameters(**given: Any) -> dict[str, Any]:
    names = (
        "n temperature top_p top_k repetition_penalty max_tokens min_tokens ignore_eos stop_token_ids seed detokenize"
    )
    assert set(given) == set(names.split())
    assert (given["n"], given["top_k"], given["ignore_eos"], given["detokenize"]) == (1, 0, True, False)
    assert 0 <= given["seed"] < 2**63
    return given


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeEngine]]:
    fake = types.ModuleType("vllm")
    fake.LLM, fake.SamplingParams = FakeEngine, parameters  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    FakeEngine.made.clear()
    yield FakeEngine.made
    FakeEngine.made.clear()


def test_vllm_is_asked_for_what_the_settings_say(vllm: list[FakeEngine], language_model: Folders) -> None:
    model = load(language_model)
    settings = {"temperature": 0.9, "top_p": 0.8, "repetition_penalty": 1.3, "min_new_tokens": 2}
    drawn = run(model, "vllm", **settings)
    assert [len(group) for group in drawn] == [3] * 5
    assert all(s.ended == (s.tokens[-1] == tiny.EOS) == (tiny.EOS in s.tokens) for g in drawn for s in g)
    assert all(len(s.tokens) > 2 and (s.ended or len(s.tokens) == 12) for g in drawn for s in g)
    assert {s.ended for g in drawn for s in g} == {True, False}
    assert run(model, "vllm", **settings) == drawn
    assert run(model, "vllm", k=2, **settings) == [g[:2] for g in drawn], "a sample does not depend on its company"
    assert run(model, "vllm", seed=2, **settings) != drawn
    assert len(vllm) == 1, "one engine for one policy"
    assert vllm[0].calls == [3, 3], "weights are read anew at every call but the first"


def test_vllm_follows_the_policys_weights(vllm: list[FakeEngine], language_model: Folders) -> None:
    """With the optimiser of the training loops: its fused step does not raise the tensors' version numbers."""
    model = load(language_model)
    before = run(model, "vllm")
    optimizer = OptimConfig(lr=0.3).build(model.parameters())
    model(collate(some_trees(), tiny.PAD)).full_BKR.sum().backward()
    optimizer.step()
    assert run(model, "vllm") != before
    assert vllm[0].calls == [1, 1]
    model.load_state_dict(load(language_model).state_dict())
    assert run(model, "vllm") == before
    assert vllm[0].calls == [2, 2]


def test_vllm_missing_or_too_cold_is_said(
    language_model: Folders, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    model = load(language_model)
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match=r"pip install 'steelyard\[vllm\]'"):
        run(model, "vllm")
    request.getfixturevalue("vllm")
    with pytest.raises(InputError, match=r"temperature: vLLM needs at least 0.01, got 0.001"):
        run(model, "vllm", temperature=0.001)


def test_vllms_copy_of_the_weights_goes_with_the_policy(vllm: list[FakeEngine], language_model: Folders) -> None:
    model = load(language_model)
    run(model, "vllm", k=1)
    folder = Path(vllm[0].folder)
    assert (folder / "model.safetensors").exists()
    del model
    gc.collect()
    assert not folder.exists()
