"""Offline baselines: what is stored, what is used again, and which files are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import tiny
from conftest import Folders
from steelyard import baselines
from steelyard.baselines import (
    BaselineConfig,
    fingerprint,
    outlook,
    read_baselines,
    require_same_responses,
    sample_baselines,
)
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.models.reward import RewardModel
from steelyard.sampling import SamplingConfig
from steelyard.train.ppo import PPOConfig, train_ppo
from steelyard.variance import Variances, shrunk_means, variances


@pytest.fixture
def folders(language_model: Folders, reward_model: Folders) -> tuple[str, str]:
    return language_model("llama"), reward_model("llama")


def configure(planted: dict[str, str], folders: tuple[str, str], **settings: Any) -> BaselineConfig:
    base = {"policy": folders[0], "reward_model": folders[1], "prompts": planted["prompts"]}
    sampling = SamplingConfig(max_new_tokens=5)
    return BaselineConfig.model_validate(base | {"sampling": sampling, "max_length": 64} | settings)


def test_every_prompt_gets_k_scored_responses(
    folders: tuple[str, str], planted: dict[str, str], tmp_path: Path
) -> None:
    path = sample_baselines(configure(planted, folders), tmp_path)
    table = pq.read_table(path).to_pydict()
    assert len(table["key"]) == 36
    model = RewardModel.load(folders[1])
    for i in range(36):
        tree = Tree(tuple(table["prompt_tokens"][i]), (tuple(table["response_tokens"][i]),))
        assert table["key"][i] == table["prompt"][i] == table["key"][i // 3 * 3]
        assert table["reward"][i] == pytest.approx(float(model.score([tree], pad_id=0)[0, 0]), rel=1e-4, abs=1e-5)
        assert table["ended"][i] == (table["response_tokens"][i][-1] == tiny.EOS)
        words = [tiny.VOCABULARY[t] for t in table["response_tokens"][i] if t not in (0, 1, 2, 3, 4)]
        assert table["response"][i].split() == words
    stored = read_baselines(path, k=None, policy=folders[0], reward_model=folders[1])
    np.testing.assert_array_equal(np.concatenate(list(stored.values())), np.float32(table["reward"]))
    fewer = read_baselines(path, k=2, policy=folders[0], reward_model=folders[1])
    assert all((fewer[key] == stored[key][:2]).all() for key in stored)
    assert [p.suffix for p in tmp_path.iterdir()] == [".parquet", ".parquet"], "nothing half-written stays"


def test_what_is_there_is_used_again(
    folders: tuple[str, str], planted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = sample_baselines(configure(planted, folders, reward_model=None), tmp_path)
    assert "reward" not in pq.read_table(responses).column_names

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("sampled again")

    monkeypatch.setattr(baselines, "sample", refuse)
    scores = sample_baselines(configure(planted, folders), tmp_path)
    assert scores != responses
    scored = scores.stat().st_mtime_ns
    again = configure(planted, folders, sampling=SamplingConfig(max_new_tokens=5, rows=7), max_tokens=64)
    assert sample_baselines(again, tmp_path) == scores
    assert scores.stat().st_mtime_ns == scored
    for change in ({"seed": 1}, {"k": 2}, {"limit": 3}, {"sampling": SamplingConfig(max_new_tokens=6)}):
        with pytest.raises(AssertionError, match="sampled again"):
            sample_baselines(configure(planted, folders, **change), tmp_path)


def test_a_prompt_that_comes_twice_is_sampled_once(
    folders: tuple[str, str], planted: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "w1 w2"}, {"prompt": "w3"}, {"prompt": "w1 w2"}, {"prompt": "w4 " * 60}]
    prompts = tiny.write_jsonl(tmp_path / "p.jsonl", rows)
    path = sample_baselines(configure(planted, folders, prompts=prompts, k=2), tmp_path / "out")
    assert pq.read_table(path)["key"].to_pylist() == ["w1 w2", "w1 w2", "w3", "w3"], "a prompt without room is left out"
    assert "2 of 3 different prompts leave room" in capsys.readouterr().out
    with pytest.raises(InputError, match="0 of 1 different prompts leave room"):
        sample_baselines(configure(planted, folders, prompts=prompts, max_length=8, limit=1,
                                   sampling=SamplingConfig(max_new_tokens=7)), tmp_path / "b")  # fmt: skip


def test_a_text_and_the_same_text_as_a_turn_are_two_prompts(
    folders: tuple[str, str], planted: dict[str, str], tmp_path: Path
) -> None:
    """Without a chat template they are other tokens: one's baselines would be those of another question."""
    turn = {"prompt": [{"role": "user", "content": "w1 w2"}]}
    texts, turns = (
        tiny.write_jsonl(tmp_path / n, [r]) for n, r in (("a.jsonl", {"prompt": "w1 w2"}), ("b.jsonl", turn))
    )
    paths = [sample_baselines(configure(planted, folders, prompts=p), tmp_path / "out") for p in (texts, turns)]
    assert paths[0] != paths[1]
    asked = PPOConfig(
        policy=folders[0], reward_model=folders[1], prompts=turns, baselines=str(paths[0]), prompts_per_step=1,
        samples_per_prompt=1, sampling=SamplingConfig(max_new_tokens=5), max_length=64, steps=1,
    )  # fmt: skip
    with pytest.raises(InputError, match="no baselines for 1 of 1 prompts"):
        train_ppo(asked, tmp_path / "a", quiet=True)
    train_ppo(asked.model_copy(update={"baselines": str(paths[1])}), tmp_path / "b", quiet=True)


