"""Planted label flips are found, by every kind of member and both ways of scoring."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import tiny
from conftest import Folders
from steelyard.data.encode import Encoder, Tree
from steelyard.data.load import load_preferences
from steelyard.errors import InputError
from steelyard.measure import MemberConfig, StrengthConfig, check, measure
from steelyard.members.config import LoraConfig, held_out_plan
from steelyard.members.head import head_scores
from steelyard.members.lora import adapt
from steelyard.members.run import member_tokens
from steelyard.models.cache import TrunkCache
from steelyard.models.reward import RewardModel
from steelyard.parallel import JobError
from steelyard.strength import out_of_fold_plan
from steelyard.train.optim import OptimConfig
from steelyard.types import Preference, Strength


def configure(planted: dict[str, str], model: str, **settings: Any) -> StrengthConfig:
    return StrengthConfig.model_validate({"data": planted["noisy"], "model": model, "max_length": 64} | settings)


def truth_of(n: int = 240) -> tuple[dict[str, int], dict[str, str]]:
    wrong = tiny.planted_pairs(n, flips=0.2, seed=1)[1]
    truth = {f"p{i}": -1 if w else 1 for i, w in enumerate(wrong)}
    return truth, {name: "uniform" for name, t in truth.items() if t < 0}


FULL: dict[str, Any] = {
    "backend": "full", "members": 2, "workers": 1,
    "member": MemberConfig(epochs=2, batch_size=16, optim=OptimConfig(lr=3e-3)),
}  # fmt: skip


LORA: dict[str, Any] = {
    "backend": "lora", "members": 2, "workers": 1, "member": MemberConfig(epochs=2, batch_size=16),
    "lora": LoraConfig(rank=4, alpha=8, lr=1e-2),
}  # fmt: skip
LAYERS: dict[str, Any] = FULL | {
    "backend": "layers", "member": MemberConfig(epochs=2, batch_size=16, optim=OptimConfig(lr=3e-3), trainable_layers=1)
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "bar"),
    [
        ({"backend": "head", "scoring": "in-sample", "members": 4}, 0.85),
        ({"backend": "head", "scoring": "out-of-fold", "members": 4, "folds": 2}, 0.85),
        (FULL | {"scoring": "in-sample"}, 0.9),
        (FULL | {"scoring": "out-of-fold", "folds": 2}, 0.9),
        (LORA | {"scoring": "in-sample"}, 0.9),
        (LORA | {"scoring": "out-of-fold", "folds": 2}, 0.9),
        (LAYERS | {"scoring": "in-sample"}, 0.9),
        (LAYERS | {"scoring": "out-of-fold", "folds": 2}, 0.8),
    ],
    ids=lambda v: f"{v['backend']}, {v['scoring']}" if isinstance(v, dict) else "",
)
def test_planted_flips_are_found(
    settings: dict[str, Any], bar: float, language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    config = configure(planted, language_model("llama"), **settings)
    preferences = load_preferences(planted["noisy"]).preferences
    truth, noise = truth_of()
    out = tmp_path / "strength"
    strengths = measure(config, preferences, out, truth=truth, noise=noise, quiet=True)
    result = json.loads((out / "result.json").read_text())
    found = {(row["scorer"], row["noise"]): row for row in result["detection"]}
    assert found["strength", "all"]["auroc"] > bar
    assert found["strength", "uniform"]["auroc"] == found["strength", "all"]["auroc"]
    assert found["longer text", "all"]["auroc"] < 0.7
    assert found["strength", "all"]["positives"] == sum(t < 0 for t in truth.values())

    # The table, the scores of the members and the strengths that are returned say the same.
    table = pq.read_table(out / "strength.parquet").to_pydict()
    scores = np.load(out / "margins.npz")["scores"].astype(np.float64)
    margins = scores[..., 0] - scores[..., 1]
    assert table["id"] == [p.id for p in preferences]
    np.testing.assert_allclose(table["strength_mean"], np.nanmean(margins, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table["strength_std"], np.nanstd(margins, 0), rtol=1e-4, atol=1e-6)
    assert table["truth"] == list(truth.values())
    assert table["voters"] == (~np.isnan(margins)).sum(0).tolist()
    assert [s.mean for s in strengths if s is not None] == table["strength_mean"]

    held_out = np.isnan(scores[..., 0])
    if config.scoring == "out-of-fold":
        keys = [str(p.prompt) for p in preferences]
        plan = out_of_fold_plan(keys, members=config.members, folds=2, seed=0)
        np.testing.assert_array_equal(held_out, ~plan)
    else:
        assert not held_out.any()
    assert measure(config, preferences, out, truth=truth, noise=noise, resume=True, quiet=True) == strengths
    turned = [replace(preferences[0], chosen="other"), *preferences[1:]]
    for others in (turned, preferences[:-1]):
        with pytest.raises(InputError, match=f"holds the strengths of other pairs than these {len(others)}"):
            measure(config, others, out, resume=True, quiet=True)


def test_equal_strengths_have_no_correlation_with_length(language_model: Folders, tmp_path: Path) -> None:
    """Each pair labelled both ways: nothing can be learned, and the run must not end on a number that is not there."""
    pairs = [
        Preference(f"{i}{way}", f"p{i}", *(("a", "b b") if way else ("b b", "a"))) for i in range(4) for way in (0, 1)
    ]
    config = StrengthConfig(data="pairs", model=language_model("llama"), members=2, max_length=64)
    measure(config, pairs, tmp_path / "s", quiet=True)
    assert json.loads((tmp_path / "s/result.json").read_text())["length_correlation"] is None


def test_out_of_fold_members_never_see_what_they_judge(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    """Turn the labels of what member 0 judges: its scores of those pairs stay, texts swapped."""
    preferences = load_preferences(planted["noisy"]).preferences
    plan = out_of_fold_plan([str(p.prompt) for p in preferences], members=2, folds=2, seed=0)
    rows = [dict(p.row) for p in preferences]
    for i in np.flatnonzero(plan[0]):
        rows[i]["chosen"], rows[i]["rejected"] = rows[i]["rejected"], rows[i]["chosen"]
    turned = tiny.write_jsonl(tmp_path / "turned.jsonl", rows)
    scores = []
    for name, data in (("a", planted["noisy"]), ("b", turned)):
        config = configure(planted, language_model("llama"), **FULL | {"data": data, "folds": 2})
        measure(config, load_preferences(data).preferences, tmp_path / name, quiet=True)
        scores.append(np.load(tmp_path / name / "margins.npz")["scores"][0][plan[0]])
    np.testing.assert_allclose(scores[0], scores[1][:, ::-1], rtol=1e-3, atol=1e-4)


def test_pairs_that_cannot_be_read_get_no_strength(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    rows = tiny.planted_pairs(40)[0]
    rows[7]["chosen"], rows[7]["rejected"] = "unheard", "unseen"  # the same tokens
    rows[9]["chosen"] = "w1 " * 100
    data = tiny.write_jsonl(tmp_path / "d.jsonl", rows)
    preferences = load_preferences(data).preferences
    config = configure(planted, language_model("llama"), data=data, members=2, folds=2)
    strengths = measure(config, preferences, tmp_path / "s", quiet=True)
    assert [i for i, s in enumerate(strengths) if s is None] == [7, 9]
    assert all(isinstance(s, Strength) for i, s in enumerate(strengths) if i not in (7, 9))
    result = json.loads((tmp_path / "s" / "result.json").read_text())
    assert result["pairs"] == 38
    assert "same tokens" in result["left_out"]
    assert result["detection"] is None
    assert sum(group["n"] for group in result["groups"]) == 38


def test_other_preferences_than_those_of_the_file_are_refused_to_full_members(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    """Full members read the file themselves: with other pairs in hand they would judge what they trained on."""
    preferences = load_preferences(planted["noisy"]).preferences[1:]
    config = configure(planted, language_model("llama"), **FULL | {"folds": 2})
    with pytest.raises(InputError, match=r"must be those of .*noisy\.jsonl"):
        measure(config, preferences, tmp_path / "s", quiet=True)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"backend": "full", "penalty": 0.1}, "penalty: no effect with backend = full"),
        ({"backend": "head", "member": MemberConfig(epochs=2)}, "member: no effect with backend = head"),
        ({"scoring": "in-sample", "folds": 5}, "folds: no effect with backend = head, scoring = in-sample"),
        ({"backend": "full", "activation_cache": "c"}, "activation_cache: no effect with backend = full"),
        ({"backend": "layers", "lora": LoraConfig(rank=4)}, "lora: no effect with backend = layers"),
        ({"backend": "lora", "keep_members": True}, "keep_members: no effect with backend = lora"),
        ({"backend": "lora", "member": MemberConfig(trainable_layers=1)}, r"member\.trainable_layers: no effect"),
        (
            {"backend": "lora", "member": MemberConfig(optim=OptimConfig(lr=1e-3))},
            r"member\.optim\.lr \(set lora\.lr\)",
        ),
        ({"backend": "layers", "member": MemberConfig(trainable_layers=0)}, "must be at least 1 with backend = layers"),
    ],
)
def test_settings_without_effect_are_refused_by_name(
    settings: dict[str, Any], named: str, planted: dict[str, str]
) -> None:
    with pytest.raises(InputError, match=named):
        check(configure(planted, "somewhere", **settings))
    resolved = StrengthConfig.model_validate(configure(planted, "somewhere", **settings).model_dump())
    with pytest.raises(InputError, match=named):
        check(resolved)
    check(StrengthConfig.model_validate(configure(planted, "somewhere").model_dump()))


@pytest.mark.parametrize("n", [2, 3])
def test_a_few_pairs_are_weighed(n: int, language_model: Folders, planted: dict[str, str], tmp_path: Path) -> None:
    data = tiny.write_jsonl(tmp_path / "d.jsonl", tiny.planted_pairs(n)[0])
    config = configure(planted, language_model("llama"), data=data, members=2)
    strengths = measure(config, load_preferences(data).preferences, tmp_path / "s", quiet=True)
    assert all(isinstance(s, Strength) for s in strengths)


def test_pairs_of_one_prompt_are_weighed_in_sample(
    language_model: Folders, planted: dict[str, str], tmp_path: Path
) -> None:
    """Pairs take the prompts' place, in the choice of the penalty and in the bootstrap: members differ."""
    rows, wrong = tiny.planted_pairs(60, flips=0.2, seed=1)
    data = tiny.write_jsonl(tmp_path / "d.jsonl", [row | {"prompt": "w1 w2"} for row in rows])
    preferences = load_preferences(data).preferences
    config = configure(planted, language_model("llama"), data=data, members=3)
    with pytest.raises(InputError, match=r"d\.jsonl: .*got 1 and 2; use --scoring in-sample, or add data"):
        measure(config, preferences, tmp_path / "out-of-fold", quiet=True)
    with pytest.raises(InputError, match=r"got 1 and 3; use --scoring in-sample"):
        held_out_plan(config.model_copy(update={"folds": 3}), ["p"] * 60)
    with pytest.raises(InputError, match=r"got 2 and 3; lower --folds, use --scoring in-sample"):
        held_out_plan(config.model_copy(update={"folds": 3}), ["p", "q"] * 30)
    config = config.model_copy(update={"scoring": "in-sample"})
    found = measure(config, preferences, tmp_path / "s", quiet=True)
    mean = np.array([s.mean for s in found if s is not None])
    assert mean[~wrong].mean() > mean[wrong].mean()
    assert np.mean([s.std for s in found if s is not None]) > 0.01 * np.abs(mean).mean()
    with pytest.raises(InputError, match=r"d\.jsonl: too few pairs to choose the penalty .* set --penalty"):
        measure(config, preferences[:1], tmp_path / "one", quiet=True)
    measure(config.model_copy(update={"penalty": 0.1}), preferences[:1], tmp_path / "given", quiet=True)


