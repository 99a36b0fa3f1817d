"""MetaRM: the difference loss by hand, the step against explicit copies of theta', and the stage around them."""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError
from scipy.special import expit
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import lives
import tiny
from conftest import Folders, Life
from steelyard.baselines import BaselineConfig, sample_baselines
from steelyard.data.encode import Encoder, OnOverlong
from steelyard.errors import InputError
from steelyard.losses.meta import Direction, difference_loss, differences, meta_step
from steelyard.losses.preference import bradley_terry
from steelyard.models.reward import RewardModel
from steelyard.sampling import SamplingConfig
from steelyard.train.metarm import MetaRMConfig, metarm_step, read_meta, spread_of, train_metarm
from steelyard.train.optim import OptimConfig
from steelyard.train.reward import RewardConfig, train_reward
from steelyard.types import Preference

F64 = torch.float64

# ---- the loss ----------------------------------------------------------------------------------------------------


def test_the_difference_loss_by_hand() -> None:
    # sigmoid(ln 3) = 3/4, sigmoid(ln 9) = 9/10; the pairs differ by ln 3, ln 9 and again ln 3.
    rewards = torch.tensor([[0.0, math.log(3), math.log(9)], [2.0, 2.0, 2.0]], dtype=F64)
    assert difference_loss(rewards).tolist() == pytest.approx([2 / 9 * (0.75 + 0.9 + 0.75), 2 / 9 * 1.5])
    assert difference_loss(rewards, normalisation="mean").tolist() == pytest.approx([0.8, 0.5])
    assert difference_loss(rewards[:, :2]).tolist() == pytest.approx([0.375, 0.25])
    assert differences(rewards)[0].tolist() == pytest.approx([math.log(3), math.log(9), math.log(3)])


