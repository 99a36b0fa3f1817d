"""The setting `device`: what it takes, where it goes, and that older run folders do not mind it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from pydantic import ValidationError

from conftest import Folders
from steelyard import config, rounds_settings
from steelyard.errors import InputError
from steelyard.models import load
from steelyard.models.next_token import Nucleus
from steelyard.models.policy import PolicyModel
from steelyard.parallel import default_workers
from steelyard.ppo_settings import PPOConfig, check
from steelyard.recipe import PolicyConfig, Recipe, baseline_config, evaluation_config, ppo_config, strength_config
from steelyard.rounds_settings import Round, RoundsConfig
from steelyard.run_dir import RunDir
from steelyard.settings import checked, parse
from steelyard.stages import build_reward
from steelyard.study import contrastive, metarm, policy_config, strength
from steelyard.study import rounds as study_rounds
from steelyard.study.contrastive import ContrastiveStudy
from steelyard.study.data import Input, plan_models
from steelyard.study.data_config import DataStudy
from steelyard.study.metarm import MetaRMStudy
from steelyard.study.policy_config import PolicyStudy
from steelyard.study.rounds import RoundsStudy
from steelyard.study.strength import StrengthStudy
from steelyard.train.metarm import MetaRMConfig
from steelyard.train.reward import RewardConfig
from steelyard.types import Preference, Strength

PATHS = {"policy": "p", "reward_model": "r", "prompts": "x"}


@pytest.fixture
def one_gpu() -> Iterator[None]:
    with mock.patch.object(torch.cuda, "device_count", return_value=1):
        yield


class TestWhatItTakes:
    @pytest.mark.parametrize("name", ["cpu", "cuda", "cuda:0"])
    def test_devices_that_are_there(self, name: str, one_gpu: None) -> None:
        assert RewardConfig(data="", model="", device=name).device == name

    @pytest.mark.parametrize("name", ["gpu", "auto", "cuda:", "cuda:x", "cpu:0", "mps", "cuda:-1", ""])
    def test_other_names(self, name: str, one_gpu: None) -> None:
        with pytest.raises(ValidationError, match="must be cpu, cuda or cuda:N"):
            RewardConfig(data="", model="", device=name)

    def test_a_device_that_is_not_there_is_refused_by_field(self, one_gpu: None) -> None:
        with mock.patch.object(torch.version, "cuda", "13.0"), pytest.raises(InputError) as error:
            checked(RewardConfig, {"data": "", "model": "", "device": "cuda:1"})
        assert str(error.value).startswith(
            "device: 'cuda:1' cannot be reached: torch finds 1 CUDA devices here; use cpu"
        )

    def test_a_torch_without_cuda_says_so(self) -> None:
        with (
            mock.patch.object(torch.version, "cuda", None),
            mock.patch.object(torch.cuda, "device_count", return_value=0),
            pytest.raises(InputError, match="--device: 'cuda' cannot be reached: this torch is built without CUDA"),
        ):
            parse(RewardConfig, ["--data", "d", "--model", "m", "--device", "cuda"], verb="train reward", about="")


class TestRunFolders:
    def test_a_run_from_before_there_were_devices_goes_on(self, tmp_path: Path) -> None:
        config = RewardConfig(data="d", model="m")
        RunDir.open(tmp_path, config, resume=False).close()
        stored = json.loads((tmp_path / "config.json").read_text())
        assert "device" not in stored
        RunDir.open(tmp_path, config, resume=True).close()

    def test_another_device_is_another_run(self, tmp_path: Path, one_gpu: None) -> None:
        RunDir.open(tmp_path, RewardConfig(data="d", model="m"), resume=False).close()
        with pytest.raises(InputError, match=r'device: stored \(absent\), given "cuda"'):
            RunDir.open(tmp_path, RewardConfig(data="d", model="m", device="cuda"), resume=True)

    def test_a_resolved_file_counts_as_before(self) -> None:
        """Every field is set there but the device, which is left out: none counts as chosen at its default."""
        stored = PPOConfig(**PATHS, reward="plain").model_dump(mode="json")
        assert "device" not in stored
        again = PPOConfig.model_validate(stored)
        assert again.given() == {"policy", "reward_model", "prompts", "reward"}
        check(again)


class TestWhereItGoes:
    def test_a_recipe_fills_it_in_like_the_seed(self, one_gpu: None) -> None:
        policy = PolicyConfig(ppo={"device": "cpu"}, evaluate={"k": 3})
        recipe = Recipe(world={}, device="cuda", policy=policy, strength={"members": 2})
        assert strength_config(recipe, "in-sample", data="", model="").device == "cuda"
        assert build_reward(recipe)["device"] == evaluation_config(recipe, policy).device == "cuda"
        assert baseline_config(recipe, policy, model="", prompts="", reward_model="").device == "cuda"
        paths = {"model": "", "prompts": "", "reward_model": "", "baselines": "", "gold": None}
        assert ppo_config(recipe, policy, "plain PPO", **paths).device == "cpu"  # type: ignore[arg-type]

    def test_rounds_fill_it_in(self, one_gpu: None) -> None:
        config = RoundsConfig(
            sft="s",
            reward_model="r",
            prompts="p",
            eval_prompts="e",
            data="d",
            device="cuda",
            meta_sample={"device": "cpu"},
        )
        now = Round(1, "p", "r")
        stages = [
            rounds_settings.ppo_config(config, now, baselines="b"),
            rounds_settings.reward_config(config, 1, model="m", meta="x"),
            rounds_settings.baselines_config(config, now),
            rounds_settings.meta_config(config, 1, "p"),
        ]
        assert [stage.device for stage in stages] == ["cuda", "cuda", "cuda", "cpu"]

    def test_studies_fill_it_in(self, one_gpu: None, tmp_path: Path) -> None:
        on, bare = {"device": "cuda"}, {"data": "", "model": ""}
        contrasted = ContrastiveStudy(world={}, **on)
        meta = MetaRMStudy(**on)
        rounds = RoundsStudy(**on)
        cells = [{"arm": ["plain", "DPO"]}]
        policies = PolicyStudy(cells=cells, arms={"plain": {"reward": "plain"}, "DPO": {"method": "dpo"}}, **on)
        plain, dpo = policies.grid()
        strengths = StrengthStudy(world={}, **on)
        told: dict[str, str] = {}
        for name, configs in {
            "contrastive": [contrastive.reward_config(contrasted, "plain", 0, validation={}, **bare)],
            "metarm": [
                *metarm.shift_configs(meta, model="", files=None, out=tmp_path),
                *(metarm.config_of(meta, a, 0, validation={}, responses={}, **bare) for a in metarm.arms(meta)),
            ],
            "rounds": [
                study_rounds.first_config(rounds, 0, model="", files=None),
                *(study_rounds.rounds_config(rounds, arm, 0, model="", first="", files=None) for arm in rounds.arms),
            ],
            "policy": [
                policy_config.ppo_config(
                    policies, plain, 0, policy="", rewards=("r",), prompts="", baselines="", gold=None
                ),
                policy_config.dpo_config(policies, dpo, 0, **bare),
                policy_config.baseline_config(policies, 0, policy="", prompts="", reward_model=""),
                policy_config.evaluation_config(policies),
                policy_config.recipe_of(policies, 0),
            ],
            "strength": [
                strength.recipe_of(strengths, 0),
                *(strength.config_of(strengths, kind, "in-sample", 0, **bare) for kind in strengths.backends),
            ],
        }.items():
            told |= {f"{name}, {i}: {type(config).__name__}": config.device for i, config in enumerate(configs)}
        assert set(told.values()) == {"cuda"}, told

    def test_a_study_of_data_trains_where_it_says(self, one_gpu: None, tmp_path: Path) -> None:
        study = DataStudy(world={}, device="cuda", analyses=["bands"], bands={"count": 2}, seeds=[0])
        pairs = [Preference(str(i), f"q{i}", "a", "b") for i in range(80)]
        strengths = [Strength(i / 40 - 1, 0.1, 1, 2, 0.5) for i in range(80)]
        _, jobs = plan_models(study, Input(pairs, strengths, None, {"original": "v"}, "m", tmp_path, "in-sample"))
        assert [job.config.device for job in jobs] == ["cuda", "cuda"]

    def test_jobs_on_a_gpu_run_one_by_one(self) -> None:
        assert default_workers("cuda") == default_workers("cuda:1") == 1


class TestFastestPrecision:
    @pytest.mark.parametrize("faster", ["float32", "bfloat16"])
    def test_auto_becomes_what_is_faster(self, faster: str, tmp_path: Path) -> None:
        with mock.patch.object(config, "fastest_precision", return_value=faster) as measured:
            made = RewardConfig(data="d", model="m", precision="auto")
            assert made.precision == faster
            measured.assert_called_once_with("cpu")
            args = ["--data", "d", "--model", "m", "--precision", "auto"]
            read, _ = parse(RewardConfig, args, verb="train reward", about="")
            assert read.precision == faster
            RunDir.open(tmp_path, made, resume=False).close()
        assert json.loads((tmp_path / "config.json").read_text())["precision"] == faster

    def test_it_is_asked_of_the_device(self, one_gpu: None) -> None:
        with mock.patch.object(config, "fastest_precision", return_value="bfloat16") as measured:
            assert RewardConfig(data="d", model="m", precision="auto", device="cuda").precision == "bfloat16"
        measured.assert_called_once_with("cuda")

    def test_a_recipe_scores_as_it_trains(self) -> None:
        with mock.patch.object(config, "fastest_precision", return_value="bfloat16"):
            assert build_reward(Recipe(world={}, reward={"precision": "auto"}))["precision"] == "bfloat16"

    @pytest.mark.parametrize(
        ("bfloat16", "float32", "faster"), [(1.0, 2.0, "bfloat16"), (1.0, 1.1, "float32"), (2.0, 1.0, "float32")]
    )
    def test_the_shortest_of_a_few_products_counts(self, bfloat16: float, float32: float, faster: str) -> None:
        times = [t for seconds in (bfloat16, float32) for longer in (5, 1, 0, 3) for t in (0.0, seconds + longer)]
        config.fastest_precision.cache_clear()
        with mock.patch.object(time, "perf_counter", side_effect=times):
            assert config.fastest_precision("cpu") == faster
        config.fastest_precision.cache_clear()

    def test_only_configurations_choose(self, language_model: Folders) -> None:
        with pytest.raises(ValueError, match="a model computes in float32 or bfloat16"):
            PolicyModel.load(language_model("llama"), precision="auto")
        with pytest.raises(ValidationError, match="activation_precision"):
            RewardConfig(data="d", model="m", activation_cache="c", activation_precision="auto")  # type: ignore[arg-type]

    def test_metarm_stays_exact(self) -> None:
        with (
            mock.patch.object(config, "fastest_precision", return_value="bfloat16"),
            pytest.raises(ValidationError, match="must be float32"),
        ):
            MetaRMConfig(data="d", model="m", meta="x", precision="auto")


class TestSlowBfloat16:
    @pytest.mark.parametrize(
        ("precision", "device", "capabilities", "warned"),
        [
            ("bfloat16", "cpu", {"avx2": True, "avx512_bf16": False}, True),
            ("bfloat16", "cpu", {"avx512_bf16": True}, False),
            ("bfloat16", "cpu", {"architecture": "aarch64", "bf16": True}, False),
            ("float32", "cpu", {"avx2": True}, False),
            ("bfloat16", "cuda", {"avx2": True}, False),
        ],
    )
    def test_it_is_said_once(
        self, precision: load.Precision, device: str, capabilities: dict[str, bool], warned: bool,
        capsys: pytest.CaptureFixture[str],
    ) -> None:  # fmt: skip
        load._say_slow.cache_clear()
        with mock.patch.object(torch.cpu, "get_capabilities", return_value=capabilities):
            for _ in range(2):
                load.say_if_slow(precision, torch.device(device))
        assert capsys.readouterr().err.count("no bfloat16 instructions") == warned


def test_a_nucleus_in_parts() -> None:
    whole = Nucleus(torch.tensor([3, 1, 2, 0, 2]), torch.tensor([2, 1, 2]))
    first, second = whole.split([2, 1])
    assert (first.tokens_L.tolist(), first.counts_n.tolist()) == ([3, 1, 2], [2, 1])
    assert (second.tokens_L.tolist(), second.counts_n.tolist()) == ([0, 2], [2])
    assert whole.split([3]) == [whole]