def heads(config: StrengthConfig, pairs: Sequence[Preference] | None, out: Path, *, quiet: bool = True) -> np.ndarray:
    encoder = Encoder.load(config.model, max_length=64)
    preferences = load_preferences(config.data).preferences
    keys = [str(p.prompt) for p in preferences]
    trees = encoder.encode(preferences).trees
    return head_scores(config, encoder, trees, keys, held_out_plan(config, keys), out, pairs=pairs, quiet=quiet)[0]


def test_heads_read_weights_and_soft_labels(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong labels that are known for certain flips, or weigh nothing, no longer mislead the members."""
    config = configure(planted, language_model("llama"), members=2)
    pairs = load_preferences(planted["noisy"]).preferences
    wrong = np.array([t < 0 for t in truth_of()[0].values()])
    out = tmp_path / "a"
    out.mkdir()
    plain = heads(config, None, out)
    np.testing.assert_array_equal(heads(config, pairs, out), plain)
    mended = heads(config, [replace(p, flip_prob=float(w)) for p, w in zip(pairs, wrong, strict=True)], out)
    dropped = heads(config, [replace(p, weight=float(not w)) for p, w in zip(pairs, wrong, strict=True)], out)
    found = [((np.nanmean(s[..., 0] - s[..., 1], 0) < 0) == wrong).mean() for s in (plain, mended, dropped)]
    assert min(found[1:]) > found[0] + 0.02
    with pytest.raises(InputError, match=r"noisy\.jsonl: all 240 usable pairs have weight 0"):
        heads(config, [replace(p, weight=0.0) for p in pairs], out)
    assert capsys.readouterr().out == ""
    heads(config, [replace(pairs[0], margin=0.5), *pairs[1:]], out, quiet=False)
    assert "noisy.jsonl: 1 pairs have a `margin`, which head members do not read" in capsys.readouterr().out


def scores_of(folder: Path) -> np.ndarray:
    found: np.ndarray = np.load(folder / "margins.npz")["scores"]
    return found


def test_layers_members_are_full_members_with_frozen_layers(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same members whether frozen layers are computed or read; both scorings pay for them once."""
    computed: list[int] = []
    prepare = TrunkCache.prepare

    def watched(self: TrunkCache, *args: Any, **kwargs: Any) -> int:
        computed.append(prepare(self, *args, **kwargs))
        return computed[-1]

    monkeypatch.setattr(TrunkCache, "prepare", watched)
    preferences = load_preferences(planted["noisy"]).preferences
    for scoring in ("in-sample", "out-of-fold"):
        folds = {"folds": 2} if scoring == "out-of-fold" else {}
        found = []
        for backend in ("full", "layers"):
            settings = LAYERS | {"backend": backend, "scoring": scoring} | folds
            out = tmp_path / backend / scoring
            measure(configure(planted, language_model("llama"), **settings), preferences, out, quiet=True)
            found.append(scores_of(out))
        np.testing.assert_allclose(*found, rtol=1e-2, atol=2e-3)
        if scoring == "in-sample":
            tokens = sum(computed)
    costs = {
        name: json.loads((tmp_path / name / "cost.json").read_text())
        for name in ("full/in-sample", "layers/in-sample", "layers/out-of-fold")
    }
    assert sum(computed) == tokens == json.loads((tmp_path / "full/in-sample/result.json").read_text())["tokens"]
    # One of two layers is frozen: a data set's pass through it costs half of its tokens, and only the first time.
    assert costs["layers/in-sample"]["shared"]["tokens"] == tokens / 2
    assert costs["layers/out-of-fold"]["shared"]["tokens"] == 0
    # Two epochs: frozen half forward 2 times, top half 3 times 2; then judging, whole.
    (full, _), (top, _) = costs["full/in-sample"]["members"], costs["layers/in-sample"]["members"]
    assert full["tokens"] == pytest.approx(tokens * (2 / 2 + 3 * 2 / 2 + 1))
    assert top["tokens"] == pytest.approx(tokens * (3 * 2 / 2 + 1 / 2))
    assert all(m[key] > 0 for m in costs["full/in-sample"]["members"] for key in ("wall", "cpu", "memory"))


@pytest.mark.parametrize("kind", [FULL, LORA])
def test_a_member_that_diverged_is_no_abstention(
    planted: dict[str, str],
    language_model: Folders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: dict[str, Any],
) -> None:
    config = configure(planted, language_model("llama"), scoring="in-sample", **kind)
    honest = RewardModel.score

    def diverged(self: RewardModel, trees: list[Tree], **how: Any) -> np.ndarray:
        scores = honest(self, trees, **how)
        scores[3, 1] = np.nan
        return scores

    monkeypatch.setattr(RewardModel, "score", diverged)
    with pytest.raises(JobError, match=r"^member 0: seed 0: 1 of \d+ rewards are not finite: .* a new folder$"):
        measure(config, load_preferences(config.data).preferences, tmp_path / "strength", quiet=True)
    assert not (tmp_path / "strength" / "result.json").exists()
    assert not list((tmp_path / "strength").rglob("*.npz"))


def test_adapters_alone_are_trained_and_begin_as_no_change(language_model: Folders) -> None:
    trees = [tiny_tree(i) for i in range(3)]
    model = RewardModel.from_language_model(language_model("llama"), pad_id=tiny.PAD, seed=0)
    before = model.score(trees, pad_id=tiny.PAD)
    adapt(model, LoraConfig(rank=3), seed=0)
    np.testing.assert_allclose(model.score(trees, pad_id=tiny.PAD), before, rtol=1e-4, atol=1e-5)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    # Seven projections in each of two layers, A and B each, and the head.
    assert len(trained) == 2 * 7 * 2 + 1
    assert all("lora_" in n or "score" in n for n in trained)
    # An adapter that is no longer zero must show in the scores: the trunk must not read the frozen weight alone.
    for name, p in trained.items():
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(0))
    assert np.abs(model.score(trees, pad_id=tiny.PAD) - before).max() > 0.1
    other = RewardModel.from_language_model(language_model("llama"), pad_id=tiny.PAD, seed=0)
    adapt(other, LoraConfig(rank=3, targets=("q_proj", "v_proj")), seed=1)
    drawn = {n: p for n, p in other.named_parameters() if "lora_A" in n}
    assert len(drawn) == 4
    assert all(not torch.equal(p, dict(model.named_parameters())[n]) for n, p in drawn.items())
    with pytest.raises(InputError, match=r"lora\.targets"):
        adapt(
            RewardModel.from_language_model(language_model("llama"), pad_id=tiny.PAD, seed=0),
            LoraConfig(targets=("x",)),
            0,
        )


