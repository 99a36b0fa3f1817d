"""Planted label flips are found, by both kinds of member and both ways of scoring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import tiny
from conftest import Folders
from steelyard.data.load import load_preferences
from steelyard.errors import InputError
from steelyard.measure import MemberConfig, StrengthConfig, check, measure
from steelyard.strength import out_of_fold_plan
from steelyard.train.optim import OptimConfig
from steelyard.types import Strength


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


@pytest.mark.parametrize(
    ("settings", "bar"),
    [
        ({"backend": "head", "scoring": "in-sample", "members": 4}, 0.85),
        ({"backend": "head", "scoring": "out-of-fold", "members": 4, "folds": 2}, 0.85),
        (FULL | {"scoring": "in-sample"}, 0.9),
        (FULL | {"scoring": "out-of-fold", "folds": 2}, 0.9),
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