def test_the_difference_loss_against_numpy() -> None:
    rewards = np.random.default_rng(0).normal(0, 3, (7, 5))
    expected = []
    for r in rewards:
        pairs = [abs(a - b) for n, a in enumerate(r) for b in r[n + 1 :]]
        assert len(pairs) == 10
        expected.append(2 / 25 * (1 / (1 + np.exp(-np.array(pairs)))).sum())
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = difference_loss(torch.tensor(rewards, dtype=dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found.numpy(), expected, rtol=tolerance)
    order = np.random.default_rng(1).permutation(5)
    moved = torch.tensor(-rewards[:, order] + 10)  # order, sign and offset do not matter
    np.testing.assert_allclose(difference_loss(moved).numpy(), expected, rtol=1e-12)


def test_its_gradient_by_hand_and_none_for_ties() -> None:
    rewards = torch.tensor([[math.log(3), 0.0], [1.0, 1.0]], dtype=F64, requires_grad=True)
    difference_loss(rewards).sum().backward()
    assert rewards.grad is not None
    # 2 / K^2 = 1/2, sigmoid' = 3/4 * 1/4: it pushes the higher reward up and the lower down.
    np.testing.assert_allclose(rewards.grad.numpy(), [[3 / 32, -3 / 32], [0.0, 0.0]])


def test_half_precision_is_lifted_and_bad_shapes_are_refused() -> None:
    assert difference_loss(torch.zeros(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
    assert difference_loss(torch.tensor([[0.0, float("nan")]])).isnan().all()
    for rewards in (torch.zeros(3), torch.zeros(3, 1), torch.zeros(1, 2, 2)):
        with pytest.raises(ValueError, match="at least two responses"):
            difference_loss(rewards)
    with pytest.raises(ValueError, match="paper or mean, got 'sum'"):
        difference_loss(torch.zeros(1, 2), normalisation="sum")  # type: ignore[arg-type]


# ---- the step ----------------------------------------------------------------------------------------------------

GENERATOR = np.random.default_rng(11)
META = GENERATOR.normal(size=(6, 4, 3))  # 6 prompts, 4 responses, 3 features
CHOSEN, REJECTED = GENERATOR.normal(size=(2, 8, 3))


class Net(nn.Module):
    """Rewards of feature vectors; one parameter is frozen and one takes no part."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.first = nn.Linear(3, 5, dtype=dtype)
            self.last = nn.Linear(5, 1, dtype=dtype)
            self.frozen = nn.Parameter(torch.ones((), dtype=dtype), requires_grad=False)
            self.idle = nn.Parameter(torch.tensor([-0.0, 2.0], dtype=dtype))

    def forward(self, x: np.ndarray) -> Tensor:
        hidden = torch.tanh(self.first(torch.tensor(x, dtype=self.frozen.dtype)))
        return self.frozen * self.last(hidden).squeeze(-1)


def ascend(net: nn.Module, rows: Sequence[int] = range(6), size: int = 6) -> Iterator[Tensor]:
    """J over META in micro-batches of `size` prompts, of which this process does `rows`."""
    for at in range(0, len(rows), size):
        yield difference_loss(net(META[list(rows[at : at + size])])).sum() / 6


def descend(net: nn.Module, rows: Sequence[int] = range(8), size: int = 8) -> Iterator[Tensor]:
    for at in range(0, len(rows), size):
        part = list(rows[at : at + size])
        yield bradley_terry(net(CHOSEN[part]), net(REJECTED[part])).sum() / 8


def step(net: nn.Module, eta: float, **options: Any) -> float:
    return meta_step(net, lambda: ascend(net), lambda: descend(net), eta, **options)


def plain(net: nn.Module) -> dict[str, Tensor]:
    net.zero_grad()
    for loss in descend(net):
        loss.backward()
    return gradients(net)


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def contents(net: nn.Module) -> dict[str, bytes]:
    return {n: p.detach().numpy().tobytes() for n, p in net.named_parameters()}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return math.sqrt(sum(float(((a[n] - b[n]) ** 2).sum()) for n in a))


def norm(a: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((x**2).sum()) for x in a.values()))


def test_the_step_of_a_linear_model_by_hand() -> None:
    """r = x w: all derivatives written out in numpy, nothing differentiated by torch."""
    net = nn.Linear(3, 1, bias=False, dtype=F64)
    theta = np.array([0.4, -1.1, 0.7])
    net.weight.data = torch.tensor(theta[None])
    eta = 2.0
    slope = np.zeros(3)
    for x in META:
        for i in range(4):
            for j in range(i + 1, 4):
                d = (x[i] - x[j]) @ theta
                slope += 2 / 16 * expit(abs(d)) * expit(-abs(d)) * np.sign(d) * (x[i] - x[j]) / 6
    moved = theta + eta * slope
    apart = CHOSEN - REJECTED
    expected = -(expit(-(apart @ moved))[:, None] * apart).mean(0)
    at_theta = -(expit(-(apart @ theta))[:, None] * apart).mean(0)

    def rewards(x: np.ndarray) -> Tensor:
        return net(torch.tensor(x)).squeeze(-1)

    size = meta_step(
        net,
        lambda: [difference_loss(rewards(META)).mean()],
        lambda: [bradley_terry(rewards(CHOSEN), rewards(REJECTED)).mean()],
        eta,
    )
    assert net.weight.grad is not None
    np.testing.assert_allclose(net.weight.grad.numpy()[0], expected, rtol=1e-12)
    assert np.abs(expected - at_theta).max() > 0.01
    assert size == pytest.approx(np.linalg.norm(slope))


@pytest.mark.parametrize("eta", [0.1, 3.0])
def test_the_step_against_an_explicit_copy(eta: float) -> None:
    net = Net()
    moved = copy.deepcopy(net)
    sum(ascend(net)).backward()  # type: ignore[union-attr]
    inner = gradients(net)
    with torch.no_grad():
        for name, p in moved.named_parameters():
            if name in inner:
                p.add_(inner[name], alpha=eta)
    expected, at_theta = plain(moved), plain(Net())
    assert step(net, eta) == pytest.approx(norm(inner))
    assert distance(gradients(net), expected) < 1e-12 * norm(expected)
    assert distance(expected, at_theta) > 1e-3 * norm(expected)
    assert "idle" not in expected


def test_theta_is_the_same_bytes_in_the_same_memory_and_after_an_error_too() -> None:
    for dtype in (torch.float32, F64):
        net = Net(dtype)
        before, places = contents(net), {n: p.data_ptr() for n, p in net.named_parameters()}
        during: list[dict[str, bytes]] = []

        def watched(net: Net = net, during: list[dict[str, bytes]] = during) -> Iterator[Tensor]:
            during.append(contents(net))
            yield from descend(net)

        meta_step(net, lambda net=net: ascend(net), watched, 0.3)  # type: ignore[misc]
        assert {n for n, held in during[0].items() if held != before[n]} == {
            "first.weight", "first.bias", "last.weight"
        }  # fmt: skip
        assert contents(net) == before
        assert {n: p.data_ptr() for n, p in net.named_parameters()} == places

        def fails() -> Iterator[Tensor]:
            raise RuntimeError("out of memory")

        with pytest.raises(RuntimeError, match="out of memory"):
            meta_step(net, lambda net=net: ascend(net), fails, 0.3)  # type: ignore[misc]
        assert contents(net) == before


def test_without_eta_it_is_the_plain_step_bit_for_bit() -> None:
    net, other = Net(torch.float32), Net(torch.float32)
    expected = plain(other)
    step(net, 0.0)
    found = gradients(net)
    assert found.keys() == expected.keys()
    assert all(found[n].numpy().tobytes() == expected[n].numpy().tobytes() for n in expected)


def test_the_optimiser_sees_the_outer_gradient_only() -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)
    size = step(net, 3.0)
    assert size > 0
    assert not optimizer.state
    outer = gradients(net)
    optimizer.step()
    for name, p in net.named_parameters():
        if name in outer:
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], 0.1 * outer[name])
            torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], 0.01 * outer[name] ** 2)
    moments = {k: v.clone() for held in optimizer.state.values() for k, v in held.items()}
    step(net, 3.0)
    after = {k: v for held in optimizer.state.values() for k, v in held.items()}
    assert all(torch.equal(moments[k], after[k]) for k in moments)


def test_the_random_control_has_the_gradients_norm_and_follows_its_seed() -> None:
    def shift(seed: int | None) -> tuple[dict[str, Tensor], float]:
        net = Net()
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        moved: dict[str, Tensor] = {}

        def look() -> Iterator[Tensor]:
            moved.update({n: p.detach() - start[n] for n, p in net.named_parameters()})
            yield from descend(net)

        options: dict[str, Any] = {} if seed is None else {"direction": "random", "seed": seed}
        return moved, meta_step(net, lambda: ascend(net), look, 0.5, **options)

    (real, size), (one, size_1), (again, _), (two, _) = shift(None), shift(1), shift(1), shift(2)
    assert size == size_1
    assert norm(real) == pytest.approx(0.5 * size, rel=1e-12)
    assert norm(one) == pytest.approx(0.5 * size, rel=1e-12)
    assert norm(two) == pytest.approx(0.5 * size, rel=1e-12)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert distance(one, two) > 0.1 * norm(one)
    assert distance(one, real) > 0.1 * norm(one)
    assert not one["idle"].any()  # it moves what the gradient moves


@pytest.mark.parametrize("direction", ["gradient", "random"])
def test_micro_batches_add_up_to_one_batch(direction: Direction) -> None:
    whole, parts = Net(), Net()
    size = step(whole, 1.0, direction=direction, seed=5)
    again = meta_step(
        parts, lambda: ascend(parts, size=2), lambda: descend(parts, size=3), 1.0,
        direction=direction, seed=5,
    )  # fmt: skip
    assert size == pytest.approx(again, rel=1e-12)
    assert distance(gradients(whole), gradients(parts)) < 1e-12 * norm(gradients(whole))


class Live(TorchDispatchMode):
    """Counts the storages of at least `size` bytes that operations have made and that are still alive."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.peak = size, 0
        self.seen: dict[int, StorageWeakRef] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().nbytes() >= self.size:
                ref = StorageWeakRef(x.untyped_storage())
                self.seen[ref.cdata] = ref
        self.seen = {k: ref for k, ref in self.seen.items() if not ref.expired()}
        self.peak = max(self.peak, len(self.seen))
        return out


@pytest.mark.parametrize("direction", ["gradient", "random"])
def test_one_buffer_of_the_gradients_size_is_all_it_needs(direction: Direction) -> None:
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))

    def meta() -> Iterator[Tensor]:
        yield difference_loss(net(x).sum(-1).view(2, 2)).mean()

    def train() -> Iterator[Tensor]:
        rewards = net(x).sum(-1)
        yield bradley_terry(rewards[:2], rewards[2:]).mean()

    def peak(work: Callable[[], Any]) -> int:
        net.zero_grad()
        with Live(64 * 64 * 4) as live:
            work()
        return live.peak

    usual = peak(lambda: next(train()).backward())
    assert usual == 3 + 3  # the gradients, and the weights, of which views pass
    assert peak(lambda: meta_step(net, meta, train, 0.1, direction=direction)) == usual + 3


def test_coarse_weights_bad_lengths_and_exploding_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"float32 or float64, got torch.bfloat16: .* rounded away"):
        step(Net(torch.bfloat16), 0.1)
    for eta in (-1e-3, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="eta must be finite and at least 0"):
            step(Net(), eta)
    net = Net()
    before = contents(net)
    with pytest.raises(FloatingPointError, match="must be finite"):
        meta_step(net, lambda: [net(META).sum() * float("inf")], lambda: descend(net), 0.1)
    assert contents(net) == before


