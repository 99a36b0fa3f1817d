"""Rounds of sampling, reward model, PPO and examination: what each round starts from, what is kept, when it stops."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from conftest import Folders
from steelyard import iterate
from steelyard.baselines import BaselineConfig, fingerprint, sample_baselines
from steelyard.data.collate import collate
from steelyard.data.encode import Encoder, Tree
from steelyard.errors import InputError
from steelyard.evaluate.policy import PolicyEvaluationConfig
from steelyard.evaluate.rounds import choose
from steelyard.iterate import run_rounds
from steelyard.models.policy import PolicyModel
from steelyard.models.reward import RewardModel
from steelyard.rounds_settings import Round, RoundsConfig
from steelyard.sampling import SamplingConfig, sample
from steelyard.train.optim import OptimConfig
from steelyard.train.ppo import PPOConfig, train_ppo

SAMPLING = {"max_new_tokens": 5}


@pytest.fixture(scope="module")
def moved(language_model: Folders, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A policy with the SFT model's tokenizer and other weights."""
    model = tiny.build_model(tiny.build_config("llama"), seed=7)
    return tiny.save_folder(model, tiny.build_tokenizer(), tmp_path_factory.mktemp("moved"))


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("lora", [{}, {"rank": 2}])
def test_ppo_goes_on_from_a_moved_policy_and_measures_its_way_from_another(
    lora: dict[str, int], moved: str, language_model: Folders, reward_model: Folders, planted: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """KL and perplexity of the first step's samples, from the two models read apart, one response at a time."""
    sft = language_model("llama")
    config = PPOConfig.model_validate(
        {
            "policy": moved, "reference": sft, "reward_model": reward_model("llama"), "prompts": planted["prompts"],
            "reward": "plain", "steps": 1, "prompts_per_step": 3, "samples_per_prompt": 1, "max_length": 64,
            "sampling": SAMPLING, "actor": {"lr": 1e-3}, "sample_every": 1, "lora": lora,
        }
    )  # fmt: skip
    train_ppo(config, tmp_path, quiet=True)
    (found,) = metrics(tmp_path)
    encoder = Encoder.load(sft, max_length=64)
    sums = []
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        words = row["response"].split()
        response = tuple(encoder.tokenizer.convert_tokens_to_ids(words))
        tree = Tree(encoder.prompt_ids(row["prompt"]), (response + (() if len(words) == 5 else (encoder.end_id,)),))
        batch = collate([tree], encoder.pad_id)
        with torch.no_grad():
            ours, theirs = (float(PolicyModel.load(f)(batch).plain_BKR.sum()) for f in (moved, sft))
        sums.append((ours - theirs, theirs, len(tree.responses[0])))
    gap, theirs, tokens = np.array(sums).T
    assert len(sums) == 3
    assert found["ppo/kl_plain"] == pytest.approx(gap.mean(), rel=1e-4)
    assert found["ppo/kl_plain"] > 1
    assert found["ppo/ppl_sft"] == pytest.approx(np.exp(-theirs.sum() / tokens.sum()), rel=1e-4)


@pytest.mark.parametrize("drawn_from", ["reference", "policy"])
def test_baselines_come_from_the_reference_or_from_the_policy_as_it_starts(
    drawn_from: str, moved: str, language_model: Folders, reward_model: Folders, planted: dict[str, str],
    tmp_path: Path,
) -> None:  # fmt: skip
    folders = {"reference": language_model("llama"), "policy": moved}
    shared: dict[str, Any] = {
        "reward_model": reward_model("llama"), "prompts": planted["prompts"], "max_length": 64,
        "sampling": SamplingConfig.model_validate(SAMPLING),
    }  # fmt: skip
    stored = sample_baselines(BaselineConfig(policy=folders[drawn_from], k=2, **shared), tmp_path / "baselines")
    config = PPOConfig(
        **folders, **shared, baselines=str(stored), steps=1, prompts_per_step=3, samples_per_prompt=2,
        actor=OptimConfig(lr=1e-3),
    )  # fmt: skip
    assert train_ppo(config, tmp_path / "ppo", quiet=True)["steps"] == 1


# ---- rounds --------------------------------------------------------------------------------------------------------

ROUNDS = 2
OPTIM = {"lr": 3e-3}


@pytest.fixture(scope="module")
def settings(
    language_model: Folders, reward_model: Folders, planted: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    rng = np.random.default_rng(11)
    asked = [{"prompt": " ".join(tiny.sentence(rng, 3, 7))} for _ in range(6)]
    folder = tmp_path_factory.mktemp("prompts")
    other = [{"prompt": " ".join(tiny.sentence(rng, 9, 12))} for _ in range(4)]
    return {
        "sft": language_model("llama"), "reward_model": reward_model("llama"), "data": planted["held-out"],
        "prompts": planted["prompts"], "eval_prompts": tiny.write_jsonl(folder / "eval.jsonl", asked + asked[:2]),
        "meta_prompts": tiny.write_jsonl(folder / "other.jsonl", other), "rounds": ROUNDS, "patience": None,
        "rm": {"batch_size": 16, "max_length": 64, "optim": OPTIM, "eval_every": None},
        "meta": {"eta": 0.1, "meta_batch_size": 2}, "meta_sample": {"k": 3},
        "ppo": {
            "reward": "plain", "steps": 2, "prompts_per_step": 4, "samples_per_prompt": 2, "max_length": 64,
            "sampling": SAMPLING, "actor": {"lr": 1e-2}, "critic": {"lr": 1e-2},
        },
        "validation": {"own": planted["clean"]}, "gold": "tiny:count_good",
        "evaluate": {"k": 3, "sampling": SAMPLING, "samples": 1},
    }  # fmt: skip


@pytest.fixture(scope="module")
def done(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounds") / "out"
    run_rounds(RoundsConfig(**settings), out, quiet=True)
    return out


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def scripted(monkeypatch: pytest.MonkeyPatch, worth: list[float]) -> None:
    """Rounds whose examination says what the script says, without models: gold by round, KL = 1 a round."""
    monkeypatch.setattr(iterate, "advance", lambda config, now, out, quiet: now._replace(number=now.number + 1))
    said = iter(range(len(worth)))

    def examine(*_: Any, **__: Any) -> dict[str, Any]:
        n = next(said)
        values = {"gold": [[worth[n]]] * 4, "kl": [[float(n)]] * 4}
        row = {"gold": worth[n], "gold_low": worth[n], "gold_high": worth[n], "kl": n, "ppl_sft": 1.0, "length": 1.0}
        return {"row": row, "accuracy": [], "prompts": list("abcd"), "values": values, "samples": []}

    monkeypatch.setattr(iterate, "examine_round", examine)


class TestChain:
    def test_each_round_goes_on_where_the_last_one_ended(self, done: Path, settings: dict[str, Any]) -> None:
        policy, model = settings["sft"], settings["reward_model"]
        for number in range(1, ROUNDS + 1):
            folder = done / f"round-{number:02d}"
            rm, optimised = (read(folder / stage / "config.json") for stage in ("rm", "ppo"))
            stored = json.loads(pq.read_schema(rm["meta"]).metadata[b"steelyard"])
            assert rm["meta"].startswith(str(folder / "meta"))
            assert stored["policy"] == fingerprint(policy), "the meta set comes from the policy as it is"
            assert (rm["model"], rm["eta"], rm["k"]) == (model, 0.1, 3)
            model = str(folder / "rm" / "model")
            assert (optimised["policy"], optimised["reward_model"]) == (policy, model)
            assert optimised["reference"] == settings["sft"]
            policy = str(folder / "ppo" / "model")
        assert len({fingerprint(f) for f in (settings["sft"], policy, str(done / "round-01" / "ppo" / "model"))}) == 3

    def test_no_round_repeats_anothers_random_numbers(self, done: Path) -> None:
        stages = [done / f"round-{n:02d}" / s / "config.json" for n in (1, 2) for s in ("rm", "ppo")]
        assert [read(path)["seed"] for path in stages] == [1, 1, 2, 2]
        drawn = [pq.read_schema(next((done / f"round-{n:02d}" / "meta").iterdir())).metadata for n in (1, 2)]
        assert [json.loads(m[b"steelyard"])["seed"] for m in drawn] == [1, 2]

    def test_the_meta_set_may_have_prompts_of_its_own(self, done: Path, settings: dict[str, Any]) -> None:
        keys = set(pq.read_table(next((done / "round-01" / "meta").iterdir()))["key"].to_pylist())
        other = [json.loads(line)["prompt"] for line in Path(settings["meta_prompts"]).read_text().splitlines()]
        assert keys == set(other)

    def test_kl_is_measured_from_the_sft_model(self, done: Path) -> None:
        first, second = (metrics(done / f"round-{n:02d}" / "ppo")[0]["ppo/kl_plain"] for n in (1, 2))
        assert first == pytest.approx(0, abs=1e-5)
        assert second > 0.01

    @pytest.mark.parametrize("eta", [0.0, 0.1])
    def test_plain_rounds_are_those_with_eta_0(self, eta: float, settings: dict[str, Any], tmp_path: Path) -> None:
        short = settings | {"rounds": 1}
        plain = {k: v for k, v in short.items() if not k.startswith("meta")} | {"reward": "plain"}
        run_rounds(RoundsConfig(**short | {"meta": {"eta": eta, "meta_batch_size": 2}}), tmp_path / "meta", quiet=True)
        run_rounds(RoundsConfig(**plain), tmp_path / "plain", quiet=True)
        assert not (tmp_path / "plain" / "round-01" / "meta").exists()
        for stage in ("rm", "ppo"):
            a, b = (tmp_path / arm / "round-01" / stage / "model" / "model.safetensors" for arm in ("meta", "plain"))
            assert (a.read_bytes() == b.read_bytes()) == (eta == 0), stage

    def test_a_fixed_reward_model_is_left_alone(self, settings: dict[str, Any], tmp_path: Path) -> None:
        idle = ("data", "rm", "meta", "meta_prompts", "meta_sample")
        fixed = {k: v for k, v in settings.items() if k not in idle} | {"reward": "fixed"}
        found = run_rounds(RoundsConfig(**fixed), tmp_path, quiet=True)
        assert not (tmp_path / "round-01" / "rm").exists()
        assert read(tmp_path / "round-02" / "ppo" / "config.json")["reward_model"] == settings["reward_model"]
        for row in found["rounds"]:
            assert row["first"] == row["current"]

    @pytest.mark.parametrize("kind", ["sft", "current"])
    def test_baselines_of_the_sft_model_or_of_the_policy_as_the_round_starts(
        self, kind: str, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        ppo = settings["ppo"] | {"reward": "contrastive", "scaling": "none"}
        own = {"ppo": ppo, "baselines": kind, "baseline_sample": {"k": 2}}
        run_rounds(RoundsConfig(**settings | own), tmp_path, quiet=True)
        for number, moved in ((1, settings["sft"]), (2, str(tmp_path / "round-01" / "ppo" / "model"))):
            config = read(tmp_path / f"round-{number:02d}" / "ppo" / "config.json")
            stored = json.loads(pq.read_schema(config["baselines"]).metadata[b"steelyard"])
            assert stored["policy"] == fingerprint(moved if kind == "current" else settings["sft"])
            assert stored["reward_model"] == fingerprint(config["reward_model"])
        responses = list((tmp_path / "baselines").glob("responses-*"))
        assert len(responses) == (2 if kind == "current" else 1), "the SFT model answers once, for all rounds"
        if kind == "current":
            # Nor are they what the reward model was trained on: drawn from the same policy, by other random numbers.
            asked = settings | own | {"meta_prompts": settings["prompts"], "rounds": 1}
            run_rounds(RoundsConfig(**asked), tmp_path / "again", quiet=True)
            drawn = [
                {r: n for n, r in enumerate(pq.read_table(file)["response"].to_pylist())}
                for kind in ("baselines", "round-01/meta")
                for file in (tmp_path / "again" / kind).glob("responses-*")
            ]
            assert len(drawn) == 2
            assert len(set(drawn[0]) & set(drawn[1])) < len(drawn[0]) / 2


class TestExamination:
    def test_rewards_kl_and_perplexity_one_response_at_a_time(self, done: Path, settings: dict[str, Any]) -> None:
        policy, rm = (str(done / "round-02" / stage / "model") for stage in ("ppo", "rm"))
        found = read(done / "round-02" / "examine" / "round.json")
        encoder = Encoder.load(policy, max_length=64)
        prompts = list(dict.fromkeys(found["prompts"]))
        assert len(prompts) == len(found["prompts"]) == 6, "repeated prompts count once"
        config = PolicyEvaluationConfig(**settings["evaluate"])
        drawn = sample(
            PolicyModel.load(policy), [encoder.prompt_ids(p) for p in prompts], prompts, k=3,
            config=config.sampling, end_id=encoder.end_id, pad_id=encoder.pad_id, seed=config.seed,
        )  # fmt: skip
        models = {"current": RewardModel.load(rm), "first": RewardModel.load(settings["reward_model"])}
        ours, sft = PolicyModel.load(policy), PolicyModel.load(settings["sft"])
        nll, tokens = 0.0, 0
        for n, prompt in enumerate(prompts):
            for k, one in enumerate(drawn[n]):
                tree = Tree(encoder.prompt_ids(prompt), (one.tokens,))
                batch = collate([tree], encoder.pad_id)
                with torch.no_grad():
                    a, b = (float(m(batch).plain_BKR.sum()) for m in (ours, sft))
                nll, tokens = nll - b, tokens + len(one.tokens)
                assert found["values"]["kl"][n][k] == pytest.approx(a - b, abs=1e-4)
                assert found["values"]["gold"][n][k] == encoder.decode(one.tokens).split().count("good")
                for name, model in models.items():
                    raw = float(model.score([tree], pad_id=encoder.pad_id)[0, 0])
                    mean, std = model.normal
                    assert found["values"][name][n][k] == pytest.approx((raw - mean) / std, abs=1e-4)
        assert found["row"]["ppl_sft"] == pytest.approx(np.exp(nll / tokens), rel=1e-4)
        assert found["row"]["gold"] == pytest.approx(np.mean(found["values"]["gold"]))
        assert found["row"]["length"] == pytest.approx(tokens / 18)

    def test_reward_models_on_validation_pairs_and_on_the_policys_own(self, done: Path) -> None:
        found = read(done / "round-02" / "examine" / "round.json")
        rows = {(r["model"], r["set"]): r for r in found["accuracy"]}
        assert rows.keys() == {(m, s) for m in ("first", "current") for s in ("own", "the policy's own responses")}
        assert rows["current", "own"]["n"] == 96
        right, known = 0.0, 0
        for gold, reward in zip(found["values"]["gold"], found["values"]["current"], strict=True):
            for i in range(3):
                for j in range(i):
                    if gold[i] != gold[j]:
                        known += 1
                        right += float((gold[i] > gold[j]) == (reward[i] > reward[j]))
        own = rows["current", "the policy's own responses"]
        assert (own["n"], own["accuracy"]) == (known, pytest.approx(right / known))

    def test_the_sft_model_is_round_0(self, done: Path) -> None:
        row = read(done / "rounds.json")["rounds"][0]
        assert row["kl"] == pytest.approx(0, abs=1e-5)
        assert row["first"] == row["current"]


class TestChoice:
    def examined(self, *gold: list[float], kl: float = 0.0) -> list[dict[str, Any]]:
        return [{"values": {"gold": [[x] for x in one], "kl": [[kl * n]] * len(one)}} for n, one in enumerate(gold)]

    def test_is_made_on_one_half_and_measured_on_the_other(self) -> None:
        found = choose(self.examined([0, 0, 0, 0], [1, 5, 3, 7], [3, -1, 3, 1]), "gold", 0.0)
        assert (found["round"], found["scores"]) == (2, [0, 2, 3])
        assert (found["rest"]["value"], found["gain"]["value"]) == (0, 0), "though its choice half says 3"

    def test_the_sft_model_is_kept_where_nothing_beats_it(self) -> None:
        found = choose(self.examined([1, 1, 1, 1], [1, 9, 1, 9], [0, 9, 0, 9]), "gold", 0.0)
        assert (found["round"], found["gain"]) == (0, {"value": 0, "low": 0, "high": 0})

    def test_distance_has_a_price(self) -> None:
        """Worth 0, 1 - 0.5 * 2, 3 - 0.5 * 4; at a nat's price of 1: 0, -1, -1."""
        far = self.examined([0, 0], [1, 1], [3, 3], kl=2.0)
        assert choose(far, "gold", 0.5)["scores"] == [0, 0, 1]
        assert choose(far, "gold", 1.0)["round"] == 0

    def test_the_earliest_round_that_is_not_told_apart_from_the_best_is_kept(self) -> None:
        """Ten prompts choose. Round 1 is ahead of 0 on all of them; 2 is ahead of 1 in the mean alone."""
        zero, one = [0.0] * 20, [1.0] * 20
        two = [1.0 + (-1.0) ** (n // 2) * 0.9 + 0.1 for n in range(20)]
        far = self.examined(zero, one, two)
        assert choose(far, "gold", 0.0)["round"] == 2
        found = choose(far, "gold", 0.0, "earliest")
        assert (found["round"], found["score"]) == (1, 1.0)
        assert found["gain"]["value"] == 1.0
        assert choose([*far, *self.examined([2.5] * 20)], "gold", 0.0, "earliest")["round"] == 3, "told apart from all"
        noise = self.examined(zero, [(-1.0) ** (n // 2) + 0.2 for n in range(20)])
        assert choose(noise, "gold", 0.0, "earliest")["round"] == 0, "the SFT model counts as a round"

    def test_keeping_the_earliest_stops_where_no_round_is_told_apart_as_better(
        self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        scripted(monkeypatch, [0, 1, 1, 3])
        found = run_rounds(
            RoundsConfig(**settings | {"rounds": 3, "patience": 1, "keep": "earliest"}), tmp_path, quiet=True
        )
        assert (found["best"]["round"], len(found["rounds"])) == (1, 3)
        assert found["stopped"] == "the examination has turned: no round told apart as better than 1 for 1"
        assert "The earliest round not told apart" in iterate.rounds_table(found)["note"]

    @pytest.mark.parametrize(("patience", "rounds", "best"), [(1, 3, 2), (2, 4, 2), (None, 5, 5)])
    def test_stops_when_the_examination_turns(
        self, patience: int | None, rounds: int, best: int, monkeypatch: pytest.MonkeyPatch,
        settings: dict[str, Any], tmp_path: Path,
    ) -> None:  # fmt: skip
        scripted(monkeypatch, [0, 1, 3, 2, 1, 4])
        found = run_rounds(RoundsConfig(**settings | {"rounds": 5, "patience": patience}), tmp_path, quiet=True)
        assert found["rounds"][-1]["round"] == rounds
        assert found["best"]["round"] == best
        assert bool(found["stopped"]) == (patience is not None)
        assert (tmp_path / "best" / "model").readlink() == Path(f"../round-{best:02d}/ppo/model")

    @pytest.mark.parametrize(("price", "best"), [(0.0, 3), (0.5, 2), (3.0, 0)])
    def test_a_price_on_distance_keeps_an_earlier_round(
        self, price: float, best: int, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        scripted(monkeypatch, [0, 1, 2, 2.4])  # less .5 a nat: 0, .5, 1, .9
        found = run_rounds(
            RoundsConfig(**settings | {"rounds": 3, "patience": None, "kl_price": price}), tmp_path, quiet=True
        )
        assert found["best"]["round"] == best
        assert found["criterion"]["kl_price"] == price

    def test_reward_models_may_start_from_the_first_each_time(
        self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        starts: dict[str, list[str]] = {}
        for how in ("first", "previous"):
            begun = starts.setdefault(how, [])

            def stand_in(config: Any, out: Path, *_: Any, begun: list[str] = begun, **__: Any) -> None:
                begun.append(config.model)
                raise FloatingPointError("far enough")

            monkeypatch.setattr(iterate, "train_metarm", stand_in)
            config = RoundsConfig(**settings | {"reward_from": how})
            now = Round(1, settings["sft"], str(tmp_path / "renewed"))
            with pytest.raises(FloatingPointError, match="far enough"):
                iterate.advance(config, now, tmp_path / how, quiet=True)
        assert starts == {"first": [settings["reward_model"]], "previous": [str(tmp_path / "renewed")]}

    def test_a_round_that_fails_is_the_last_one(
        self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        """PPO's own guard ends round 2; what was reached before is kept, and resuming changes nothing."""
        honest = iterate.train_ppo

        def guarded(config: PPOConfig, *rest: Any, **how: Any) -> Any:
            bound = {"max_kl": 1e-9} if config.seed % 1000 == 2 else {}
            return honest(config.model_copy(update=bound), *rest, **how)

        monkeypatch.setattr(iterate, "train_ppo", guarded)
        config = RoundsConfig(**settings | {"rounds": 4})
        found = run_rounds(config, tmp_path / "out", quiet=True)
        assert [row["round"] for row in found["rounds"]] == [0, 1]
        assert re.fullmatch(r"round 2 failed: step 1: the KL of .* rose above max_kl = 1e-09.*", found["stopped"])
        assert str(tmp_path) not in found["stopped"]
        assert found["best"]["round"] in (0, 1)
        assert (tmp_path / "out" / "round-02" / "ppo" / "offending-step-00000001.json").exists()
        before = (tmp_path / "out" / "rounds.json").read_bytes()
        (tmp_path / "out" / "result.json").unlink()  # killed just before the end
        assert run_rounds(config, tmp_path / "out", resume=True, quiet=True) == found
        assert (tmp_path / "out" / "rounds.json").read_bytes() == before

    def test_a_policy_that_can_answer_no_more_ends_the_rounds(
        self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        """Broken by the last step of its training, so that only the examination can see it."""
        honest = iterate.train_ppo

        def broken(config: PPOConfig, out: Path, *rest: Any, **how: Any) -> Any:
            result = honest(config, out, *rest, **how)
            if config.seed % 1000 == 2:
                weights = load_file(out / "model" / "model.safetensors")
                weights["model.norm.weight"].fill_(3e38)  # finite, but what comes of it is not
                save_file(weights, out / "model" / "model.safetensors", {"format": "pt"})
            return result

        monkeypatch.setattr(iterate, "train_ppo", broken)
        config = RoundsConfig(**settings | {"rounds": 4})
        found = run_rounds(config, tmp_path / "out", quiet=True)
        assert [row["round"] for row in found["rounds"]] == [0, 1]
        assert re.fullmatch("round 2 failed: .*the model's states are not finite.*", found["stopped"])
        assert found["best"]["round"] in (0, 1)

    def test_prompts_that_are_trained_on_are_named(
        self,
        settings: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        scripted(monkeypatch, [0, 1, 3])
        run_rounds(RoundsConfig(**settings), tmp_path / "apart", quiet=True)
        assert "warning" not in capsys.readouterr().err
        scripted(monkeypatch, [0, 1, 3])
        mixed = (
            Path(settings["prompts"]).read_text().splitlines()[:2]
            + Path(settings["eval_prompts"]).read_text().splitlines()
        )
        (tmp_path / "mixed.jsonl").write_text("\n".join(mixed) + "\n")
        run_rounds(
            RoundsConfig(**settings | {"eval_prompts": str(tmp_path / "mixed.jsonl")}), tmp_path / "out", quiet=True
        )
        assert "mixed.jsonl: 2 of 8 prompts are in" in capsys.readouterr().err

    def test_the_kept_round_is_recorded_and_linked(self, done: Path, settings: dict[str, Any]) -> None:
        best, record = read(done / "best" / "best.json"), read(done / "rounds.json")
        assert best == record["best"]
        model = Path(settings["sft"]) if best["round"] == 0 else done / best["model"]
        assert (done / "best" / "model").resolve() == model.resolve()
        assert PolicyModel.load(done / "best" / "model")

    def test_without_a_criterion_all_are_kept_and_none_is_called_best(
        self, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        scripted(monkeypatch, [0, 1, 0])
        own = {k: v for k, v in settings.items() if k not in ("gold", "patience")}
        found = run_rounds(RoundsConfig(**own), tmp_path, quiet=True)
        assert (found["best"], found["stopped"], len(found["rounds"])) == (None, "", 3)
        assert "cannot tell a better policy from one that deceives them" in found["criterion"]["why"]
        assert not (tmp_path / "best").exists()

    def test_a_judge_stands_in_for_gold(self, settings: dict[str, Any], planted_reward: Path, tmp_path: Path) -> None:
        own = {k: v for k, v in settings.items() if k != "gold"}
        found = run_rounds(
            RoundsConfig(**own | {"judge": str(planted_reward / "model"), "rounds": 1}), tmp_path, quiet=True
        )
        assert found["criterion"]["by"] == "judge"
        worth = np.array(read(tmp_path / "round-01" / "examine" / "round.json")["values"]["judge"]).mean(1)
        assert found["best"]["scores"][1] == pytest.approx(worth[::2].mean())


@pytest.mark.parametrize(
    ("evaluate", "drawn"),
    [
        ({"k": 3}, SamplingConfig(max_new_tokens=5)),
        ({"sampling": {"max_new_tokens": 4}}, SamplingConfig(max_new_tokens=4)),
        ({"sampling": {"temperature": 0.5}}, SamplingConfig(max_new_tokens=5, temperature=0.5)),
    ],
)
def test_the_examination_samples_as_ppo_does_unless_it_says_otherwise(
    evaluate: dict[str, Any], drawn: SamplingConfig, settings: dict[str, Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[SamplingConfig] = []

    def watch(*args: Any, **_: Any) -> Any:
        seen.append(next(a for a in args if isinstance(a, PolicyEvaluationConfig)).sampling)
        raise KeyboardInterrupt

    monkeypatch.setattr(iterate, "examine_round", watch)
    with pytest.raises(KeyboardInterrupt):
        run_rounds(RoundsConfig(**settings | {"evaluate": evaluate}), tmp_path / "out", quiet=True)
    assert seen == [drawn]
    # What PPO says is not what the examination's own defaults say: written out, those are another examination.
    other = RoundsConfig(**settings | {"evaluate": {"sampling": SamplingConfig().model_dump()}})
    with pytest.raises(InputError, match=r"evaluate\.sampling"):
        run_rounds(other, tmp_path / "out", resume=True, quiet=True)


def test_the_validation_sets_are_read_as_the_reward_model_reads_pairs(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    long, short = (" ".join(tiny.sentence(rng, n, n + 1)) for n in (60, 4))
    rows = [{"prompt": short, "chosen": c, "rejected": r} for c, r in ((long, short), (short, "w1"), ("w2", "w3 w4"))]
    file = tiny.write_jsonl(tmp_path / "some.jsonl", [*rows, {"prompt": short, "chosen": "w1"}])
    rm = settings["rm"] | {"on_invalid": "skip", "on_overlong": "drop"}
    seen: list[int] = []

    def watch(*args: Any, **_: Any) -> Any:
        seen.append(len(args[5]["own"][1]))
        raise KeyboardInterrupt

    monkeypatch.setattr(iterate, "examine_round", watch)
    for length in (64, 80):
        own = settings | {"rm": rm | {"max_length": length}, "validation": {"own": file}}
        with pytest.raises(KeyboardInterrupt):
            run_rounds(RoundsConfig(**own), tmp_path / str(length), quiet=True)
    assert seen == [2, 3]


class TestRefusals:
    @pytest.mark.parametrize(
        ("own", "said"),
        [
            ({"data": None}, "reward = metarm trains the reward model; name its preferences"),
            ({"reward": "plain"}, "meta, meta_prompts, meta_sample: no effect with reward = plain"),
            ({"baselines": "current"}, "baselines: no effect with ppo.reward = plain"),
            (
                {"ppo": {"k": 5}, "baseline_sample": {"k": 3}},
                "baseline_sample.k: must be at least the 5 baselines that ppo reads, got 3",
            ),
            (
                {"ppo": {"baseline": "shrunk"}, "baseline_sample": {"k": 1}},
                "baseline_sample.k: must be at least the 2 baselines that ppo reads (baseline = shrunk), got 1",
            ),
            (
                {"ppo": {"limit": 5}, "baseline_sample": {"limit": 4}},
                "baseline_sample.limit: must be at least ppo.limit = 5, got 4",
            ),
            (
                {"ppo": {}, "baseline_sample": {"sampling": {"max_new_tokens": 70}}},
                "baseline_sample: prompts of up to 442 tokens get baselines (max_length less sampling.max_new_tokens), "
                "but ppo takes prompts of up to 448",
            ),
            (
                {"kl_price": 0.1, "evaluate": {"sampling": {"top_p": 0.9}}},
                "kl_price: the examination's answers must be drawn from the policy as it is, for only then is their "
                "mean log-ratio the KL; give evaluate.sampling without top_p",
            ),
            ({"gold": None, "kl_price": 0.1, "patience": 2}, "kl_price, patience: no effect where no criterion"),
            ({"gold": None, "keep": "earliest"}, "keep: no effect where no criterion"),
            ({"keep_by": "judge"}, "keep_by: judge needs `judge`"),
            ({"ppo": {"policy": "x"}}, "ppo: policy is filled in by the rounds"),
            ({"ppo": {"reward": "plain", "stepz": 3}}, "ppo.stepz: no such setting"),
            ({"ppo": {"reward": "plain", "k": 3}}, "ppo: k: no effect with reward = plain"),
            ({"rm": {"eta": 1.0}}, "rm and meta: eta stands in both"),
            ({"meta": {"eta": -1.0}}, "rm and meta.eta: must be at least 0"),
            ({"evaluate": {"strata": 2, "tie": 0.1}}, "evaluate: strata, tie: no effect in rounds"),
        ],
    )
    def test_before_anything_runs(
        self, own: dict[str, Any], said: str, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=re.escape(said)):
            run_rounds(RoundsConfig(**settings | own), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_judge_must_not_be_what_is_optimised(
        self, settings: dict[str, Any], planted: dict[str, str], planted_reward: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="is the reward model itself"):
            run_rounds(RoundsConfig(**settings | {"judge": settings["reward_model"]}), tmp_path)
        same = settings | {"judge": str(planted_reward / "model"), "data": planted["clean"]}
        with pytest.raises(InputError, match="as the rounds are; give one trained on other data"):
            run_rounds(RoundsConfig(**same), tmp_path)

    def test_a_judge_reads_the_tokens_that_the_policy_drew(self, settings: dict[str, Any], tmp_path: Path) -> None:
        """With another vocabulary its scores would be those of other texts, without a sign."""
        tokenizer = tiny.build_tokenizer(words=(*tiny.VOCABULARY[1:], tiny.VOCABULARY[0]))
        other = tiny.save_folder(tiny.build_model(tiny.build_config(), head=True), tokenizer, tmp_path / "other")
        with pytest.raises(InputError, match="other: the judge must share one tokenizer with"):
            run_rounds(RoundsConfig(**settings | {"judge": str(other)}), tmp_path / "out")

    def test_ppo_needs_room_before_any_reward_model_is_trained(self, settings: dict[str, Any], tmp_path: Path) -> None:
        ppo = settings["ppo"] | {"prompts_per_step": 10_000}
        with pytest.raises(InputError, match="prompts_per_step = 10000 needs more"):
            run_rounds(RoundsConfig(**settings | {"ppo": ppo}), tmp_path / "out")
        assert not (tmp_path / "out" / "round-01").exists()

    @pytest.mark.parametrize("name", ["data", "meta_prompts"])
    def test_files_of_later_stages_are_read_before_round_0(
        self, name: str, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"prompt": 3, "chosen": "w1", "rejected": "w2"}\n')
        for path, said in ((tmp_path / "none.jsonl", "none.jsonl: no such file"), (bad, r"bad.jsonl(.|\n)*prompt")):
            with pytest.raises(InputError, match=said):
                run_rounds(RoundsConfig(**settings | {name: str(path)}), tmp_path / f"out-{path.stem}")
            assert not list((tmp_path / f"out-{path.stem}").glob("round-*"))

    def test_one_prompt_cannot_be_halved(self, settings: dict[str, Any], tmp_path: Path) -> None:
        one = tiny.write_jsonl(tmp_path / "one.jsonl", [{"prompt": "w1 w2"}] * 3)
        with pytest.raises(InputError, match=r"2 different ones are needed; 1 of 1 leave room"):
            run_rounds(RoundsConfig(**settings | {"eval_prompts": one}), tmp_path / "out")
