"""The outputs of frozen layers on disk: nothing changes by reading them, and one entry serves every role of a pair."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import tiny
from conftest import Folders
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_preferences
from steelyard.errors import InputError
from steelyard.models import cache as module
from steelyard.models.cache import TrunkCache, key, lower_layers
from steelyard.models.reward import RewardModel
from steelyard.parallel import run_jobs
from steelyard.train.optim import OptimConfig
from steelyard.train.pairwise import freeze_below, read_pairs
from steelyard.train.reward import RewardConfig, reward_step, train_reward

PAD = tiny.PAD


def trees_of(folder: str, n: int = 24, seed: int = 0) -> list[Tree]:
    encoder = Encoder.load(folder, max_length=64)
    return [encoder.tree(r["prompt"], [r["chosen"], r["rejected"]]) for r in tiny.planted_pairs(n, seed=seed)[0]]


def swap(tree: Tree) -> Tree:
    return Tree(tree.prompt, tree.responses[::-1])


@pytest.fixture
def model(reward_model: Folders) -> RewardModel:
    return RewardModel.load(reward_model("llama"))


@pytest.fixture
def trees(reward_model: Folders) -> list[Tree]:
    return trees_of(reward_model("llama"))


@pytest.mark.parametrize(("family", "cut"), [("llama", 1), ("llama", 2), ("qwen2", 1), ("qwen3", 1)])
def test_scores_and_gradients_are_those_without_the_cache(
    family: str, cut: int, reward_model: Folders, tmp_path: Path
) -> None:
    model = RewardModel.load(reward_model(family))
    freeze_below(model, 2 - cut)
    encoder = Encoder.load(reward_model("llama"), max_length=64)
    pairs = load_preferences(tiny.write_jsonl(tmp_path / "d.jsonl", tiny.planted_pairs(24)[0])).preferences
    trees = encoder.encode(pairs).trees
    cache = TrunkCache(tmp_path, model, source="a", cut=cut)
    computed = cache.prepare(trees, max_tokens=100)
    assert computed == sum(map(len, trees))
    assert cache.prepare(trees) == 0
    # float32 throughout: what differs is the grouping of matrix products alone.
    np.testing.assert_allclose(
        cache.score(trees, pad_id=PAD, max_tokens=60), model.score(trees, pad_id=PAD), rtol=1e-5, atol=1e-5
    )
    gradients = []
    for c in (None, cache):
        model.zero_grad(set_to_none=True)
        reward_step(model, pairs, trees, encoder, RewardConfig(data="", model=""), c)
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    without, with_cache = gradients
    assert without.keys() == with_cache.keys()
    assert not any(f"layers.{n}." in name for n in range(cut) for name in without)
    size = max(float(g.abs().max()) for g in without.values())
    for name, g in without.items():
        assert float((g - with_cache[name]).abs().max()) < 1e-5 * size, name


def test_states_are_those_of_the_layers_one_by_one(model: RewardModel, trees: list[Tree], tmp_path: Path) -> None:
    """Against transformers' own hidden states of each response in a sequence of its own."""
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    cache.prepare(trees)
    for tree in trees[:4]:
        states = cache.states([tree])
        at = len(tree.prompt)
        for response in tree.responses:
            with torch.no_grad():
                ids = torch.tensor([tree.prompt + response])
                expected = model.trunk(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[1][0]
            np.testing.assert_allclose(states[: len(tree.prompt)], expected[: len(tree.prompt)], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(
                states[at : at + len(response)], expected[len(tree.prompt) :], rtol=1e-4, atol=1e-5
            )
            at += len(response)


def test_swapped_pairs_and_other_files_find_the_same_entries(
    model: RewardModel, trees: list[Tree], tmp_path: Path
) -> None:
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    cache.prepare(trees)
    turned = [swap(t) for t in trees[::-1]]
    again = TrunkCache(tmp_path, model, source="a", cut=1)
    assert again.prepare(turned) == 0
    np.testing.assert_allclose(again.score(turned, pad_id=PAD), model.score(turned, pad_id=PAD), rtol=1e-5, atol=1e-5)
    # Where the prompt ends decides too: the same tokens cut elsewhere are another response.
    prompt, response = trees[0].prompt, trees[0].responses[0]
    assert key(prompt + response[:1], response[1:]) != key(prompt, response)
    assert again.missing([Tree(prompt + response[:1], (response[1:],))])


def test_responses_that_pairs_share_are_computed_and_stored_once(
    model: RewardModel, trees: list[Tree], tmp_path: Path
) -> None:
    """Four responses to a prompt make six pairs; a fifth one that comes later costs itself and the prompt."""
    prompt, responses = trees[0].prompt, [t.responses[i] for t in trees[:2] for i in (0, 1)]
    pairs = [Tree(prompt, (a, b)) for i, a in enumerate(responses) for b in responses[:i]]
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    assert cache.prepare(pairs) == len(prompt) + sum(map(len, responses)) < sum(map(len, pairs)) / 2
    new = trees[2].responses[0]
    later = [Tree(prompt, (new, r)) for r in responses]
    assert cache.prepare(pairs + later) == len(prompt) + len(new)
    stored = sum(np.load(p, mmap_mode="r").shape[0] for p in cache.folder.glob("part-?-????????????????.npy"))
    assert stored == len(prompt) + sum(map(len, responses)) + len(new)
    alone = [[float(model.score([Tree(prompt, (r,))], pad_id=PAD)[0, 0]) for r in t.responses] for t in pairs + later]
    for scorer in (cache, model):
        np.testing.assert_allclose(scorer.score(pairs + later, pad_id=PAD), alone, rtol=1e-4, atol=1e-5)


def test_sets_that_share_pairs_are_scored_once(
    model: RewardModel, trees: list[Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    sets = {"original": trees, "relabelled": [swap(t) for t in trees[:10]], "agreement": trees[10:]}
    expected = model.score_sets(sets, pad_id=PAD)
    seen: list[int] = []
    rewards = cache.rewards
    monkeypatch.setattr(cache, "rewards", lambda t, **kw: seen.append(len(t)) or rewards(t, **kw))
    found = cache.score_sets(sets, pad_id=PAD)
    assert sum(seen) == len(trees)
    for name, scores in expected.items():
        np.testing.assert_allclose(found[name], scores, rtol=1e-5, atol=1e-5)


def test_bfloat16_halves_the_file_and_rounds(model: RewardModel, trees: list[Tree], tmp_path: Path) -> None:
    exact, rounded = (TrunkCache(tmp_path, model, source="a", cut=1, states=s) for s in ("float32", "bfloat16"))
    for c in (exact, rounded):
        c.prepare(trees)
    sizes = [
        sum(p.stat().st_size - 128 for p in c.folder.glob("part-?-????????????????.npy")) for c in (exact, rounded)
    ]
    assert sizes[0] == 2 * sizes[1] == sum(map(len, trees)) * 32 * 4
    a, b = (c.states(trees) for c in (exact, rounded))
    assert float((a - b).abs().max() / a.abs().max()) < 2**-8
    assert float(((a - b).abs() / a.abs().clamp(min=1e-6)).max()) <= 2**-8
    np.testing.assert_allclose(rounded.score(trees, pad_id=PAD), exact.score(trees, pad_id=PAD), rtol=0.1, atol=0.1)


def test_other_weights_cuts_and_precisions_never_meet(model: RewardModel, trees: list[Tree], tmp_path: Path) -> None:
    folders = set()
    for source, cut, states, precision in [
        ("a", 1, "float32", "float32"),
        ("b", 1, "float32", "float32"),
        ("a", 2, "float32", "float32"),
        ("a", 1, "bfloat16", "float32"),
        ("a", 1, "float32", "bfloat16"),
    ]:
        model.precision = precision  # type: ignore[assignment]
        folders.add(TrunkCache(tmp_path, model, source=source, cut=cut, states=states).folder)  # type: ignore[arg-type]
    assert len(folders) == 5


def test_entries_of_other_weights_are_refused(model: RewardModel, trees: list[Tree], tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    cache.prepare(trees[:3])
    with torch.no_grad():
        model.trunk.layers[0].mlp.up_proj.weight.mul_(1.5)  # type: ignore[operator, index, union-attr]
    with pytest.raises(InputError, match="other weights"):
        TrunkCache(tmp_path, model, source="a", cut=1).prepare(trees)


def test_a_disk_without_room_is_told_before_anything_is_written(
    model: RewardModel, trees: list[Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    need = sum(map(len, trees)) * 32 * 4
    said: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, need))
    with pytest.raises(InputError, match=r"48 responses: .* free; free the disk.*activation_precision"):
        cache.prepare(trees, say=said.append)
    assert not said
    assert not list(cache.folder.glob("*.npy"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2 * need))
    cache.prepare(trees, say=said.append)
    assert len(said) == 1
    assert f"{need / 1000:.3g} kB" in said[0]


def test_damaged_files_are_named(model: RewardModel, trees: list[Tree], tmp_path: Path) -> None:
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    cache.prepare(trees)
    for path in cache.folder.glob("part-?-????????????????.npy"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"part-.*\.npy: a damaged part.*delete"):
        TrunkCache(tmp_path, model, source="a", cut=1).prepare(trees)
    for path in cache.folder.glob("*.index.npy"):
        path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"index\.npy: a damaged index"):
        TrunkCache(tmp_path, model, source="a", cut=1).prepare(trees)


def test_models_that_cannot_be_run_in_parts_are_refused(
    reward_model: Folders, model: RewardModel, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="only Llama"):
        TrunkCache(tmp_path, RewardModel.load(reward_model("gpt_neox")), source="a", cut=1)
    with pytest.raises(InputError, match="only Llama"):
        lower_layers(RewardModel.load(reward_model("gpt_neox")), 1)
    for cut in (0, 3):
        with pytest.raises(InputError, match=f"{cut} frozen layers cannot be kept: the model has 2"):
            TrunkCache(tmp_path, model, source="a", cut=cut)


def build(folder: str, out: Path, first: int, last: int) -> tuple[int, Any]:
    """A job: fill the cache with some of the trees, read them, and say how many tokens were computed here."""
    model = RewardModel.load(folder)
    trees = trees_of(folder, 60)[first:last]
    cache = TrunkCache(out, model, source="a", cut=1)
    computed = cache.prepare(trees, max_tokens=64)
    return computed, cache.score(trees, pad_id=PAD)


def test_processes_that_build_at_once_share_the_work(
    reward_model: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reward_model("llama")
    ranges = [(0, 60), (10, 60), (0, 50)]
    results = run_jobs(build, [(folder, tmp_path, *r) for r in ranges], workers=3)
    trees = trees_of(folder, 60)
    assert sum(computed for computed, _ in results) == sum(map(len, trees))
    expected = RewardModel.load(folder).score(trees, pad_id=PAD)
    for (first, last), (_, scores) in zip(ranges, results, strict=True):
        np.testing.assert_allclose(scores, expected[first:last], rtol=1e-5, atol=1e-5)
    (built,) = tmp_path.iterdir()
    assert not list(built.glob(".*"))
    assert json.loads((built / "about.json").read_text())["layers"] == 1


def test_a_killed_build_leaves_nothing_in_the_way(
    model: RewardModel, trees: list[Tree], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 1)  # every tree is a shard
    cache = TrunkCache(tmp_path, model, source="a", cut=1)
    steps = 0

    def stop(tokens: int) -> None:
        nonlocal steps
        steps += 1
        if steps == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.prepare(trees, on_tokens=stop)
    assert len(list(cache.folder.glob(".part-*"))) == 1
    again = TrunkCache(tmp_path, model, source="a", cut=1)
    left = again.missing(trees)
    assert len(left) == len(trees) - 6
    assert again.prepare(trees) == sum(map(len, left))
    assert not list(cache.folder.glob(".part-*"))
    np.testing.assert_allclose(again.score(trees, pad_id=PAD), model.score(trees, pad_id=PAD), rtol=1e-5, atol=1e-5)


TRAINED: dict[str, Any] = {
    "epochs": 2, "batch_size": 16, "optim": OptimConfig(lr=3e-3), "trainable_layers": 1, "max_length": 64,
    "log_every": 4, "eval_every": 6, "seed": 3,
}  # fmt: skip


def test_training_with_the_cache_is_training_without(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    """A second arm on flipped pairs computes nothing below the cut, and gets what it would get by itself."""
    rows, _ = tiny.planted_pairs(96)
    flipped = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} if i % 5 == 0 else r for i, r in enumerate(rows)]
    arms = {"plain": planted["clean"], "flip": tiny.write_jsonl(tmp_path / "flip.jsonl", flipped[:80])}
    settings = TRAINED | {"model": language_model("llama"), "validation": {"held-out": planted["held-out"]}}
    shards = []
    for arm, data in arms.items():
        lines = []
        for name, folder in (("with", str(tmp_path / "cache")), ("without", None)):
            out = tmp_path / arm / name
            train_reward(RewardConfig(data=data, activation_cache=folder, **settings), out, quiet=True)
            lines.append([json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()])
            assert (out / "model").is_dir()
        assert [line.keys() for line in lines[0]] == [line.keys() for line in lines[1]]
        for a, b in zip(*lines, strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
        models = [RewardModel.load(tmp_path / arm / name / "model") for name in ("with", "without")]
        encoder = Encoder.load(language_model("llama"), max_length=64)
        held_out = read_pairs(planted["held-out"], encoder)[1]
        scores = [m.score(held_out, pad_id=PAD) for m in models]
        np.testing.assert_allclose(*scores, rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(models[0].normal, models[1].normal, rtol=1e-3, atol=1e-4)
        shards.append(sorted(p.name for p in (tmp_path / "cache").rglob("*.npy")))
    assert shards[0] == shards[1]


def test_training_with_the_cache_goes_on_after_a_stop(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TRAINED | {"model": language_model("llama"), "data": planted["clean"], "save_every": 3}
    config = RewardConfig(activation_cache=str(tmp_path / "cache"), **settings)
    train_reward(config, tmp_path / "whole", quiet=True)
    rewards, calls = TrunkCache.rewards, 0

    def stop(self: TrunkCache, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return rewards(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TrunkCache, "rewards", stop)
        with pytest.raises(KeyboardInterrupt):
            train_reward(config, tmp_path / "stopped", quiet=True)
    train_reward(config, tmp_path / "stopped", resume=True, quiet=True)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()


def test_weights_and_margins_do_not_matter_to_the_entry(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    encoder = Encoder.load(language_model("llama"), max_length=64)
    pairs = load_preferences(planted["clean"]).preferences
    weighed = [replace(p, weight=0.5, margin=1.0, flip_prob=0.2) for p in pairs]
    assert encoder.encode(pairs).trees == encoder.encode(weighed).trees


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activation_cache": "c"}, "activation_cache: needs trainable_layers"),
        ({"activation_precision": "bfloat16", "trainable_layers": 1}, "activation_precision: no effect without"),
        (
            {"activation_cache": "c", "trainable_layers": 1, "contrastive": {"method": "simcse"}},
            r"no use with contrastive\.method",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RewardConfig.model_validate({"data": "d", "model": "m"} | settings)


def test_the_lower_layers_name_survives_training_above_and_saving_elsewhere(
    reward_model: Folders, tmp_path: Path
) -> None:
    model = RewardModel.load(reward_model("llama"))
    name = lower_layers(model, 1)
    with torch.no_grad():
        model.trunk.layers[1].mlp.up_proj.weight.add_(1.0)
        model.head.weight.zero_()
    model.hf.save_pretrained(tmp_path / "copy")
    assert lower_layers(RewardModel.load(tmp_path / "copy"), 1) == name
    assert lower_layers(model, 2) != name
    with torch.no_grad():
        model.trunk.layers[0].mlp.up_proj.weight[0, 0] += 1.0
    assert lower_layers(model, 1) != name