def test_autocast_is_off_in_both_passes() -> None:
    net, kinds = Net(torch.float32), []

    def watched(losses: Iterator[Tensor]) -> Iterator[Tensor]:
        kinds.append((net.first.weight @ torch.ones(3)).dtype)
        yield from losses

    with torch.autocast("cpu", torch.bfloat16):
        meta_step(net, lambda: watched(ascend(net)), lambda: watched(descend(net)), 0.1)
    assert kinds == [torch.float32, torch.float32]


SHARES: tuple[tuple[Direction, int], ...] = (("gradient", 4), ("random", 2), ("gradient", 0))
"""Direction, and how many of the eight pairs the first process has: in the last case none."""


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    for direction, cut in SHARES:
        net = Net()
        ascent = ascend(net, [range(2), range(2, 6)][rank])
        descent = descend(net, [range(cut), range(cut, 8)][rank])
        size = meta_step(
            net, lambda a=ascent: a, lambda d=descent: d, 1.0,  # type: ignore[misc]
            direction=direction, seed=9, reduce=torch.distributed.all_reduce,
        )  # fmt: skip
        torch.save({"size": size} | gradients(net), f"{folder}/{rank}-{direction}-{cut}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_one_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for direction, cut in SHARES:
        net = Net()
        size = step(net, 1.0, direction=direction, seed=9)
        one, two = (torch.load(tmp_path / f"{rank}-{direction}-{cut}.pt") for rank in range(2))
        assert all(torch.equal(torch.as_tensor(one[n]), torch.as_tensor(two[n])) for n in one)
        assert one.pop("size") == pytest.approx(size, rel=1e-12)
        assert distance(one, gradients(net)) < 1e-12 * norm(one)


# ---- the stage ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def meta_file(language_model: Folders, planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four unscored responses to each of twelve prompts."""
    config = BaselineConfig(
        policy=language_model("llama"), prompts=planted["prompts"], max_length=64, k=4,
        sampling=SamplingConfig(max_new_tokens=5),
    )  # fmt: skip
    return str(sample_baselines(config, tmp_path_factory.mktemp("meta")))


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs with soft labels, margins and weights."""
    rng = np.random.default_rng(3)
    rows = [
        row | {"flip_prob": float(a), "margin": float(m), "weight": float(w)}
        for row, a, m, w in zip(
            tiny.planted_pairs(40)[0], rng.uniform(0, 0.4, 40), rng.normal(0, 0.5, 40), rng.integers(0, 3, 40),
            strict=True,
        )
    ]  # fmt: skip
    return tiny.write_jsonl(tmp_path_factory.mktemp("weighed") / "weighed.jsonl", rows)


def settings(data: str, model: str, meta: str, **changes: Any) -> MetaRMConfig:
    common: dict[str, Any] = {
        "data": data, "model": model, "meta": meta, "k": 3, "batch_size": 8, "meta_batch_size": 6, "max_length": 64,
        "optim": OptimConfig(lr=3e-3), "eta": 1e-2, "log_every": 4, "save_every": 3,
    }  # fmt: skip
    return MetaRMConfig(**common | changes)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def outcome(out: Path) -> dict[str, bytes]:
    files = [*(out / "model").iterdir(), out / "metrics.jsonl", out / "result.json"]
    return {path.name: path.read_bytes() for path in files}


def encoded(folder: str, n: int = 5) -> tuple[Encoder, list[Preference]]:
    fields = [(0.0, 0.0, 1.0), (0.3, 0.5, 2.0), (1.0, -1.0, 0.5), (0.1, 2.0, 0.0), (0.0, 1.5, 3.0)]
    return Encoder.load(folder, max_length=64), [
        Preference(row["id"], row["prompt"], row["chosen"], row["rejected"], flip_prob=a, margin=m, weight=w)
        for row, (a, m, w) in zip(tiny.planted_pairs(n)[0], fields, strict=True)
    ]


def test_the_step_of_a_reward_model_is_that_of_separate_sequences(reward_model: Folders, meta_file: str) -> None:
    """Float64 through plain transformers: every text on its own, theta' an explicit copy."""
    from transformers import AutoModelForSequenceClassification

    folder, eta = reward_model("llama"), 0.2
    encoder, pairs = encoded(folder)
    meta = read_meta(meta_file, encoder, 3, lambda text: None)[:5]
    theta: Any = AutoModelForSequenceClassification.from_pretrained(folder).double()
    moved = copy.deepcopy(theta)

    def reward(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> Any:
        return model(input_ids=torch.tensor([prompt + response])).logits[0, 0]

    J: Any = 0.0
    rewards = []
    for tree in meta:
        r = [reward(theta, tree.prompt, response) for response in tree.responses]
        J = J + 2 / 9 * sum(torch.sigmoid(abs(r[i] - r[j])) for i, j in ((0, 1), (0, 2), (1, 2))) / 5
        rewards.append([x.item() for x in r])
    J.backward()
    inner = {n: p.grad for n, p in theta.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for name, p in moved.named_parameters():
            p += eta * inner[name]

    def loss(model: Any) -> Any:
        total: Any = 0.0
        for p in pairs:
            prompt = encoder.prompt_ids(p.prompt)
            d = reward(model, prompt, encoder.response_ids(p.chosen)) - reward(
                model, prompt, encoder.response_ids(p.rejected)
            )
            right, wrong = torch.sigmoid(d - p.margin), torch.sigmoid(-(d - p.margin))
            total = total + p.weight * -((1 - p.flip_prob) * torch.log(right) + p.flip_prob * torch.log(wrong))
        return total / 6.5

    loss(moved).backward()
    theta.zero_grad()
    loss(theta).backward()
    expected = {n: p.grad for n, p in moved.named_parameters() if p.grad is not None}
    at_theta = {n: p.grad for n, p in theta.named_parameters() if p.grad is not None}
    assert distance(expected, at_theta) > 0.01 * norm(expected)

    for max_tokens in (16, 4096):
        model = RewardModel.load(folder)
        before = contents(model.hf)
        config = settings("", "", "", eta=eta, max_tokens=max_tokens)
        seen, found, size = metarm_step(model, pairs, encoder.encode(pairs).trees, meta, encoder, config, 1)
        np.testing.assert_allclose(found.numpy(), rewards, rtol=1e-4, atol=1e-5)
        assert size == pytest.approx(norm(inner), rel=1e-4)
        single = {n: p.grad.double() for n, p in model.hf.named_parameters() if p.grad is not None}
        assert distance(single, expected) < 1e-4 * norm(expected)
        assert seen[:, 1].tolist() == [1, 2, 0.5, 0, 3]
        assert contents(model.hf) == before


def test_pairs_that_weigh_nothing_leave_no_gradient(reward_model: Folders, meta_file: str) -> None:
    encoder, pairs = encoded(reward_model("llama"))
    silent = [replace(p, weight=0.0) for p in pairs]
    model = RewardModel.load(reward_model("llama"))
    meta = read_meta(meta_file, encoder, 3, lambda text: None)
    seen, rewards, size = metarm_step(
        model, silent, encoder.encode(silent).trees, meta, encoder, settings("", "", ""), 1
    )
    assert gradients(model) == {}
    assert size > 0
    assert rewards.any()
    assert not seen.any()


def test_dropout_that_a_model_brings_stays_off(planted: dict[str, str], meta_file: str, tmp_path: Path) -> None:
    """It would follow no seed, and the examination before the first step would turn it on."""
    start = tiny.build_model(tiny.build_config("gpt_neox", hidden_dropout=0.5))
    folder = str(tiny.save_folder(start, tiny.build_tokenizer(), tmp_path / "start"))
    common: dict[str, Any] = {
        "data": planted["clean"], "model": folder, "batch_size": 16, "max_length": 64,
        "optim": OptimConfig(lr=3e-3),
    }  # fmt: skip
    train_reward(RewardConfig(**common), tmp_path / "plain", quiet=True)
    train_metarm(MetaRMConfig(**common, meta=meta_file, k=3, eta=0.0), tmp_path / "control", quiet=True)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("plain", "control")]
    assert weights[0] == weights[1]


def test_without_eta_the_stage_is_plain_training_bit_for_bit(
    language_model: Folders, weighed: str, meta_file: str, tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "data": weighed, "model": language_model("llama"), "batch_size": 8, "epochs": 2, "max_length": 64, "seed": 3,
        "optim": OptimConfig(lr=3e-3), "margin_in_flip": False,
    }  # fmt: skip
    train_reward(RewardConfig(**common), tmp_path / "plain", quiet=True)
    train_metarm(MetaRMConfig(**common, meta=meta_file, k=3, eta=0.0), tmp_path / "control", quiet=True)
    train_metarm(MetaRMConfig(**common, meta=meta_file, k=3, eta=0.05), tmp_path / "meta", quiet=True)
    weights = [(tmp_path / arm / "model" / "model.safetensors").read_bytes() for arm in ("plain", "control", "meta")]
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]
    for plain_line, line in zip(lines(tmp_path / "plain"), lines(tmp_path / "control"), strict=True):
        for key in ("train/loss", "train/accuracy", "train/margin", "train/lr"):
            assert line[key] == plain_line[key]


def test_metrics_and_histogram_are_those_of_the_data(
    language_model: Folders, planted: dict[str, str], meta_file: str, tmp_path: Path
) -> None:
    """With rates of practically zero the model stays as it began: everything can be computed again from outside."""
    config = settings(
        planted["held-out"], language_model("llama"), meta_file, batch_size=16, eta=1e-12, log_every=100,
        optim=OptimConfig(lr=1e-12), validation={"own": planted["held-out"]},
    )  # fmt: skip
    result = train_metarm(config, tmp_path / "rm", quiet=True)
    model, encoder = RewardModel.load(tmp_path / "rm" / "model"), Encoder.load(language_model("llama"))
    table = pq.read_table(meta_file).to_pylist()
    rewards = np.empty((12, 3))
    for i in range(12):
        group = table[4 * i : 4 * i + 3]
        for j, row in enumerate(group):
            ids = torch.tensor([row["prompt_tokens"] + row["response_tokens"]])
            rewards[i, j] = model.hf(input_ids=ids).logits.item()
    apart = np.abs(rewards[:, [0, 0, 1]] - rewards[:, [1, 2, 2]])
    line, examined = lines(tmp_path / "rm")
    assert line["meta/difference_loss"] == pytest.approx((2 / 9 * expit(apart).sum(1)).mean(), rel=1e-5)
    assert line["meta/difference_mean"] == pytest.approx(apart.mean(), rel=1e-5)
    assert line["meta/spread"] == pytest.approx(apart.mean() / rewards.std(), rel=1e-5)
    assert line["meta/gradient_norm"] > 0
    assert examined["validation/own/accuracy"] == pytest.approx(line["train/accuracy"])
    assert examined["validation/own/loss"] == pytest.approx(line["train/loss"], rel=1e-5)

    found = result["differences"]
    assert (found["set"], found["prompts"], found["k"], result["steps"]) == ("meta", 12, 3, 4)
    scaled = apart / (rewards.max() - rewards.min())
    # Differences that lie on the edge of a bin may fall to either side in float32.
    clear = np.abs(scaled * 20 - np.round(scaled * 20)) > 1e-3
    counts = np.histogram(scaled[clear], bins=found["edges"])[0]
    for when in ("before", "after"):
        assert sum(found[when]["counts"]) == 36
        assert np.abs(np.array(found[when]["counts"]) - counts).sum() <= (~clear).sum()
        assert found[when]["mean"] == pytest.approx(scaled.mean(), rel=1e-5)
        assert found[when]["spread"] == pytest.approx(line["meta/spread"], rel=1e-5)
    assert encoder.max_length == 1024


def test_spread_and_histogram_cannot_be_gamed_by_scaling() -> None:
    rewards = np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32)
    one, other = spread_of(rewards), spread_of(8 * rewards - 64)
    assert one["counts"] == other["counts"]
    assert one["spread"] == pytest.approx(other["spread"], rel=1e-4)
    assert 8 * one["difference_mean"] == pytest.approx(other["difference_mean"], rel=1e-4)
    flat = spread_of(np.ones((2, 3), dtype=np.float32))
    assert flat["spread"] is None
    assert flat["counts"] == [6] + [0] * 19