def test_rewards_that_are_no_numbers_are_not_kept(
    folders: tuple[str, str], planted: dict[str, str], tmp_path: Path
) -> None:
    model = RewardModel.load(folders[1])
    with torch.no_grad():
        model.hf.score.weight.fill_(3e38)  # finite, but no reward made of it is
    model.save(tmp_path / "rm", Encoder.load(folders[1]))
    with pytest.raises(InputError, match=r"rm: gives \d+ of 36 responses a reward that is not finite, first to prompt"):
        sample_baselines(configure(planted, folders, reward_model=str(tmp_path / "rm")), tmp_path / "out")
    assert [p.name.split("-")[0] for p in (tmp_path / "out").iterdir()] == ["responses"]
    path = sample_baselines(configure(planted, folders), tmp_path / "sound")
    table = pq.read_table(path)
    bad = pa.array([float("nan"), *table["reward"].to_pylist()[1:]])
    pq.write_table(table.set_column(table.column_names.index("reward"), "reward", bad), path)
    with pytest.raises(InputError, match="holds rewards that are not finite"):
        read_baselines(path, k=None, policy=folders[0], reward_model=folders[1])


def test_a_fingerprint_is_that_of_the_contents(folders: tuple[str, str], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[0], copy)
    assert fingerprint(copy) == fingerprint(folders[0])
    (copy / "training.log").write_text("not part of the model")
    assert fingerprint(copy) == fingerprint(folders[0])
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint(copy) != fingerprint(folders[0])
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")  # models.load opens such folders, too
    before = fingerprint(copy)
    (copy / "pytorch_model.bin").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert fingerprint(copy) != before


def test_a_damaged_file_is_told_as_such(folders: tuple[str, str], planted: dict[str, str], tmp_path: Path) -> None:
    path = sample_baselines(configure(planted, folders), tmp_path / "whole")
    whole = pq.read_table(path)
    damaged = {
        "no whole baseline file": [
            whole.drop_columns(["reward"]), whole.drop_columns(["key"]),
            whole.replace_schema_metadata({"steelyard": '{"reward_model": "x"}'}), whole.replace_schema_metadata({}),
        ],
        "holds 2 of 3 responses to the prompt .*; rows were lost": [whole.slice(1), whole.slice(0, len(whole) - 1)],
    }  # fmt: skip
    for match, tables in damaged.items():
        for number, table in enumerate(tables):
            pq.write_table(table, tmp_path / f"{number}.parquet")
            with pytest.raises(InputError, match=match):
                read_baselines(tmp_path / f"{number}.parquet", k=None, policy=folders[0], reward_model=folders[1])
    pq.write_table(whole.drop_columns(["response_tokens"]), tmp_path / "mute.parquet")
    require_same_responses([path])
    with pytest.raises(InputError, match=r"mute.parquet: is no whole baseline file"):
        require_same_responses([path, tmp_path / "mute.parquet"])


def test_another_precision_is_another_file(folders: tuple[str, str], planted: dict[str, str], tmp_path: Path) -> None:
    paths = {sample_baselines(configure(planted, folders, precision=p), tmp_path) for p in ("float32", "bfloat16")}
    assert len(paths) == 2


