"""`study policy` in tiny: the grid, what its curves compute, what its runs leave, how it grows, and what it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from steelyard.cli import main
from steelyard.data.encode import Encoder
from steelyard.data.load import load_preferences, load_prompts
from steelyard.errors import InputError
from steelyard.evaluate.policy import answer
from steelyard.report.blocks import Figure, Table
from steelyard.report.policy_study_records import PolicyStudyFile
from steelyard.report.policy_study_sections import policy_study_section
from steelyard.report.read import Run
from steelyard.simulate.world import gold
from steelyard.study.policy import run_policy_study
from steelyard.study.policy_config import (
    Cell,
    PolicyStudy,
    check,
    control_of,
    dpo_config,
    evaluation_config,
    ppo_config,
)
from steelyard.study.policy_curves import (
    at_kl,
    contrasted,
    correlation,
    correlation_interval,
    errors,
    expected_contrast,
    expected_reward,
    flip_table,
    line,
    reached,
    simulate_contrast,
)
from steelyard.study.policy_jobs import Exam, load_arrays
from steelyard.study.policy_places import labels_of, reward_of, run_of, start_of
from steelyard.study.policy_runs import Run as Looks
from steelyard.study.policy_runs import Runs, value_row
from steelyard.study.policy_tables import comparisons, differences, ends, frontier
from steelyard.variance import variances

OPTIM = {"lr": 3e-3}
DRAWN = {"max_new_tokens": 6}
TINY: dict[str, Any] = {
    "name": "Tiny",
    "seeds": [0, 1],
    "world": {"sft": 24, "preferences": 40, "validation": 12, "rl_prompts": 8, "eval_prompts": 6},
    "sft": {
        "scratch": {"layers": 1, "width": 16, "heads": 2, "context": 192}, "batch_size": 8, "max_length": 160,
        "optim": OPTIM,
    },
    "strength": {"members": 2, "max_length": 160},
    "repairs": {
        "oracle": {"recipe": "oracle flip"}, "flip": {"recipe": "flip", "q": 0.2},
        "SimCSE": {"recipe": "keep", "reward": {"contrastive": {"method": "simcse"}, "optim": {"lr": 2e-3}}},
    },
    "reward": {"batch_size": 8, "max_length": 160, "optim": OPTIM},
    "baselines": {"k": 3, "max_length": 160, "sampling": DRAWN},
    "ppo": {
        "steps": 4, "prompts_per_step": 4, "samples_per_prompt": 2, "max_length": 160, "sampling": DRAWN,
        "actor": {"lr": 1e-2}, "critic": {"lr": 1e-2}, "kl_coef": 0.05, "scale_warmup": 8,
    },
    "dpo": {"batch_size": 8, "max_length": 160, "optim": {"lr": 1e-2}},
    "arms": {
        "plain": {"reward": "plain"}, "contrastive": {"reward": "contrastive", "k": 2},
        "RLOO": {"reward": "plain", "advantage": "rloo"},
        "UWO": {"reward": "plain", "members": 2, "aggregate": "uncertainty-weighted"},
        "UWO, PAR": {"reward": "par", "members": 2, "aggregate": "uncertainty-weighted"},
        "stopped": {"reward": "plain", "max_kl": 1e-9}, "DPO": {"method": "dpo"},
    },
    "cells": [
        {"noise": ["uniform", "systematic"], "rate": [0, 0.2], "arm": "plain"},
        {"noise": "systematic", "rate": 0.2, "arm": ["contrastive", "RLOO", "UWO", "UWO, PAR", "stopped", "DPO"]},
        {"noise": "systematic", "rate": 0.2, "repair": "oracle", "arm": ["plain", "contrastive"]},
    ],
    "recommended": {"repair": "oracle", "arm": "contrastive"},
    "looks": 2,
    "at_kl": [1e-3, 50],
    "evaluate": {"k": 2, "sampling": DRAWN, "strata": 2},
    "workers": 1,
}  # fmt: skip
NOISY = ("systematic", 0.2, "none")


def study(**changes: Any) -> PolicyStudy:
    return PolicyStudy(**TINY | changes)


def start(folder: Path, *more: str, **changes: Any) -> int:
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return main(["study", "policy", str(folder / "study.yaml"), "--out", str(folder / "out"), *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    root = tmp_path_factory.mktemp("policy-study")
    assert start(root, compare=[{"of": {"repair": "oracle", "arm": "plain"}, "less": {"arm": "DPO"}}]) == 0
    return root / "out"


@pytest.fixture(scope="module")
def found(done: Path) -> dict[str, Any]:
    return json.loads((done / "study.json").read_text())


class TestCurves:
    def test_interpolates_in_the_root_of_the_distance(self) -> None:
        gold_JX, kl_J = np.array([[0.0, 10.0], [1.0, 10.0], [3.0, 20.0]]), np.array([0.0, 1.0, 4.0])
        assert at_kl(gold_JX, kl_J, 2.25) == pytest.approx([2.0, 15.0])  # the root 1.5 lies half way from 1 to 2
        assert at_kl(gold_JX, kl_J, 0.25) == pytest.approx([0.5, 10.0])
        assert at_kl(gold_JX, kl_J, 0.0) == pytest.approx([0.0, 10.0])
        assert at_kl(gold_JX, kl_J, 4.01) is None

    def test_a_runs_own_greatest_distance_is_always_found(self) -> None:
        for kl in np.random.default_rng(0).uniform(0.01, 9, 200):
            assert at_kl(np.array([[0.0], [1.0]]), np.array([0.0, kl]), reached(np.array([0.0, kl]))) == pytest.approx(
                1
            )

    def test_takes_the_first_crossing_of_a_run_that_turns_back(self) -> None:
        values, kl_J = np.array([[0.0], [2.0], [5.0], [7.0]]), np.array([0.0, 4.0, 1.0, 9.0])
        assert at_kl(values, kl_J, 1.0) == pytest.approx([1.0])
        assert at_kl(values, np.array([0.3, -0.1, 0.0, -0.2]), 0.01) is None  # an estimate below 0 is no distance

    def test_refuses_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="one distance a look"):
            at_kl(np.zeros((3, 2)), np.zeros(2), 1.0)
        with pytest.raises(ValueError, match="at least 0"):
            at_kl(np.zeros((2, 2)), np.zeros(2), -1.0)

    def test_the_prediction_holds_for_normal_rewards(self) -> None:
        rng = np.random.default_rng(3)
        level = rng.normal(0, 2, (40_000, 1))
        base, current = (level + rng.normal(0, 1, (40_000, k)) for k in (3, 2))
        split = variances(base)
        assert split.between == pytest.approx(4, rel=0.03)
        assert split.within == pytest.approx(1, rel=0.03)
        assert current.var() == pytest.approx(split.plain, rel=0.03)
        for k in (1, 3):
            assert contrasted(current, base, k).var() == pytest.approx(split.contrastive(k), rel=0.03)

    def test_correlation_sees_what_a_prompt_shares(self) -> None:
        rng = np.random.default_rng(4)
        level = rng.normal(0, 1, (50_000, 1))
        a, b = (level + rng.normal(0, 1, (50_000, k)) for k in (2, 3))
        assert correlation(a, b) == pytest.approx(0.5, abs=0.02)  # tau^2 / (tau^2 + s^2)
        assert correlation(a, b[:, ::-1]) == pytest.approx(correlation(a, b))
        assert correlation(a - level, b - level) == pytest.approx(0, abs=0.02)
        assert correlation(np.ones((4, 2)), b[:4]) == 0
        row = correlation_interval([a[:200], a[200:400]], [b[:200], b[200:400]])
        assert row["low"] < row["value"] < row["high"]
        assert len(row["seeds"]) == 2

    def test_the_seeds_deviations_are_stretched_for_their_small_number(self) -> None:
        """Correlations 1 and -1 whatever prompts are drawn: two drawn seeds have mean 1, 0, 0 or -1, times sqrt(2)."""
        a = np.arange(50.0)[:, None]
        row = correlation_interval([a, a], [a, -a])
        assert (row["value"], row["seeds"]) == (pytest.approx(0), pytest.approx([1, -1]))
        assert (row["low"], row["high"]) == pytest.approx((-np.sqrt(2), np.sqrt(2)))

    def test_one_number_of_one_seed_has_no_interval(self) -> None:
        assert value_row([0.5]) == {"value": 0.5, "low": None, "high": None, "seeds": [0.5]}
        # Two seeds, 0 and 2: the drawn means are 0, 1, 1, 2, stretched around 1.
        row = value_row([0.0, 2.0])
        assert (row["low"], row["high"]) == pytest.approx((1 - np.sqrt(2), 1 + np.sqrt(2)))
        # One seed with responses has one over its prompts.
        row = value_row([np.array([0.0, 1.0])], [0, 1])
        assert (row["value"], row["low"], row["high"]) == (0.5, 0.0, 1.0)

    def test_errors_leave_nothing_of_a_line(self) -> None:
        truth = np.random.default_rng(5).normal(size=(7, 2))
        fitted = line(3 - 2 * truth, truth)
        assert fitted == pytest.approx((3, -2))
        assert errors(3 - 2 * truth, truth, fitted) == pytest.approx(0)


class TestTables:
    """Two cells of two seeds with looks made by hand: gold follows the root of the distance, and turns."""

    CELLS = (Cell(*NOISY, "contrastive", 0.05), Cell(*NOISY, "plain", 0.05))

    def runs(self) -> Runs:
        rng = np.random.default_rng(0)
        noise = rng.normal(size=(3, 2))  # prompts x answers: the same of all runs, so differences are free of it
        of: dict[Cell, dict[int, Looks]] = {}
        for cell, slope in zip(self.CELLS, (2.0, 1.0), strict=True):
            of[cell] = {}
            for seed, far in ((0, 3.0), (1, 1.5 if cell.arm == "plain" else 4.0)):
                roots = np.array([0.0, far / 2, far])
                value = slope * roots - np.array([0, 0, 1.25 * slope * far])  # the last look has turned
                columns = {
                    "gold": value[:, None, None] + noise, "proxy": roots[:, None, None] + noise,
                    "kl": np.broadcast_to((roots**2)[:, None, None], (3, 3, 2)),
                    "length": np.full((3, 3, 2), 7.0), "ended": np.ones((3, 3, 2)),
                }  # fmt: skip
                of[cell][seed] = Looks(Path("nowhere"), [0, 5, 10], columns)
        return Runs(of, [], [0, 0, 1, 1, 2, 2])

    def test_differences_at_equal_distance(self) -> None:
        made = study(cells=[{"noise": "systematic", "rate": 0.2, "arm": ["contrastive", "plain"]}], recommended=None)
        made = made.model_copy(update={"at_kl": (1.0, 4.0, 25.0)})
        rows = {d["at"]: d for d in differences(made, list(self.CELLS), self.runs()) if d["kind"] == "arm"}
        # At 1 nat: seed 0 on the first stretch of both runs, 2 against 1. Seed 1: on the first of contrastive, 2, and
        # of plain between .75 (there .75) and 1.5 (1.5 - 1.875 = -.375): a third of the way, .375.
        assert rows["KL 1"]["seeds"] == pytest.approx([1.0, 2 - 0.375])
        # At 4 nats plain PPO of seed 1 never is; at 25 nobody.
        assert (rows["KL 4"]["n_seeds"], rows["KL 4"]["kl"]) == (1, None)
        third = (2 - 1.5) / 1.5
        between = [1.5 * slope + third * (-0.75 * slope - 1.5 * slope) for slope in (2.0, 1.0)]
        assert rows["KL 4"]["seeds"] == pytest.approx([between[0] - between[1]])
        assert "KL 25" not in rows
        # The greatest common distance is each seed's own: 9 and 2.25 nats.
        common = rows["greatest KL that both reached"]
        assert common["kl"] == pytest.approx((9 + 2.25) / 2)
        assert common["seeds"] == pytest.approx([-0.75 * 2 + 0.75, 3.0 - (1.5 - 1.875)], abs=1e-9)
        assert rows["end of the run"]["seeds"] == pytest.approx([(2 - 1) * (3 - 3.75), 2 * (4 - 5) - (1.5 - 1.875)])

    def test_curves_and_ends(self) -> None:
        runs = self.runs()
        points = frontier(self.CELLS[0], runs)
        assert [p["step"] for p in points] == [0, 5, 10]
        assert [p["root_kl"] for p in points] == pytest.approx([0, 1.75, 3.5])  # means of 1.5 and 2, 3 and 4
        start = points[0]["gold"]["value"]
        assert [p["gold"]["value"] - start for p in points] == pytest.approx([0, 2 * 1.75, 2 * (3.5 - 1.25 * 3.5)])
        (end,) = ends(self.CELLS[0], runs)
        assert end["best_kl"] == pytest.approx((1.5**2 + 2**2) / 2)  # both seeds are best at the middle look
        assert end["best"]["value"] - start == pytest.approx(3.5)
        assert end["lost"]["seeds"] == pytest.approx([-0.75 * 2 - 3, -2 - 4])
        assert (end["kl"], end["length"], end["n_seeds"]) == (pytest.approx((9 + 16) / 2), 7.0, 2)


class TestFlips:
    def test_identity_by_hand(self) -> None:
        assert expected_reward(0.5, 0.2, 0.1) == pytest.approx(0.55)  # 0.5 x 0.9 right, 0.5 x 0.2 taken for right
        assert expected_contrast(0.9, 0.4, 0.2, 0.1) == pytest.approx(0.35)
        assert expected_contrast(0.9, 0.4, 0.0, 0.3) == pytest.approx(expected_contrast(0.9, 0.4, 0.3, 0.0))
        assert expected_contrast(0.9, 0.4, 0.5, 0.5) == pytest.approx(0)  # a coin says nothing
        with pytest.raises(ValueError, match="probabilities"):
            expected_reward(1.2, 0, 0)

    def test_identity_by_enumeration(self) -> None:
        """E r over both truths and both flips."""
        for p, c0, c1 in ((0.3, 0.2, 0.4), (1.0, 0.7, 0.1)):
            total = sum(
                chance * flip * reward
                for true, chance in ((1, p), (0, 1 - p))
                for reward, flip in ((1, 1 - c1 if true else c0), (0, c1 if true else 1 - c0))
            )
            assert expected_reward(p, c0, c1) == pytest.approx(total)

    def test_simulation_agrees(self) -> None:
        for row in flip_table(draws=20_000, seed=1):
            assert abs(row["simulated"] - row["predicted"]) < 4 * row["error"]
        few, many = (simulate_contrast(0.7, 0.4, 0.2, 0.2, k=k, draws=20_000, seed=2)[1] for k in (1, 5))
        # var r = 0.62 x 0.38 and 0.44 x 0.56; the second is divided by k.
        assert (few / many) ** 2 == pytest.approx((0.2356 + 0.2464) / (0.2356 + 0.2464 / 5), rel=0.05)


class TestGrid:
    def test_is_the_union_of_its_blocks(self) -> None:
        grid = study().grid()
        assert [c.world for c in grid[:3]] == ["clean", "uniform 20 %", "systematic 20 %"]
        assert len(grid) == 11
        assert Cell("systematic", 0.2, "none", "DPO", None) in grid
        assert Cell(*NOISY, "contrastive", 0.05) in grid
        assert len({c.place for c in grid}) == len(grid)

    def test_cells_of_the_same_labels_stand_together(self) -> None:
        later = {"noise": ["systematic", "uniform"], "rate": 0.2, "arm": "RLOO"}
        grid = study(cells=[*TINY["cells"], later], recommended=None).grid()
        runs = [key for key, _ in itertools.groupby(grid, key=lambda c: c.data)]
        assert len(runs) == len(set(runs))
        assert [world for world, _ in itertools.groupby(c.world for c in grid)] == [
            "clean", "uniform 20 %", "systematic 20 %",
        ]  # fmt: skip
        assert [c.arm for c in grid if c.data == ("uniform 20 %", "none")] == ["plain", "RLOO"]

    def test_controls(self) -> None:
        cells = [*TINY["cells"], {"noise": "systematic", "rate": 0.2, "arm": ["plain", "contrastive"], "kl_coef": 0}]
        wide = study(cells=cells)
        grid = wide.grid()
        for weight in (0.05, 0.0):
            control = control_of(wide, Cell(*NOISY, "contrastive", weight), grid)
            assert control == Cell(*NOISY, "plain", weight)
        assert control_of(wide, Cell(*NOISY, "DPO", None), grid) == Cell(*NOISY, "plain", 0.05)

    def test_what_is_compared_where_plain_has_other_kl_weights(self) -> None:
        cells = [*TINY["cells"], {"noise": "systematic", "rate": 0.2, "arm": "plain", "kl_coef": [0, 0.2]}]
        wide, data = study(cells=cells), ("systematic 20 %", "none")
        found = [(kind, a, b) for kind, a, b in comparisons(wide, wide.grid()) if a.data == data == b.data]
        plain = {w: Cell(*NOISY, "plain", w) for w in (0, 0.05, 0.2)}
        weights = [(a, b) for kind, a, b in found if kind == "KL weight"]
        assert weights == [(plain[0], plain[0.05]), (plain[0.2], plain[0.05])]
        heavier = [(a, b) for kind, a, b in found if kind == "arm, heavier KL"]
        arms = {c.arm for c in wide.grid() if c.data == data} - {"plain", "DPO"}
        assert {a.arm for a, _ in heavier} == arms
        assert {b for _, b in heavier} == {plain[0.2]}

    def test_a_repair_is_set_against_the_labels_and_its_own_control(self) -> None:
        cells = [
            {"noise": "systematic", "rate": 0.2, "repair": ["none", "SimCSE", "control", "oracle"], "arm": "plain"}
        ]
        made = study(cells=cells, recommended=None, against={"SimCSE": "control"})
        found = {(a.repair, b.repair) for kind, a, b in comparisons(made, made.grid()) if kind == "repair"}
        assert found == {(r, "none") for r in ("SimCSE", "control", "oracle")} | {("SimCSE", "control")}

    def test_the_kl_penalty_is_scaled_like_the_reward(self) -> None:
        def config(arm: dict[str, Any], weight: float) -> Any:
            one = study(arms=TINY["arms"] | {"it": arm})
            paths: dict[str, Any] = {"policy": "", "rewards": ("",), "prompts": "", "baselines": ("",), "gold": None}
            return ppo_config(one, Cell(*NOISY, "it", weight), 3, **paths)

        assert config({"reward": "contrastive"}, 0.05).scale_kl
        assert config({"reward": "plain", "scaling": "std"}, 0.05).scale_kl
        assert not config({"reward": "contrastive"}, 0.0).scale_kl  # there is no penalty
        assert not config({"reward": "contrastive", "scaling": "none"}, 0.05).scale_kl
        # What all arms share must not scale an arm after all.
        shared = study(ppo=TINY["ppo"] | {"scaling": "none"})
        cell = Cell("none", 0.0, "none", "contrastive", 0.05)
        named: dict[str, Any] = {"policy": "p", "rewards": ("r",), "prompts": "q", "baselines": ("b",), "gold": None}
        assert ppo_config(shared, cell, 0, **named).scaling == "none"
        shared = study(ppo=TINY["ppo"] | {"baseline": "shrunk", "lsc_percentile": 50, "group_std": False})
        alone = ppo_config(shared, Cell(*NOISY, "plain", 0.05), 0, **named)
        assert (alone.baseline, alone.lsc_percentile, alone.group_std) == ("mean", 85, True)
        assert ppo_config(shared, cell, 0, **named).baseline == "shrunk"
        assert not config({"reward": "plain"}, 0.05).scale_kl
        assert config({"reward": "plain"}, 0.3).kl_coef == 0.3

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"arms": {"contrastive": {}}}, "arms.plain: all arms are compared"),
            ({"arms": TINY["arms"] | {"contrastive": {"k": 9}}}, "baselines.k: must be at least the 9"),
            ({"arms": TINY["arms"] | {"contrastive": {"scale_kl": False}}}, "scale_kl: the study decides"),
            ({"arms": TINY["arms"] | {"RLOO": {"advantage": "rloo"}}}, "arms.RLOO: advantage = rloo with reward"),
            ({"arms": TINY["arms"] | {"UWO": {"reward": "plain", "members": 0}}}, "arms.UWO.members"),
            ({"arms": TINY["arms"] | {"DPO": {"method": "ipo"}}}, "arms.DPO.method: must be ppo or dpo"),
            ({"cells": [{"rate": 0.2, "arm": "plain"}]}, "cells.0.noise: none goes with rate 0"),
            ({"cells": [{"arm": "other"}]}, "cells.0.arm: must be of"),
            ({"cells": [{"arm": "plain", "repair": "other"}]}, "cells.0.repair: must be of"),
            ({"cells": [{"arm": "contrastive"}], "recommended": None}, "no plain arm"),
            ({"recommended": {"arm": "RLOO", "repair": "oracle"}}, "recommended: no cell"),
            ({"compare": [{"of": {"arm": "RLOO", "kl_coef": 9}, "less": {"arm": "DPO"}}]}, "compare.0: no labels have"),
            ({"recommended": {"arm": "ROLO"}}, "recommended.arm: must be of"),
            ({"compare": [{"of": {"arm": "plain"}, "less": {"arm": "ROLO"}}]}, "compare.0.less.arm: must be of"),
            ({"compare": [{"of": {"arm": "plain", "repair": "o"}, "less": {"arm": "DPO"}}]}, "compare.0.of.repair"),
            ({"compare": [{"of": {"arm": "DPO"}, "less": {"arm": "DPO"}}]}, "compare.0: of and less are the same"),
            ({"world": {"seed": 3}}, "world: seed: use `world_seed`"),
            ({"seeds": [1, 1]}, "seeds: must differ"),
            ({"ppo": TINY["ppo"] | {"kl_coef": "abc"}}, "ppo.kl_coef: must be a number of at least 0, got 'abc'"),
            ({"ppo": TINY["ppo"] | {"kl_coef": None}}, "ppo.kl_coef: must be a number of at least 0, got None"),
            ({"ppo": TINY["ppo"] | {"kl_coef": float("nan")}}, "ppo.kl_coef: must be a number of at least 0, got nan"),
            ({"arms": TINY["arms"] | {"UWO": {"reward": "plain", "members": True}}}, "arms.UWO.members"),
            ({"at_kl": [0.0]}, "at_kl: must be above 0"),
            ({"evaluate": {"k": 1}}, "evaluate.k: must be at least 2"),
            ({"evaluate": {"sampling": {"temperature": 0.8}}}, "leave out temperature = 0.8"),
            ({"evaluate": {"sampling": {"top_p": 0.9, "min_new_tokens": 2}}}, "out top_p = 0.9, min_new_tokens = 2"),
            ({"repairs": {"none": {"recipe": "flip"}}}, "repairs.none"),
            ({"repairs": {"a/b": {"recipe": "flip"}}}, "repairs: 'a/b' cannot name a folder"),
            ({"ppo": TINY["ppo"] | {"seed": 7}}, "ppo: `seed` follows from the study's `seeds`"),
            ({"arms": TINY["arms"] | {"plain": {"reward": "plain", "seed": 7}}}, "arms.plain: `seed` follows"),
            ({"against": {"oracle": "contrl"}}, "against.oracle: must name `repairs`"),
            ({"against": {"oracle": "oracle"}}, "against.oracle: a repair cannot be its own control"),
        ],
    )  # fmt: skip
    def test_refusals(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            run_policy_study(study(**changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_arm_keeps_the_rest_of_a_shared_section_and_leaves_out_what_only_ensembles_read(self) -> None:
        shared = {"aggregate": "worst", "sampling": {"max_new_tokens": 6}, "actor": {"lr": 1e-2, "warmup": 0}}
        arms = {"it": {"reward": "plain", "sampling": {"top_p": 0.9}, "actor": {"lr": 1e-3}}}
        arms["DPO"] = {"method": "dpo", "optim": {"lr": 1e-3}}
        one = study(ppo=shared, arms=TINY["arms"] | arms, dpo={"optim": {"lr": 1.0, "warmup": 0}})
        made = [
            ppo_config(one, Cell(*NOISY, "it", 0.1), 0, policy="p", rewards=r, prompts="q", baselines=(), gold=None)
            for r in (("a",), ("a", "b"))
        ]
        assert [config.aggregate for config in made] == ["mean", "worst"]
        assert (made[0].sampling.max_new_tokens, made[0].sampling.top_p) == (6, 0.9)
        assert (made[0].actor.lr, made[0].actor.warmup) == (1e-3, 0)
        offline = dpo_config(one, Cell(*NOISY, "DPO", None), 0, data="d", model="m")
        assert (offline.optim.lr, offline.optim.warmup) == (1e-3, 0)

    def test_every_seed_is_checked_before_anything_starts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert start(tmp_path, seeds=[0, -1]) == 2
        assert "study.yaml: seeds.1: must be at least 0, got -1" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()

    def test_a_rate_out_of_reach_is_refused_before_anything_is_trained(self, tmp_path: Path) -> None:
        cells = [{"noise": "systematic", "rate": 0.95, "arm": "plain"}]
        with pytest.raises(InputError, match=r"noise systematic, rate 0\.95"):
            run_policy_study(study(cells=cells, recommended=None), tmp_path / "out")
        assert not (tmp_path / "out" / "seeds" / "0" / "sft").exists()

    def test_answers_without_room_are_refused_before_anything_is_trained(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"^evaluate: .*leave room for 160 new tokens within max_length = 160"):
            run_policy_study(study(evaluate={"k": 2, "sampling": {"max_new_tokens": 160}}), tmp_path / "out")
        assert not (tmp_path / "out" / "seeds").exists()

    def test_ppo_without_room_is_refused_before_anything_is_trained(self, tmp_path: Path) -> None:
        longer = {"sampling": {"max_new_tokens": 158}}
        own = study(ppo=TINY["ppo"] | longer, baselines=TINY["baselines"] | longer)
        with pytest.raises(InputError, match=r"^arms\.plain: .*0 of \d+ prompts leave room for 158 new tokens"):
            run_policy_study(own, tmp_path / "out")
        assert not (tmp_path / "out" / "seeds").exists()


@pytest.mark.usefixtures("no_figures")
def test_a_reward_model_may_be_trained_otherwise(tmp_path: Path, one_thread: None) -> None:
    cells = [{"noise": "systematic", "rate": 0.2, "repair": ["none", "SimCSE"], "arm": "plain"}]
    made = study(cells=cells, recommended=None, seeds=[0])
    found = run_policy_study(made, tmp_path / "out")
    data = [("systematic 20 %", name) for name in ("none", "SimCSE")]
    plain, other = (json.loads((reward_of(tmp_path / "out", 0, d) / "config.json").read_text()) for d in data)
    assert {name for name in plain if plain[name] != other[name]} == {"data", "contrastive", "optim"}
    assert other["contrastive"]["method"] == "simcse"
    assert other["optim"] == plain["optim"] | {"lr": 2e-3}
    pairs = [load_preferences(labels_of(tmp_path / "out", 0, d)).preferences for d in data]
    assert [(p.id, p.chosen, p.flip_prob) for p in pairs[0]] == [(p.id, p.chosen, p.flip_prob) for p in pairs[1]]
    assert not list((tmp_path / "out").rglob("strength"))
    assert {(e["repair"], e["arm"]) for e in found["ends"]} == {("none", "plain"), ("SimCSE", "plain")}


class TestStudy:
    def test_labels_are_noisy_as_said_and_differ_by_seed(self, done: Path, found: dict[str, Any]) -> None:
        wrong = {(r["world"], r["repair"]): r["wrong"] for r in found["rewards"]}
        assert wrong["clean", "none"] == 0 == wrong["systematic 20 %", "oracle"]
        assert 0.05 < wrong["systematic 20 %", "none"] < 0.4
        files = [load_preferences(labels_of(done, s, ("uniform 20 %", "none"))).preferences for s in (0, 1)]
        assert [p.chosen for p in files[0]] != [p.chosen for p in files[1]]
        assert [{p.chosen, p.rejected} for p in files[0]] == [{p.chosen, p.rejected} for p in files[1]]
        share = np.mean([gold(p.prompt, p.chosen) < gold(p.prompt, p.rejected) for p in (*files[0], *files[1])])
        assert wrong["uniform 20 %", "none"] == pytest.approx(share)

    def test_the_last_look_is_of_the_model_that_is_saved(self, done: Path) -> None:
        config, plain = evaluation_config(study()), Cell(*NOISY, "plain", 0.05)
        folder, sft = run_of(done, 1, plain), start_of(study(), done, 1)
        prompts = [p.prompt for p in load_prompts(done / "data" / "eval_prompts.jsonl").items]
        reward = str(reward_of(done, 1, plain.data) / "model")
        encoder = Encoder.load(sft, max_length=160)
        again = answer(str(folder / "model"), sft, reward, prompts, encoder, gold, config)
        last = load_arrays(folder / "looks" / "step-00000004.npz")
        for name in ("gold", "proxy", "kl", "length", "ended"):
            assert last[name] == pytest.approx(getattr(again, f"{name}_NK"), abs=1e-5)
        first = load_arrays(folder / "looks" / "step-00000000.npz")
        assert np.all(first["kl"] == 0)
        examined = load_arrays(reward_of(done, 1, plain.data) / "examined.npz")
        assert examined["proxy"] == pytest.approx(first["proxy"])
        assert examined["base_gold"].shape == (6, 3)
        assert not np.allclose(examined["base_proxy"][:, :2], examined["proxy"])  # drawn apart

    def test_the_ensemble_is_paid_less_where_its_members_disagree(self, done: Path) -> None:
        cell = Cell(*NOISY, "UWO", 0.05)
        scores = [load_arrays(reward_of(done, 0, cell.data, m) / "examined.npz")["proxy"] for m in (0, 1)]
        first = load_arrays(run_of(done, 0, cell) / "looks" / "step-00000000.npz")
        expected = (scores[0] + scores[1]) / 2 - 0.5 * ((scores[0] - scores[1]) / 2) ** 2
        assert first["proxy"] == pytest.approx(expected, rel=1e-4, abs=1e-4)

    def test_differences_are_paired_by_seed_and_answer(self, done: Path, found: dict[str, Any]) -> None:
        ends = {
            arm: [load_arrays(sorted((run_of(done, s, Cell(*NOISY, arm, w)) / "looks").iterdir())[-1])["gold"]
                  for s in (0, 1)]
            for arm, w in (("plain", 0.05), ("contrastive", 0.05), ("DPO", None))
        }  # fmt: skip
        rows = {(d["kind"], d["arm"], d["repair"], d["at"]): d for d in found["differences"] if d["world"] != "clean"}
        for arm in ("contrastive", "DPO"):
            row = rows["arm", arm, "none", "end of the run"]
            assert row["seeds"] == pytest.approx(
                [np.mean(a - b) for a, b in zip(ends[arm], ends["plain"], strict=True)]
            )
            assert row["against"]["arm"] == "plain"
            assert row["n_seeds"] == 2
        assert not any(at == "KL 50" for *_, at in rows)  # nobody came so far
        assert rows["recommended", "contrastive", "oracle", "end of the run"]["against"]["repair"] == "none"
        assert rows["repair", "contrastive", "oracle", "end of the run"]["against"]["arm"] == "contrastive"
        asked = rows["asked for", "plain", "oracle", "end of the run"]
        assert (asked["world"], asked["against"]["arm"]) == ("systematic 20 %", "DPO")
        repaired = [load_arrays(sorted((run_of(done, s, Cell("systematic", 0.2, "oracle", "plain", 0.05)) / "looks")
                                       .iterdir())[-1])["gold"] for s in (0, 1)]  # fmt: skip
        assert asked["seeds"] == pytest.approx([np.mean(a - b) for a, b in zip(repaired, ends["DPO"], strict=True)])
        (win,) = (
            w for w in found["wins"]
            if [(w[c]["arm"], w[c]["repair"]) for c in "ab"] == [("contrastive", "none"), ("plain", "none")]
        )  # fmt: skip
        gaps = np.array(ends["contrastive"]) - np.array(ends["plain"])
        assert win["win"] == pytest.approx((gaps > 1e-6).mean())
        assert win["lose"] == pytest.approx((gaps < -1e-6).mean())
        assert win["score"] == pytest.approx(win["win"] + win["tie"] / 2)

    def test_a_run_that_its_guard_ends_is_left_out_by_name(self, found: dict[str, Any]) -> None:
        assert {f["seed"] for f in found["failed"]} <= {0, 1}
        assert found["failed"]
        assert all(f["arm"] == "stopped" and "max_kl" in f["error"] for f in found["failed"])

    def test_strata_hold_all_prompts_hardest_first(self, found: dict[str, Any]) -> None:
        rows = [s for s in found["strata"] if s["arm"] == "contrastive" and s["repair"] == "none"]
        assert [r["n"] for r in rows] == [3, 3]
        assert rows[0]["high"] <= rows[1]["low"]
        (difference,) = (
            d for d in found["differences"]
            if (d["arm"], d["kind"], d["repair"], d["at"]) == ("contrastive", "arm", "none", "end of the run")
        )  # fmt: skip
        assert np.mean([r["difference"]["value"] for r in rows]) == pytest.approx(difference["value"])

    def test_predictions_stand_beside_measurements(self, done: Path, found: dict[str, Any]) -> None:
        of_sft = [v for v in found["variances"] if (v["world"], v["policy"]) == ("clean", "SFT")]
        rows = {v["k"]: v for v in of_sft if not v["shrunk"]}
        assert set(rows) == {0, 1, 3}
        (shrunk,) = (v for v in of_sft if v["shrunk"])
        assert shrunk["k"] == 3
        assert shrunk["predicted"]["value"] <= min(rows[0]["predicted"]["value"], rows[3]["predicted"]["value"])
        seen = load_arrays(reward_of(done, 0, ("clean", "none")) / "examined.npz")
        gap = seen["proxy"] - seen["base_proxy"].mean(1, keepdims=True)
        assert rows[3]["measured"]["seeds"][0] == pytest.approx(gap.var(ddof=1))
        within = seen["base_proxy"].var(1, ddof=1).mean()
        assert rows[1]["predicted"]["seeds"][0] == pytest.approx(2 * within)
        speeds = {s["arm"]: s for s in found["speeds"] if s["world"] != "clean" and s["repair"] == "none"}
        assert speeds["RLOO"]["explained_first"] is None
        assert speeds["plain"]["explained_first"] is not None

    def test_the_report_shows_it(self, done: Path) -> None:
        page = (done / "report.html").read_text()
        for text in ("Over-optimisation", "Gold against distance: plain PPO and the recommended", "flip-rate identity",
                     "Runs that were stopped", "What label noise does", "By difficulty of the prompt",
                     "Further comparisons, named in the study file"):  # fmt: skip
            assert text in page
        assert page.count('class="plot"') >= 12
        assert "24 answers, judge: gold" in page  # of 2 seeds to 6 prompts, 2 each
        tables = json.loads((done / "summary.json").read_text())["tables"]
        place = tables[1]["columns"].index("less")
        assert {r[place] for r in tables[1]["rows"] if r[place - 1] == "recommended"} == {"plain, KL weight 0.05"}


class TestReport:
    def test_two_controls_of_one_repair_are_told_apart(self) -> None:
        cell = {"world": "systematic 20 %", "repair": "flip+margin, twice", "arm": "contrastive", "kl_coef": 0.2}
        value = {"kind": "repair", "at": "greatest KL that both reached", "n_seeds": 1, "value": 0.1, "low": 0.0,
                 "high": 0.2, "seeds": [0.1]}  # fmt: skip
        rows = [cell | value | {"against": cell | {"repair": repair}} for repair in ("none", "random flip")]
        file = {"kind": "policy", "seeds": [0], "control": "plain", "kl_coef": 0.05, "differences": rows}
        section = policy_study_section(Run("run", policy_study=PolicyStudyFile.model_validate(file)))
        assert section is not None
        (compared,) = (b for b in section.blocks if isinstance(b, Table) and b.title.startswith("Repaired labels"))
        column = list(compared.columns).index("less")
        assert [row[column] for row in compared.rows] == [
            "contrastive, KL weight 0.2", "contrastive on random flip, KL weight 0.2"
        ]  # fmt: skip
        (figure,) = (b for b in section.blocks if isinstance(b, Figure))
        drawn = figure.panels[0].svg
        assert drawn.count("twice, KL 0.2") == 2  # beyond the fortieth letter
        assert drawn.count("/ random flip") == 1
        assert "intervals over prompts alone (there is one seed;" in section.intro


class TestResume:
    @pytest.mark.usefixtures("no_figures")
    def test_grows_by_seeds_cells_and_arms_and_trains_nothing_twice(self, done: Path) -> None:
        before = {p: p.stat().st_mtime_ns for p in done.glob("seeds/*/**/result.json")}
        more = {
            "arms": TINY["arms"] | {"PAR": {"reward": "par"}}, "seeds": [0, 1, 2], "recommended": None,
            "cells": [{"noise": "systematic", "rate": 0.2, "arm": ["plain", "PAR"]}], "at_kl": [1e-3],
        }  # fmt: skip
        assert start(done.parent, **more) == 2  # not without --resume
        assert start(done.parent, "--resume", **more) == 0
        assert {p: p.stat().st_mtime_ns for p in before} == before
        found = json.loads((done / "study.json").read_text())
        assert {e["arm"] for e in found["ends"]} == {"plain", "PAR"}
        assert found["ends"][0]["n_seeds"] == 3

    def test_refuses_what_would_mix_two_studies(self, done: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert start(done.parent, "--resume", arms=TINY["arms"] | {"contrastive": {"reward": "contrastive"}}) == 2
        assert "arms: contrastive has other settings" in capsys.readouterr().err
        assert start(done.parent, "--resume", baselines=TINY["baselines"] | {"k": 4}) == 2
        assert "other settings" in capsys.readouterr().err
        # An arm that was left out for a while must come back as it was.
        alone = {"recommended": None, "cells": [{"noise": "systematic", "rate": 0.2, "arm": "plain"}]}
        assert start(done.parent, "--resume", arms={"plain": TINY["arms"]["plain"]}, **alone) == 0
        other = {"contrastive": {"reward": "contrastive", "k": 1, "scaling": "none"}}
        capsys.readouterr()
        assert start(done.parent, "--resume", arms=TINY["arms"] | other) == 2
        assert "these fields differ" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["world", "confirm", "hard-prompts"])
def test_the_recipes_in_the_repository_are_studies(name: str) -> None:
    path = Path(__file__).parents[1] / "recipes" / "policy-study" / f"{name}.yaml"
    check(PolicyStudy(**yaml.safe_load(path.read_text())))


def test_looks_are_equal_parts_that_end_with_the_run() -> None:
    exam = Exam((), evaluation_config(study()), 160, 6)
    assert exam.steps(60) == {10, 20, 30, 40, 50, 60}
    assert exam.steps(4) == {1, 2, 3, 4}
    assert max(exam.steps(94)) == 94