def test_it_learns_the_planted_rule(
    language_model: Folders, planted: dict[str, str], meta_file: str, tmp_path: Path
) -> None:
    config = settings(
        planted["clean"], language_model("llama"), meta_file, batch_size=16, epochs=4, eta=1e-3, eval_every=12,
        validation={"held-out": planted["held-out"]}, meta_validation=meta_file,
    )  # fmt: skip
    result = train_metarm(config, tmp_path / "rm", quiet=True)
    examined = [line for line in lines(tmp_path / "rm") if "validation/held-out/accuracy" in line]
    assert [line["step"] for line in examined] == [12, 24]
    assert examined[-1]["validation/held-out/accuracy"] > 0.95
    assert result["differences"]["set"] == "meta_validation"
    assert result["differences"]["before"] != result["differences"]["after"]
    again = settings(planted["clean"], str(tmp_path / "rm" / "model"), meta_file, batch_size=48, eta=1e-3)
    continued = train_metarm(again, tmp_path / "round-2", quiet=True)
    assert continued["differences"]["before"] == result["differences"]["after"]  # where the last ended


def train_until(config: MetaRMConfig, out: Path, steps: int) -> None:
    """A job: train, and be killed at the optimiser's step number `steps` of this life."""
    lives.die_at_step(steps)
    train_metarm(config, out, resume=True, quiet=True)