def test_files_of_other_models_are_refused(folders: tuple[str, str], planted: dict[str, str], tmp_path: Path) -> None:
    policy, reward = folders
    path = sample_baselines(configure(planted, folders), tmp_path)

    def refuse(match: str, path: Path = path, *, k: int | None = None, policy: str = policy, rm: str = reward) -> None:
        with pytest.raises(InputError, match=match):
            read_baselines(path, k=k, policy=policy, reward_model=rm)

    refuse("sampled from another model .* run `steelyard sample` with this policy", policy=reward)
    refuse("scored by another model .* run `steelyard sample` with this reward model", rm=policy)
    refuse("holds 3 responses per prompt, 4 are wanted; sample again with k = 4", k=4)
    refuse("none.parquet: no such file; `steelyard sample` makes", tmp_path / "none.parquet")
    refuse(r"a folder, not a file: name one of its scores-\*\.parquet", tmp_path)
    refuse("must be a baseline file", Path(planted["prompts"]))
    refuse("have no scores", sample_baselines(configure(planted, folders, reward_model=None), tmp_path))


def test_variances_by_hand() -> None:
    found = variances(np.array([[1.0, 3.0], [5.0, 7.0]]))  # within: 2 and 2; the means 2 and 6 vary by 8
    assert found.within == pytest.approx(2)
    assert found.between == pytest.approx(7)
    assert found.plain == pytest.approx(9)
    assert [found.contrastive(k) for k in (1, 2)] == pytest.approx([4, 3])
    assert found.reliability(2) == pytest.approx(7 / 8)
    assert found.shrunk(2) == pytest.approx(2 + 7 / 8)
    with pytest.raises(ValueError, match="K >= 2"):
        variances(np.zeros((4, 1)))


def test_shrunk_means_by_hand() -> None:
    """Means 2 and 6 around 4, an eighth of their variance noise: drawn in by an eighth."""
    assert shrunk_means(np.array([[1.0, 3.0], [5.0, 7.0]])) == pytest.approx([2.25, 5.75])
    # No more between prompts than noise explains: nothing of a prompt's own is believed.
    assert shrunk_means(np.array([[1.0, 5.0], [2.0, 4.0]])) == pytest.approx([3.0, 3.0])
    assert shrunk_means(np.full((3, 2), 1.5)) == pytest.approx([1.5] * 3)


@pytest.mark.parametrize("between", [0.0, 0.05, 0.3, 3.0])
@pytest.mark.parametrize("k", [2, 5])
def test_shrunk_baselines_never_add_variance(between: float, k: int) -> None:
    """Simulated: rewards of new responses, less what the baselines of the same prompts say, in each of three ways."""
    rng = np.random.default_rng(0)
    level = rng.normal(size=(40_000, 1)) * between**0.5
    baselines, rewards = level + rng.normal(size=(40_000, k)), (level + rng.normal(size=(40_000, 1)))[:, 0]
    plain, contrastive = rewards.var(), (rewards - baselines.mean(1)).var()
    shrunk = (rewards - shrunk_means(baselines)).var()
    assert shrunk == pytest.approx(Variances(between, 1.0).shrunk(k), rel=0.03)
    assert shrunk <= 1.002 * min(plain, contrastive)
    if between == 0.3:
        assert shrunk < 0.97 * min(plain, contrastive)


def test_the_outlook_is_the_ratio_of_the_variances(tmp_path: Path) -> None:
    def said(rewards: list[float], k: int) -> str:
        path = tmp_path / f"{k}-{len(rewards)}.parquet"
        table = pa.table({"reward": rewards}).replace_schema_metadata({"steelyard": json.dumps({"k": k})})
        pq.write_table(table, path)
        return outlook(path)

    # Between 7, within 2: plain 9, contrastive 2 (1 + 1/2) = 3.
    assert "78 %" in said([1.0, 3.0, 5.0, 7.0], 2)
    assert "0.33 times" in said([1.0, 3.0, 5.0, 7.0], 2)
    assert "shrunk 0.32 times" in said([1.0, 3.0, 5.0, 7.0], 2)
    # Nothing between prompts: contrastive rewards only add the baselines' own noise.
    assert "1.50 times" in said([1.0, 3.0, 3.0, 1.0], 2)
    assert "shrunk 1.00 times" in said([1.0, 3.0, 3.0, 1.0], 2)
    assert "too few" in said([1.0, 2.0], 1)
    assert "same reward" in said([1.0] * 6, 2)
