"""Checkpoints: exact round trips, damage that is noticed, optimisers that go on bit for bit."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from steelyard import checkpoint
from steelyard.checkpoint import CheckpointError
from steelyard.errors import InputError


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and bits (NaN equals itself)."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous().view(-1).view(torch.uint8).equal(other.contiguous().view(-1).view(torch.uint8))
    )


def test_any_tensor_comes_back_with_the_same_bits(tmp_path: Path) -> None:
    tensors = {
        "float": torch.tensor([0.1, -0.0, math.inf, math.nan]),
        "bf16": torch.tensor([[1.5, 2.25]], dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "bool": torch.tensor([True, False]),
        "bytes": torch.get_rng_state(),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "imaginary": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    checkpoint.save(tmp_path / "c", tensors, {})
    loaded, state = checkpoint.load(tmp_path / "c")
    assert state == {}
    assert loaded.keys() == tensors.keys()
    for name in tensors:
        assert equal(loaded[name], tensors[name].detach().resolve_conj()), name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


def test_tied_tensors_are_stored_once_and_views_are_kept_apart(tmp_path: Path) -> None:
    base = torch.arange(100_000.0)
    checkpoint.save(tmp_path / "c", {"a": base, "b": base, "part": base[10:20], "tail": base[15:]}, {})
    assert (tmp_path / "c" / "tensors.safetensors").stat().st_size < 2.1 * base.nbytes
    loaded, _ = checkpoint.load(tmp_path / "c")
    assert loaded["a"] is loaded["b"]
    assert loaded["a"].equal(base)
    assert loaded["part"].tolist() == list(range(10, 20))
    assert loaded["tail"].equal(base[15:])
    loaded["part"].zero_()
    assert loaded["a"][10] == 10


def test_state_is_exact_or_refused(tmp_path: Path) -> None:
    state = {
        "best": -math.inf,
        "third": 1 / 3,
        "big": 2**200,
        "text": "\ud800 ü\u2028",
        "nested": {"list": [None, True]},
    }
    checkpoint.save(tmp_path / "c", {}, state)
    assert checkpoint.load(tmp_path / "c") == ({}, state)
    with pytest.raises(InputError, match=r"state: a: b\[1\] must be a plain JSON value, got tuple"):
        checkpoint.save(tmp_path / "d", {}, {"a": {"b": [1, (2, 3)]}})
    with pytest.raises(InputError, match="state: a must have text keys only, got the key 1"):
        checkpoint.save(tmp_path / "d", {}, {"a": {1: 2}})
    assert not (tmp_path / "d").exists()


def test_tensor_that_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'s' must be dense"):
        checkpoint.save(tmp_path / "c", {"s": torch.eye(2).to_sparse()}, {})
    with pytest.raises(CheckpointError, match="'m' must be dense"):
        checkpoint.save(tmp_path / "c", {"m": torch.empty(2, device="meta")}, {})


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_every_damage_is_noticed_and_the_file_named(tmp_path: Path, name: str) -> None:
    for damage in ("bit", "cut", "grown", "empty", "missing"):
        folder = tmp_path / damage
        checkpoint.save(folder, {"x": torch.arange(9.0)}, {"step": 3})
        path = folder / name
        data = bytearray(path.read_bytes())
        if damage == "bit":
            middle = data.index(b"sha256") + 12 if name == "manifest.json" else len(data) - 3
            data[middle] ^= 1
        elif damage == "cut":
            data = data[:-1]
        elif damage == "grown":
            data += b"}"
        elif damage == "empty":
            data = bytearray()
        path.write_bytes(data)
        if damage == "missing":
            path.unlink()
        # A digest changed in the manifest shows as the file that no longer fits it.
        named = "tensors.safetensors" if (name, damage) == ("manifest.json", "bit") else name
        with pytest.raises(CheckpointError, match=named):
            checkpoint.load(folder)


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {}, {})
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    (tmp_path / "c/manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99, this version reads 1"):
        checkpoint.load(tmp_path / "c")


def test_saving_again_replaces(tmp_path: Path) -> None:
    for value in (1, 2):
        checkpoint.save(tmp_path / "c", {"x": torch.tensor(value)}, {"value": value})
    tensors, state = checkpoint.load(tmp_path / "c")
    assert (tensors["x"].item(), state["value"]) == (2, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_replacement_cut_off_between_its_two_moves_is_readable_and_mended(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "c", {}, {"value": 1})
    (tmp_path / "c").rename(tmp_path / "c.old")
    (tmp_path / "c.partial").mkdir()
    (tmp_path / "d.removed").mkdir()
    assert checkpoint.load(tmp_path / "c")[1] == {"value": 1}
    checkpoint.settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


Stepper = tuple[torch.nn.Module, torch.optim.Optimizer, torch.Generator]


def build(kind: str) -> Stepper:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    weights, biases = [model[0].weight, model[2].weight], [model[0].bias, model[2].bias]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 3e-3}]
    optimizer: torch.optim.Optimizer
    if kind == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9)
    elif kind == "tensor lr":
        optimizer = torch.optim.AdamW(groups, lr=torch.tensor(1e-2))
    else:
        optimizer = torch.optim.AdamW(groups, lr=1e-2, amsgrad=True)
    return model, optimizer, torch.Generator().manual_seed(1)


def train(stepper: Stepper, steps: int) -> None:
    model, optimizer, generator = stepper
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 4, generator=generator)).pow(2).mean().backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.7


@pytest.mark.parametrize("kind", ["adamw", "sgd", "tensor lr"])
def test_restored_optimiser_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    straight = build(kind)
    train(straight, 3)
    tensors, packed = checkpoint.pack_optimizer(straight[1], "optimizer")
    tensors |= {f"model/{name}": value for name, value in straight[0].state_dict().items()}
    tensors["generator"] = checkpoint.pack_generator(straight[2])
    checkpoint.save(tmp_path / "c", tensors, {"optimizer": packed})
    train(straight, 3)

    resumed = build(kind)
    loaded, state = checkpoint.load(tmp_path / "c")
    names = resumed[0].state_dict()
    resumed[0].load_state_dict({name: loaded[f"model/{name}"] for name in names})
    checkpoint.unpack_optimizer(resumed[1], loaded, state["optimizer"], "optimizer")
    checkpoint.unpack_generator(resumed[2], loaded["generator"])
    kept = {name: value.clone() for name, value in loaded.items()}
    train(resumed, 3)

    for name, value in straight[0].state_dict().items():
        assert equal(value, resumed[0].state_dict()[name]), name
    ours, theirs = (checkpoint.pack_optimizer(each[1], "") for each in (resumed, straight))
    assert ours[1] == theirs[1]
    assert all(equal(ours[0][name], theirs[0][name]) for name in theirs[0])
    assert all(equal(loaded[name], kept[name]) for name in kept), "the loaded tensors must not be trained in place"


def test_optimiser_that_does_not_match_is_refused_untouched() -> None:
    stepper = build("adamw")
    train(stepper, 1)
    tensors, packed = checkpoint.pack_optimizer(stepper[1], "o")

    def refused(optimizer: torch.optim.Optimizer, message: str, held: dict[str, torch.Tensor] = tensors) -> None:
        before = [dict(group) for group in optimizer.param_groups]
        with pytest.raises(CheckpointError, match=message):
            checkpoint.unpack_optimizer(optimizer, held, packed, "o")
        assert not optimizer.state
        assert [group["lr"] for group in optimizer.param_groups] == [group["lr"] for group in before]

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.zeros(shape, dtype=dtype))

    def adamw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.optim.Optimizer:
        biases = {"params": [zeros(8), zeros(1)]}
        return torch.optim.AdamW([{"params": [zeros(*shape, dtype=dtype) for shape in shapes]}, biases])

    refused(build("sgd")[1], "its kind must match the checkpoint's AdamW, got SGD")
    refused(build("tensor lr")[1], "tensor options of group 0")
    refused(torch.optim.AdamW([zeros(8, 4)]), "number of groups must match the checkpoint's 2, got 1")
    refused(adamw((8, 4)), "number of parameters in group 0 must match the checkpoint's 2, got 1")
    refused(adamw((8, 4), (8, 1)), r"shape of parameter 1 must match the checkpoint's \[1, 8\], got \[8, 1\]")
    refused(adamw((8, 4), (1, 8), dtype=torch.float64), "dtype of parameter 0")
    fewer = {name: value for name, value in tensors.items() if name != "o/2/exp_avg"}
    refused(build("adamw")[1], "lacks o/2/exp_avg", fewer)


def test_swapped_parameters_of_one_shape_are_noticed_by_name() -> None:
    one, two = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    packed = checkpoint.pack_optimizer(torch.optim.SGD([("one", one), ("two", two)], lr=0.1), "o")
    swapped = torch.optim.SGD([("two", two), ("one", one)], lr=0.1)
    with pytest.raises(CheckpointError, match="name of parameter 0 must match the checkpoint's one, got two"):
        checkpoint.unpack_optimizer(swapped, packed[0], packed[1], "o")


def test_random_states_go_on_where_they_were(tmp_path: Path) -> None:
    generators = [
        np.random.Generator(kind(5)) for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)
    ]
    torch.manual_seed(3)
    for generator in generators:
        generator.integers(10, size=3, dtype=np.uint32)  # leaves half a word behind, which is state as well
    packed = {type(each.bit_generator).__name__: checkpoint.pack_numpy(each) for each in generators}
    checkpoint.save(tmp_path / "c", checkpoint.pack_rng(), packed)
    expected = [generator.normal(size=5) for generator in generators], torch.randn(4)

    tensors, state = checkpoint.load(tmp_path / "c")
    fresh = [np.random.Generator(type(each.bit_generator)(0)) for each in generators]
    for generator in fresh:
        checkpoint.unpack_numpy(generator, state[type(generator.bit_generator).__name__])
    checkpoint.unpack_rng(tensors)
    for generator, values in zip(fresh, expected[0], strict=True):
        np.testing.assert_array_equal(generator.normal(size=5), values)
    assert torch.randn(4).equal(expected[1])


def test_random_state_of_another_kind_is_refused() -> None:
    other = np.random.Generator(np.random.MT19937(0))
    with pytest.raises(CheckpointError, match="must be one of PCG64, got MT19937"):
        checkpoint.unpack_numpy(np.random.default_rng(0), checkpoint.pack_numpy(other))
    with pytest.raises(CheckpointError, match="does not fit a generator on cpu"):
        checkpoint.unpack_generator(torch.Generator(), torch.zeros(3, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="lacks 'rng/cpu'"):
        checkpoint.unpack_rng({})