def tiny_tree(i: int) -> Tree:
    return Tree((5 + i, 6, 7), ((8, 9 + i, 3), (10, 3)))


def test_lora_without_peft_says_what_to_install(
    language_model: Folders, planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    preferences = load_preferences(planted["noisy"]).preferences
    with pytest.raises(InputError, match=r"needs the package peft.*steelyard\[lora\]"):
        measure(configure(planted, language_model("llama"), **LORA), preferences, tmp_path / "s", quiet=True)
    assert not (tmp_path / "s" / "config.json").exists()


def test_tokens_of_adapters_and_of_whole_models(language_model: Folders, planted: dict[str, str]) -> None:
    trees = [tiny_tree(n) for n in range(10)]  # 8 tokens each, no two alike
    model = language_model("llama")
    full = configure(planted, model, **FULL | {"member": MemberConfig(epochs=1.5)})
    # 1.5 passes at 3 and judging of 4 pairs; and for members that are kept the final scoring of all 10.
    assert member_tokens(full, trees, trees[:4]) == 1.5 * 80 * 3 + 32
    kept = full.model_copy(update={"keep_members": True})
    assert member_tokens(kept, trees, trees[:4]) == 1.5 * 80 * 3 + 32 + 80
    lora = configure(planted, model, **LORA | {"member": MemberConfig(epochs=1.5)})
    assert member_tokens(lora, trees, trees[:4]) == 1.5 * 80 * 2 + 32