@pytest.mark.parametrize("direction", ["gradient", "random"])
def test_killed_and_continued_it_leaves_the_same_bytes(
    direction: str, language_model: Folders, weighed: str, meta_file: str, life: Life, tmp_path: Path
) -> None:
    config = settings(weighed, language_model("llama"), meta_file, epochs=2, direction=direction)  # 10 steps
    train_metarm(config, tmp_path / "whole", quiet=True)
    # One life ends after a checkpoint and a line of metrics, the other (gradient only) before its first checkpoint.
    for steps in (2, 6) if direction == "gradient" else (5,):
        assert life(train_until, config, tmp_path / "killed", steps) == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob("step-*"))
    train_metarm(config, tmp_path / "killed", resume=True, quiet=True)
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert {"model.safetensors", "metrics.jsonl", "result.json"} <= expected.keys()
    assert found == expected


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValidationError, match="must be float32, got bfloat16: eta"):
        settings("", "", "", precision="bfloat16")
    with pytest.raises(ValidationError, match="random has no effect with eta 0"):
        settings("", "", "", eta=0, direction="random")
    for bad in ({"k": 1}, {"eta": -1e-6}, {"direction": "up"}, {"meta_batch_size": 0}):
        with pytest.raises(ValidationError):
            settings("", "", "", **bad)
    defaults = MetaRMConfig(data="", model="", meta="")
    assert (defaults.eta, defaults.optim.lr, defaults.k) == (5e-6, 5e-6, 5)
    assert (defaults.batch_size, defaults.meta_batch_size) == (16, 16)


def test_the_command(
    language_model: Folders, weighed: str, meta_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from steelyard.cli import main

    args = ["train", "metarm", "--data", weighed, "--model", language_model("llama"), "--max-length", "64"]
    args += ["--k", "4", "--out", str(tmp_path / "rm")]
    assert main([*args, "--meta", meta_file, "--precision", "bfloat16"]) == 2
    assert "--precision: must be float32, got bfloat16" in capsys.readouterr().err
    assert main([*args, "--meta", weighed]) == 2
    assert "must be a file of `steelyard sample`" in capsys.readouterr().err
    assert main([*args, "--meta", meta_file]) == 0
    assert f"{meta_file}: 12 prompts, the first 4 of 4 responses to each" in capsys.readouterr().out
    assert json.loads((tmp_path / "rm" / "result.json").read_text())["steps"] == 3


def test_preferences_that_all_weigh_nothing_are_refused(
    language_model: Folders, meta_file: str, tmp_path: Path
) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [row | {"weight": 0} for row in tiny.planted_pairs(4)[0]])
    with pytest.raises(InputError, match=r"d\.jsonl: all 4 usable pairs have weight 0.*`weight` above 0"):
        train_metarm(settings(data, language_model("llama"), meta_file), tmp_path / "out", quiet=True)
    assert not (tmp_path / "out" / "config.json").exists()


def test_meta_files_are_checked(meta_file: str, language_model: Folders, reward_model: Folders, tmp_path: Path) -> None:
    said: list[str] = []
    encoder = Encoder.load(language_model("llama"), max_length=64)
    trees = read_meta(meta_file, encoder, 2, said.append)
    assert len(trees) == 12
    assert {len(t.responses) for t in trees} == {2}
    assert said == [f"{meta_file}: 12 prompts, the first 2 of 4 responses to each"]
    rows = pq.read_table(meta_file)
    with pytest.raises(InputError, match="holds 4 responses per prompt, 5 are wanted"):
        read_meta(meta_file, encoder, 5)
    with pytest.raises(InputError, match="no such meta file"):
        read_meta(str(tmp_path / "none.parquet"), encoder, 2)
    (tmp_path / "text.parquet").write_text("no")
    with pytest.raises(InputError, match="must be a file of `steelyard sample`"):
        read_meta(str(tmp_path / "text.parquet"), encoder, 2)
    pq.write_table(pa.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="must be a file of `steelyard sample`"):
        read_meta(str(tmp_path / "other.parquet"), encoder, 2)
    pq.write_table(rows.slice(1), tmp_path / "torn.parquet")
    with pytest.raises(InputError, match="row 1 must begin 4 responses to one prompt"):
        read_meta(str(tmp_path / "torn.parquet"), encoder, 2)
    words = (*tiny.SPECIAL, *reversed(tiny.WORDS))
    with pytest.raises(InputError, match="drawn with another tokenizer"):
        read_meta(meta_file, Encoder(tiny.build_tokenizer(words=words)), 2)
    small = Encoder(tiny.build_tokenizer(words=tiny.VOCABULARY[:8]))
    with pytest.raises(InputError, match="drawn with another tokenizer"):
        read_meta(meta_file, small, 2)


def test_overlong_meta_prompts_follow_the_rule(meta_file: str, language_model: Folders) -> None:
    whole = read_meta(meta_file, Encoder.load(language_model("llama")), 4, lambda text: None)
    limit = sorted(t.longest for t in whole)[6]
    over = [t for t in whole if t.longest > limit]
    assert over

    def read(rule: OnOverlong) -> tuple[int, list[Any], str]:
        said: list[str] = []
        encoder = Encoder.load(language_model("llama"), max_length=limit, on_overlong=rule)
        trees = read_meta(meta_file, encoder, 4, said.append)
        return max(t.longest for t in trees), trees, said[0]

    longest, trees, said = read("truncate-prompt")
    assert longest == limit
    assert len(trees) == 12
    assert said.endswith(f"; {len(over)} lost the start of a prompt longer than max_length")
    assert all(t.prompt == w.prompt[len(w.prompt) - len(t.prompt) :] for t, w in zip(trees, whole, strict=True))
    longest, trees, said = read("drop")
    assert longest <= limit
    assert said.endswith(f"; {len(over)} prompts left out: longer than max_length")
    assert len(trees) == 12 - len(over)
    with pytest.raises(InputError, match=f"more than max_length = {limit}"):
        read("error")
